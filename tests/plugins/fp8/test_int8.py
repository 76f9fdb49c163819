"""`int8`: the codec's rounding, products of integers and their bound, and that it refuses to train."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import composeformer as cf
from composeformer.contracts import Linear
from composeformer.errors import InputError
from composeformer_fp8.configs.int8 import Int8, Rows
from composeformer_fp8.int8 import FEW, Int8Policy, RowsCodec, packed
from composeformer_fp8.testing import SIZES, content, tensors

CODEC = RowsCodec(Rows())


@settings(max_examples=50)
@given(tensors())
@example(torch.full((1, 3), 2.0**-130))
def test_codes_are_the_nearest_integers_and_repeat(value: Tensor) -> None:
    codes, scales = CODEC.encode(value)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert CODEC.wrong(0, codes) is None
    assert CODEC.wrong(1, scales) is None
    # The largest is 127 but for the scale's own rounding, a quarter at most; quotients are rounded to fp32 before.
    error = (CODEC.decode((codes, scales), torch.float64) - value.double()).abs()
    assert (error <= 0.5 * scales.double() * (1 + 2.0**-15)).all()
    again = CODEC.encode(CODEC.decode((codes, scales)))
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_numbers_that_integers_can_not_hold_are_one_error() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(InputError, match="NaN or infinity"):
            CODEC.encode(torch.tensor([[1.0, bad]]))
    assert CODEC.wrong(0, torch.tensor([[-128]], dtype=torch.int8)) is not None
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        assert CODEC.wrong(1, torch.tensor([[bad]], dtype=torch.bfloat16)) is not None


def made(inputs: int, outputs: int, groups: int | None = None, bias: bool = False) -> tuple[nn.Module, Tensor]:
    """A map of integers, and the weight it was made from."""
    declared = Linear(name="map", inputs=inputs, outputs=outputs, groups=groups, bias=bias)
    value = content("even", declared.weight.shape, 0)
    shift = nn.Parameter(content("even", (1, *declared.weights[1].shape), 1)[0]) if bias else None
    codes, scales = (nn.Buffer(part) for part in CODEC.encode(value))
    return Int8Policy(Int8()).linear("layers.0.map", declared, codes, shift, scales=(scales,)), value


@settings(max_examples=50)
@given(st.integers(0, 20), SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
@example(1, 48, 7, False, 0)
@example(FEW, 576, 129, False, 0)
@example(FEW, 95, 64, False, 0)
def test_product_is_within_its_bound_by_integers_or_without(
    rows: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    linear, value = made(inputs, outputs, bias=bias)
    x = content("even", (rows, inputs), seed).bfloat16()
    with torch.inference_mode():
        y = linear(x)
    assert y.dtype == linear.dtype == torch.bfloat16
    shift = linear.bias.double() if bias else torch.zeros(outputs, dtype=torch.float64)
    exact = x.double() @ value.double().mT + shift
    mass = x.double().abs().sum(1)[:, None] * value.double().abs().amax(1)
    bound = Int8().error_bound(inputs) * mass
    assert ((y.double() - exact).abs() <= bound + 2.0**-8 * (exact.abs() + bound)).all()
    used = x.double() @ linear.matrix().double().mT + shift
    # Against the matrix itself all that is left is fp32 sums and one rounding.
    assert ((y.double() - used).abs() <= 2.0**-8 * used.abs() + (inputs + 4) * 2.0**-23 * (mass + shift.abs())).all()


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("groups", [None, 2])
def test_activations_are_bfloat16_whatever_comes(rows: int, groups: int | None) -> None:
    linear, _ = made(96, 33, groups=groups)
    offsets = () if groups is None else (torch.tensor([rows // 2, rows]),)
    x = content("even", (rows, 96), 3)
    assert torch.equal(linear(x, *offsets), linear(x.bfloat16(), *offsets))
    assert not torch.equal(linear(x, *offsets), linear(x.bfloat16() * 1.01, *offsets))


def test_integers_are_read_directly_for_few_rows_of_whole_vectors_alone() -> None:
    weight = torch.zeros(8, 96, dtype=torch.int8)
    assert packed(torch.zeros(FEW, 96), weight)
    assert not packed(torch.zeros(FEW + 1, 96), weight)
    assert not packed(torch.zeros(0, 96), weight)
    assert not packed(torch.zeros(1, 95), weight[:, :95])


@pytest.mark.parametrize("offset", [1, 3, 8, 24])
@pytest.mark.parametrize(("outputs", "inputs", "rows"), [(5, 48, 3), (128, 256, 8)])
def test_memory_may_begin_anywhere(offset: int, outputs: int, inputs: int, rows: int) -> None:
    """As that of a mapped file, or of a row among others: PyTorch's product of integers reads beyond what it may."""
    generator = torch.Generator().manual_seed(offset)
    x = torch.randn(offset + rows * inputs, generator=generator).bfloat16()[offset:].view(rows, inputs)
    codes = torch.randint(-127, 128, (offset + outputs * inputs,), generator=generator, dtype=torch.int8)
    weight = nn.Buffer(codes[offset:].view(outputs, inputs))
    scales = nn.Buffer((torch.rand(offset + outputs, generator=generator) + 0.5).bfloat16()[offset:, None])
    declared = Linear(name="map", inputs=inputs, outputs=outputs)
    linear = Int8Policy(Int8()).linear("map", declared, weight, None, scales=(scales,))
    before = linear.matrix()
    with torch.inference_mode():
        y = linear(x)
    assert torch.equal(y, linear(x.clone()))
    assert torch.equal(linear.matrix(), before)
    linear.load_state_dict({name: each.clone() for name, each in linear.state_dict().items()})  # as it may be after
    exact = x.double() @ before.double().mT
    size = x.double().abs() @ before.double().abs().mT
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + inputs * 2.0**-24 * size).all()


def test_training_is_refused_in_one_line_and_inference_serves() -> None:
    model = cf.build(cf.Spec.load("tiny-deepseek-v3").with_(precision={"kind": "int8"}), seed=0)
    logits = model(torch.arange(6)[None]).logits
    assert logits.isfinite().all()
    with pytest.raises(InputError, match="int8 is for inference") as told:
        logits.sum().backward()
    assert len(told.value.lines) == 1
    full = cf.build("tiny-deepseek-v3", seed=0)(torch.arange(6)[None]).logits
    # Each of some twenty maps errs by at most 1 / 254 of its row's largest weight; together far below that sum.
    assert (logits - full).norm() <= 20 / 254 * full.norm()


def test_formats_are_integers_beside_bfloat16() -> None:
    formats = cf.Spec.load("tiny-deepseek-v3").with_(precision={"kind": "int8"}).formats
    stored = {name: weight.dtype for name, weight in formats.stored.items()}
    assert stored["layers.1.ffn.up.weight"] == "int8"
    assert stored["layers.1.ffn.up.weight_scale"] == "bfloat16"
    assert stored["embedding.weight"] == "bfloat16"
    assert stored["layers.1.ffn.router.bias"] == "float32"
