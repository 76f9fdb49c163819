"""Experts as one batched product over blocks of equal size: for any dtype and width, without a loop.

Rows are sorted by expert. Each expert's are padded with zeros to whole blocks of `size` = ceil(M / E) rows,
and each block is multiplied by its expert's weight. With S experts that have rows, the blocks are at most

    sum_e ceil(count_e / size) <= (M + min(S, M) (size - 1)) / size <= 2 E

whatever the load: shapes are static, no count is read on the host, and the copies are of at most twice the
weights and twice the rows. Few rows (M <= E: size 1) copy the weights of theirs alone.

Shapes: M rows, E experts, N blocks of `size` rows, I inputs, O outputs of a map.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from composeformer_moe.reference import MixtureOfExperts, times


class Batched(MixtureOfExperts):
    """`moe` by `torch.bmm`. The weights are what the maps' `matrix()` gives."""

    def experts(self, rows: Float[Tensor, "M D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "M D"]:
        expert_N, slot_M, size = blocks(counts, len(rows))
        # One slot more, which takes the rows of no expert and is dropped.
        x_NSD = rows.new_zeros(len(expert_N) * size + 1, rows.shape[1]).index_copy(0, slot_M, rows)[:-1]
        x_NSD = x_NSD.view(len(expert_N), size, rows.shape[1])
        gate_NOI, up_NOI, down_NOI = (each.matrix()[expert_N] for each in (self.gate, self.up, self.down))
        inner_NSI = F.silu(times(x_NSD, gate_NOI)) * times(x_NSD, up_NOI)
        found = times(inner_NSI, down_NOI).flatten(0, 1)
        return F.pad(found, (0, 0, 0, 1))[slot_M]


def blocks(counts: Int[Tensor, " E"], rows: int) -> tuple[Int[Tensor, " N"], Int[Tensor, " M"], int]:
    """Each block's expert, each row's slot in the blocks (the one past the last for a row of no expert), and
    the size of a block.
    """
    experts = len(counts)
    size = max(1, -(-rows // experts))
    number = (rows + min(experts, rows) * (size - 1)) // size
    ends = counts.cumsum(0)
    block_ends = ((counts + size - 1) // size).cumsum(0)
    places = torch.arange(max(number, rows), device=counts.device)
    expert_N = torch.searchsorted(block_ends, places[:number], right=True).clamp(max=experts - 1)
    expert_M = torch.searchsorted(ends, places[:rows], right=True)
    # Rows before the expert's first, in the blocks and in the sorted rows.
    shift_E = torch.cat([block_ends.new_zeros(1), block_ends[:-1]]) * size - (ends - counts)
    slot_M = places[:rows] + shift_E[expert_M.clamp(max=experts - 1)]
    return expert_N, torch.where(expert_M < experts, slot_M, number * size), size
