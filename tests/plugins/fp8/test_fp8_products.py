"""The three products: the emulation against its definition, error bounds, `fast` against the emulation, groups."""

import threading
from fractions import Fraction
from math import frexp

import attrs
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.testing.ranks import on_ranks
from composeformer_fp8.configs.mx import MXFP8
from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.configs.scaled import FP8Block, FP8Tensor
from composeformer_fp8.emulate import Emulated, Operand, product, truncated
from composeformer_fp8.fast import Fast, multiplied
from composeformer_fp8.numbers import E4M3, E5M2, Narrow
from composeformer_fp8.quantise import Block, quantise, values
from composeformer_fp8.testing import CONTENTS, content, magnitude

RECIPES = {
    "block": FP8Block().recipe,
    "block-ue8m0": FP8Block(scales="ue8m0").recipe,
    "block-e5m2": FP8Block(gradients="e5m2").recipe,
    "tensor": FP8Tensor().recipe,
    "tensor-ue8m0": FP8Tensor(scales="ue8m0", gradients="e5m2").recipe,
    "mx": MXFP8().recipe,
}
# Rows, outputs, inputs.
SHAPES = st.sampled_from([(1, 1, 1), (5, 576, 129), (130, 64, 576), (300, 31, 33), (129, 128, 384), (0, 3, 5)])
SORTS = st.sampled_from(CONTENTS)
SEEDS = st.integers(0, 2**31)


