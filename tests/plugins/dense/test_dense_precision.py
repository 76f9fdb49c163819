"""full and bf16: formats on paper, what is built from them, and the linear maps they make."""

import pytest
import torch
from torch import nn

from composeformer.contracts import Linear, Weight
from composeformer.errors import SpecError
from composeformer.policy import PolicyLinear
from composeformer.tensors import DTYPES
from composeformer_dense.configs.precision import BF16, Full
from composeformer_dense.precision import CastLinear

POLICIES = [{"kind": "full", "dtype": d} for d in ("float32", "bfloat16", "float16", "float64")]
POLICIES += [{"kind": "bf16"}, {"kind": "bf16", "weights": "bfloat16"}]
policies = pytest.mark.parametrize("precision", POLICIES, ids=lambda p: "-".join(p.values()))


@policies
def test_every_tensor_is_stored_as_its_format_says(lab, precision):
    model = lab.model(precision=precision)
    config, plan = model.spec.single("precision").config, model.spec.plan
    wanted = {}
    for node in plan.nodes():
        for name, linear in node.linears.items():
            for weight in linear.weights:
                role = f"{node.path}.{name}"
                wanted[f"{node.path}.{weight.name}"] = config.format(role, weight, linear.sensitive).storage
        for weight in node.weights.values():
            name = f"{node.path}.{weight.name}"
            wanted[name] = config.format(name, weight, True).storage
    built = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert built == {name: DTYPES[dtype] for name, dtype in wanted.items()}


@policies
def test_every_linear_map_multiplies_in_its_compute_format(lab, precision):
    model = lab.model(precision=precision)
    config = model.spec.single("precision").config
    for role, declared in model.spec.plan.linears.items():
        linear = model.get_submodule(role)
        assert isinstance(linear, PolicyLinear)
        dtype = DTYPES[config.format(role, declared.weight, declared.sensitive).compute]
        x = torch.randn(3, declared.inputs)
        assert linear.dtype == linear(x).dtype == linear.matrix().dtype == dtype
        assert torch.equal(linear(x), x.to(dtype) @ linear.matrix().T)


def test_bf16_keeps_masters_sensitive_maps_and_plain_weights_in_fp32():
    config, weight = BF16(), Weight(name="weight", shape=(2, 2))
    plain = config.format("layers.0.mixer.q", weight, False)
    assert (plain.storage, plain.compute, plain.gather, plain.bits) == ("float32", "bfloat16", "float32", 16)
    assert (plain.gradient, plain.moment) == ("float32", "float32")
    assert config.format("head.projection", weight, True).compute == "float32"
    narrow = BF16(weights="bfloat16").format("layers.0.mixer.q", weight, False)
    assert (narrow.storage, narrow.gradient, narrow.moment) == ("bfloat16", "bfloat16", "float32")


@pytest.mark.parametrize("config", [Full(dtype="bfloat16"), BF16(), BF16(weights="bfloat16")])
def test_a_dtype_fixed_by_a_part_wins(config):
    table = Weight(name="table", shape=(4,), dtype="int64", trains=False)
    assert config.format("layers.0.ffn.table", table, False).storage == "int64"


@policies
def test_cache_and_stream_have_the_declared_dtype(lab, precision):
    model = lab.model(precision=precision)
    wanted = DTYPES[model.spec.single("precision").config.activations]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        cache = model.new_cache(1, 4)
        hidden = model(ids, cache=cache).hidden
    assert hidden.dtype == model.activations == wanted
    assert {t.dtype for t in cache.get("layers.0.mixer").tensors.values()} == {wanted}


def test_a_linear_map_says_its_shape():
    assert repr(CastLinear(nn.Parameter(torch.ones(5, 4, 3)), None, torch.float32)) == (
        "CastLinear(groups=5, 3 -> 4, bias=False)"
    )


def test_bf16_is_near_full_precision(lab):
    """The declared bound: products of bfloat16 inputs over two sublayers and a norm, eight bits each."""
    narrow, wide = (
        lab.model(precision={"kind": "bf16"}),
        lab.model(precision={"kind": "full", "dtype": "float32"}),
    )
    wide.load_state_dict(narrow.state_dict())
    ids = torch.arange(24)[None]
    with torch.no_grad():
        found, wanted = narrow(ids).logits, wide(ids).logits
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 2**-5 * wanted.abs().max()


@pytest.mark.parametrize("table", [{"kind": "full", "dtype": "int8"}, {"kind": "bf16", "weights": "float16"}])
def test_other_dtypes_are_refused(lab, table):
    with pytest.raises(SpecError, match="must be one of float32, bfloat16"):
        lab.spec(precision=table)


def test_a_declared_map_needs_no_torch_to_name_its_tensors():
    names = [w.name for w in Linear(name="q", inputs=3, outputs=4, bias=True).weights]
    assert names == ["q.weight", "q.bias"]


@pytest.mark.parametrize("inputs", [15, 31, 62, 136])
def test_a_nan_stays_in_its_row_where_features_are_no_whole_vectors(inputs):
    generator = torch.Generator().manual_seed(0)
    linear = CastLinear(nn.Parameter(torch.randn(33, inputs, generator=generator)), None, torch.bfloat16)
    x = torch.randn(130, inputs, generator=generator).bfloat16()
    wanted = linear(x)
    x[1] = torch.nan
    found = linear(x)
    assert found[1].isnan().all()
    rest = torch.arange(130) != 1
    # The same products, perhaps in another order, each rounded to bfloat16 once.
    size = x[rest].float().abs() @ linear.matrix().float().abs().mT
    assert ((found - wanted)[rest].float().abs() <= 2**-7 * size).all()
