"""Latent attention in decoding: queries go to the latents, so that keys and values are never written out.

    q . (W_UK c) = (W_UK^T q) . c            sum_j p_j (W_UV c_j) = W_UV (sum_j p_j c_j)

Source: arXiv 2405.04434, section 2.1.2 and appendix C. W_UK and W_UV are the rows of `kv_b`, read through
its `matrix()`: the very weight that the map multiplies by, whatever policy made it. All heads then share one
key [c; k^R] and one value c per token, so that a step reads the cache and little else.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from composeformer_attention_mla.reference import LatentAttention


class Absorbed(LatentAttention):
    """`mla` as multi-query attention on the latents."""

    def attend(
        self,
        q_BTHN: Float[Tensor, "B T H N"],
        q_BTHR: Float[Tensor, "B T H R"],
        latent_BSC: Float[Tensor, "B S C"],
        key_BSR: Float[Tensor, "B S R"],
        seen: Bool[Tensor, "_ T S"] | None,
    ) -> Float[Tensor, "B T H V"]:
        kind = torch.promote_types(q_BTHN.dtype, torch.float32)
        B, T, H, _ = q_BTHN.shape
        # Heads read the latents beside a linear map, and answer for the sum of their gradients themselves.
        latent_BSC = self.replicated(latent_BSC).to(kind)
        matrix = self.kv_b.matrix()
        up_HNC, up_HVC = matrix.unflatten(0, (H, -1)).split([self.nope, self.value], 1)
        q_BTHC = torch.einsum("bthn,hnc->bthc", q_BTHN.to(matrix.dtype), up_HNC)
        scores = torch.baddbmm(
            q_BTHR.reshape(B, T * H, -1).to(kind) @ key_BSR.to(kind).mT,
            q_BTHC.reshape(B, T * H, -1).to(kind),
            latent_BSC.mT,
            beta=self.scale,
            alpha=self.scale,
        )
        if seen is None and T > 1:
            seen = torch.ones(T, T, dtype=torch.bool, device=scores.device).tril()[None]
        if seen is not None:
            scores = scores.view(B, T, H, -1).masked_fill(~seen[:, :, None], -torch.inf).flatten(1, 2)
        mixed_BTHC = (scores.softmax(-1) @ latent_BSC).view(B, T, H, -1).to(matrix.dtype)
        return torch.einsum("bthc,hvc->bthv", mixed_BTHC, up_HVC).to(q_BTHN.dtype)
