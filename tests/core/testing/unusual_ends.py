"""The ends of a model: embeddings without a row for each id, a head of angles, heads that predict independently.

Shapes: B rows, T tokens, D hidden size, V vocabulary, K further heads.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.config import Config, config, field
from composeformer.contracts import Component, Cost, Declared, Implementation, Linear, Phase, Uses, Weight
from composeformer.errors import Problem
from composeformer.site import Site
from composeformer.tensors import Batch, Prediction, Rotary


@config
class Composed(Config):
    """The sum of a row for the quotient and one for the remainder of an id (arXiv 1909.02164)."""

    buckets: int = field(3, minimum=1, unit="ids", help="How many ids share a quotient.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        model = site.spec.model
        yield Weight(name="quotients", shape=(-(-model.vocab_size // self.buckets), model.hidden_size))
        yield Weight(name="remainders", shape=(self.buckets, model.hidden_size))

    def validate(self, site: Site) -> Iterable[Problem]:
        if site.spec.model.vocab_size < self.buckets:
            yield Problem("buckets", self.buckets, f"must be <= vocab_size ({site.spec.model.vocab_size})")


class ComposedEmbedding(nn.Module):
    quotients: Tensor
    remainders: Tensor

    def __init__(self, config: Composed, site: Any) -> None:
        super().__init__()
        self.buckets = config.buckets
        self.quotients, self.remainders = site.weight("quotients"), site.weight("remainders")

    def forward(self, ids: Tensor) -> Tensor:
        return self.quotients[ids // self.buckets] + self.remainders[ids % self.buckets]


@config
class Angles(Config):
    """A multiple of the cosines between a hidden state and each token's vector, arXiv 1704.06369; never tied."""

    scale: float = field(8.0, above=0.0, maximum=64.0, help="The multiple.")

    def validate(self, site: Site) -> Iterable[Problem]:
        if site.spec.model.tie_embeddings:
            yield Problem("scale", self.scale, "has vectors of its own: model.tie_embeddings must be false")

    def tensors(self, site: Site) -> Iterable[Declared]:
        model = site.spec.model
        yield Linear(name="vectors", inputs=model.hidden_size, outputs=model.vocab_size, sensitive=True)


class AnglesHead(nn.Module):
    def __init__(self, config: Angles, site: Any) -> None:
        super().__init__()
        self.scale, self.vectors = config.scale, site.linear("vectors")

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        long = self.vectors.matrix().to(wide).norm(dim=-1).clamp(min=2.0**-60)
        unit = F.normalize(hidden.to(wide), dim=-1).to(hidden.dtype)
        return (self.scale * self.vectors(unit).to(wide) / long).to(self.vectors.dtype)


@config
class Medusa(Config):
    """Head k predicts token t + k + 1 from h_t alone: head(h + silu(W_k h)) (arXiv 2401.10774)."""

    heads: int = field(2, minimum=1, maximum=3, unit="tokens", help="Further tokens predicted.")
    loss_weight: float = field(0.2, minimum=0.0, affects="training", help="Of all their losses together.")

    def validate(self, site: Site) -> Iterable[Problem]:
        if self.heads >= site.spec.model.max_position_embeddings:
            yield Problem("heads", self.heads, "must be < max_position_embeddings")

    def tensors(self, site: Site) -> Iterable[Declared]:
        for k in range(self.heads):
            yield Linear(name=f"heads.{k}", inputs=site.width, outputs=site.width, bias=True)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Uses(name="the model's head", slot="head", times=self.heads)


class Nothing:
    """What heads keep of the text that they have read: they read the newest hidden state."""

    num_bytes = 0


class MedusaHeads(nn.Module):
    def __init__(self, config: Medusa, site: Any) -> None:
        super().__init__()
        self.heads = nn.ModuleList(site.linear(f"heads.{k}") for k in range(config.heads))
        self.head = site.shared("head")
        # A nearer token counts more; together they count once.
        shares = [0.8**k for k in range(config.heads)]
        self.shares = [each / sum(shares) for each in shares]

    def predicted(self, k: int, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.heads[k](hidden)).to(hidden.dtype)

    def forward(self, stream: Tensor, hidden: Tensor, batch: Batch) -> list[Prediction]:
        found = []
        for k in range(min(len(self.heads), batch.ids.shape[1] - 1)):
            length, ahead = batch.ids.shape[1] - k - 1, k + 1
            own = self.predicted(k, hidden[:, :length])
            found.append(Prediction(self.head(own), own, self.followed(batch, ahead), self.shares[k]))
        return found

    def followed(self, batch: Batch, ahead: int) -> Batch:
        """The batch as it stands `ahead` places on, real where all between is, and of one document."""
        length = batch.ids.shape[1] - ahead
        real = torch.ones_like(batch.ids[:, :length], dtype=torch.bool)
        for step in range(ahead + 1):
            at = slice(step, step + length)
            if batch.valid is not None:
                real = real & batch.valid[:, at]
            if batch.documents is not None:
                real = real & (batch.documents[:, at] == batch.documents[:, :length])
        tables = {key: Rotary(*(each[:, :length] for each in table)) for key, table in batch.tables.items()}
        documents = None if batch.documents is None else batch.documents[:, :length]
        return Batch(batch.ids[:, ahead:], batch.positions[:, :length], documents, real, tables, batch.phase)

    def new_cache(self, batch_size: int, max_length: int) -> Nothing:
        return Nothing()

    @property
    def num_drafts(self) -> int:
        return len(self.heads)

    def draft(
        self,
        hidden: Tensor,
        ids: Tensor,
        valid: Tensor | None,
        cache: Nothing,
        rotary: Callable[[Tensor], Mapping[str, Rotary]],
        choose: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = places.expand(hidden.shape[:2]) if valid is None else torch.where(valid, places, 0)
        newest = hidden[torch.arange(len(hidden)), last.amax(1)]
        own = [self.predicted(k, newest) for k in range(len(self.heads))]
        return torch.stack([choose(k, self.head(each)) for k, each in enumerate(own)], 1)


COMPONENTS = tuple(
    Component(slot, kind, made, (Implementation("reference", f"{__name__}:{module}"),), claims=claims)
    for slot, kind, made, module, claims in (
        ("embedding", "composed", Composed, "ComposedEmbedding", ()),
        ("head", "angles", Angles, "AnglesHead", ()),
        ("predictor", "medusa", Medusa, "MedusaHeads", ("own-head", "from-hidden")),
    )
)
