"""What a precision policy does for a built model: it makes every linear map.

A component of slot `precision` registers a class constructed `Policy(config)`. It is asked once for each
declared linear map and never sees the part around it; a part never sees the format behind its maps.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from composeformer.contracts import Linear


@runtime_checkable
class PolicyLinear(Protocol):
    """A linear map y = x W^T + b, an `nn.Module` that holds its parameters as `weight` and `bias`.

    Shapes: (outputs, inputs) and (outputs,), or (E, outputs, inputs) and (E, outputs) for E groups.
    """

    weight: nn.Parameter
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
        """The weight that `forward` multiplies by: dequantised, differentiable, local, never stale."""


class Policy(Protocol):
    """A precision policy of a built model."""

    activations: torch.dtype

    def linear(
        self, role: str, declared: Linear, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> nn.Module:
        """The map `role` (its full dotted name) over parameters that exist already; a `PolicyLinear`."""
