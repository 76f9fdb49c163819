"""How tokens reach their experts: what a communication backend does for a part.

A component of slot `comm` registers a class constructed `Exchange(config, groups, group)`, once for each part
that declares groups; `groups` is their number in the whole model, `group` the `torch.distributed.ProcessGroup`
that shares them, or None where there is one process. Rank r of R owns groups r G/R to (r + 1) G/R. The part chooses experts and computes them; a
backend moves rows, and may cut them into chunks or overlap the two.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from composeformer.tensors import Routing

T = TypeVar("T")

# Rows sorted by expert and the number of each expert's; rows beyond their sum belong to none, and come out zero.
Experts = Callable[[Float[Tensor, "M D"], Int[Tensor, " E"]], Float[Tensor, "M D"]]


class Exchange(Protocol):
    """A communication backend as one part sees it."""

    def exchange(
        self,
        x: Float[Tensor, "*N D"],
        routing: Routing,
        experts: Experts,
        beside: Callable[[], T] | None = None,
    ) -> tuple[Float[Tensor, "*N D"], T | None]:
        """Each token's sum over its experts of weight times output, and what `beside` gave meanwhile.

        An index equal to the number of experts is none. Weights multiply before rows of one token are summed.
        """
