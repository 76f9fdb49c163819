"""Grouped-query attention through PyTorch's `scaled_dot_product_attention`, which never stores the scores.

A mask is given only where one is needed, for without it the kernels skip half of the square.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from composeformer_dense.attention import Attention


class SDPA(Attention):
    """`gqa` without sinks and cap."""

    def attend(
        self,
        q_BTHD: Float[Tensor, "B T H D"],
        k_BSKD: Float[Tensor, "B S K D"],
        v_BSKD: Float[Tensor, "B S K D"],
        seen: Bool[Tensor, "_ T S"] | None,
    ) -> Float[Tensor, "B T H D"]:
        groups = q_BTHD.shape[2] // k_BSKD.shape[2]
        flash = seen is None and q_BTHD.dtype in (torch.bfloat16, torch.float16)
        if groups > 1 and q_BTHD.is_cuda and not flash:
            # On CUDA only the flash kernel knows grouped heads; without a kernel the scores are stored.
            k_BSKD, v_BSKD = k_BSKD.repeat_interleave(groups, 2), v_BSKD.repeat_interleave(groups, 2)
            groups = 1
        mixed_BHTD = scaled_dot_product_attention(
            q_BTHD.transpose(1, 2),
            k_BSKD.transpose(1, 2),
            v_BSKD.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None],
            is_causal=seen is None and q_BTHD.shape[1] > 1,
            scale=self.head_dim**-0.5,
            enable_gqa=groups > 1,
        )
        return mixed_BHTD.transpose(1, 2)
