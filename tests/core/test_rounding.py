"""Declared errors: what dtypes are, and that the bounds hold for casts, codes and whole numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composeformer.formats import BITS, Format, plain
from composeformer.rounding import FLOATS, cast, integers, of_format, scaled
from composeformer.tensors import DTYPES
from composeformer.testing.maps import operand_error


@pytest.mark.parametrize("dtype", FLOATS)
def test_facts_of_dtypes_are_those_of_torch(dtype: str) -> None:
    unit, normal, largest = FLOATS[dtype]
    found = torch.finfo(DTYPES[dtype])
    assert (unit, normal, largest) == (found.eps / 2, found.smallest_normal, found.max)
    assert dtype in BITS


@given(st.sampled_from(["float32", "bfloat16", "float16"]), st.floats(-6e4, 6e4))
def test_a_cast_moves_a_number_by_no_more_than_is_declared(dtype: str, value: float) -> None:
    exact = torch.tensor([[value]], dtype=torch.float64)
    error = (exact.to(DTYPES[dtype]).double() - exact).abs()
    declared = cast(dtype)
    assert (
        error
        <= torch.maximum(declared.relative * exact.abs(), torch.tensor(declared.least, dtype=torch.float64))
    ).all()


@given(st.integers(2, 8), st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9))
def test_whole_numbers_move_a_number_by_half_a_step(bits: int, values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    largest = 2 ** (bits - 1) - 1
    scale = (x.abs().amax() / largest).clamp(min=2.0**-126)
    found = (x / scale).round() * scale
    assert ((found.double() - x.double()).abs() <= operand_error(x.double(), integers(bits, (1, 0)))).all()


def test_blocks_are_taken_of_rows_and_columns_and_ends_may_be_smaller() -> None:
    x = torch.ones(3, 5, dtype=torch.float64)
    x[2, 4], x[0, 0] = 8, torch.nan
    declared = integers(8, (2, 3))
    error = operand_error(x, declared)
    assert torch.equal(error[2, 3:], torch.full((2,), 8 * declared.shared, dtype=torch.float64))
    wanted = torch.full((2, 3), declared.shared, dtype=torch.float64)
    wanted[0, 0] = 0  # what is not finite counts for nothing
    assert torch.equal(error[:2, :3], wanted)
    assert torch.equal(operand_error(x.mT, declared.turned), error.mT)


def test_a_format_says_its_error_itself() -> None:
    assert of_format(plain("bfloat16", "")).weight == cast("bfloat16")
    assert of_format(plain("float64", "")).sums(1000) < 2.0**-40
    narrow = Format(
        storage="float32", compute="float32", bits=4, gather="float32", gradient="float32", moment="float32"
    )
    found = of_format(narrow)
    assert found.weight.shared == pytest.approx(1 / 14, rel=1e-5)
    assert found.activation == cast("float32")
    # Scales that are no larger than need be are at most half of what is allowed for.
    assert scaled("float8_e4m3fn", (1, 128)).shared >= 2.0**-4 * 2.0**-6 / 448
