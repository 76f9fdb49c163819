"""The three products of a scaled map, emulated exactly as a recipe declares: `reference`, the judge.

A partial sum is that of `chunk` products: computed in fp64, where 43 bits hold any sum of 128 products of E4M3, so
that its order does not matter (E5M2 is summed in two parts, above 1 and below, each as exact, and these added);
rounded to fp32; multiplied by the scale of the left operand, then of the right; added
in fp32 to those before it.

An accumulator of fewer than 24 bits is that of Hopper's tensor cores (14 bits: arXiv 2412.19437, sections 3.3.2 and
3.5.2; modelled bit for bit in arXiv 2511.10909). 32 products and the sum so far are shifted to the largest exponent
among them, that of a product being the sum of its factors'; of each, what is then below `bits` bits is cut off; the
rest is added exactly, and the sum cut to `bits` significant bits. (To a device the exponent of a subnormal code is that
of the smallest normal one.)

A group's products are those of its rows alone, so groups are independent.

Shapes: N rows, I inputs, O outputs, E groups; an operand has R rows along the reduction K, in blocks with scales.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.numbers import Narrow
from composeformer_fp8.quantise import Block, quantise, spread, values

# What one instruction of the tensor cores adds up before it truncates.
INSTRUCTION = 32
# Products that are held at once, each alone.
STRIP = 2**21

Held = tuple[Tensor, ...]
# What picks a group from a stack: its number, or nothing.
Index = tuple[int, ...]


class Operand(NamedTuple):
    """Codes along the reduction, and the scales of their blocks."""

    codes: Float[Tensor, "R K"]
    scales: Float[Tensor, "r k"]
    block: Block


class Emulated:
    """The products of one recipe; of a weight, or of a stack of them with the `ends` of their groups' rows."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def held(self, weight: Float[Tensor, "*E O I"], backward: bool = True) -> Held:
        """Codes and scales of a weight; where a recipe quantises it anew, those for its transpose too."""
        recipe = self.recipe
        forward = quantise(weight, recipe.block, recipe.weights, recipe.scales)
        if not (recipe.anew and backward):
            return forward
        return *forward, *quantise(weight.mT, recipe.block, recipe.weights, recipe.scales)

    def matrix(self, held: Held) -> Float[Tensor, "*E O I"]:
        """The weight that the forward product multiplies by, in fp32."""
        codes, scales = held[:2]
        return values(codes) * spread(scales, self.recipe.block, (codes.shape[-2], codes.shape[-1]))

    def output(self, x: Float[Tensor, "N I"], held: Held, ends: list[int] | None) -> Float[Tensor, "N O"]:
        """x W^T in fp32; rows past the last end are zeros."""
        codes, scales = held[:2]
        found = x.new_zeros(len(x), codes.shape[-2], dtype=torch.float32)
        for rows, group in groups_of(ends, len(x)):
            weight = Operand(codes[group], scales[group], self.recipe.block)
            found[rows] = product(self._tiles(x[rows], self.recipe.activations), weight, self.recipe)
        return found

    def to_input(
        self, gradient: Float[Tensor, "N O"], held: Held, ends: list[int] | None
    ) -> Float[Tensor, "N I"]:
        """dy W in fp32."""
        transposed = held[2:] if self.recipe.anew else tuple(each.mT for each in held)
        codes, scales = transposed
        block = self.recipe.block if self.recipe.anew else self.recipe.block[::-1]
        found = gradient.new_zeros(len(gradient), codes.shape[-2], dtype=torch.float32)
        for rows, group in groups_of(ends, len(gradient)):
            weight = Operand(codes[group], scales[group], block)
            found[rows] = product(self._tiles(gradient[rows], self.recipe.gradients), weight, self.recipe)
        return found

    def to_weight(
        self, gradient: Float[Tensor, "N O"], x: Float[Tensor, "N I"], ends: list[int] | None
    ) -> Float[Tensor, "*E O I"]:
        """dy^T x in fp32; zeros for a group without rows."""
        found = [
            product(
                self._tiles(gradient[rows].mT, self.recipe.gradients),
                self._tiles(x[rows].mT, self.recipe.activations),
                self.recipe,
            )
            for rows, _ in groups_of(ends, len(x))
        ]
        return found[0] if ends is None else torch.stack(found)

    def _tiles(self, x: Float[Tensor, "R K"], form: Narrow) -> Operand:
        """Activations or gradients in tiles along the reduction."""
        block = (1, self.recipe.tile) if self.recipe.tile else (0, 0)
        return Operand(*quantise(x, block, form, self.recipe.scales), block)


