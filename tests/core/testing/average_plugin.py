"""A mixer of a third party, right and wrong: each token becomes a projection of the mean of all up to it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.cache import TokenCache
from composeformer.config import Config, config
from composeformer.contracts import Cache, Component, Core, Cost, Declared, Implementation, Linear, Phase
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.site import Site
from composeformer.tensors import Batch, Output, own_keys


@config
class AverageConfig(Config):
    """The mean of all tokens so far, projected."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="projection", inputs=site.width, outputs=site.width)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="mean", per_key=2 * site.width)
        yield Cache(name="inputs", per_token=site.width)


class Average(nn.Module):
    """As it should be."""

    ahead = 0  # tokens to come that are averaged, too

    def __init__(self, config: AverageConfig, site: Any) -> None:
        super().__init__()
        self.projection = site.linear("projection")

    def forward(self, x: Tensor, batch: Batch, cache: TokenCache | None = None) -> Output:
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        keys, seen = x, own_keys(batch)
        if cache is not None:
            cached = cache.append(batch, x=x)
            keys, seen = cached.tensors["x"].to(x.dtype), cached.seen
        if seen is None:
            tokens, length = x.shape[1], keys.shape[1]
            seen = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens + self.ahead)[None]
        weights = seen.to(x.dtype)
        return Output(self.projection(weights @ keys / weights.sum(-1, keepdim=True).clamp(min=1)))

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> TokenCache:
        weight = self.projection.weight
        shapes = {"x": (weight.shape[1],)}
        dtype = self.projection.dtype
        return TokenCache(
            shapes, batch_size, max_length, device=weight.device, dtype=dtype, max_rollback=max_rollback
        )


class Peeking(Average):
    """It sees the token after the next, where there is one."""

    ahead = 2


class Raising(Average):
    """It can not do what it is asked to."""

    def forward(self, x: Tensor, batch: Batch, cache: TokenCache | None = None) -> Output:
        if x.shape[1] > 3:
            raise IndexError("no more than three tokens")
        return super().forward(x, batch, cache)


def component(kind: str, module: type[nn.Module], **more: Any) -> Component:
    reference = Implementation("reference", f"{__name__}:{module.__name__}")
    return Component("mixer", kind, AverageConfig, (reference,), **more)


def registry(*components: Component) -> Registry:
    """What is installed, and a plugin `averages` with these."""
    own = PluginInfo(
        name="averages",
        distribution="averages-dist",
        version="1.0",
        origin=__file__,
        status="loaded",
        components=components,
    )
    return Registry((*current().registry.infos, own))
