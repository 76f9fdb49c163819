"""The same products from dequantised operands, each by one of PyTorch's own: `fast`, for small machines.

Operands are rounded to the very codes of the emulation; only sums differ, by what fp32 does in another order
(`Recipe.fast_error`). Where scales are powers of two, q s is a bfloat16, so that PyTorch may multiply in bfloat16 with
fp32 sums (AMX, or AVX-512 BF16) and lose nothing but what is below 2^-126, which those units flush to zero.

Shapes: N rows, I inputs, O outputs, E groups.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from composeformer_fp8.configs.recipe import Recipe
from composeformer_fp8.emulate import Emulated, Held, Index, groups_of
from composeformer_fp8.numbers import Narrow
from composeformer_fp8.quantise import Block, dequantise, quantise
from composeformer_fp8.strips import rounded

LOCK = threading.Lock()


class Fast(Emulated):
    """Dequantised operands; the rest as in the emulation. A weight is held as it is, and rounded when it is needed."""

    def held(self, weight: Float[Tensor, "*E O I"], backward: bool = True) -> Held:
        return (weight,)

    def matrix(self, held: Held) -> Float[Tensor, "*E O I"]:
        if len(held) > 1:
            return super().matrix(held)
        return self._weight(held[0], self.recipe.block)

    def output(self, x: Float[Tensor, "N I"], held: Held, ends: list[int] | None) -> Float[Tensor, "N O"]:
        outputs = held[0].shape[-2]
        return self._rows(x, outputs, ends, self.recipe.activations, lambda own: self.matrix(_pick(held, own)).mT)

    def to_input(
        self, gradient: Float[Tensor, "N O"], held: Held, ends: list[int] | None
    ) -> Float[Tensor, "N I"]:
        anew = len(held) == 1 and self.recipe.anew

        def matrix(own: Index) -> Tensor:
            picked = _pick(held, own)
            return self._weight(picked[0], self.recipe.block[::-1]) if anew else self.matrix(picked)

        return self._rows(gradient, held[0].shape[-1], ends, self.recipe.gradients, matrix)

    def to_weight(
        self, gradient: Float[Tensor, "N O"], x: Float[Tensor, "N I"], ends: list[int] | None
    ) -> Float[Tensor, "*E O I"]:
        block = (self.recipe.tile, 1) if self.recipe.tile else (0, 0)
        leading = () if ends is None else (len(ends),)
        found = gradient.new_empty(*leading, gradient.shape[1], x.shape[1], dtype=torch.float32)
        for rows, group in groups_of(ends, len(x)):
            a = self._rounded(gradient[rows], block, self.recipe.gradients)
            b = self._rounded(x[rows], block, self.recipe.activations)
            with multiplied(self.recipe, x.device):
                torch.mm(a.mT, b, out=found[group])
        return found

    def _rows(
        self,
        x: Float[Tensor, "N K"],
        width: int,
        ends: list[int] | None,
        form: Narrow,
        matrix: Callable[[Index], Float[Tensor, "K S"]],
    ) -> Float[Tensor, "N S"]:
        """Rows by the matrix of their group, which is made only where a group has rows."""
        block = (1, self.recipe.tile) if self.recipe.tile else (0, 0)
        found = x.new_empty(len(x), width, dtype=torch.float32)
        last = len(x) if ends is None else ends[-1]
        found[last:] = 0
        # Tiles along a row know no groups; one scale for a tensor does.
        whole = self._rounded(x[:last], block, form) if self.recipe.tile else None
        for rows, group in groups_of(ends, len(x)):
            if len(into := found[rows]):
                own = self._rounded(x[rows], block, form) if whole is None else whole[rows]
                with multiplied(self.recipe, x.device):
                    torch.mm(own, matrix(group), out=into)
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


def _pick(held: Held, group: Index) -> Held:
    """What is held of one group."""
    return tuple(each[group] for each in held)


@contextmanager
def multiplied(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """fp32 products in narrower operands where that loses nothing, elsewhere in fp32 whatever is set.

    The setting is the process's. So it is narrowed only while no other thread could multiply by it what is not exact,
    and one thread at a time changes it and sets it back.
    """
    backends: Any = torch.backends
    setting, narrower = (backends.cuda, "tf32") if device.type == "cuda" else (backends.mkldnn, "bf16")
    with LOCK:
        before = setting.matmul.fp32_precision
        narrow = recipe.exact_scales and threading.active_count() == 1
        setting.matmul.fp32_precision = narrower if narrow else "ieee"
        try:
            yield
        finally:
            setting.matmul.fp32_precision = before
