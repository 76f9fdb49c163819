"""The mean of all tokens up to each, projected: nothing is wrong with it."""

import torch
from torch import nn

from composeformer.cache import TokenCache
from composeformer.tensors import Output, own_keys


class MeanOfAll(nn.Module):
    def __init__(self, config, site):
        super().__init__()
        self.projection = site.linear("projection")

    def forward(self, x, batch, cache=None):
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        keys, seen = x, own_keys(batch)
        if cache is not None:
            cached = cache.append(batch, x=x)
            keys, seen = cached.tensors["x"].to(x.dtype), cached.seen
        if seen is None:
            T, S = x.shape[1], keys.shape[1]
            seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)[None]
        weights = seen.to(x.dtype)
        return Output(self.projection(weights @ keys / weights.sum(-1, keepdim=True).clamp(min=1)))

    def new_cache(self, batch_size, max_length, max_rollback=0):
        weight, dtype = self.projection.weight, self.projection.dtype
        sizes = {"x": (weight.shape[1],)}
        return TokenCache(
            sizes, batch_size, max_length, device=weight.device, dtype=dtype, max_rollback=max_rollback
        )
