"""Multi-head latent attention (`mla`), plainly: keys and values of every head written out.

    c^Q = norm(h W_DQ)        [q^C; q^R] = c^Q [W_UQ; W_QR]          per head; q^R is then rotated
    c^KV, k^R = h W_DKV, h W_KR            c^KV is normalised, k^R rotated; both are cached, for all heads
    [k^C; v] = norm(c^KV) [W_UK; W_UV]                               per head
    o_t = sum_j softmax_j(scale (q^C_t . k^C_j + q^R_t . k^R_j)) v_j          y = o W_O

Source: arXiv 2405.04434, equations 9 to 19 (37 to 47 in its appendix); arXiv 2412.19437, equations 1 to 11.
The norms are those of V2's section 3.1.2. The scale is 1 / sqrt(N + R), times what the position says of it
(its `score_scale`; 1 where it says nothing). Scores, softmax and sums are in fp32 (fp64 stays fp64).

Maps are named as in the released weights: `q_a` W_DQ, `q_b` (W_UQ, W_QR), `kv_a` (W_DKV, W_KR), `kv_b`
(W_UK, W_UV), `o` W_O; `q` where queries are not compressed.

Shapes: B rows, T new tokens, S keys, H heads, N features without a position, R rotary ones, V of a value,
C of the latent.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from composeformer.cache import TokenCache
from composeformer.tensors import Batch, Output, Rotary, own_keys
from composeformer_attention_mla.config import MLA

if TYPE_CHECKING:
    from composeformer.assemble import TensorSite


class LatentAttention(nn.Module):
    """The reference. An implementation overrides `attend`."""

    def __init__(self, config: MLA, site: "TensorSite") -> None:
        super().__init__()
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank, self.scale, self.window = config.kv_lora_rank, config.scale, config.window
        self.compressed = config.q_lora_rank is not None
        if self.compressed:
            self.q_a, self.q_a_norm, self.q_b = site.linear("q_a"), site.part("q_a_norm"), site.linear("q_b")
        else:
            self.q = site.linear("q")
        self.kv_a, self.kv_a_norm = site.linear("kv_a"), site.part("kv_a_norm")
        self.kv_b, self.o = site.linear("kv_b"), site.linear("o")
        self.position: Any = site.part("position")
        self.replicated: Callable[[Tensor], Tensor] = site.replicated

    def forward(self, x: Float[Tensor, "B T D"], batch: Batch, cache: TokenCache | None = None) -> Output:
        """Attention over x and all that a cache holds, to which x is added. Padding gives o's bias."""
        if batch.valid is not None:
            x = x.masked_fill(~batch.valid[:, :, None], 0)
        rotary = batch.tables[self.position.key]
        q_BTHN, q_BTHR = self.queries(x, rotary)
        latent_BSC, key_BSR = self.latents(x, rotary)
        if cache is None:
            seen = own_keys(batch, self.window)
        else:
            cached = cache.append(batch, latent=latent_BSC, rope=key_BSR)
            latent_BSC = cached.tensors["latent"].to(latent_BSC.dtype)
            key_BSR = cached.tensors["rope"].to(key_BSR.dtype)
            seen = cached.seen
        if batch.valid is None:
            mixed_BTHV = self.attend(q_BTHN, q_BTHR, latent_BSC, key_BSR, seen)
        else:
            # Padding sees every key, lest a row of the softmax be empty; what it finds is dropped.
            padding = ~batch.valid[:, :, None]
            seen = None if seen is None else seen | padding
            mixed_BTHV = self.attend(q_BTHN, q_BTHR, latent_BSC, key_BSR, seen)
            mixed_BTHV = mixed_BTHV.masked_fill(padding[..., None], 0)
        return Output(self.o(mixed_BTHV.flatten(2)))

    def queries(self, x: Float[Tensor, "B T D"], rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Each head's query: its features without a position (B, T, H, N) and its rotated ones (B, T, H, R)."""
        q = self.q_b(self.q_a_norm(self.q_a(x))) if self.compressed else self.q(x)
        q_BTHN, q_BTHR = q.unflatten(-1, (-1, self.nope + self.rope)).split([self.nope, self.rope], -1)
        return q_BTHN, self.position.rotate(q_BTHR, rotary)

    def latents(self, x: Float[Tensor, "B T D"], rotary: Rotary) -> tuple[Tensor, Tensor]:
        """What a cache holds of each token: the normalised latent (B, T, C), the rotated key (B, T, R)."""
        latent_BTC, key_BTR = self.kv_a(x).split([self.rank, self.rope], -1)
        key_BTR = self.position.rotate(key_BTR[:, :, None], rotary)[:, :, 0]
        return self.kv_a_norm(latent_BTC), self.replicated(key_BTR)

    def attend(
        self,
        q_BTHN: Float[Tensor, "B T H N"],
        q_BTHR: Float[Tensor, "B T H R"],
        latent_BSC: Float[Tensor, "B S C"],
        key_BSR: Float[Tensor, "B S R"],
        seen: Bool[Tensor, "_ T S"] | None,
    ) -> Float[Tensor, "B T H V"]:
        """The attention core. Every query sees a key at least; None means causal: they are the last T of S tokens."""
        kind = torch.promote_types(q_BTHN.dtype, torch.float32)
        q_BTHD, k_BSHD, v_BSHV = self.heads(q_BTHN, q_BTHR, latent_BSC, key_BSR)
        scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD.to(kind), k_BSHD.to(kind)) * self.scale
        if seen is None:
            seen = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BTHN.device)
            seen = seen.tril(seen.shape[1] - seen.shape[0])[None]
        weights_BHTS = scores_BHTS.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        mixed_BTHV = torch.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV.to(kind))
        return mixed_BTHV.to(q_BTHN.dtype)

    def heads(
        self,
        q_BTHN: Float[Tensor, "B T H N"],
        q_BTHR: Float[Tensor, "B T H R"],
        latent_BSC: Float[Tensor, "B S C"],
        key_BSR: Float[Tensor, "B S R"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, N + R), keys (B, S, H, N + R) and values (B, S, H, V), in the queries' dtype."""
        kv = self.kv_b(latent_BSC).unflatten(-1, (-1, self.nope + self.value)).to(q_BTHN.dtype)
        k_BSHN, v_BSHV = kv.split([self.nope, self.value], -1)
        k_BSHR = key_BSR.to(q_BTHN.dtype)[:, :, None].expand(*k_BSHN.shape[:3], -1)
        return torch.cat([q_BTHN, q_BTHR], -1), torch.cat([k_BSHN, k_BSHR], -1), v_BSHV

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> TokenCache:
        """An empty cache on the weights' device, in the dtype of the latents' projection."""
        return TokenCache(
            {"latent": (self.rank,), "rope": (self.rope,)},
            batch_size,
            max_length,
            device=self.kv_a.weight.device,
            dtype=self.kv_a.dtype,
            window=self.window,
            max_rollback=max_rollback,
        )
