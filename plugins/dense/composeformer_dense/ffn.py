"""The feed-forward network (`swiglu`): y = down(activation(gate(x)) * up(x)).

Source: arXiv 2002.05202, equation 6.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.tensors import Batch, Output
from composeformer_dense.configs.ffn import SwiGLU

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.relu,
    "relu2": relu2,
}


class FeedForward(nn.Module):
    """Two or three linear maps around a nonlinearity."""

    def __init__(self, config: SwiGLU, site: "TensorSite") -> None:
        super().__init__()
        self.gate = site.linear("gate") if config.gated else None
        self.up = site.linear("up")
        self.down = site.linear("down")
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch) -> Output:
        """Each token alone; padding enters as zeros, so that it reaches no gradient."""
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        up = self.up(x)
        inner = self.activation(up) if self.gate is None else self.activation(self.gate(x)) * up
        return Output(self.down(inner))
