"""Feed-forward networks that choose: maxout, the largest activations of each token, and a memory of product keys.

Shapes: B rows, T tokens, D features, M inner features, N sub-keys, K chosen ones.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.config import Config, config, field
from composeformer.contracts import Component, Core, Cost, Declared, Implementation, Linear, Phase, Weight
from composeformer.errors import Problem
from composeformer.site import Site
from composeformer.tensors import Batch, Output


@config
class Maxout(Config):
    """The larger of two linear maps, feature by feature (arXiv 1302.4389)."""

    inner: int = field(minimum=1, unit="features", help="Features that the two have.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="one", inputs=site.width, outputs=self.inner)
        yield Linear(name="two", inputs=site.width, outputs=self.inner)
        yield Linear(name="down", inputs=self.inner, outputs=site.width)


def real(x: Tensor, batch: Batch) -> Tensor:
    """Zeros at padding, which may hold anything: the gradient of a weight would meet NaN there."""
    return x if batch.valid is None else x.masked_fill(~batch.valid[:, :, None], 0)


class MaxoutNetwork(nn.Module):
    def __init__(self, config: Maxout, site: Any) -> None:
        super().__init__()
        self.one, self.two, self.down = (site.linear(name) for name in ("one", "two", "down"))

    def forward(self, x: Tensor, batch: Batch) -> Output:
        x = real(x, batch)
        return Output(self.down(torch.maximum(self.one(x), self.two(x))))


@config
class Winners(Config):
    """Of each token the K largest activations, squared; all others are zero (arXiv 2109.08668, 1906.00402)."""

    inner: int = field(minimum=1, unit="features", help="Features to choose from.")
    winners: int = field(minimum=1, unit="features", help="How many are left.")

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.winners > self.inner:
            yield Problem("winners", self.winners, f"must be <= inner ({self.inner})")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="up", inputs=site.width, outputs=self.inner)
        yield Linear(name="down", inputs=self.inner, outputs=site.width)


class WinnersNetwork(nn.Module):
    def __init__(self, config: Winners, site: Any) -> None:
        super().__init__()
        self.winners = config.winners
        self.up, self.down = site.linear("up"), site.linear("down")

    def forward(self, x: Tensor, batch: Batch) -> Output:
        active = self.up(real(x, batch)).relu().square()
        largest = active.topk(self.winners, dim=-1).indices
        kept = torch.zeros_like(active).scatter(-1, largest, 1)
        return Output(self.down(torch.where(kept > 0, active, 0)))


@config
class ProductKeys(Config):
    """Each pair of two sub-keys has a value; a token reads the K pairs that it scores highest (arXiv 1907.05242)."""

    keys: int = field(minimum=2, maximum=6, unit="keys", help="Sub-keys in each of the two sets.")
    read: int = field(1, minimum=1, maximum=4, unit="values", help="Values that a token reads.")

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.read > self.keys:
            yield Problem("read", self.read, f"must be <= keys ({self.keys})")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="first", inputs=site.width, outputs=self.keys)
        yield Linear(name="second", inputs=site.width, outputs=self.keys)
        yield Weight(name="values", shape=(self.keys**2, site.width))

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="reading", constant=2 * self.read * site.width)


class ProductKeyMemory(nn.Module):
    values: Tensor

    def __init__(self, config: ProductKeys, site: Any) -> None:
        super().__init__()
        self.config = config
        self.first, self.second, self.values = (
            site.linear("first"),
            site.linear("second"),
            site.weight("values"),
        )

    def forward(self, x: Tensor, batch: Batch) -> Output:
        x, wide = real(x, batch), torch.promote_types(x.dtype, torch.float32)
        one, two = self.first(x).to(wide), self.second(x).to(wide)
        scores, places = (one[..., :, None] + two[..., None, :]).flatten(-2).topk(self.config.read, dim=-1)
        read = self.values[places].to(wide) * scores.softmax(-1)[..., None]  # (B, T, K, D)
        return Output(read.sum(-2).to(x.dtype))


COMPONENTS = tuple(
    Component("ffn", kind, made, (Implementation("reference", f"{__name__}:{module}"),))
    for kind, made, module in (
        ("maxout", Maxout, "MaxoutNetwork"),
        ("winners", Winners, "WinnersNetwork"),
        ("product-keys", ProductKeys, "ProductKeyMemory"),
    )
)
