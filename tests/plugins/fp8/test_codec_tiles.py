"""`f8-1x128`: rows round alone, within the format's bound, and a second time not at all."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.contracts import Weight
from composeformer_fp8.codec_tiles import TilesCodec
from composeformer_fp8.configs.codec_tiles import TILE, Tiles

quick = settings(max_examples=60, deadline=None, derandomize=True)
CODEC = TilesCodec(Tiles())


@st.composite
def rows(draw):
    """Rows of normal numbers times powers of two of any size, some features zero, whole tiles too."""
    count, features = draw(st.integers(0, 4)), draw(st.sampled_from([1, 5, 127, 128, 129, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    value = torch.randn(count, features, generator=generator)
    spread = draw(st.integers(0, 60))
    exponent = torch.randint(-spread, spread + 1, (count, features), generator=generator)
    zero = torch.rand(count, features, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))
    return torch.ldexp(value, exponent).masked_fill(zero, 0)


@quick
@given(value=rows())
def test_rounding_is_within_half_a_step_of_each_code(value):
    """E4M3 has three bits behind the first: 2^-4 of a normal number, 2^-10 of the scale below.

    The division by the scale and the product with it add 2^-24 each, of the value or, for codes at 448, of it.
    """
    codes, scales = CODEC.encode(value)
    assert (codes.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scales.shape == (len(value), ceil(value.shape[1] / TILE))
    each = scales.repeat_interleave(TILE, 1)[:, : value.shape[1]].double()
    error = (CODEC.decode((codes, scales), torch.float64) - value.double()).abs()
    bound = torch.maximum(value.double().abs() * 2**-4, each * 2**-10) * (1 + 2**-18)
    assert (error <= bound).all()


@quick
@given(value=rows(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_each_row_rounds_alone_and_what_is_rounded_stays(value, dtype):
    value = value.to(dtype)
    codes, scales = CODEC.encode(value)
    for index in range(len(value)):
        one = CODEC.encode(value[index : index + 1])
        assert torch.equal(one[0].view(torch.uint8), codes[index : index + 1].view(torch.uint8))
        assert torch.equal(one[1], scales[index : index + 1])
        again = CODEC.decode((codes, scales), dtype, slice(index, index + 1))
        assert torch.equal(again, CODEC.decode((codes, scales), dtype)[index : index + 1])
    if dtype != torch.bfloat16:  # where a code times its scale is rounded once more
        twice = CODEC.encode(CODEC.decode((codes, scales), dtype))
        assert torch.equal(twice[0].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(twice[1], scales)


def test_zeros_nan_and_infinities_touch_no_neighbour():
    value = torch.ones(3, 2 * TILE)
    value[0, 3], value[1, 3] = torch.nan, -torch.inf
    value[2] = 0
    found = CODEC.decode(CODEC.encode(value))
    assert found[:2, 3].isnan().all()
    assert not found[2].any()
    kept = torch.ones(2 * TILE, dtype=torch.bool)
    kept[3] = False
    assert (found[:2, kept] == 1).all()


def test_stored_tensors_are_those_that_encode_gives():
    weight = Weight(name="a.weight", shape=(5, 300))
    codes, scales = Tiles().stored(weight)
    assert [codes.name, scales.name] == ["a.weight", "a.weight_scale_inv"]
    assert not codes.trains
    assert not scales.trains
    found = CODEC.encode(torch.randn(5, 300))
    for declared, tensor in zip((codes, scales), found, strict=True):
        assert declared.shape == tuple(tensor.shape)
        assert declared.dtype == str(tensor.dtype).removeprefix("torch.")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_no_encoder_writes_are_told(scale):
    codes, scales = CODEC.encode(torch.ones(2, 300))
    assert CODEC.wrong(0, codes) is CODEC.wrong(1, scales) is None
    scales[1, 2] = scale
    assert CODEC.wrong(1, scales) == f"a scale of {scale} at (1, 2), which must be finite and positive"


@quick
@given(value=rows(), dim=st.sampled_from([-2, -1]), data=st.data())
def test_a_cut_of_codes_and_scales_holds_that_part_of_the_rows(value, dim, data):
    start = data.draw(st.integers(0, value.shape[dim]))
    stop = data.draw(st.integers(start, value.shape[dim]))
    parts = CODEC.encode(value)
    edges = Tiles().cut(dim, start, stop)
    pieces = tuple(part.narrow(dim, a, b - a) for part, (a, b) in zip(parts, edges, strict=True))
    assert pieces[0].shape[dim] < stop - start + TILE
    found = CODEC.decode(pieces).narrow(dim, start - edges[0][0], stop - start)
    assert torch.equal(found, CODEC.decode(parts).narrow(dim, start, stop - start))


def test_some_rows_are_those_of_every_matrix_of_a_stack():
    value = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))
    parts = CODEC.encode(value)
    assert torch.equal(CODEC.decode(parts, rows=slice(1, 4)), CODEC.decode(parts)[:, 1:4])
