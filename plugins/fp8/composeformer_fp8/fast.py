"""The same products from dequantised operands, each by one of PyTorch's own: `fast`, for small machines.

Operands are rounded to the very codes of the emulation; only sums differ, by what fp32 does in another order
(`Recipe.fast_error`). Where scales are powers of two, q s is a bfloat16, so that PyTorch may multiply in bfloat16 with
fp32 sums (AMX, or AVX-512 BF16) and lose nothing.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.emulate import Emulated, Held
from composeformer_fp8.numbers import Narrow
from composeformer_fp8.quantise import Block, dequantise, quantise
from composeformer_fp8.strips import rounded


class Fast(Emulated):
    """Dequantised operands; the rest as in the emulation. A weight is held as it is, and rounded when it is needed."""

    def held(self, weight: Float[Tensor, "*E O I"], backward: bool = True) -> Held:
        return (weight,)

    def matrix(self, held: Held) -> Float[Tensor, "*E O I"]:
        if len(held) > 1:
            return super().matrix(held)
        return self._weight(held[0], self.recipe.block)

    def output(self, x: Float[Tensor, "N I"], held: Held, ends: list[int] | None) -> Float[Tensor, "N O"]:
        return self._rows(x, self.matrix(held), ends, self.recipe.activations)

    def to_input(
        self, gradient: Float[Tensor, "N O"], held: Held, ends: list[int] | None
    ) -> Float[Tensor, "N I"]:
        anew = len(held) == 1 and self.recipe.anew
        matrix = self._weight(held[0], self.recipe.block[::-1]) if anew else self.matrix(held)
        return self._rows(gradient, matrix.mT, ends, self.recipe.gradients)

    def to_weight(
        self, gradient: Float[Tensor, "N O"], x: Float[Tensor, "N I"], ends: list[int] | None
    ) -> Float[Tensor, "*E O I"]:
        spans = _spans(ends, len(x))
        block = (self.recipe.tile, 1) if self.recipe.tile else (0, 0)
        found = gradient.new_empty(len(spans), gradient.shape[1], x.shape[1], dtype=torch.float32)
        for rows, into in zip(spans, found, strict=True):
            a = self._rounded(gradient[rows], block, self.recipe.gradients)
            b = self._rounded(x[rows], block, self.recipe.activations)
            with multiplied(self.recipe, x.device):
                torch.mm(a.mT, b, out=into)
        return found[0] if ends is None else found

    def _rows(
        self, x: Float[Tensor, "N K"], matrix: Float[Tensor, "*E S K"], ends: list[int] | None, form: Narrow
    ) -> Float[Tensor, "N S"]:
        """Rows by the transposed matrix of their group."""
        block = (1, self.recipe.tile) if self.recipe.tile else (0, 0)
        spans = _spans(ends, len(x))
        found = x.new_empty(len(x), matrix.shape[-2], dtype=torch.float32)
        last = spans[-1].stop
        found[last:] = 0
        # Tiles along a row know no groups; one scale for a tensor does.
        whole = self._rounded(x[:last], block, form) if self.recipe.tile else None
        for rows, weight in zip(spans, matrix[None] if ends is None else matrix, strict=True):
            own = self._rounded(x[rows], block, form) if whole is None else whole[rows]
            with multiplied(self.recipe, x.device):
                torch.mm(own, weight.mT, out=found[rows])
        return found

    def _weight(self, weight: Float[Tensor, "*E O I"], block: Block) -> Float[Tensor, "*E O I"]:
        if weight.ndim == 2:
            return self._rounded(weight, block, self.recipe.weights)
        return torch.stack([self._rounded(each, block, self.recipe.weights) for each in weight])

    def _rounded(self, x: Float[Tensor, "R C"], block: Block, form: Narrow) -> Float[Tensor, "R C"]:
        """q s of each element, in fp32."""
        if x.is_cpu and not torch.compiler.is_compiling():
            return rounded(x, block, form, self.recipe.scales)
        return dequantise(*quantise(x, block, form, self.recipe.scales), block)


def _spans(ends: list[int] | None, rows: int) -> list[slice]:
    """The rows of each group; without `ends` there is one."""
    if ends is None:
        return [slice(0, rows)]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends)]


@contextmanager
def multiplied(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """fp32 products in narrower operands where that loses nothing, elsewhere in fp32 whatever is set.

    The setting is the process's: another thread that multiplies meanwhile sees it.
    """
    backends: Any = torch.backends
    setting, narrower = (backends.cuda, "tf32") if device.type == "cuda" else (backends.mkldnn, "bf16")
    before = setting.matmul.fp32_precision
    setting.matmul.fp32_precision = narrower if recipe.exact_scales else "ieee"
    try:
        yield
    finally:
        setting.matmul.fp32_precision = before
