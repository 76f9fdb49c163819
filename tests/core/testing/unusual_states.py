"""Mixers whose cache does not grow: a causal short convolution, and linear attention with a feature map.

A row keeps what its last R + 1 real tokens left, the newest first, so that R of them may be forgotten.

Shapes: B rows, T new tokens, D features, W taps, R tokens that may be rolled back.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from composeformer.cache import rolled_back
from composeformer.config import Config, config, field
from composeformer.contracts import (
    Cache,
    Component,
    Core,
    Cost,
    Declared,
    Implementation,
    Linear,
    Phase,
    Weight,
)
from composeformer.formats import BITS
from composeformer.site import Site
from composeformer.tensors import Batch, Output

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class States:
    """What each row's last tokens left (B, R + 1, ...), and their documents."""

    def __init__(
        self, shape: tuple[int, ...], rows: int, room: int, like: Tensor, dtype: torch.dtype
    ) -> None:
        self.states = torch.zeros(rows, room + 1, *shape, dtype=dtype, device=like.device)
        self.documents = torch.full((rows, room + 1), -1, device=like.device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.longest = torch.zeros_like(self.lengths)

    def read(self, batch: Batch, each: Tensor, step: Step) -> Tensor:
        """What `step` reads at each token (B, T, ...); it makes (read, next state) of a state and a token."""
        real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
        documents = torch.zeros_like(batch.ids) if batch.documents is None else batch.documents
        found = []
        for token, document, valid in zip(each.unbind(1), documents.unbind(1), real.unbind(1), strict=True):
            same = (document == self.documents[:, 0]).view(-1, *[1] * (self.states.ndim - 2))
            read, state = step(torch.where(same, self.states[:, 0], 0), token)
            found.append(read)
            moved = torch.cat([state[:, None], self.states[:, :-1]], 1)
            behind = torch.cat([document[:, None], self.documents[:, :-1]], 1)
            self.states = torch.where(valid.view(-1, *[1] * (moved.ndim - 1)), moved, self.states)
            self.documents = torch.where(valid[:, None], behind, self.documents)
            self.lengths = self.lengths + valid
        return torch.stack(found, 1)

    def rollback(self, counts: Tensor) -> None:
        most = self.states.shape[1] - 1
        left, self.longest = rolled_back(counts, self.lengths, self.longest, most)
        index = torch.arange(most + 1, device=left.device) + (self.lengths - left)[:, None]
        rows = torch.arange(len(left), device=left.device)[:, None]
        index, self.lengths = index.clamp(max=most), left
        self.states, self.documents = self.states[rows, index], self.documents[rows, index]

    def reorder(self, index: Tensor) -> None:
        self.states, self.documents = self.states[index], self.documents[index]
        self.lengths, self.longest = self.lengths[index], self.longest[index]

    @property
    def num_bytes(self) -> int:
        return self.states.nbytes


class Recurrent(nn.Module):
    """A mixer of one `step`; `shape` is that of its state, kept in `kept`."""

    shape: tuple[int, ...]
    kept: torch.dtype
    output: Any

    def forward(self, x: Tensor, batch: Batch, cache: States | None = None) -> Output:
        if batch.valid is not None:  # what stands at padding may be NaN, which no gradient forgets
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        cache = self.new_cache(*x.shape[:2]) if cache is None else cache
        return Output(self.output(cache.read(batch, self.entering(x).to(self.kept), self.step).to(x.dtype)))

    def entering(self, x: Tensor) -> Tensor:
        """What steps are made of."""
        return x

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> States:
        return States(self.shape, batch_size, max_rollback, self.output.weight, self.kept)


@config
class ShortConv(Config):
    """Each feature alone is a weighted sum of its last W values (arXiv 2302.10866)."""

    taps: int = field(3, minimum=2, maximum=8, unit="tokens", help="How many tokens are summed.")

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Weight(name="taps", shape=(self.taps, site.width))
        yield Linear(name="output", inputs=site.width, outputs=site.width)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        yield Core(name="convolution", constant=2 * self.taps * site.width)
        yield Cache(name="inputs", constant=(self.taps - 1) * site.width)


class ShortConvolution(Recurrent):
    """Its state are the last W - 1 inputs, the newest first."""

    def __init__(self, config: ShortConv, site: Any) -> None:
        super().__init__()
        self.taps, self.output = site.weight("taps"), site.linear("output")
        self.shape = (config.taps - 1, site.width)

    @property
    def kept(self) -> torch.dtype:
        return self.output.dtype

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:  # (B, W - 1, D), (B, D)
        seen = torch.cat([token[:, None], state], 1)
        wide = torch.promote_types(token.dtype, torch.float32)
        return (seen.to(wide) * self.taps.to(wide)).sum(1), seen[:, :-1]


@config
class LinearAttention(Config):
    """y = phi(q) S / phi(q) z, S and z the sums of phi(k) v and of phi(k); phi = elu + 1 (arXiv 2006.16236)."""

    head_dim: int = field(
        4, minimum=1, maximum=8, unit="features", help="Features of queries, keys and values."
    )

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="qkv", inputs=site.width, outputs=3 * self.head_dim)
        yield Linear(name="output", inputs=self.head_dim, outputs=site.width)

    def cost(self, site: Site, phase: Phase) -> Iterable[Cost]:
        elements = self.head_dim * (self.head_dim + 1)
        bits = BITS[site.spec.formats.activations]
        yield Core(name="sums", constant=4 * elements)
        # In fp32 at least: among bfloat16 elements each counts as two.
        yield Cache(name="sums", constant=elements * max(bits, 32) // bits)


class LinearAttentionMixer(Recurrent):
    """Its state is S with z as a last column, in fp32 or wider."""

    def __init__(self, config: LinearAttention, site: Any) -> None:
        super().__init__()
        self.qkv, self.output = site.linear("qkv"), site.linear("output")
        self.shape = (config.head_dim, config.head_dim + 1)

    @property
    def kept(self) -> torch.dtype:
        return torch.promote_types(self.output.dtype, torch.float32)

    def entering(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def step(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = token.chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = state + k[:, :, None] * F.pad(v, (0, 1), value=1.0)[:, None]
        read = (q[:, None] @ state)[:, 0]
        return read[:, :-1] / read[:, -1:], state


COMPONENTS = tuple(
    Component("mixer", kind, made, (Implementation("reference", f"{__name__}:{module}"),), claims=claims)
    for kind, made, module, claims in (
        ("short-conv", ShortConv, "ShortConvolution", ()),
        ("linear-attention", LinearAttention, "LinearAttentionMixer", ("sees", "set", "averages")),
    )
)
