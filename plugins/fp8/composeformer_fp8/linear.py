"""Linear maps of the scaled policies, and their gradients.

The codes of a weight are made from its master at every forward, so they are never stale, and kept for the backward
pass; activations are kept as they came and quantised anew along the tokens, so that their second rounding does not
follow a first one. (DeepSeek-V3 keeps the codes and requantises those: arXiv 2412.19437, section 3.5.2.) Rounding
has the gradient of the identity.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from composeformer_fp8.emulate import Emulated, Held
from composeformer_fp8.kept import Kept


class Scaled(nn.Module):
    """A linear map, or a stack of them, as `products` computes it."""

    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, products: Emulated, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.products = products
        self.dtype = dtype

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[-2:]
        groups = f"groups={self.weight.shape[0]}, " if self.weight.ndim == 3 else ""
        return f"{groups}{inputs} -> {outputs}, bias={self.bias is not None}"

    def held(self, backward: bool = True) -> Held:
        """The codes and scales that are multiplied."""
        return self.products.held(self.weight.detach(), backward)

    def matrix(self) -> Float[Tensor, "*E O I"]:
        """The weight as the forward product has it, in fp32; its gradient is the weight's."""
        matrix = self.products.matrix(self.held(backward=False))
        if not self.weight.requires_grad:
            return matrix
        found: Tensor = _Straight.apply(self.weight, matrix)  # type: ignore[no-untyped-call]
        return found

    def forward(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """x W^T + b; with `offsets`, the ends of the groups' rows, each group's rows by its own map."""
        rows = x.reshape(-1, x.shape[-1])
        ends = None if offsets is None else _ends(offsets, len(rows))
        needed = torch.is_grad_enabled() and x.requires_grad
        dtype = self.dtype if self.bias is None else torch.float32
        y: Tensor = _Product.apply(rows, self.weight, ends, self.products, dtype, *self.held(needed))  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = (y + _spread(self.bias, offsets, len(rows))).to(self.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class Coded(Kept, Scaled):
    """A map whose weight is stored as codes, and their scales beside them: multiplied as they are."""

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: nn.Parameter | None,
        products: Emulated,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, bias, products, dtype)
        self.weight_scale_inv = scales

    def held(self, backward: bool = True) -> Held:
        return self.weight, self.weight_scale_inv


def _ends(offsets: Tensor, rows: int) -> list[int]:
    """Where groups end; of tensors without values, all in the first."""
    return [rows] * len(offsets) if offsets.is_meta else offsets.tolist()


def _spread(bias: Tensor, offsets: Tensor | None, rows: int) -> Tensor:
    """What each row has added: its group's bias, or nothing past the last group."""
    bias = bias.float()
    if offsets is None:
        return bias
    group_N = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True)
    return F.pad(bias, (0, 0, 0, 1))[group_N]


class _Straight(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, matrix: Tensor) -> Tensor:
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Product(torch.autograd.Function):
    """x W^T, and the two products of its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ends: list[int] | None,
        products: Emulated,
        dtype: torch.dtype,
        *held: Tensor,
    ) -> Tensor:
        to_x, to_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if to_weight else None, *(held if to_x else ()))
        ctx.ends, ctx.products, ctx.dtypes = ends, products, (x.dtype, weight.dtype)
        return products.output(x, held, ends).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *held = ctx.saved_tensors
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = ctx.products.to_input(gradient, tuple(held), ctx.ends).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            to_weight = ctx.products.to_weight(gradient, x, ctx.ends).to(ctx.dtypes[1])
        return to_x, to_weight, None, None, None, *(None for _ in ctx.needs_input_grad[5:])
