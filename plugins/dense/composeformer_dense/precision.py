"""`full` and `bf16`: linear maps that cast and multiply.

Masters keep their dtype; the copy that is multiplied is made at every forward, so it is never stale, and
autograd carries the gradient back to the masters' dtype.

Shapes: N rows, I inputs, O outputs, E groups.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.contracts import Linear
from composeformer.tensors import DTYPES
from composeformer_dense.configs.precision import BF16, Full
from composeformer_dense.ragged import ragged

# Features that such a product reads at once.
VECTOR = 32


class CastLinear(nn.Module):
    """A linear map, or a stack of them, multiplied in the dtype `compute`, which it gives unless `dtype` is another."""

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        compute: torch.dtype,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.compute = compute
        self.dtype = compute if dtype is None else dtype

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[-2:]
        groups = f"groups={self.weight.shape[0]}, " if self.weight.ndim == 3 else ""
        return f"{groups}{inputs} -> {outputs}, bias={self.bias is not None}"

    def matrix(self) -> Float[Tensor, "*E O I"]:
        """The weight as it is multiplied."""
        return self.weight.to(self.compute)

    def forward(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """x W^T + b; with `offsets`, the ends of the groups' rows, each group's rows by its own map."""
        x, matrix = confined(x.to(self.compute), self.matrix())
        bias = None if self.bias is None else self.bias.to(self.compute)
        if offsets is None:
            return F.linear(x, matrix, bias).to(self.dtype)
        return ragged(x, matrix, bias, offsets).to(self.dtype)


def confined(
    x: Float[Tensor, "*N I"], matrix: Float[Tensor, "*E O I"]
) -> tuple[Float[Tensor, "*N J"], Float[Tensor, "*E O J"]]:
    """The same, with zeros behind features of bfloat16 on a CPU where some are not finite.

    There a product reads past the end of a row that is no whole vector, into the next one, and multiplies that by zero:
    NaN at padding would spoil the token before it (PyTorch 2.13, with AMX).
    """
    rest = -x.shape[-1] % VECTOR
    if not rest or x.dtype != torch.bfloat16 or not x.is_cpu or torch.compiler.is_compiling():
        return x, matrix
    if bool(x.isfinite().all()):
        return x, matrix
    return F.pad(x, (0, rest)), F.pad(matrix, (0, rest))


class FullPolicy:
    """Everything in one dtype."""

    def __init__(self, config: Full) -> None:
        self.config = config
        self.activations = DTYPES[config.activations]

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
        return CastLinear(weight, bias, self.activations, dtype)


class BF16Policy:
    """Linear maps in bfloat16 but the sensitive ones, which take and give fp32."""

    def __init__(self, config: BF16) -> None:
        self.config = config
        self.activations = torch.bfloat16

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
        compute = self.config.format(role, declared.weight, declared.sensitive).compute
        return CastLinear(weight, bias, DTYPES[compute], dtype)
