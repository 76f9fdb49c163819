"""`rmsnorm` and `layernorm`, computed in fp32 (fp64 stays fp64) and given back in the input's dtype.

Sources: arXiv 1910.07467, arXiv 1607.06450. As in Llama's code the normalised input is rounded to its dtype
before RMSNorm's weight multiplies it.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer_dense.configs import norm

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, config: norm.RMSNorm, site: "TensorSite") -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = site.weight("weight")

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        scaled: Tensor = self.weight * normed.to(x.dtype)
        return scaled.to(x.dtype)


class LayerNorm(nn.Module):
    """weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias."""

    def __init__(self, config: norm.LayerNorm, site: "TensorSite") -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = site.weight("weight")
        self.bias = site.weight("bias") if config.bias else None

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), bias, self.eps).to(x.dtype)
