"""Rows in another order and back, with gradients whose sums depend on no order of arrival.

`order` (M,) says which of N W places each row has, place n W + w being the w-th copy of token n; `places` (N, W)
says where each went, M or beyond where it is left out. A token's rows are gathered and summed, forward and
backward alike, where PyTorch's gradient of an index would scatter, on a GPU in any order.

Shapes: N tokens, D features, W copies of a token, M rows, E experts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def by_expert(
    expert_NW: Int[Tensor, "N W"], experts: int
) -> tuple[Int[Tensor, " M"], Int[Tensor, "N W"], Int[Tensor, " E"]]:
    """`order`, `places` and counts of all copies sorted by expert, stably; those of expert E, none, come last."""
    expert_M = expert_NW.reshape(-1)
    order = expert_M.argsort(stable=True)
    counts = order.new_zeros(experts + 1).scatter_add_(0, expert_M, torch.ones_like(expert_M))
    return order, inverse(order).view(expert_NW.shape), counts[:experts]


def inverse(order: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
    """Where each of M went in a permutation of them."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def spread(
    x: Float[Tensor, "N D"], order: Int[Tensor, " M"], places: Int[Tensor, "N W"]
) -> Float[Tensor, "M D"]:
    """Tokens to rows; backward, each token sums its rows."""
    if torch.is_grad_enabled():
        return _Spread.apply(x, order, places)  # type: ignore[no-untyped-call,no-any-return]
    return x.index_select(0, order // places.shape[1])


def gather(
    rows: Float[Tensor, "M D"],
    order: Int[Tensor, " M"],
    places: Int[Tensor, "N W"],
    weights: Float[Tensor, "N W"],
) -> Float[Tensor, "N D"]:
    """Rows to each token's weighted sum, in fp32 or wider; backward, rows take their token's gradient."""
    if torch.is_grad_enabled():
        return _Gather.apply(rows, order, places, weights)  # type: ignore[no-untyped-call,no-any-return]
    return _gather(rows, places, weights)


def summed(
    rows: Float[Tensor, "M D"], places: Int[Tensor, "N W"], weights: Float[Tensor, "N W"] | None = None
) -> Float[Tensor, "N D"]:
    """Each token's rows, times their weights, summed in the order of its places; narrow ones in fp32."""
    if len(rows) < places.numel():
        # What is left out stands for zeros, which even an infinite weight's copy must not read elsewhere.
        rows, places = F.pad(rows, (0, 0, 0, 1)), places.clamp(max=len(rows))
    return F.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")


def _gather(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    kind = torch.promote_types(rows.dtype, weights.dtype)
    return summed(rows.to(kind), places, weights.to(kind))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, order // places.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return summed(gradient, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, places, weights)
        return _gather(rows, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows, order, places, weights = ctx.saved_tensors
        of_token = gradient.index_select(0, order // places.shape[1])
        to_weights = F.pad((of_token * rows).sum(1), (0, 1))[places.clamp(max=len(rows))]
        to_rows = of_token.mul_(weights.reshape(-1)[order][:, None]).to(rows.dtype)
        return to_rows, None, None, to_weights
