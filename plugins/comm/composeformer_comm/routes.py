"""How tokens become rows that leave: a copy for each expert, or one for each rank or node.

Per expert, rows are sorted by expert at home and weighed there when they are back, so that results are those of one
process, bit for bit, as far as the wire rounds nothing; no index or weight travels. Per rank, a token's one copy has
its indices and weights with it, and whoever holds it sums; a copy goes on where the next hop leads. Ahead of rows
each peer is told how many come, which is all that is read on the host.

Shapes: N tokens, D features, K experts a token, P peers of a hop, R ranks, E experts of a rank, n rows that arrived,
M rows to compute.
"""

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from composeformer.costs.ledger import Content
from composeformer_comm.hops import Hop
from composeformer_comm.sorting import by_expert, gather, inverse, spread
from composeformer_comm.transport import Pending
from composeformer_comm.travel import Arrived, Carrier, Leg, Return, Travel, features_of
from composeformer_comm.wire import as_bytes, of_bytes, pack, unpack


class Sending(NamedTuple):
    """A first leg on its way, and what the peers said of it: how many rows of each expert, or pairs in all."""

    x: Float[Tensor, "N D"]
    weights: Float[Tensor, "N K"]
    leg: Leg
    pending: Pending
    widths: list[int]
    counts: Int[Tensor, "R E"] | None
    pairs: int = 0


class Sent(NamedTuple):
    """What `combine` needs: the legs, how rows were sorted here and at home, and weights where they multiply."""

    legs: tuple[Leg, ...]
    order: Int[Tensor, " M"]
    places: Int[Tensor, "n W"]
    weights: Float[Tensor, "_ K"]
    token: Tensor
    computed: torch.dtype


class Route(Protocol):
    """What a backend does in three steps, so that something may be computed after the first."""

    def start(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N K"], weights: Float[Tensor, "N K"]
    ) -> Sending: ...

    def arrive(self, sending: Sending) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Sent]: ...

    def combine(self, rows: Float[Tensor, "M D"], sent: Sent) -> Float[Tensor, "N D"]: ...


class PerExpert:
    """One all-to-all, a copy for each expert."""

    def __init__(self, carrier: Carrier, hops: tuple[Hop, ...], groups: int) -> None:
        self.carrier, self.hop, self.groups = carrier, hops[0], groups
        self.each = groups // carrier.transport.size

    def start(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N K"], weights: Float[Tensor, "N K"]
    ) -> Sending:
        order, places, counts = by_expert(indices, self.groups)
        counts_RE = counts.view(-1, self.each)
        told_RE = self.carrier.transport.counts(counts_RE, self.hop)
        sent, received = lists(counts_RE.sum(1), told_RE.sum(1))
        leg = Leg(self.hop, order[: sum(sent)], places, sent, received)
        wire = self.carrier.dispatch
        widths = wire.widths(x.shape[1], x.dtype)
        pending = self.carrier.out(
            pack(wire.encode(x.detach(), x.dtype)), leg, "dispatch", "forward", features_of(widths)
        )
        # What belongs to no expert weighs nothing, whatever the router made of it.
        weights = weights.masked_fill(indices == self.groups, 0)
        return Sending(x, weights, leg, pending, widths, told_RE)

    def arrive(self, sending: Sending) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Sent]:
        x, leg, told_RE = sending.x, sending.leg, sending.counts
        assert told_RE is not None
        fields = unpack(sending.pending.wait(), sending.widths)
        arrived = self.carrier.dispatch.decode(fields, x.shape[1], x.dtype, x.dtype)
        rows, _, token = travelled(x, None, Arrived(arrived, None), self.carrier, (leg,))
        # Each rank's rows are sorted by expert; all together are to be.
        expert_RE = torch.arange(self.each, device=x.device).repeat(len(told_RE))
        expert_M = expert_RE.repeat_interleave(told_RE.flatten(), output_size=len(rows))
        order = expert_M.argsort(stable=True)
        sent = Sent((leg,), order, inverse(order)[:, None], sending.weights, token, x.dtype)
        return spread(rows, order, sent.places), told_RE.sum(0), sent

    def combine(self, rows: Float[Tensor, "M D"], sent: Sent) -> Float[Tensor, "N D"]:
        (leg,) = sent.legs
        assert leg.order is not None
        assert leg.places is not None
        rows = spread(rows, sent.places[:, 0], sent.order[:, None])
        home = returned(rows, sent.token, rows.dtype, self.carrier, (leg.sorted,))
        return gather(home, leg.order, leg.places, sent.weights)


