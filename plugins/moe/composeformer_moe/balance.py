"""Loads of experts, and the losses that even them out.

    balance = alpha sum_s T_s sum_i f_si P_si       f_si = E / (K T_s) count_si        P_si = 1 / T_s sum_{t in s} p_ti

over sequences (rows) s of T_s real tokens, with p the scores of all E experts, which sum to 1. Source: arXiv
2412.19437, equations 17 to 20, and arXiv 2405.04434, equations 23 to 25, which take the mean over sequences;
here each counts by its tokens, so that micro-batches add. No gradient passes the counts.

The z-loss, alpha sum_t logsumexp(logits_t)^2, is arXiv 2202.08906, equation 5, likewise a sum.

Shapes: B rows of T tokens, E experts, K chosen.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@torch.no_grad()
def loads(indices: Int[Tensor, "*N K"], num_experts: int) -> Int[Tensor, " E"]:
    """How many tokens each expert got. Integers, so that no order of adding matters; `num_experts` is none."""
    flat = indices.reshape(-1)
    return flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def balance_loss(
    scores: Float[Tensor, "B T E"], indices: Int[Tensor, "B T K"], valid: Bool[Tensor, "B T"] | None
) -> Float[Tensor, ""]:
    """The balance loss with alpha 1, over real tokens."""
    experts, top_k = scores.shape[-1], indices.shape[-1]
    length_B = torch.full((len(scores),), scores.shape[1], device=scores.device)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, :, None], 0)
        indices = indices.masked_fill(~valid[:, :, None], experts)
        length_B = valid.sum(1)
    flat = indices.flatten(1)
    bins_BF = flat.new_zeros(len(flat), experts + 1)
    counts_BE = bins_BF.scatter_add_(1, flat, torch.ones_like(flat))[:, :experts]
    # T f P is a sum over tokens, divided by T once.
    share_BE = counts_BE.to(scores.dtype) * (experts / top_k) / length_B.clamp(min=1)[:, None]
    return (share_BE * scores.sum(1)).sum()


def z_loss(logits: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"] | None) -> Float[Tensor, ""]:
    """The z-loss with alpha 1, over real tokens."""
    squares = logits.logsumexp(-1).square()
    return (squares if valid is None else squares.masked_fill(~valid, 0)).sum()
