"""Codes and scales: against a loop over blocks, and the laws of rounding and of scales."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.tensors import DTYPES
from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.numbers import E4M3, E5M2, SMALLEST_SCALE, Narrow, blocks
from composeformer_fp8.quantise import Block, dequantise, quantise, scale, values
from composeformer_fp8.strips import rounded
from composeformer_fp8.testing import SIZES, content, magnitude, tensors

RULES = ("float32", "ue8m0", "mx")
FORMS = st.sampled_from([E4M3, E5M2])
BLOCKS = st.sampled_from([(1, 128), (128, 1), (128, 128), (1, 32), (0, 0)])


def table(form: Narrow) -> np.ndarray:
    """Every finite number of a format, ascending, from the definition: sign, exponent, significand."""
    bits = form.mantissa
    bias = 7 if bits == 3 else 15
    found = []
    for code in range(128):
        exponent, fraction = code >> bits, code & (2**bits - 1)
        power = max(exponent, 1) - bias - bits
        found.append(math.ldexp(fraction + (2**bits if exponent else 0), power))
    positive = np.array([number for number in found if number <= form.largest])
    return np.concatenate([-positive[:0:-1], positive])


def nearest(ratio: np.ndarray, form: Narrow) -> np.ndarray:
    """The nearest number of the format to each ratio; of two, the one whose code is even."""
    numbers = table(form)
    middle = len(numbers) // 2
    above = np.clip(np.searchsorted(numbers, ratio), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    down, up = ratio - low, high - ratio
    even = np.abs(above - middle) % 2 == 0
    return np.where((up < down) | ((up == down) & even), high, low)


def scalar(x: Tensor, block: Block, form: Narrow, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes' values and scales, one block after the other, in Python's numbers."""
    data = x.numpy()
    rows, columns = data.shape
    r, c = block[0] or rows, block[1] or columns
    codes = np.zeros(data.shape)
    scales = np.zeros((blocks(rows, r), blocks(columns, c)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            own = data[i * r : (i + 1) * r, j * c : (j + 1) * c]
            finite = [abs(float(v)) for v in own.flat if math.isfinite(v)]
            amax = max(finite, default=0.0)
            if rule == "float32":
                s = float(np.float32(amax) / np.float32(form.largest))
            elif rule == "mx":
                s = math.ldexp(1.0, math.frexp(amax)[1] - math.frexp(form.largest)[1]) if amax else 0.0
            else:
                s = SMALLEST_SCALE
                while amax > form.halfway * s:
                    s *= 2
            s = max(s, SMALLEST_SCALE)
            with np.errstate(invalid="ignore"):
                ratio = (own / np.float32(s)).astype(np.float64)
            ratio[~np.isfinite(own)] = np.nan
            q = np.where(np.isnan(ratio), np.nan, nearest(np.clip(ratio, -form.largest, form.largest), form))
            scales[i, j] = 1.0 if not np.nan_to_num(q).any() else s
            codes[i * r : (i + 1) * r, j * c : (j + 1) * c] = q
    return codes, scales


def same(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, NaN where NaN; the sign of a zero means nothing to a product."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def spoiled(x: Tensor, seed: int) -> Tensor:
    """With an infinity and a NaN somewhere."""
    places = torch.randint(x.numel(), (2,), generator=torch.Generator().manual_seed(seed))
    x = x.clone()
    x.view(-1)[places[0]] = -math.inf
    x.view(-1)[places[1]] = math.nan
    return x


@settings(max_examples=60)
@given(tensors(), BLOCKS, FORMS, st.sampled_from(RULES), st.none() | st.integers(0, 99))
@example(torch.full((1, 1), 2.0**-137), (1, 128), E4M3, "float32", None)
@example(torch.full((3, 2), 3e38), (1, 128), E4M3, "ue8m0", None)
@example(torch.full((1, 4), 61440.0), (1, 128), E5M2, "ue8m0", None)
def test_codes_and_scales_equal_a_loop_over_blocks(
    x: Tensor, block: Block, form: Narrow, rule: str, spoil: int | None
) -> None:
    if spoil is not None:
        x = spoiled(x, spoil)
    codes, scales = quantise(x, block, form, rule)
    q, s = scalar(x, block, form, rule)
    assert codes.dtype == DTYPES[form.dtype]
    assert np.array_equal(scales.numpy(), s)
    assert same(values(codes, torch.float64), torch.from_numpy(q))


@settings(max_examples=60)
@given(tensors(), BLOCKS, FORMS, st.sampled_from(RULES), st.none() | st.integers(0, 99))
@example(torch.full((1, 4), 61440.0), (1, 128), E5M2, "ue8m0", None)  # a tie with an even number beyond the format
def test_rounding_without_codes_is_quantising_and_back(
    x: Tensor, block: Block, form: Narrow, rule: str, spoil: int | None
) -> None:
    if spoil is not None:
        x = spoiled(x, spoil)
    for source in (x, x.bfloat16()):
        expected = dequantise(*quantise(source, block, form, rule), block)
        assert same(rounded(source, block, form, rule), expected)


@settings(max_examples=60)
@given(tensors(), BLOCKS, FORMS, st.sampled_from(RULES))
def test_error_is_within_half_a_step(x: Tensor, block: Block, form: Narrow, rule: str) -> None:
    recipe = Recipe(tile=128, block=block, scales=rule)
    found = dequantise(*quantise(x, block, form, rule), block, torch.float64)
    # MX scales let the largest numbers saturate, by less than a step. Quotients are rounded to fp32 before.
    bound = form.roundoff * (2 if rule == "mx" else 1) * (1 + 2.0**-20)
    assert ((found - x.double()).abs() <= bound * magnitude(x, block, form, recipe)).all()


@settings(max_examples=60)
@given(tensors(), BLOCKS, FORMS, st.sampled_from(RULES))
@example(torch.full((1, 2), 225.0 / 448), (1, 128), E4M3, "ue8m0")
@example(torch.tensor([[1.0000001, 0.5]]), (1, 128), E4M3, "float32")
def test_quantising_what_codes_stand_for_gives_them_again(x: Tensor, block: Block, form: Narrow, rule: str) -> None:
    codes, scales = quantise(x, block, form, rule)
    again, rescaled = quantise(dequantise(codes, scales, block), block, form, rule)
    assert torch.equal(rescaled, scales)
    assert same(values(again), values(codes))


def test_powers_of_two_from_the_logarithm_would_not_repeat() -> None:
    """Why `ue8m0` is not 2^ceil(log2(amax / 448)): 225 of 448 rounds to 224, whose scale is half."""
    naive = [2.0 ** math.ceil(math.log2(amax / 448)) for amax in (225.0, 224.0)]
    assert naive[0] == 2 * naive[1]
    ours = scale(torch.tensor([225.0, 224.0]), E4M3, "ue8m0")
    assert ours[0] == ours[1]


@given(SIZES, SIZES, st.integers(0, 2**32 - 1), st.integers(-20, 20), BLOCKS, FORMS, st.sampled_from(RULES))
@settings(max_examples=40)
def test_scaling_by_a_power_of_two_scales_the_scales_alone(
    rows: int, columns: int, seed: int, power: int, block: Block, form: Narrow, rule: str
) -> None:
    x = content("even", (rows, columns), seed)
    codes, scales = quantise(x, block, form, rule)
    again, rescaled = quantise(x * 2.0**power, block, form, rule)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(rescaled, scales * 2.0**power)


@given(tensors(), BLOCKS, st.sampled_from(RULES), st.integers(0, 99))
@settings(max_examples=40)
def test_infinities_and_nan_become_nan_and_touch_nothing_else(x: Tensor, block: Block, rule: str, seed: int) -> None:
    broken = spoiled(x, seed)
    codes, scales = quantise(broken, block, E4M3, rule)
    expected, own = quantise(broken.nan_to_num(0.0, 0.0, 0.0), block, E4M3, rule)
    assert torch.equal(values(codes).isnan(), ~broken.isfinite())
    assert torch.equal(scales, own)
    assert torch.equal(values(codes).nan_to_num(0.0), values(expected))


@given(st.integers(1, 4), SIZES, SIZES, st.integers(0, 2**32 - 1), BLOCKS)
@settings(max_examples=30)
def test_experts_are_quantised_alone(groups: int, rows: int, columns: int, seed: int, block: Block) -> None:
    stack = torch.stack([content("wide", (rows, columns), seed + group) for group in range(groups)])
    codes, scales = quantise(stack, block, E4M3, "float32")
    for group in range(groups):
        own = quantise(stack[group], block, E4M3, "float32")
        assert torch.equal(codes[group].view(torch.uint8), own[0].view(torch.uint8))
        assert torch.equal(scales[group], own[1])


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_ties_go_to_even_codes_and_all_else_to_the_nearest(form: Narrow) -> None:
    numbers = torch.from_numpy(table(form)).float()
    low, high = numbers[:-1], numbers[1:]
    middle = (low + high) / 2
    below, above = torch.nextafter(middle, low), torch.nextafter(middle, high)
    # The largest number in the block fixes the scale at 1.
    row = torch.cat([torch.tensor([form.largest]), middle, below, above])[None]
    codes, scales = quantise(row, (1, 0), form, "float32")
    assert scales.item() == 1.0
    found = values(codes)[0, 1:].view(3, -1)
    assert torch.equal(found[1], low)
    assert torch.equal(found[2], high)
    up = found[0] == high
    assert torch.equal(found[0], torch.where(up, high, low))
    # Codes alternate between even and odd, so ties alternate between up and down, but around zero.
    half = len(up) // 2
    assert (up[:half][1:] != up[:half][:-1]).all()
    assert (up[half:][1:] != up[half:][:-1]).all()
    assert int(up.sum()) == half


@pytest.mark.parametrize("rule", RULES)
def test_rounds_up_as_often_as_down(rule: str) -> None:
    # Of n even draws the half goes up, give or take sqrt(n) / 2; a fair rounding is never five of those away. At the
    # ends of the drawn range gaps between codes are cut off, so only those are counted that lie in it whole.
    x = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) + 0.5
    codes, scales = quantise(x, (1, 128), E4M3, rule)
    ratio = x / scales.repeat_interleave(128, 1)
    inside = (ratio > 160) & (ratio < 352) & (ratio != values(codes))
    n = int(inside.sum())
    assert n > 2**16
    assert abs(int((values(codes) > ratio)[inside].sum()) - n / 2) <= 5 * math.sqrt(n) / 2


def test_bias_of_rounding_vanishes() -> None:
    # An error is even within half a step d: its mean over n draws is 0, give or take d / sqrt(12 n).
    x = torch.rand(1024, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float() * 2 - 1
    found = dequantise(*quantise(x, (1, 128), E4M3, "float32"), (1, 128), torch.float64)
    step = 32 / 448
    assert abs(float((found - x).mean())) <= 5 * step / math.sqrt(12 * x.numel())


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_blocks_beat_one_scale_on_outliers_by_the_factor_of_theory(cells: int) -> None:
    """One outlier of size A among numbers even in [-1, 1].

    Under one scale A / 448 they are below the normals (A >= 2^15), all rounded to steps d = 2^-9 A / 448: an error of
    d / sqrt(12) where whole cells cover [-1, 1], that is d = 2 / (2 m + 1). In blocks without the outlier, s = 1 / 448,
    and the fraction p = 3 / 7, 2 / 7, 1 / 7, ... of numbers has steps of 1 / 14, 1 / 28, ...: the mean square step is
    (3 / 7 + 2 / 7 (1 / 4 + 1 / 32 + ...)) / 196 = (3 / 7 + 4 / 49) / 196, down to the subnormals.
    """
    step = 2 / (2 * cells + 1)
    outlier = step * 448 * 2**9
    x = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(2)) * 2 - 1
    x[0, 0] = outlier
    plain = slice(1, None)

    def error(block: Block) -> float:
        found = dequantise(*quantise(x, block, E4M3, "float32"), block, torch.float64)
        return float((found - x)[plain].square().mean().sqrt())

    factor = step / math.sqrt((3 / 7 + 4 / 49) / 196)
    # A mean square of n errors has a relative deviation below 1 / sqrt(n); and a tile's largest of 128 is not quite 1,
    # in the mean 1 / 129 less, which makes its steps that much smaller.
    assert error((0, 0)) / error((1, 128)) == pytest.approx(factor, rel=1 / 129 + 5 / 1024)


def test_one_scale_loses_what_an_outlier_dwarfs_and_blocks_keep_it() -> None:
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(3)) + 1
    x[0, 0] = 2 * 448 * 2.0**11  # half of the smallest step is 2, above all others
    whole = values(quantise(x, (0, 0), E4M3, "float32")[0])
    assert int((whole != 0).sum()) == 1
    tiles = dequantise(*quantise(x, (1, 128), E4M3, "float32"), (1, 128))
    relative = ((tiles - x).abs() / x)[1:]
    assert relative.max() <= E4M3.roundoff


@pytest.mark.parametrize("rule", RULES)
def test_scale_of_zeros_is_one_and_codes_are_zero(rule: str) -> None:
    codes, scales = quantise(torch.zeros(3, 300), (1, 128), E4M3, rule)
    assert torch.equal(scales, torch.ones(3, 3))
    assert torch.equal(values(codes), torch.zeros(3, 300))


@given(st.floats(2.0**-140, 2.0**126, width=32))
@example(464.0)
@example(float(np.nextafter(np.float32(464.0), np.float32(465.0))))
def test_power_of_two_scale_is_the_smallest_that_holds(amax: float) -> None:
    s = float(scale(torch.tensor([amax]), E4M3, "ue8m0"))
    if amax <= 2.0**-136:
        assert s == 1.0
        return
    assert math.frexp(s)[0] == 0.5
    assert amax <= 464 * s
    assert s == SMALLEST_SCALE or amax > 464 * s / 2