def groups_of(ends: list[int] | None, rows: int) -> Iterator[tuple[slice, Index]]:
    """The rows of each group, and what indexes its weight; without `ends` there is one."""
    if ends is None:
        yield slice(rows), ()
        return
    for group, (start, stop) in enumerate(zip([0, *ends], ends)):
        yield slice(start, stop), (group,)


def product(a: Operand, b: Operand, recipe: Recipe) -> Float[Tensor, "R S"]:
    """a b^T in fp32, accumulated as `recipe` declares."""
    length = a.codes.shape[1]
    left, right = _per_row(a), _per_row(b)
    a_RK, b_SK = values(a.codes, torch.float64), values(b.codes, torch.float64)
    total = a_RK.new_zeros(len(a_RK), len(b_SK), dtype=torch.float32 if recipe.promoted else torch.float64)
    if not recipe.promoted and left.shape[1] == right.shape[1] == 1:
        # One scale for all of the reduction waits until its end.
        return (_add(total, a_RK, b_SK, recipe.bits) * left.double() * right.double().mT).float()
    for number, start in enumerate(range(0, length, recipe.chunk)):
        chunk = slice(start, start + recipe.chunk)
        scale_R, scale_S = left[:, number % left.shape[1], None], right[:, number % right.shape[1]]
        if recipe.promoted:
            partial = _sum(a_RK[:, chunk], b_SK[:, chunk], recipe.bits, a.codes.dtype == torch.float8_e5m2)
            total += partial.float() * scale_R * scale_S
        else:
            total = _add(total, a_RK[:, chunk] * scale_R, b_SK[:, chunk] * scale_S[:, None], recipe.bits)
    return total.float()


def _sum(a_RK: Tensor, b_SK: Tensor, bits: int, wide: bool) -> Tensor:
    """a b^T of codes, those of a of a `wide` format or not, in an accumulator of `bits` significant bits."""
    zero = a_RK.new_zeros(len(a_RK), len(b_SK))
    if bits < 24 or not wide:
        return _add(zero, a_RK, b_SK, bits)
    small = a_RK.abs() < 1
    return a_RK.masked_fill(small, 0) @ b_SK.mT + a_RK.masked_fill(~small, 0) @ b_SK.mT


def _add(total: Tensor, a: Tensor, b: Tensor, bits: int) -> Tensor:
    """total + a b^T in an accumulator of `bits` significant bits."""
    if bits >= 24:
        return total + a @ b.mT
    rows = max(STRIP // (INSTRUCTION * max(len(b), 1)), 1)
    strips = zip(torch.split(total, rows), torch.split(a, rows), strict=True)
    return torch.cat([_aligned(each, left, b, bits) for each, left in strips])


def _aligned(total_RS: Tensor, a_RK: Tensor, b_SK: Tensor, bits: int) -> Tensor:
    """The same, by one instruction for each 32 of the reduction."""
    for start in range(0, a_RK.shape[1], INSTRUCTION):
        chunk = slice(start, start + INSTRUCTION)
        a_R1K, b_1SK = a_RK[:, None, chunk], b_SK[None, :, chunk]
        exponents_RSK = _exponent(a_R1K) + _exponent(b_1SK)
        largest_RS = torch.maximum(exponents_RSK.amax(-1), _exponent(total_RS))
        unit_RS = torch.exp2((largest_RS - (bits - 1)).double())
        products_RSK = ((a_R1K * b_1SK) / unit_RS[..., None]).trunc_()
        total_RS = truncated((products_RSK.sum(-1) + (total_RS / unit_RS).trunc_()) * unit_RS, bits)
    return total_RS


def _exponent(x: Tensor) -> Tensor:
    """That of a significand in [1, 2); of zero one below all others."""
    return torch.frexp(x)[1].sub_(1).masked_fill_(x == 0, -500)


def truncated(x: Float[Tensor, "*S"], bits: int) -> Float[Tensor, "*S"]:
    """fp64 numbers cut towards zero to `bits` significant bits."""
    dropped = 53 - bits
    return (x.view(torch.int64) >> dropped << dropped).view(torch.float64)


def _per_row(operand: Operand) -> Float[Tensor, "R k"]:
    """The scale of each row in each chunk of the reduction; one column where a tensor has one scale."""
    return spread(operand.scales, (operand.block[0], 1), (len(operand.codes), operand.scales.shape[1]))
