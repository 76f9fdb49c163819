"""Linear maps of four-bit integers, a scale for each group of inputs; products in fp32.

The master is rounded anew at every forward, and its gradient is that of what it was rounded to.

Shapes: N rows, I inputs, O outputs, E stacked maps.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.contracts import Linear
from int4_groups.plugin import LARGEST, Int4Groups


class High(nn.Module):
    """A linear map, or a stack of them, in fp32; it gives `dtype`."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.dtype = dtype

    def matrix(self) -> Float[Tensor, "*E O I"]:
        """The weight as it is multiplied."""
        return self.weight.float()

    def forward(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """x W^T + b; with `offsets`, the ends of the groups' rows, each group's rows by its own map."""
        x, matrix = x.float(), self.matrix()
        bias = None if self.bias is None else self.bias.float()
        if offsets is None:
            return F.linear(x, matrix, bias).to(self.dtype)
        ends = offsets.tolist()
        biases = [None] * len(ends) if bias is None else bias.unbind()
        rows = [
            F.linear(x[start:end], each, shift)
            for start, end, each, shift in zip([0, *ends], ends, matrix.unbind(), biases, strict=False)
        ]
        none = x.new_zeros(len(x) - ends[-1], matrix.shape[1])  # rows of no group
        return torch.cat([*rows, none]).to(self.dtype)


class Int4Linear(High):
    """The same, by the rounded weight."""

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype, group_size: int
    ) -> None:
        super().__init__(weight, bias, dtype)
        self.group_size = group_size

    def matrix(self) -> Float[Tensor, "*E O I"]:
        weight = self.weight.float()
        still = weight.detach()
        # The difference is zero, and has the gradient.
        return rounded(still, self.group_size) + (weight - still)


def rounded(weight: Float[Tensor, "*E O I"], group_size: int) -> Float[Tensor, "*E O I"]:
    """The values of the nearest codes. A group of zeros stays zero; a last one may have fewer inputs."""
    inputs = weight.shape[-1]
    groups = F.pad(weight, (0, -inputs % group_size)).unflatten(-1, (-1, group_size))
    largest = groups.abs().amax(-1, keepdim=True)
    # Through the ratio, for a scale could be too small for fp32.
    ratio = torch.where(largest > 0, groups / largest, 0.0)
    codes = (ratio * LARGEST).round()
    return (codes / LARGEST * largest).flatten(-2)[..., :inputs]


class Int4Policy:
    """Integers for all linear maps but the sensitive ones, which take and give fp32."""

    def __init__(self, config: Int4Groups) -> None:
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
        """The map over tensors that exist."""
        if declared.sensitive:
            return High(weight, bias, dtype or torch.float32)
        return Int4Linear(weight, bias, dtype or self.activations, self.config.group_size)
