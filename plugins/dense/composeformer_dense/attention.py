"""Grouped-query attention (`gqa`), plainly: two matrix products around a softmax.

    q, k, v = x Wq, x Wk, x Wv         per head: out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j
    y = out Wo

Source: arXiv 2305.13245, with arXiv 1706.03762 equation 1. Query and key heads may be normalised first
(arXiv 2302.05442); scores may be capped (arXiv 2408.00118), and compete with a learnt sink (arXiv
2309.17453, as a logit in gpt-oss). Scores, softmax and sums are in fp32 (fp64 stays fp64).

Shapes: B rows, T new tokens, S keys, H query heads, K key heads, G = H / K, D features of a head.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from composeformer.cache import TokenCache
from composeformer.tensors import Batch, Output, own_keys
from composeformer_dense.configs.attention import GQA

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class Attention(nn.Module):
    """The reference. An implementation overrides `attend`."""

    sinks: Tensor | None

    def __init__(self, config: GQA, site: "TensorSite") -> None:
        super().__init__()
        self.head_dim = config.head_width(site.width)
        self.window, self.cap = config.window, config.cap
        self.q, self.k, self.v, self.o = (site.linear(name) for name in ("q", "k", "v", "o"))
        self.position: Any = site.part("position")
        self.q_norm = site.part("q_norm") if config.qk_norm is not None else None
        self.k_norm = site.part("k_norm") if config.qk_norm is not None else None
        self.sinks = site.weight("sinks") if config.sinks else None

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch, cache: TokenCache | None = None) -> Output:
        """Attention over x and all that a cache holds, to which x is added. Padding gives o's bias."""
        q_BTHD, k_BTKD, v_BTKD = self.heads(x, batch)
        if cache is None:
            seen = own_keys(batch, self.window)
        else:
            cached = cache.append(batch, k=k_BTKD, v=v_BTKD)
            k_BTKD, v_BTKD = (cached.tensors[name].to(q_BTHD.dtype) for name in ("k", "v"))
            seen = cached.seen
        if batch.valid is None:
            mixed_BTHD = self.attend(q_BTHD, k_BTKD, v_BTKD, seen)
        else:
            # Padding sees every key, lest a row of the softmax be empty; what it finds is dropped.
            padding = ~batch.valid[:, :, None]
            mixed_BTHD = self.attend(q_BTHD, k_BTKD, v_BTKD, None if seen is None else seen | padding)
            mixed_BTHD = mixed_BTHD.masked_fill(padding[..., None], 0)
        return Output(self.o(mixed_BTHD.flatten(2)))

    def heads(self, x: Float[Tensor, "B T D"], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, K, D): projected, normalised, rotated."""
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        table = batch.tables[self.position.key]
        return self.position.rotate(q, table), self.position.rotate(k, table).to(q.dtype), v.to(q.dtype)

    def attend(
        self,
        q_BTHD: Float[Tensor, "B T H D"],
        k_BSKD: Float[Tensor, "B S K D"],
        v_BSKD: Float[Tensor, "B S K D"],
        seen: Bool[Tensor, "_ T S"] | None,
    ) -> Float[Tensor, "B T H D"]:
        """The attention core. Every query sees a key at least; None means causal: they are the last T of S tokens."""
        kind = torch.promote_types(q_BTHD.dtype, torch.float32)
        B, T, _, D = q_BTHD.shape
        q_BTKGD = q_BTHD.to(kind).reshape(B, T, k_BSKD.shape[2], -1, D)
        scores_BKGTS = torch.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD.to(kind)) * self.head_dim**-0.5
        if self.cap is not None:
            scores_BKGTS = self.cap * torch.tanh(scores_BKGTS / self.cap)
        if seen is None:
            seen = torch.ones(scores_BKGTS.shape[-2:], dtype=torch.bool, device=q_BTHD.device)
            seen = seen.tril(seen.shape[1] - T)[None]
        scores_BKGTS = scores_BKGTS.masked_fill(~seen[:, None, None], -torch.inf)
        if self.sinks is None:
            weights_BKGTS = scores_BKGTS.softmax(-1)
        else:
            sinks = self.sinks.to(kind).view(1, *q_BTKGD.shape[2:4], 1, 1).expand(*scores_BKGTS.shape[:-1], 1)
            weights_BKGTS = torch.cat([scores_BKGTS, sinks], -1).softmax(-1)[..., :-1]
        mixed_BTKGD = torch.einsum("bkgts,bskd->btkgd", weights_BKGTS, v_BSKD.to(kind))
        return mixed_BTKGD.flatten(2, 3).to(q_BTHD.dtype)

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> TokenCache:
        """An empty cache on the weights' device, in the dtype of the keys' projection."""
        # Not of its matrix: where FSDP2 shards the weight, that is whole in a forward alone.
        shape = (self.k.weight.shape[0] // self.head_dim, self.head_dim)
        return TokenCache(
            {"k": shape, "v": shape},
            batch_size,
            max_length,
            device=self.k.weight.device,
            dtype=self.k.dtype,
            window=self.window,
            max_rollback=max_rollback,
        )
