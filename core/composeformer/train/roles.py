"""What a training step asks of its parts: an objective, and a way to make an optimizer.

A component of slot `objective` names a class constructed `Objective(config)`; one of slot `optimizer` names
a function called `make(config, trained, learning_rate)`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer

from composeformer.contracts import Linear, Weight
from composeformer.formats import Format
from composeformer.parallel.pieces import is_shard
from composeformer.tensors import Batch, ModelOutput


class Objective(Protocol):
    """A training loss that adds over micro-batches and processes: a sum, and the weight to divide it by."""

    def weight(self, batch: Batch) -> Shaped[Tensor, ""]:
        """The weight that a call will return, from the tokens alone: a step adds up all before it begins."""

    def __call__(self, outputs: ModelOutput, batch: Batch) -> tuple[Float[Tensor, ""], Shaped[Tensor, ""]]:
        """The summed loss, in fp32 or wider, and its weight; nothing to learn from is a sum of zero."""


class Trained(NamedTuple):
    """A parameter with what its part declared: `linear` is the map it belongs to, if it does; `format` is what the
    precision policy says of it, None where there is no policy.
    """

    name: str
    parameter: nn.Parameter
    weight: Weight
    linear: Linear | None
    format: Format | None = None

    @property
    def is_shard(self) -> bool:
        """Whether this process holds a shard of it: a tensor of another class, which looks like the whole one."""
        return is_shard(self.parameter)

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies: two dimensions or more, and no bias of a stack of maps."""
        bias = self.linear is not None and self.weight.name == f"{self.linear.name}.bias"
        return len(self.weight.shape) >= 2 and not bias


class MakeOptimizer(Protocol):
    """Makes an optimizer of torch's interface over `trained`; each group's `lr` is what schedules change."""

    def __call__(self, config: Any, trained: Sequence[Trained], learning_rate: float) -> Optimizer: ...
