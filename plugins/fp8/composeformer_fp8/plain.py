"""What a scaled policy leaves in high precision: sensitive linear maps, which take and give fp32.

Shapes: N rows, I inputs, O outputs, E groups.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class High(nn.Module):
    """A linear map, or a stack of them, in fp32 whatever its weight is stored in; it gives `dtype`."""

    bias: nn.Parameter | None

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.dtype = dtype

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape[-2:]
        groups = f"groups={self.weight.shape[0]}, " if self.weight.ndim == 3 else ""
        return f"{groups}{inputs} -> {outputs}, bias={self.bias is not None}"

    def matrix(self) -> Float[Tensor, "*E O I"]:
        """The weight in fp32."""
        return self.weight.float()

    def forward(
        self, x: Float[Tensor, "*N I"], offsets: Int[Tensor, " E"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """x W^T + b; with `offsets`, the ends of the groups' rows, each group's rows by its own map."""
        bias = None if self.bias is None else self.bias.float()
        if offsets is None:
            return F.linear(x.float(), self.matrix(), bias).to(self.dtype)
        return ragged(x.float(), self.weight, bias, offsets).to(self.dtype)


def ragged(
    x: Float[Tensor, "N I"],
    weight: Float[Tensor, "E O I"],
    bias: Float[Tensor, "E O"] | None,
    ends: Int[Tensor, " E"],
    scales: Float[Tensor, "E O 1"] | None = None,
) -> Float[Tensor, "N O"]:
    """Each group's rows by its own matrix in fp32, its weight times `scales` where there are any; rows past the last
    end come out as zeros. A group without rows costs nothing.
    """
    stops = ends.tolist()
    parts = []
    for group, (start, stop, matrix) in enumerate(zip([0, *stops], stops, weight.unbind(0))):
        # The first is there in any case: where nobody has rows, the result is still a function of x.
        if start < stop or weight.requires_grad or not group:
            matrix = matrix.float() if scales is None else matrix.float() * scales[group].float()
            parts.append(F.linear(x[start:stop], matrix, None if bias is None else bias[group]))
    return torch.cat([*parts, x.new_zeros(len(x) - stops[-1], weight.shape[1])])
