"""`collective` and `hierarchical`: experts spread over the processes of a group.

Both are a route for rows (`routes`) along their config's hops (`hops`), in its wire formats (`wire`). Sources:
all-to-all dispatch and combine, arXiv 2006.16668; one copy per node with partial sums on the way back,
arXiv 2412.19437, section 3.2.2.

Shapes: N tokens, D features, M rows, E experts of this process.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from composeformer.exchange import Experts
from composeformer.tensors import Routing
from composeformer_comm.config import Remote
from composeformer_comm.hops import owned
from composeformer_comm.local import LocalExchange, flat

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from composeformer_comm.routes import Route, Sending

T = TypeVar("T")

log = logging.getLogger(__name__)


class RemoteExchange(LocalExchange):
    """Rank r of R owns experts r G/R to (r + 1) G/R. Alone it is `local`, which is logged once.

    Raises InputError where the experts, or the ranks of a node, do not divide evenly; UnknownKind where a wire
    format needs a codec that no plugin has.
    """

    def __init__(self, config: Remote, groups: int, group: "ProcessGroup | None" = None) -> None:
        super().__init__(config, groups)
        self.route: Route | None = None
        if group is None or group.size() == 1:
            falls_back(type(config).__name__.lower())
            return
        # torch.distributed is imported where there is a group of processes.
        from composeformer_comm.routes import PerExpert, PerRank
        from composeformer_comm.transport import Transport
        from composeformer_comm.travel import Carrier

        owned(groups, group.size())
        hops = config.hops(group.size())
        carrier = Carrier(config, Transport(group, self.ledger))
        self.route = (PerExpert if config.per_expert else PerRank)(carrier, hops, groups)

    def exchange(
        self,
        x: Float[Tensor, "*N D"],
        routing: Routing,
        experts: Experts,
        beside: Callable[[], T] | None = None,
    ) -> tuple[Float[Tensor, "*N D"], T | None]:
        """As `local`, over all processes; `beside` is computed while rows are on their first way."""
        if self.route is None:
            return super().exchange(x, routing, experts, beside)
        sending = self._start(self.route, x, routing)
        meanwhile = None if beside is None else beside()
        rows, counts, sent = self.route.arrive(sending)
        routed = self.route.combine(experts(rows, counts), sent)
        return routed.to(x.dtype).view(x.shape), meanwhile

    def dispatch(
        self, x: Float[Tensor, "*N D"], routing: Routing
    ) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Any]:
        """Rows of all processes for this one's experts, sorted by expert, and how many are each expert's."""
        if self.route is None:
            return super().dispatch(x, routing)
        return self.route.arrive(self._start(self.route, x, routing))

    def combine(self, rows: Float[Tensor, "M D"], sent: Any) -> Float[Tensor, "N D"]:
        """Sums each of this process's tokens' rows times their weights, in fp32 or wider."""
        return super().combine(rows, sent) if self.route is None else self.route.combine(rows, sent)

    def _start(self, route: "Route", x: Tensor, routing: Routing) -> "Sending":
        indices, weights = flat(routing)
        return route.start(x.flatten(0, -2), indices, weights)


@cache
def falls_back(kind: str) -> None:
    """Says once that a backend for several processes has one."""
    log.info("comm %s falls back to local: one process holds all experts", kind)
