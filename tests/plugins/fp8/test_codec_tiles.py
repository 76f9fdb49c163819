"""`f8-1x128`: rows round alone, within the format's bound, and a second time not at all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer_fp8.codec_tiles import TilesCodec
from composeformer_fp8.configs.codec_tiles import Tiles

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


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_no_encoder_writes_are_told(scale):
    codes, scales = CODEC.encode(torch.ones(2, 300))
    assert CODEC.wrong(0, codes) is CODEC.wrong(1, scales) is None
    scales[1, 2] = scale
    assert CODEC.wrong(1, scales) == f"a scale of {scale} at (1, 2), which must be finite and positive"


def test_some_rows_are_those_of_every_matrix_of_a_stack():
    value = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))
    parts = CODEC.encode(value)
    assert torch.equal(CODEC.decode(parts, rows=slice(1, 4)), CODEC.decode(parts)[:, 1:4])
