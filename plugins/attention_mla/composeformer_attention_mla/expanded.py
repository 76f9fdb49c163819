"""Latent attention in training and prefill: keys and values written out once, then PyTorch's fused attention.

The scores are never stored. A mask is given only where one is needed, for without it the kernels skip half
of the square.
"""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from composeformer_attention_mla.reference import LatentAttention


class Expanded(LatentAttention):
    """`mla` as multi-head attention."""

    def attend(
        self,
        q_BTHN: Float[Tensor, "B T H N"],
        q_BTHR: Float[Tensor, "B T H R"],
        latent_BSC: Float[Tensor, "B S C"],
        key_BSR: Float[Tensor, "B S R"],
        seen: Bool[Tensor, "_ T S"] | None,
    ) -> Float[Tensor, "B T H V"]:
        q_BTHD, k_BSHD, v_BSHV = self.heads(q_BTHN, q_BTHR, latent_BSC, key_BSR)
        # The flash kernels want queries, keys and values of one width; without one the scores are stored.
        short = q_BTHD.shape[-1] - v_BSHV.shape[-1]
        if short > 0:
            v_BSHV = pad(v_BSHV, (0, short))
        elif short < 0:
            q_BTHD, k_BSHD = pad(q_BTHD, (0, -short)), pad(k_BSHD, (0, -short))
        mixed_BHTD = scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSHD.transpose(1, 2),
            v_BSHV.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None],
            is_causal=seen is None and q_BTHD.shape[1] > 1,
            scale=self.scale,
        )
        return mixed_BHTD.transpose(1, 2)[..., : self.value]
