"""The model's ends: `token` embedding and `linear` head.

Sources: arXiv 1608.05859 (the tied head), arXiv 2408.00118 (the cap).
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer_dense.configs import ends

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class TokenEmbedding(nn.Module):
    """scale * weight[id]."""

    def __init__(self, config: ends.TokenEmbedding, site: "TensorSite") -> None:
        super().__init__()
        self.scale = config.scale
        self.weight = site.weight("weight")

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = F.embedding(ids, self.weight)
        return x if self.scale == 1.0 else x * self.scale


class LinearHead(nn.Module):
    """scale * W hidden, softly capped."""

    def __init__(self, config: ends.LinearHead, site: "TensorSite") -> None:
        super().__init__()
        self.scale, self.cap = config.scale, config.cap
        self.projection = site.linear("projection")

    def forward(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        logits: Tensor = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
