"""How tokens reach their experts: what a communication backend does for a part.

A component of slot `comm` registers a class constructed `Exchange(config, groups, group)`, once for each part
that declares groups. `groups` is their number in the whole model; `group` is the process group that shares
them, or None where there is one process. Rank r of R owns groups r G/R to (r + 1) G/R.

The part chooses experts and computes them; a backend moves rows, and may cut them into chunks or compute
`beside` while they travel. Every rank runs the same collectives in the same order whatever the routing, forward
and backward. The config of a `comm` component declares its bytes: `composeformer.costs.ledger.CommConfig`. One that
says `processes = "one"` is refused where several processes share experts.

Shapes: N tokens of this process, D features, K experts a token, M rows, E experts of this process.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from composeformer.costs.ledger import Ledger
from composeformer.errors import ComposeError
from composeformer.tensors import Routing

T = TypeVar("T")

# Rows sorted by expert and the number of each expert's; rows beyond their sum belong to none, and come out zero.
Experts = Callable[[Float[Tensor, "M D"], Int[Tensor, " E"]], Float[Tensor, "M D"]]


class CommError(ComposeError):
    """Processes that did not meet in a collective: who waited, in which one, with which sizes."""

    exit_code = 1

    @classmethod
    def of(cls, told: str, begun: float, error: Exception) -> "CommError":
        """One line: `told`, how long it took since `begun` on the monotonic clock, and what the library said."""
        said = " ".join(str(error).split())
        said = said if len(said) <= 200 else said[:197] + "..."
        return cls(f"{told}, failed after {time.monotonic() - begun:.1f} s: {said}")


class Exchange(Protocol):
    """A communication backend as one part sees it.

    Gradients flow to x, to the routing weights and to the experts, and can be taken once. `ledger` accumulates
    the bytes that this process handed to collectives.
    """

    ledger: Ledger

    def dispatch(
        self, x: Float[Tensor, "*N D"], routing: Routing
    ) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Any]:
        """The rows that this process's experts are to compute, from all processes: sorted by expert, with the
        number of each expert's, and what `combine` needs to send them back.

        An index equal to the number of experts is none.
        """

    def combine(self, rows: Float[Tensor, "M D"], sent: Any) -> Float[Tensor, "N D"]:
        """Each of this process's tokens: the sum over its experts of weight times output, in fp32 or wider and in
        an order that no timing changes.

        Routing weights multiply before rows of one token are summed, wherever that happens.
        """

    def exchange(
        self,
        x: Float[Tensor, "*N D"],
        routing: Routing,
        experts: Experts,
        beside: Callable[[], T] | None = None,
    ) -> tuple[Float[Tensor, "*N D"], T | None]:
        """Dispatches, computes `experts`, combines into x's dtype and shape; and what `beside` gave, computed while
        rows travel where that is possible.

        Raises CommError where another process does not take part.
        """