def drawn(shape: tuple[int, int, int], sort: str, seed: int, groups: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and an output gradient."""
    rows, outputs, inputs = shape
    weight = content(sort, (max(groups, 1) * outputs, inputs), seed + 1)
    x, gradient = content(sort, (rows, inputs), seed), content(sort, (rows, outputs), seed + 2)
    return x, weight.view(groups, outputs, inputs) if groups else weight, gradient


def literal(a: Operand, b: Operand, chunk: int) -> np.ndarray:
    """The definition in exact fractions: each chunk's sum rounded once, scaled twice, added up in fp32."""
    a_RK, b_SK = values(a.codes, torch.float64).tolist(), values(b.codes, torch.float64).tolist()
    found = np.zeros((len(a_RK), len(b_SK)), np.float32)
    for i, left in enumerate(a_RK):
        for j, right in enumerate(b_SK):
            total = np.float32(0)
            for number, start in enumerate(range(0, len(left), chunk)):
                pairs = zip(left[start : start + chunk], right[start : start + chunk])
                exact = sum((Fraction(p) * Fraction(q) for p, q in pairs), Fraction(0))
                assert Fraction(float(exact)) == exact  # 43 bits suffice
                s = a.scales[i // a.block[0] if a.block[0] else 0, number if a.block[1] else 0]
                t = b.scales[j // b.block[0] if b.block[0] else 0, number if b.block[1] else 0]
                total += np.float32(float(exact)) * np.float32(s) * np.float32(t)
            found[i, j] = total
    return found


@settings(max_examples=15)
@given(st.sampled_from(["block", "block-ue8m0", "tensor", "mx"]), SORTS, SEEDS, st.sampled_from([1, 128, 129, 300]))
def test_emulation_equals_its_definition_in_exact_fractions(name: str, sort: str, seed: int, length: int) -> None:
    recipe = RECIPES[name]
    tile = (1, recipe.tile) if recipe.tile else (0, 0)
    a = Operand(*quantise(content(sort, (3, length), seed), tile, E4M3, recipe.scales), tile)
    b = Operand(*quantise(content(sort, (130, length), seed + 1), recipe.block, E4M3, recipe.scales), recipe.block)
    picked = b._replace(codes=b.codes[126:], scales=_rows(b)[126:], block=(1, b.block[1]))
    assert np.array_equal(product(a, b, recipe)[:, 126:].numpy(), literal(a, picked, recipe.chunk))


def _rows(operand: Operand) -> Tensor:
    return operand.scales.repeat_interleave(operand.block[0] or len(operand.codes), 0)


def within(
    found: Tensor, a: Tensor, b: Tensor, blocks: tuple[Block, Block], form: Narrow, recipe: Recipe, gradient: bool
) -> None:
    """That a b^T has been found within the declared bound."""
    mass = magnitude(a, blocks[0], form, recipe) @ magnitude(b, blocks[1], recipe.weights, recipe).mT
    bound = recipe.error_bound(a.shape[1], gradient) * mass
    assert ((found.double() - a.double() @ b.double().mT).abs() <= bound).all()


@settings(max_examples=60)
@given(st.sampled_from(sorted(RECIPES)), st.sampled_from([Emulated, Fast]), SHAPES, SORTS, SEEDS)
def test_products_are_within_the_declared_bound(
    name: str, kind: type[Emulated], shape: tuple[int, int, int], sort: str, seed: int
) -> None:
    recipe = RECIPES[name]
    x, weight, gradient = drawn(shape, sort, seed)
    products = kind(recipe)
    held = products.held(weight)
    row, column = ((1, recipe.tile), (1, recipe.tile)) if recipe.tile else ((0, 0), (0, 0))
    back = recipe.block if recipe.anew else recipe.block[::-1]
    y, to_x = products.output(x, held, None), products.to_input(gradient, held, None)
    to_weight = products.to_weight(gradient, x, None)
    if kind is Fast:  # its sums have a bound of their own, far below
        recipe = _loose(recipe)
    within(y, x, weight, (row, recipe.block), recipe.activations, recipe, False)
    within(to_x, gradient, weight.mT, (row, back), recipe.gradients, recipe, True)
    within(to_weight, gradient.mT, x.mT, (column, column), recipe.gradients, recipe, True)


def _loose(recipe: Recipe) -> Recipe:
    class Loose(Recipe):
        def accumulation_error(self, inputs: int) -> float:
            return self.fast_error(inputs)

        def fast_error(self, inputs: int) -> float:
            return recipe.fast_error(inputs)

    return Loose(**{a: getattr(recipe, a) for a in ("tile", "block", "scales", "gradients", "chunk")})


def apart(products: Fast, a: Tensor, b: Tensor, length: int) -> Tensor:
    """How far the two may be: by their sums, and where bfloat16 units flush what is below 2^-126."""
    units = a.double().abs() @ b.double().abs().mT
    flushed = length * 2.0**-126 * (1 + a.abs().amax() + b.abs().amax()) if a.numel() and b.numel() else 0.0
    return products.recipe.fast_error(length) * units + flushed


@settings(max_examples=60)
@given(st.sampled_from(sorted(RECIPES)), SHAPES, SORTS, SEEDS)
@example("block-ue8m0", (129, 128, 384), "wide", 0)
def test_fast_is_the_emulation_but_for_fp32_sums(
    name: str, shape: tuple[int, int, int], sort: str, seed: int
) -> None:
    recipe = RECIPES[name]
    x, weight, gradient = drawn(shape, sort, seed)
    slow, fast = Emulated(recipe), Fast(recipe)
    held, own = slow.held(weight), fast.held(weight)
    row, column = ((1, recipe.tile), (recipe.tile, 1)) if recipe.tile else ((0, 0), (0, 0))
    matrix, back = fast.matrix(own), slow.matrix(held)
    assert torch.equal(matrix, back)
    if recipe.anew:
        back = fast._weight(weight, recipe.block[::-1])
    x_q = fast._rounded(x, row, recipe.activations)
    g_q = fast._rounded(gradient, row, recipe.gradients)
    x_t = fast._rounded(x, column, recipe.activations)
    g_t = fast._rounded(gradient, column, recipe.gradients)
    pairs = [
        (fast.output(x, own, None), slow.output(x, held, None), x_q, matrix, shape[2]),
        (fast.to_input(gradient, own, None), slow.to_input(gradient, held, None), g_q, back.mT, shape[1]),
        (fast.to_weight(gradient, x, None), slow.to_weight(gradient, x, None), g_t.mT, x_t.mT, shape[0]),
    ]
    for found, expected, a, b, length in pairs:
        assert ((found - expected).double().abs() <= apart(fast, a, b, length)).all()


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_sums_of_e5m2_are_of_all_their_bits_in_products_of_any_size(rows: int) -> None:
    """From 2^31 to 2^-25 are more bits than fp64 has: large numbers that come first would leave none of a small one."""
    a = torch.full((1, 128), 57344.0)
    b = torch.full((1, 128), 448.0)
    a[0, 64:], a[0, 60:68], b[0, 64] = -57344.0, 0.0, 2.0**-9
    a[0, 64] = 2.0**-16
    a, b = (each.expand(rows, 128) for each in (a, b))
    left, right = (Operand(*quantise(x, (1, 128), form, "float32"), (1, 128)) for x, form in ((a, E5M2), (b, E4M3)))
    assert (left.scales == 1).all()
    assert (right.scales == 1).all()
    assert (product(left, right, RECIPES["block-e5m2"]) == 2.0**-25).all()


def test_promoted_sums_differ_from_a_plain_product_where_fp32_has_no_room() -> None:
    # The first chunk is 128 x 448 x 448, where neighbours in fp32 stand 2 apart: what the others add, 49 / 64 each, is
    # lost one by one, and kept where nothing is rounded until the end. All scales are powers of two.
    a = torch.zeros(1, 5 * 128)
    a[0, :128], a[0, 128::128] = 448, 0.875
    promoted, plain = (Emulated(FP8Block(promotion=each).recipe) for each in (128, 0))
    first = 128 * 448 * 448
    assert plain.output(a, plain.held(a), None).item() == first + 4  # 4 x 49 / 64 = 3.0625, to the nearest even
    assert promoted.output(a, promoted.held(a), None).item() == first


@given(st.floats(-1e30, 1e30, allow_subnormal=False), st.integers(2, 24))
@example(0.0, 14)
def test_truncation_keeps_the_leading_bits_and_never_grows(x: float, bits: int) -> None:
    found = truncated(torch.tensor([x], dtype=torch.float64), bits).item()
    assert abs(found) <= abs(x)
    assert abs(x - found) <= 2.0 ** -(bits - 1) * abs(x)
    assert _odd(Fraction(found).numerator).bit_length() <= bits


def _odd(number: int) -> int:
    number = abs(number)
    return number // max(number & -number, 1)


@pytest.mark.parametrize("bits", [24, 14])
@pytest.mark.parametrize("promotion", [128, 0])
def test_error_of_sums_grows_with_the_reduction_as_declared(bits: int, promotion: int) -> None:
    """Against the exact sum of the same codes: of positive numbers, where truncation always takes away."""
    recipe = FP8Tensor(promotion=promotion, accumulator_bits=bits).recipe
    found = []
    for length in (512, 2048, 8192):
        generator = torch.Generator().manual_seed(length)
        a, b = (torch.rand(8, length, generator=generator) + 0.5 for _ in range(2))
        left, right = (Operand(*quantise(each, (0, 0), E4M3, "float32"), (0, 0)) for each in (a, b))
        exact = values(left.codes, torch.float64) @ values(right.codes, torch.float64).mT
        exact = exact * left.scales.double() * right.scales.double()
        relative = ((product(left, right, recipe).double() - exact) / exact).abs().max().item()
        assert relative <= recipe.accumulation_error(length)
        found.append(relative)
    if bits == 14 and promotion == 0:
        # Each of K products loses half a unit, in the mean, of the sum so far: one in 2^13 to 2^14 of it, and it is in
        # the mean half of the last. Products have 8 bits, so that they lose less until the sum is far above them.
        for length, relative in zip((512, 2048, 8192), found, strict=True):
            assert relative < length * 2**-15
            assert relative > length * 2**-16 or length == 512
    elif bits == 14:
        assert max(found) < 2 * min(found)  # as large at any length
    else:
        assert max(found) < 2**-20


@settings(max_examples=20)
@given(st.sampled_from([1, 31, 33, 100]), st.sampled_from(["even", "zeros", "huge"]), SEEDS, st.sampled_from([14, 7]))
def test_narrow_accumulator_is_its_definition_in_integers(length: int, sort: str, seed: int, bits: int) -> None:
    operands = [content(sort, (3, length), seed + i) for i in range(2)]
    (left, s), (right, t) = (quantise(each, (0, 0), E4M3, "ue8m0") for each in operands)
    recipe = FP8Tensor(scales="ue8m0", promotion=0, accumulator_bits=14).recipe
    a, b = (Operand(codes, scales, (0, 0)) for codes, scales in ((left, s), (right, t)))
    found = product(a, b, attrs.evolve(recipe, bits=bits)).double() / (s.double() * t.double())
    for i in range(3):
        for j in range(3):
            total = Fraction(0)
            pairs = list(zip(values(left)[i].tolist(), values(right)[j].tolist(), strict=True))
            for start in range(0, length, 32):
                some = [(p, q) for p, q in pairs[start : start + 32] if p * q]
                addends = [(Fraction(p) * Fraction(q), _power(p) + _power(q)) for p, q in some]
                addends += [(total, _power(float(total)))] if total else []
                largest = max((power for _, power in addends), default=0)
                total = sum((_cut(each, Fraction(2) ** (largest - bits + 1)) for each, _ in addends), Fraction(0))
                total = _cut(total, Fraction(2) ** (_power(float(total)) - bits + 1)) if total else total
            assert Fraction(float(found[i, j])) == total


def _power(x: float) -> int:
    """The exponent of a number whose significand is in [1, 2)."""
    return frexp(x)[1] - 1


def _cut(x: Fraction, unit: Fraction) -> Fraction:
    """To a multiple of `unit`, towards zero."""
    return int(x / unit) * unit


def test_narrow_sums_without_promotion_err_more_than_with() -> None:
    x, weight, _ = drawn((8, 8, 4096), "even", 0)
    exact = None
    errors = []
    for promotion in (128, 0):
        products = Emulated(FP8Block(promotion=promotion, accumulator_bits=14).recipe)
        whole = Emulated(FP8Block(promotion=0).recipe)
        exact = whole.output(x, whole.held(weight), None)
        errors.append((products.output(x, products.held(weight), None) - exact).square().mean().sqrt().item())
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("before", ["bf16", "ieee"])
def test_setting_of_products_is_that_of_the_recipe_within_and_the_users_after(before: str) -> None:
    """In a process of its own, where no thread is left of what ran before."""
    on_ranks(1, set_within, before, gloo=False)


def set_within(rank: int, before: str) -> None:
    setting = torch.backends.mkldnn.matmul
    setting.fp32_precision = before
    for name, expected in (("block", "ieee"), ("block-ue8m0", "bf16"), ("mx", "bf16")):
        with multiplied(RECIPES[name], torch.device("cpu")):
            assert setting.fp32_precision == expected
        assert setting.fp32_precision == before
    with pytest.raises(KeyError), multiplied(RECIPES["mx"], torch.device("cpu")):
        raise KeyError
    assert setting.fp32_precision == before


def test_threads_neither_meet_another_setting_nor_leave_one() -> None:
    setting = torch.backends.mkldnn.matmul
    before, device = setting.fp32_precision, torch.device("cpu")
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = []

    def first() -> None:
        with multiplied(RECIPES["block-ue8m0"], device):
            seen.append(setting.fp32_precision)
            first_in.set()
            second_in.wait(0.2)  # which it may not be, until this thread is out
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with multiplied(RECIPES["block-ue8m0"], device):
            second_in.set()
            seen.append(first_out.wait(10))

    threads = [threading.Thread(target=each) for each in (first, second)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    # A product that is not exact, in this thread, would have met bf16.
    assert seen == ["ieee", True]
    assert setting.fp32_precision == before


def test_stored_codes_with_any_scales_are_not_multiplied_in_bfloat16() -> None:
    recipe = RECIPES["block-ue8m0"]
    assert recipe.exact_scales
    assert not recipe.of_stored().exact_scales
