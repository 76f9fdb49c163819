"""A cache that is a state: what all tokens but the last few have made of it, and a journal of what these few do.

A state can not be unwound, so it stays `max_rollback` tokens behind, and the steps of those tokens are kept beside it:
they are taken again before the next ones, and a token that is rolled back is struck from the journal. The state of a
head has K V elements, a step K + V + 2, so that a short journal is far smaller than a second state.

Rows differ in their number of real tokens: a journal is right-aligned, and what is not real in it does nothing.

Shapes: B rows, T new tokens, J = max_rollback, H heads, K features of a key, V of a value.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from composeformer.cache import rolled_back
from composeformer.errors import InputError
from composeformer.tensors import Batch
from gated_delta.documents import last_of, starts_of
from gated_delta.rule import Scanned, Starts, Steps

Scan = Callable[[Steps, Starts, Tensor], Scanned]


class StateCache:
    """`num_bytes` counts the state and the journal's steps, and no bookkeeping."""

    def __init__(
        self,
        heads: int,
        k_head_dim: int,
        v_head_dim: int,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_rollback: int = 0,
    ) -> None:
        self.max_length, self.max_rollback = max_length, max_rollback
        zeros = torch.zeros(batch_size, device=device, dtype=dtype)
        self.state = zeros[:, None, None, None].repeat(1, heads, k_head_dim, v_head_dim)
        row = zeros[:, None, None].repeat(1, max_rollback, heads)
        key, value = (row[..., None].repeat(1, 1, 1, size) for size in (k_head_dim, v_head_dim))
        # Queries are never read again.
        self.journal = Steps(key[..., :0], key, value, row, row.clone())
        self.real = torch.zeros(batch_size, max_rollback, device=device, dtype=torch.bool)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self._longest = torch.zeros_like(self.lengths)  # at the last rollback
        self.bound = 0  # no row is longer
        # Of the journal's tokens, and of the token that the state ends with; None where none are told.
        self._documents: Tensor | None = None
        self._last = torch.full_like(self.lengths, -1)

    @property
    def num_bytes(self) -> int:
        return self.state.nbytes + sum(each.nbytes for each in self.journal)

    def extend(self, batch: Batch, steps: Steps, scan: Scan) -> Float[Tensor, "B T H V"]:
        """Takes the steps of T tokens, those of padding undone, and gives what each token reads.

        Raises InputError when a row could exceed `max_length`, padding counted until the next rollback or reorder;
        and when some calls tell documents and some do not.
        """
        tokens = batch.ids.shape[1]
        if self.bound + tokens > self.max_length:
            told = f"{self.bound} + {tokens} tokens exceed max_length {self.max_length}"
            raise InputError(f"the cache is full: {told}")
        self._agree(batch.documents)
        real = torch.ones_like(batch.ids, dtype=torch.bool) if batch.valid is None else batch.valid
        self.lengths, self.bound = self.lengths + real.sum(1), self.bound + tokens
        steps = undone(steps, real)
        if not self.max_rollback:
            return self._move(steps, real, batch.documents, scan)
        held = self.journal._replace(q=torch.zeros_like(self.journal.k))
        joined = Steps(*(torch.cat(pair, 1) for pair in zip(held, steps, strict=True)))
        real = torch.cat([self.real, real], 1)
        order = real.to(torch.int8).argsort(dim=1, stable=True)  # what is not real comes first
        # The first T of the J + T leave the journal for the state; the others are read from it, and stay.
        joined = Steps(*(_picked(each, order) for each in joined))
        old, self.journal = (Steps(*(each[:, part] for each in joined)) for part in halves(tokens))
        real = real.gather(1, order)
        documents = starts = None
        if self._documents is not None and batch.documents is not None:
            documents = torch.cat([self._documents, batch.documents], 1).gather(1, order)
        read = self._move(old, real[:, :tokens], None if documents is None else documents[:, :tokens], scan)
        self.real = real[:, tokens:]
        if documents is not None:
            self._documents = documents[:, tokens:]
            starts = starts_of(self._documents, self.real, self._last)
        later, _ = scan(self.journal, starts, self.state)
        self.journal = self.journal._replace(q=self.journal.q[..., :0])
        return _picked(torch.cat([read, later], 1), order.argsort(dim=1))[:, self.max_rollback :]

    def _move(self, steps: Steps, real: Tensor, documents: Tensor | None, scan: Scan) -> Tensor:
        """Moves the state on by these steps, and gives what they read."""
        starts = None if documents is None else starts_of(documents, real, self._last)
        read, self.state = scan(steps, starts, self.state)
        if documents is not None:
            self._last = last_of(documents, real, self._last)
        return read

    def _agree(self, documents: Tensor | None) -> None:
        if not self.bound:
            self._last = torch.full_like(self.lengths, -1)
            self._documents = None if documents is None else self._last[:, None].repeat(1, self.max_rollback)
        elif (documents is None) != (self._documents is None):
            raise InputError("documents: must be given in all calls of a cache or in none")

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        """Forgets the last `counts[b]` real tokens of row b, down to `max_rollback` below its longest so far."""
        left, self._longest = rolled_back(counts, self.lengths, self._longest, self.max_rollback)
        dropped = self.lengths - left
        # How many real tokens stand from each on.
        behind = self.real.flip(1).cumsum(1).flip(1)
        self.real = self.real & (behind > dropped[:, None])
        self.journal = undone(self.journal, self.real)
        self.lengths = left
        self._settle()

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        """Row i becomes what row `index[i]` was."""
        index = index.to(self.lengths.device)
        self.state, self.real = self.state[index], self.real[index]
        self.journal = Steps(*(each[index] for each in self.journal))
        self.lengths, self._longest = self.lengths[index], self._longest[index]
        if self._documents is not None:
            self._documents, self._last = self._documents[index], self._last[index]
        self._settle()

    def _settle(self) -> None:
        self.bound = int(self.lengths.max()) if len(self.lengths) else 0


def halves(tokens: int) -> tuple[slice, slice]:
    """The first so many tokens, and the rest."""
    return slice(tokens), slice(tokens, None)


def undone(steps: Steps, real: Bool[Tensor, "B T"]) -> Steps:
    """The steps, those of tokens that are not real with g = b = 0 and a key and value of zeros: they do nothing."""
    masks = (~real)[:, :, None], (~real)[:, :, None, None]
    return Steps(*(each.masked_fill(masks[each.ndim - 3], 0) for each in steps))


def _picked(x: Tensor, order: Int[Tensor, "B N"]) -> Tensor:
    """The tokens (B, N, ...) in another order, row by row."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
