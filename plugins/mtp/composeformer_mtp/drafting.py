"""Drafting: the modules of `mtp` as a cheap model that guesses what the main model will say.

The main model has read a row up to token t, and token t + 1 is chosen. Module 1 makes of (h_t, x_{t+1}) a guess
of x_{t+2}, module 2 of module 1's hidden state and that guess a guess of x_{t+3}, and so on. A module's cache
has an entry for each position up to t. Those of module k for the last k - 1 positions rest on guesses: the next
call forgets them and makes them again from the tokens that were taken, for which it needs module k - 1's hidden
state k - 1 places back, kept from the call before.

Columns of a call are right-aligned, so that the last one is each row's newest token.

Shapes: B rows, N new positions, W columns, D hidden size, V vocabulary, K modules.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from composeformer.contracts import Phase
from composeformer.tensors import Batch, Rotary

if TYPE_CHECKING:
    from composeformer.cache import MixerCache
    from composeformer_mtp.module import MultiTokenPrediction


class Drafting:
    """The caches of the modules' mixers, and what the next call goes on from."""

    def __init__(self, caches: "Sequence[MixerCache | None]", batch_size: int, device: torch.device) -> None:
        self.caches = list(caches)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        # For module k the hidden states of module k - 1 at the first position that is made again.
        self.kept: list[Tensor | None] = [None] * len(self.caches)

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self.caches if cache is not None)


def draft(
    module: "MultiTokenPrediction",
    hidden: Float[Tensor, "B N D"],
    ids: Int[Tensor, "B N"],
    valid: Bool[Tensor, "B N"] | None,
    cache: Drafting,
    rotary: Callable[[Int[Tensor, "B N"]], Mapping[str, Rotary]],
    choose: Callable[[int, Float[Tensor, "B V"]], Int[Tensor, " B"]],
) -> Int[Tensor, "B K"]:
    """A guess of each module, for every row with a new position.

    `hidden` are the main model's (behind its last norm) at the new positions, `ids` the tokens that follow them,
    taken for good; `valid` is False where a row has no position. `rotary` gives the tables of positions, and
    `choose(k, logits)` a token for each row from the logits of module k, counted from 0.
    """
    new = torch.full_like(cache.lengths, ids.shape[1]) if valid is None else valid.sum(1)
    if valid is not None:
        order = valid.to(torch.int8).argsort(dim=1, stable=True)
        ids, hidden = ids.gather(1, order), hidden.gather(1, order[..., None].expand_as(hidden))
    live, before = new > 0, cache.lengths
    real = new
    drafts: list[Tensor] = []
    for k, depth in enumerate(module.depths):
        again = torch.where(live, before.clamp(max=k), 0)
        if k:
            ids = torch.cat([ids, drafts[-1][:, None]], 1)
            made = hidden
            hidden, real = _joined(made, cache.kept[k], real, live & (before >= k))
            cache.kept[k] = _kept(made, cache.kept[k], k, live)
        held = cache.caches[k]
        if held is not None:
            held.rollback(again)
        hidden, logits = _step(module, depth, hidden, ids, real, before - again, held, rotary)
        drafts.append(choose(k, logits))
    cache.lengths = before + new
    return torch.stack(drafts, 1)


def _joined(
    made: Float[Tensor, "B W D"], kept: Tensor | None, real: Int[Tensor, " B"], joins: Bool[Tensor, " B"]
) -> tuple[Float[Tensor, "B W+1 D"], Int[Tensor, " B"]]:
    """Module k - 1's hidden states with the one kept before the first, where there is one."""
    wider = torch.cat([made.new_zeros(made.shape[0], 1, made.shape[2]), made], 1)
    if kept is not None:
        rows = torch.arange(len(made), device=made.device)
        wider[rows, made.shape[1] - real] = kept
    return wider, real + joins


def _kept(
    made: Float[Tensor, "B W D"], kept: Tensor | None, k: int, live: Bool[Tensor, " B"]
) -> Float[Tensor, "B D"]:
    """Module k - 1's hidden state k places before the next position; rows without a new one keep theirs."""
    last = made[:, -k] if made.shape[1] >= k else made.new_zeros(made.shape[0], made.shape[2])
    return last if kept is None else torch.where(live[:, None], last, kept)


def _step(
    module: "MultiTokenPrediction",
    depth: "torch.nn.Module",
    hidden: Float[Tensor, "B W D"],
    ids: Int[Tensor, "B W"],
    real: Int[Tensor, " B"],
    start: Int[Tensor, " B"],
    cache: "MixerCache | None",
    rotary: Callable[[Int[Tensor, "B N"]], Mapping[str, Rotary]],
) -> tuple[Float[Tensor, "B W D"], Float[Tensor, "B V"]]:
    """One module over the last `real` columns of each row, whose first position is `start`."""
    width = int(real.max())
    hidden, ids = hidden[:, hidden.shape[1] - width :], ids[:, ids.shape[1] - width :]
    columns = torch.arange(width, device=ids.device)[None]
    pads = width - real[:, None]
    valid = None if int(real.min()) == width else columns >= pads
    positions = (start[:, None] + columns - pads).clamp(min=0)
    phase: Phase = "decode" if width <= 2 * module.num_drafts + 1 else "prefill"
    batch = Batch(ids, positions, None, valid, rotary(positions), phase)
    made, _ = depth(hidden, module.embedding(ids), batch, cache)
    return made, module.head(made[:, -1])
