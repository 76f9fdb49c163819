"""Sigmoids with a bias on the choice; but loads are kept on the module, so that an evaluation between two steps of
training moves the bias.
"""

import torch
from torch import nn

from composeformer.tensors import Routing


class Router(nn.Module):
    def __init__(self, config, site):
        super().__init__()
        self.top_k, self.speed = config.top_k, config.speed
        self.gate, self.bias, self.load = site.linear("gate"), site.weight("bias"), site.weight("load")

    def forward(self, x, batch):
        kind = torch.promote_types(x.dtype, torch.float32)
        scores = (x.to(kind) @ self.gate.matrix().to(kind).mT).sigmoid()
        biased = scores.detach() + self.bias
        chosen = biased.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        counted = chosen if batch.valid is None else chosen[batch.valid]
        with torch.no_grad():
            self.load += counted.reshape(-1).bincount(minlength=len(self.load))
        weights = scores.gather(-1, chosen)
        return Routing(chosen, weights / weights.sum(-1, keepdim=True))

    def after_step(self, totals, run):
        self.bias.add_(torch.sign(self.load.sum() - self.load * len(self.load)), alpha=self.speed)
        self.load.zero_()
