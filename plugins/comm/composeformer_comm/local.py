"""`local`: all experts are here. Rows are sorted by expert, computed, and sorted back.

Nothing is read on the host. Every other backend is held to this one.

Shapes: N tokens, D features, K experts a token, M = N K rows, E experts.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from composeformer.costs.ledger import Ledger
from composeformer.errors import InputError
from composeformer.exchange import Experts
from composeformer.tensors import Routing
from composeformer_comm.sorting import by_expert, gather, spread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Sorted(NamedTuple):
    """How rows were sorted: `order` says which (token, slot) each row is, `places` where each went."""

    order: Int[Tensor, " M"]
    places: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]


class LocalExchange:
    """The exchange of one process. Raises InputError for a `group` of several."""

    def __init__(self, config: Any, groups: int, group: "ProcessGroup | None" = None) -> None:
        if group is not None and group.size() > 1:
            told = f"moves tokens within one process, and {group.size()} share the experts"
            raise InputError(f"comm.kind = local: {told}; collective and hierarchical serve several")
        self.groups = groups
        self.ledger = Ledger()

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
    ) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Any]:
        """Rows sorted by expert, those of no expert last, and how many are each expert's."""
        expert_NK, weights_NK = flat(routing)
        order, places, counts = by_expert(expert_NK, self.groups)
        # What belongs to no expert weighs nothing, whatever the router made of it.
        weights_NK = weights_NK.masked_fill(expert_NK == self.groups, 0)
        return spread(x.flatten(0, -2), order, places), counts, Sorted(order, places, weights_NK)

    def combine(self, rows: Float[Tensor, "M D"], sent: Any) -> Float[Tensor, "N D"]:
        """Sums each token's rows times their weights, in fp32 or wider."""
        return gather(rows, *sent)


def flat(routing: Routing) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Indices and weights of tokens in one dimension."""
    return routing.indices.flatten(0, -2), routing.weights.flatten(0, -2)
