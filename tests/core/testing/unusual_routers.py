"""Routers that learn nothing, choose nobody, or weigh all alike.

Shapes: B rows, T tokens, D features, E experts, K chosen ones.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.config import Config, config, field
from composeformer.contracts import Component, Core, Cost, Declared, Implementation, Linear, Phase, Weight
from composeformer.errors import Problem
from composeformer.site import Site
from composeformer.tensors import Batch, Routing


@config
class Routes(Config):
    """At most K experts a token."""

    top_k: int = field(minimum=1, maximum=2, unit="experts", help="Experts that each token may pass through.")

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.top_k > site.sizes["num_experts"]:
            yield Problem("top_k", self.top_k, f"must be <= num_experts ({site.sizes['num_experts']})")


@config
class Fixed(Routes):
    """Experts by a random projection that never trains; all of them weigh the same."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        shape = site.sizes["num_experts"], site.width
        yield Weight(name="projection", shape=shape, dtype="float32", trains=False)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="scores", constant=2 * site.sizes["num_experts"] * site.width)


class FixedRouter(nn.Module):
    projection: Tensor

    def __init__(self, config: Fixed, site: Any) -> None:
        super().__init__()
        self.top_k, self.projection = config.top_k, site.weight("projection")

    def forward(self, x: Tensor, batch: Batch) -> Routing:
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = x.detach().to(wide) @ self.projection.to(wide).mT
        indices = scores.topk(self.top_k, dim=-1).indices
        return Routing(indices, torch.full_like(indices, 1 / self.top_k, dtype=wide))


@config
class Threshold(Routes):
    """The experts whose gate is more than half open, if there are any: at most K, by their gates."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="gate", inputs=site.width, outputs=site.sizes["num_experts"], sensitive=True)


class ThresholdRouter(nn.Module):
    def __init__(self, config: Threshold, site: Any) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.gate = config.top_k, site.sizes["num_experts"], site.linear("gate")

    def forward(self, x: Tensor, batch: Batch) -> Routing:
        logits = self.gate(x.to(torch.promote_types(x.dtype, torch.float32)))
        logits = logits.to(torch.promote_types(x.dtype, torch.float32))
        best, indices = logits.topk(self.top_k, dim=-1)
        return Routing(indices.masked_fill(~(best > 0), self.num_experts), best.sigmoid())


@config
class Alternating(Routes):
    """Experts by the token's id alone, the same for all layers, one after another; no tensors (arXiv 2106.04426)."""

    factor: float = field(1.0, above=0.0, help="What each expert weighs.")


class AlternatingRouter(nn.Module):
    def __init__(self, config: Alternating, site: Any) -> None:
        super().__init__()
        self.config, self.num_experts = config, site.sizes["num_experts"]

    def forward(self, x: Tensor, batch: Batch) -> Routing:
        next_ones = torch.arange(self.config.top_k, device=x.device)
        indices = (batch.ids[..., None] + next_ones) % self.num_experts
        wide = torch.promote_types(x.dtype, torch.float32)
        return Routing(indices, torch.full_like(indices, self.config.factor, dtype=wide))


COMPONENTS = tuple(
    Component("router", kind, made, (Implementation("reference", f"{__name__}:{module}"),))
    for kind, made, module in (
        ("fixed", Fixed, "FixedRouter"),
        ("threshold", Threshold, "ThresholdRouter"),
        ("alternating", Alternating, "AlternatingRouter"),
    )
)
