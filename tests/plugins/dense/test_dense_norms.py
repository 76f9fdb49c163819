"""rmsnorm and layernorm against transformers and torch; what they are is in the laws of norms."""

import pytest
import torch
from torch.nn import functional as F

from composeformer.errors import SpecError

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


def test_layernorm_equals_torch(lab, close):
    module, x = norm(lab, "layernorm"), lab.stream(2, 3)
    close(module(x), F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5))


@both
def test_an_eps_of_zero_is_refused(lab, kind):
    with pytest.raises(SpecError, match=r"norm\.eps = 0\.0: must be > 0"):
        lab.spec(norm={"kind": kind, "eps": 0.0})
