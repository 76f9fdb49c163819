"""Which experts a token chooses: an exact top-k, within the best groups where there are groups.

Ties go to the lowest index on every device and in every recomputation. `torch.topk` promises no order among
equal values, a stable sort does. Many scores are sorted by `topk` all the same, as integers of which no two are
alike: the floats' bits, made monotone, and behind them the index counted down.

Shapes: N tokens, E experts, G groups of neighbouring experts, K experts chosen.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Up to here a sort's one kernel is quicker than the several that make integers.
FEW = 4096


def best(scores: Float[Tensor, "*N E"], k: int) -> Int[Tensor, "*N K"]:
    """Indices of the k largest scores (fp32 or fp64), the largest first, among equal ones the lowest first.

    0.0 and -0.0 are equal. Where NaN comes is left open.
    """
    scores = scores.detach()
    if scores.dtype == torch.float64 or scores.numel() <= FEW:  # beside 64 bits there is no room for an index
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ranks(scores).topk(k).indices


def ranks(scores: Float[Tensor, "*N E"]) -> Int[Tensor, "*N E"]:
    """Integers ordered as the fp32 scores are, and among equal ones against their index."""
    experts = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32)  # adding zero makes 0.0 of -0.0
    monotone = bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)
    return monotone.long() * experts + torch.arange(experts - 1, -1, -1, device=bits.device)


def in_best_groups(
    scores: Float[Tensor, "*N E"], num_groups: int, top_k_groups: int, group_score: str
) -> Float[Tensor, "*N E"]:
    """The scores with those outside the `top_k_groups` best groups at minus infinity: below any score, as zero
    is not. A group's score is its `max` or the sum of its `top2`.
    """
    if top_k_groups >= num_groups:
        return scores
    size = scores.shape[-1] // num_groups
    scores_NGE = scores.detach().view(*scores.shape[:-1], num_groups, size)
    scores_NG = scores_NGE.amax(-1) if group_score == "max" else scores_NGE.topk(2).values.sum(-1)
    barred_NG = torch.ones_like(scores_NG, dtype=torch.bool)
    barred_NG.scatter_(-1, best(scores_NG, top_k_groups), False)
    return scores_NGE.masked_fill(barred_NG[..., None], -torch.inf).flatten(-2)
