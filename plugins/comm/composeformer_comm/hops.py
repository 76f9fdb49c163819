"""The all-to-alls that rows take: who meets whom, and which class of links lies between.

A node is a set of `size` consecutive ranks. `flat` is one hop among all ranks; `two_level` goes first to the rank
of the same place in each node, then within the node. A hop among one is left out. Rank r of R owns groups r G/R
to (r + 1) G/R.
"""

import attrs

from composeformer.costs.ledger import Link
from composeformer.errors import InputError


@attrs.frozen(kw_only=True)
class Hop:
    """One all-to-all: peers lie `stride` ranks apart, `number` of them, the first at `first(rank)`; each stands for
    `span` ranks, which own what is sent to it. `size` is the ranks of a node.
    """

    name: str
    number: int
    stride: int
    span: int
    size: int

    def first(self, rank: int) -> int:
        """The peer of the lowest rank."""
        period = self.number * self.stride
        return rank // period * period + rank % self.stride

    def peers(self, rank: int) -> range:
        """The ranks that `rank` meets, itself among them."""
        first = self.first(rank)
        return range(first, first + self.number * self.stride, self.stride)

    def block(self, rank: int) -> int:
        """The lowest of the ranks that the peers of `rank` stand for."""
        return rank // (self.number * self.span) * (self.number * self.span)

    def link(self, rank: int, other: int) -> Link:
        """The class of links between two ranks."""
        if rank == other:
            return "self"
        return "intra" if rank // self.size == other // self.size else "inter"


def flat(ranks: int, size: int | None) -> Hop:
    """All ranks meet. Raises InputError where they are no whole nodes."""
    size = ranks if size is None else size
    check(ranks, size)
    return Hop(name="ranks", number=ranks, stride=1, span=1, size=size)


def two_level(ranks: int, size: int) -> tuple[Hop, ...]:
    """Nodes, then the ranks of a node. Raises InputError where they are no whole nodes."""
    check(ranks, size)
    nodes = Hop(name="nodes", number=ranks // size, stride=size, span=size, size=size)
    inside = Hop(name="ranks", number=size, stride=1, span=1, size=size)
    return tuple(hop for hop in (nodes, inside) if hop.number > 1)


def check(ranks: int, size: int) -> None:
    """Raises InputError unless `ranks` are whole nodes of `size`."""
    if told := no_whole_nodes(ranks, size):
        raise InputError(f"comm.ranks_per_node = {size}: {told}")


def no_whole_nodes(ranks: int, size: int) -> str | None:
    """Why `ranks` can not be nodes of `size`, or None. One rank alone is always a node."""
    if ranks == 1 or ranks % size == 0:
        return None
    near = _nearest_divisor(ranks, size)
    return f"must divide the number of ranks that share the experts ({ranks}); the nearest that does is {near}"


def owned(groups: int, ranks: int) -> int:
    """Groups of each rank. Raises InputError where they can not be shared evenly."""
    if groups % ranks:
        near = _nearest_divisor(groups, ranks)
        raise InputError(
            f"parallel.expert = {ranks}: {groups} experts can not be shared evenly by {ranks} ranks; "
            f"the nearest number that divides them is {near}"
        )
    return groups // ranks


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
