"""Rows along the hops of an exchange and back, with gradients: the gradient of a dispatch combines, that of a combine
dispatches (arXiv 2412.19437, section 3.3.3), each in the other's direction's wire format, as if it rounded nothing.

A `Leg` is one hop as this routing uses it. Going out a row's bytes are made once and copied from hop to hop; coming
back each hop sums the copies of a row, in fp32 or wider and in the order of its places, before the next. Every rank
has the same nodes of the autograd graph whatever it was sent and whatever needs a gradient there, so that all meet
in the same collectives.

Shapes: N rows here, S sent in one leg, n arrived after all legs, D features, W copies of a row, K experts a token.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from composeformer.costs.ledger import Direction, Purpose, Step
from composeformer_comm.hops import Hop
from composeformer_comm.sorting import summed
from composeformer_comm.transport import Contents, Pending, Transport
from composeformer_comm.wire import Wire, as_bytes, of_bytes, pack, unpack

if TYPE_CHECKING:
    from composeformer_comm.config import Remote


class Leg(NamedTuple):
    """Which rows each rank is sent, and where each copy of a row went; None where rows are already so sorted."""

    hop: Hop
    order: Int[Tensor, " S"] | None
    places: Int[Tensor, "N W"] | None
    sent: list[int]
    received: list[int]

    @property
    def sorted(self) -> "Leg":
        """The same for rows that are in the order in which they are sent."""
        return self._replace(order=None, places=None)


class Carrier:
    """Moves rows in the wire formats of one config. `computed` is the dtype of what travels as computed."""

    def __init__(self, config: "Remote", transport: Transport) -> None:
        self.transport = transport
        self.dispatch, self.combine = Wire(config.dispatch_format), Wire(config.combine_format)

    def out(
        self, parcel: Tensor, leg: Leg, purpose: Purpose, direction: Direction, contents: Contents
    ) -> Pending:
        """Starts to send the rows of a parcel along a leg."""
        if leg.order is not None:
            width = 1 if leg.places is None else leg.places.shape[1]
            parcel = parcel.index_select(0, leg.order // width)
        step = Step(purpose, direction, leg.hop.name)
        return self.transport.start(parcel, leg.sent, leg.received, leg.hop, step, contents)

    def home(
        self,
        values: Float[Tensor, "S D"],
        leg: Leg,
        purpose: Purpose,
        direction: Direction,
        computed: torch.dtype,
        weights: Float[Tensor, "S K"] | None = None,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N K"] | None]:
        """Sends results back along a leg and sums each row's copies, in the dtype of `values`; weights too."""
        features = values.shape[1]
        fields = self.combine.encode(values, computed)
        widths = self.combine.widths(features, computed)
        contents = features_of(widths)
        if weights is not None:
            fields, widths = [*fields, as_bytes(weights)], [*widths, weights.shape[1] * weights.itemsize]
            contents = [*contents, ("metadata", widths[-1])]
        step = Step(purpose, direction, leg.hop.name)
        parcel = self.transport.start(pack(fields), leg.received, leg.sent, leg.hop, step, contents).wait()
        parts = unpack(parcel, widths)
        found = self.combine.decode(parts, features, computed, values.dtype)
        back = None if weights is None else of_bytes(parts[-1], weights.dtype)
        if leg.places is None:
            return found, back
        return summed(found, leg.places), None if back is None else summed(back, leg.places)


def features_of(widths: Sequence[int]) -> Contents:
    """What the fields of encoded features are in a ledger."""
    return [("payload", widths[0]), *(("scales", width) for width in widths[1:])]


class Arrived(NamedTuple):
    """What the legs brought: rows, and the weights that travelled with them, if they did."""

    rows: Float[Tensor, "n D"]
    weights: Float[Tensor, "n K"] | None


class Travel(torch.autograd.Function):
    """A dispatch that has happened: its rows and weights, as functions of this rank's tokens and their weights.

    The third result is a zero that `Return` takes, so that its backward pass comes before this one's on every
    rank, also where nothing arrived. `anchor` needs a gradient, so that all of them have one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        anchor: Tensor,
        arrived: Arrived,
        carrier: Carrier,
        legs: Sequence[Leg],
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.carrier, ctx.legs, ctx.dtype = carrier, legs, x.dtype
        return arrived.rows, arrived.weights, x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_rows: Tensor, to_weights: Tensor | None, to_token: Tensor) -> tuple[Any, ...]:
        # Rows that were sorted at home sum there as one process would; partial sums stay wide from hop to hop.
        if to_weights is not None:
            to_rows = to_rows.to(torch.promote_types(to_rows.dtype, torch.float32))
        for leg in reversed(ctx.legs):
            to_rows, to_weights = ctx.carrier.home(
                to_rows, leg, "dispatch", "backward", ctx.dtype, to_weights
            )
        return to_rows.to(ctx.dtype), to_weights, None, None, None, None


class Return(torch.autograd.Function):
    """The results of what arrived, sent back along the legs: (n, D) to (N, D), in their own dtype."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, token: Tensor, computed: torch.dtype, carrier: Carrier, legs: Sequence[Leg]
    ) -> Tensor:
        ctx.carrier, ctx.legs, ctx.computed, ctx.dtype = carrier, legs, computed, values.dtype
        for leg in reversed(legs):
            values, _ = carrier.home(values, leg, "combine", "forward", computed)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        wire, computed, features = ctx.carrier.dispatch, ctx.computed, gradient.shape[1]
        widths = wire.widths(features, computed)
        parcel = pack(wire.encode(gradient, computed))
        for leg in ctx.legs:
            parcel = ctx.carrier.out(parcel, leg, "combine", "backward", features_of(widths)).wait()
        to_values = wire.decode(unpack(parcel, widths), features, computed, ctx.dtype)
        return to_values, to_values.new_zeros(()), None, None, None
