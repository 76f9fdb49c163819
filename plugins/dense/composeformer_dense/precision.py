"""`full` and `bf16`: linear maps that cast and multiply.

Masters keep their dtype; the copy that is multiplied is made at every forward, so it is never stale, and
autograd carries the gradient back to the masters' dtype.

Shapes: N rows, I inputs, O outputs, E groups.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.contracts import Linear
from composeformer.tensors import DTYPES
from composeformer_dense.configs.precision import BF16, Full
from composeformer_dense.ragged import ragged


class CastLinear(nn.Module):
    """A linear map, or a stack of them, multiplied in one dtype."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.dtype = dtype

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[-2:]
        groups = f"groups={self.weight.shape[0]}, " if self.weight.ndim == 3 else ""
        return f"{groups}{inputs} -> {outputs}, bias={self.bias is not None}"

    def matrix(self) -> Float[Tensor, "*E O I"]:
        """The weight as it is multiplied."""
        return self.weight.to(self.dtype)

    def forward(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """x W^T + b; with `offsets`, the ends of the groups' rows, each group's rows by its own map."""
        x = x.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if offsets is None:
            return F.linear(x, self.matrix(), bias)
        return ragged(x, self.matrix(), bias, offsets)


class FullPolicy:
    """Everything in one dtype."""

    def __init__(self, config: Full) -> None:
        self.config = config
        self.activations = DTYPES[config.activations]

    def linear(
        self, role: str, declared: Linear, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> nn.Module:
        return CastLinear(weight, bias, self.activations)


class BF16Policy:
    """Linear maps in bfloat16 but the sensitive ones, which take and give fp32."""

    def __init__(self, config: BF16) -> None:
        self.config = config
        self.activations = torch.bfloat16

    def linear(
        self, role: str, declared: Linear, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> nn.Module:
        compute = self.config.format(role, declared.weight, declared.sensitive).compute
        return CastLinear(weight, bias, DTYPES[compute])
