"""What a precision policy does for a built model: it makes every linear map.

A component of slot `precision` registers a class constructed `Policy(config)`. It is asked once for each
declared linear map and never sees the part around it; a part never sees the format behind its maps.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composeformer.contracts import Linear


@runtime_checkable
class PolicyLinear(Protocol):
    """A linear map y = x W^T + b, an `nn.Module` that holds its parameters as `weight` and `bias`.

    Shapes: (outputs, inputs) and (outputs,), or (E, outputs, inputs) and (E, outputs) for E groups. Where the
    format has a codec, `weight` is a buffer of codes, and what else is stored stands beside it under its name.
    """

    weight: Tensor
    bias: nn.Parameter | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what `forward` returns, whatever it is given."""

    def __call__(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """The map of x. With groups, x is (N, I) with rows sorted by group, and `offsets` are the ends of the
        groups' rows; rows from the last end on belong to none and come out as zeros.
        """

    def matrix(self) -> Tensor:
        """The weight that `forward` multiplies by: dequantised, differentiable, local, never stale.

        In any float dtype that holds it exactly; who multiplies by it casts the other operand. It is read inside a
        forward pass: a weight that is sharded over processes is whole there alone.
        """


class Policy(Protocol):
    """A precision policy of a built model."""

    activations: torch.dtype

    def linear(
        self,
        role: str,
        declared: Linear,
        weight: Tensor,
        bias: nn.Parameter | None,
        *,
        scales: Sequence[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The map `role` (its full dotted name) over tensors that exist already; a `PolicyLinear`.

        `declared` is sensitive unless a rule names the map. `scales` are the other stored tensors of a format with
        a codec. `forward` gives `dtype`; for None what the policy gives for such a map.
        """


class Codec(Protocol):
    """A form in which weights are stored: a class constructed `Codec(config)`, of slot `codec`.

    A weight has shape (..., outputs, inputs); leading dimensions are groups, each coded alone.
    """

    def encode(self, value: Float[Tensor, "*E O I"]) -> tuple[Tensor, ...]:
        """The tensors that hold a value, codes first, in the order of the config's `stored`."""

    def decode(
        self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32, rows: slice | None = None
    ) -> Float[Tensor, "*E O I"]:
        """The value that they hold, or some of its rows."""

    def wrong(self, place: int, part: Tensor) -> str | None:
        """What is wrong with numbers that a file has at this place of `stored`, None for what an encoder writes."""
