"""`local`: all experts are here. Rows are sorted by expert, computed, and sorted back.

Nothing is read on the host, and no sum depends on an order: a token's K rows are gathered and summed, forward
and backward alike, where PyTorch's gradient of an index would scatter. Every other backend is held to this one.

Shapes: N tokens, D features, K experts a token, M = N K rows, E experts.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from composeformer.exchange import Experts
from composeformer.tensors import Routing
from composeformer_comm.config import Local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Sent(NamedTuple):
    """How rows were sorted: `order` says which (token, slot) each row is, `places` where each went."""

    order: Int[Tensor, " M"]
    places: Int[Tensor, " M"]
    weights: Float[Tensor, "N K"]


class LocalExchange:
    """The exchange of one process; a `group` of several is of no use to it."""

    def __init__(self, config: Local, groups: int, group: "ProcessGroup | None" = None) -> None:
        self.groups = groups

    def exchange(
        self,
        x: Float[Tensor, "*N D"],
        routing: Routing,
        experts: Experts,
        beside: Callable[[], T] | None = None,
    ) -> tuple[Float[Tensor, "*N D"], T | None]:
        """Each token's sum over its experts of weight times output, in x's dtype, and what `beside` gave."""
        rows, counts, sent = self.dispatch(x, routing)
        routed = self.combine(experts(rows, counts), sent).to(x.dtype).view(x.shape)
        return routed, None if beside is None else beside()

    def dispatch(
        self, x: Float[Tensor, "*N D"], routing: Routing
    ) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Sent]:
        """Rows sorted by expert, those of no expert last, and how many are each expert's."""
        expert_NK, weights_NK = routing.indices.flatten(0, -2), routing.weights.flatten(0, -2)
        expert_M, top_k = expert_NK.reshape(-1), expert_NK.shape[1]
        order = expert_M.argsort(stable=True)
        places = order.argsort()
        counts = order.new_zeros(self.groups + 1).scatter_add_(0, expert_M, torch.ones_like(expert_M))
        x_ND = x.flatten(0, -2)
        if torch.is_grad_enabled():
            rows: Tensor = _Spread.apply(x_ND, order, places, top_k)  # type: ignore[no-untyped-call]
        else:
            rows = _spread(x_ND, order, top_k)
        # What belongs to no expert weighs nothing, whatever the router made of it.
        weights_NK = weights_NK.masked_fill(expert_NK == self.groups, 0)
        return rows, counts[: self.groups], Sent(order, places, weights_NK)

    def combine(self, rows: Float[Tensor, "M D"], sent: Sent) -> Float[Tensor, "N D"]:
        """Sums each token's rows times their weights, in fp32 or wider."""
        if torch.is_grad_enabled():
            return _Gather.apply(rows, *sent)  # type: ignore[no-untyped-call,no-any-return]
        return _gather(rows, sent.places, sent.weights)


def _spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return x.index_select(0, order // top_k)


def _gather(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    kind = torch.promote_types(rows.dtype, weights.dtype)
    bags = places.view(weights.shape)
    return F.embedding_bag(bags, rows.to(kind), per_sample_weights=weights.to(kind), mode="sum")


class _Spread(torch.autograd.Function):
    """Tokens to sorted rows; backward, each token sums its K rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, places: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.top_k = top_k
        return _spread(x, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places.view(-1, ctx.top_k), gradient, mode="sum"), None, None, None


class _Gather(torch.autograd.Function):
    """Sorted rows to each token's weighted sum; backward, rows take their token's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, places, weights)
        return _gather(rows, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, Tensor]:
        rows, order, places, weights = ctx.saved_tensors
        spread = _spread(gradient, order, weights.shape[1])
        to_weights = (spread * rows).sum(1).index_select(0, places).view(weights.shape)
        to_rows = spread.mul_(weights.reshape(-1)[order][:, None]).to(rows.dtype)
        return to_rows, None, None, to_weights
