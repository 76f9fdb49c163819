"""Experts as grouped products: three in all, each of all rows by their own experts' maps.

The linear maps compute them, so that the precision policy owns the product and its rounding; with `full` and
`bf16` it is PyTorch's `grouped_mm`, which reads no count on the host.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from composeformer_moe.reference import MixtureOfExperts


class Grouped(MixtureOfExperts):
    """`moe` through its linear maps' grouped form."""

    def experts(self, rows: Float[Tensor, "M D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        ends = counts.cumsum(0, dtype=torch.int32)
        found: Tensor = self.down(F.silu(self.gate(rows, ends)) * self.up(rows, ends), ends)
        return found