class PerRank:
    """A token's one copy for each peer that stands for some of its experts, along one hop or several."""

    def __init__(self, carrier: Carrier, hops: tuple[Hop, ...], groups: int) -> None:
        self.carrier, self.hops, self.groups = carrier, hops, groups
        self.each = groups // carrier.transport.size

    def start(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N K"], weights: Float[Tensor, "N K"]
    ) -> Sending:
        wire = self.carrier.dispatch
        fields = [*wire.encode(x.detach(), x.dtype), as_bytes(indices.int()), as_bytes(weights.detach())]
        leg, pairs = self.leg(indices, self.hops[0])
        widths = [field.shape[1] for field in fields]
        return Sending(x, weights, leg, self.send(pack(fields), leg, widths), widths, None, pairs)

    def arrive(self, sending: Sending) -> tuple[Float[Tensor, "M D"], Int[Tensor, " E"], Sent]:
        x, widths, pairs = sending.x, sending.widths, sending.pairs
        legs, parcel = [sending.leg], sending.pending.wait()
        for hop in self.hops[1:]:
            leg, pairs = self.leg(of_bytes(unpack(parcel, widths)[-2], torch.int32), hop)
            legs.append(leg)
            parcel = self.send(parcel, leg, widths).wait()
        *fields, indices, weights = unpack(parcel, widths)
        found = Arrived(
            self.carrier.dispatch.decode(fields, x.shape[1], x.dtype, x.dtype),
            of_bytes(weights, sending.weights.dtype),
        )
        rows, weights_nK, token = travelled(x, sending.weights, found, self.carrier, tuple(legs))
        own_nK = of_bytes(indices, torch.int32).long() - self.carrier.transport.rank * self.each
        elsewhere = (own_nK < 0) | (own_nK >= self.each)
        order, places, counts = by_expert(own_nK.masked_fill(elsewhere, self.each), self.each)
        weights_nK = weights_nK.masked_fill(elsewhere, 0)
        sent = Sent(tuple(legs), order[:pairs], places, weights_nK, token, x.dtype)
        return spread(rows, sent.order, places), counts, sent

    def combine(self, rows: Float[Tensor, "M D"], sent: Sent) -> Float[Tensor, "N D"]:
        partial = gather(rows, sent.order, sent.places, sent.weights)
        return returned(partial, sent.token, sent.computed, self.carrier, sent.legs)

    def send(self, parcel: Tensor, leg: Leg, widths: list[int]) -> Pending:
        content: list[tuple[Content, int]] = [*features_of(widths[:-2]), ("metadata", sum(widths[-2:]))]
        return self.carrier.out(parcel, leg, "dispatch", "forward", content)

    def leg(self, indices: Int[Tensor, "N K"], hop: Hop) -> tuple[Leg, int]:
        """A hop for these rows, and how many (row, expert) pairs will arrive that are this peer's."""
        rank, size = self.carrier.transport.rank, self.carrier.transport.size
        rows, peers = len(indices), hop.number
        peer_NK = (indices.long() // self.each - hop.block(rank)).div(hop.span, rounding_mode="floor")
        nowhere = (peer_NK < 0) | (peer_NK >= peers)
        hits_NP = peer_NK.new_zeros(rows, peers + 1)
        hits_NP.scatter_add_(1, peer_NK.masked_fill(nowhere, peers), torch.ones_like(peer_NK))
        hits_NP = hits_NP[:, :peers]
        goes_NP = hits_NP > 0
        counts_P2 = torch.stack([goes_NP.sum(0), hits_NP.sum(0)], 1)
        told_P2 = self.carrier.transport.counts(counts_P2, hop)
        out, into, pairs = lists(counts_P2[:, 0], told_P2[:, 0], told_P2[:, 1])
        # Those for the first peer first, each peer's in the order of the rows; what goes nowhere comes last.
        number = sum(out)
        goes = goes_NP.T.reshape(-1)
        places = torch.where(goes, goes.cumsum(0) - 1, number)
        source = torch.arange(rows, device=goes.device)[:, None] * peers + torch.arange(
            peers, device=goes.device
        )
        order = places.new_empty(number + 1).scatter_(0, places, source.T.reshape(-1))[:number]
        sent, received = [0] * size, [0] * size
        for place, peer in enumerate(hop.peers(rank)):
            sent[peer], received[peer] = out[place], into[place]
        return Leg(hop, order, places.view(peers, rows).T.contiguous(), sent, received), sum(pairs)


def travelled(
    x: Tensor, weights: Tensor | None, arrived: Arrived, carrier: Carrier, legs: tuple[Leg, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """What arrived, with gradients where there are any."""
    if not torch.is_grad_enabled():
        return arrived.rows, arrived.weights, x.new_zeros(())  # type: ignore[return-value]
    anchor = torch.zeros((), requires_grad=True)
    return Travel.apply(x, weights, anchor, arrived, carrier, legs)  # type: ignore[no-untyped-call,no-any-return]


def returned(
    values: Tensor, token: Tensor, computed: torch.dtype, carrier: Carrier, legs: tuple[Leg, ...]
) -> Tensor:
    """Results sent back, with gradients where there are any."""
    if torch.is_grad_enabled():
        return Return.apply(values, token, computed, carrier, legs)  # type: ignore[no-untyped-call,no-any-return]
    for leg in reversed(legs):
        values, _ = carrier.home(values, leg, "combine", "forward", computed)
    return values


def lists(*sizes: Int[Tensor, " P"]) -> list[list[int]]:
    """Several tensors of equal length as lists, read from the device at once."""
    found: list[list[int]] = torch.stack(sizes).tolist()
    return found
