"""Mixers that score pairs of tokens, not by a softmax over rotated keys: positions are distances, counted in tokens.

Shapes: B rows, T new tokens, S cached ones, D features of a head.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from composeformer.cache import TokenCache
from composeformer.config import Config, config, field
from composeformer.contracts import Cache, Component, Core, Cost, Declared, Implementation, Linear, Phase
from composeformer.site import Site
from composeformer.tensors import Batch, Output, own_keys


@config
class Pairs(Config):
    """One head of queries, keys and values."""

    head_dim: int = field(
        4, minimum=1, maximum=8, unit="features", help="Features of queries, keys and values."
    )

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="qkv", inputs=site.width, outputs=3 * self.head_dim)
        yield Linear(name="output", inputs=self.head_dim, outputs=site.width)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="scores and sums", per_key=4 * self.head_dim)
        yield Cache(name="keys and values", per_token=2 * self.head_dim)


class Scored(nn.Module):
    """Subclasses say what each key weighs."""

    def __init__(self, config: Any, site: Any) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.output = site.linear("qkv"), site.linear("output")

    def weights(self, scores: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        """Of keys (B, T, S), from their scores, those that are seen, and how many seen ones come after each."""
        raise AssertionError

    def forward(self, x: Tensor, batch: Batch, cache: TokenCache | None = None) -> Output:
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = own_keys(batch)
        if cache is not None:
            cached = cache.append(batch, k=k, v=v)
            k, v, seen = cached.tensors["k"], cached.tensors["v"], cached.seen
        if seen is None:
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])[None]
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).mT * self.config.head_dim**-0.5
        # Slots stand in the order of their tokens, for there is no window.
        distance = seen.flip(-1).cumsum(-1).flip(-1) - 1
        mixed = self.weights(scores.masked_fill(~seen, 0), seen, distance) @ v.to(wide)
        return Output(self.output(mixed.to(x.dtype)))

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> TokenCache:
        return TokenCache(
            dict.fromkeys("kv", (self.config.head_dim,)),
            batch_size,
            max_length,
            device=self.output.weight.device,
            dtype=self.output.dtype,
            max_rollback=max_rollback,
        )


@config
class SigmoidAlibi(Pairs):
    """Each key weighs a sigmoid of its own (arXiv 2409.04431), less the farther it is (arXiv 2108.12409)."""

    slope: float = field(0.5, minimum=0.0, help="What a score loses for each token between.")


class SigmoidAlibiMixer(Scored):
    """No weight depends on another: the bias - log n keeps their sum about one."""

    def weights(self, scores: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        count = seen.sum(-1, keepdim=True).clamp(min=1)
        return torch.sigmoid(scores - self.config.slope * distance - count.log()) * seen


@config
class Dilated(Pairs):
    """A token sees itself and every second one before it (arXiv 1904.10509, strided)."""

    stride: int = field(2, minimum=1, maximum=4, unit="tokens", help="From each key to the next.")


class DilatedMixer(Scored):
    def weights(self, scores: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        seen = seen & (distance % self.config.stride == 0)
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen


@config
class Signed(Pairs):
    """Weights are plain products, of any sign, and sum to nothing (arXiv 2307.08621 without decay)."""


class SignedMixer(Scored):
    def weights(self, scores: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        return scores * seen


COMPONENTS = tuple(
    Component("mixer", kind, made, (Implementation("reference", f"{__name__}:{module}"),), claims=claims)
    for kind, made, module, claims in (
        ("sigmoid-alibi", SigmoidAlibi, "SigmoidAlibiMixer", ("sees",)),
        ("dilated", Dilated, "DilatedMixer", ("averages",)),
        ("signed", Signed, "SignedMixer", ("sees", "set")),
    )
)
