"""rmsnorm and layernorm against transformers and torch, in every dtype, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from composeformer.errors import SpecError

quick = settings(max_examples=15, deadline=None, derandomize=True)
both = pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])


def norm(lab, kind, dtype="float64", **fields):
    return lab.model(norm={"kind": kind, **fields}, precision={"kind": "full", "dtype": dtype}).residual.norm


def test_rmsnorm_equals_transformers_with_gradients(lab, close):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = norm(lab, "rmsnorm", "float32", eps=1e-3)
    theirs = LlamaRMSNorm(lab.hidden, eps=1e-3)
    theirs.load_state_dict(module.state_dict())
    x = lab.stream(2, 5, dtype=torch.float32)
    close(lab.gradients(module, module, x), lab.gradients(theirs, theirs, x), 1e-6)


def test_rmsnorm_equals_transformers_to_the_bit_in_bfloat16(lab):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = norm(lab, "rmsnorm", "bfloat16")
    theirs = LlamaRMSNorm(lab.hidden, eps=1e-6).bfloat16()
    theirs.load_state_dict(module.state_dict())
    x = lab.stream(2, 50, dtype=torch.bfloat16)
    assert torch.equal(module(x), theirs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_is_the_formula_with_gradients(lab, close, bias):
    module = norm(lab, "layernorm", eps=1e-3, bias=bias)
    assert (module.bias is not None) == bias

    def formula(x):
        y = (
            (x - x.mean(-1, keepdim=True))
            / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
            * module.weight
        )
        return y if module.bias is None else y + module.bias

    x = lab.stream(2, 5)
    close(lab.gradients(module, module, x), lab.gradients(module, formula, x))


@both
@quick
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_scaling_the_input_changes_nothing(lab, close, kind, scale, seed):
    module, x = norm(lab, kind, eps=1e-12), lab.stream(1, 3, seed)
    close(module(x * scale), module(x), 1e-5)


@both
def test_the_spec_s_eps_is_used(lab, kind):
    """At inputs so small that eps decides."""
    x = lab.stream(1, 3) * 1e-3
    small, large = norm(lab, kind, eps=1e-12), norm(lab, kind, eps=1e-2)
    assert (large(x) - (large.bias if kind == "layernorm" else 0)).abs().max() < 0.1
    assert small(x).abs().max() > 0.5


@both
def test_zero_has_a_finite_output_and_gradient(lab, kind):
    module = norm(lab, kind)
    found = lab.gradients(module, module, torch.zeros(1, 2, lab.hidden, dtype=torch.float64))
    assert all(torch.isfinite(each).all() for each in found.values())


@both
def test_narrow_inputs_are_averaged_in_fp32(lab, kind):
    """Squares of fp16's large values overflow fp16."""
    module = norm(lab, kind, "float16")
    x = lab.stream(1, 4, dtype=torch.float16) * 4000
    wanted = norm(lab, kind, "float32")
    wanted.load_state_dict(module.state_dict())
    assert module(x).dtype == torch.float16
    assert (module(x) - wanted(x.float())).abs().max() <= 2**-9 * wanted(x.float()).abs().max()


@both
def test_the_stream_keeps_its_dtype_beside_fp32_weights(lab, kind):
    model = lab.model(norm={"kind": kind}, precision={"kind": "bf16"})
    module = model.residual.norm
    assert module.weight.dtype == torch.float32
    assert module(lab.stream(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layernorm_equals_torch(lab, close):
    module, x = norm(lab, "layernorm"), lab.stream(2, 3)
    close(module(x), F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5))


@both
def test_an_eps_of_zero_is_refused(lab, kind):
    with pytest.raises(SpecError, match=r"norm\.eps = 0\.0: must be > 0"):
        lab.spec(norm={"kind": kind, "eps": 0.0})
