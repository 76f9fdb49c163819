"""Static caches of per-token tensors, with rollback and reorder.

A `TokenCache` keeps named tensors for each cached token, in slots allocated once: keys and values, or a
latent and a rotary key. The n-th real token of a row stands in slot n; under a window, in slot n modulo
`window + max_rollback`, a ring. So the row's length alone says which token each slot holds and what a query
may see: nothing is stored beside the payload, save documents where they are packed.

Padding has no slot: it moves no row on, takes nothing out of a window, and is no token to roll back. Lengths
are a device tensor per row, and `bound` is a host number no row exceeds, so that reads stay short without
asking the device.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from composeformer.counting import orders
from composeformer.errors import InputError
from composeformer.inputs import check_integers
from composeformer.tensors import Batch, own_keys, visible


class MixerCache(Protocol):
    """What every mixer's cache can do; the mixer alone appends to it."""

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        """Forgets the last `counts[b]` real tokens of row b, down to `max_rollback` below its longest so far."""

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        """Row i becomes what row `index[i]` was."""

    @property
    def num_bytes(self) -> int:
        """Bytes of payload allocated."""


class Cached(NamedTuple):
    """The tensors (B, S, ...) by name, and which of their S tokens each of the T queries sees.

    `seen` None: the queries are the last T of the S tokens, and each sees itself and all before it; S is T, or
    T is 1. The first axis of `seen` is 1 where all rows see alike. A query of padding may see none.
    """

    tensors: Mapping[str, Tensor]
    seen: Bool[Tensor, "_ T S"] | None


class TokenCache:
    """Slots for named tensors of the given trailing shapes; `num_bytes` counts them and no bookkeeping."""

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        batch_size: int,
        max_length: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        window: int | None = None,
        max_rollback: int = 0,
    ) -> None:
        self.max_length = max_length
        self.max_rollback = max_rollback
        self.window = window
        self.ring = window is not None and window + max_rollback < max_length
        self.slots = window + max_rollback if self.ring and window is not None else max_length
        # One slot more than is ever read: what has no slot is written there.
        self._stored = {
            name: torch.zeros(batch_size, self.slots + 1, *shape, device=device, dtype=dtype)
            for name, shape in shapes.items()
        }
        self._documents: Tensor | None = None
        self._places = torch.arange(self.slots, device=device)[None]
        self._rows = torch.arange(batch_size, device=device)[:, None]
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self._longest = torch.zeros_like(self.lengths)  # at the last rollback; lengths grow between rollbacks
        self.bound = 0
        self._level = True  # every row is `bound` long

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The slots (B, S, ...) by name."""
        return {name: tensor[:, : self.slots] for name, tensor in self._stored.items()}

    @property
    def orders(self) -> Int[Tensor, "B S"]:
        """Which of its row's tokens each slot holds, from 0; negative or past the row's end: none.

        After a rollback a ring may name a token that was overwritten, which no query can see any more.
        """
        return self._keys(self.slots).expand(len(self.lengths), -1)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def append(self, batch: Batch, **tensors: Tensor) -> Cached:
        """Adds T tokens (B, T, ...) and returns all that their queries may see.

        Raises InputError when a row could exceed `max_length`, padding counted until the next rollback or
        reorder; and when some calls tell documents and some do not.
        """
        tokens = batch.ids.shape[1]
        if self.bound + tokens > self.max_length:
            raise InputError(
                f"the cache is full: {self.bound} + {tokens} tokens exceed max_length {self.max_length}"
            )
        fresh = not self.bound
        if fresh:
            packed = batch.documents is not None
            self._documents = self._rows.new_zeros(len(self._rows), self.slots + 1) if packed else None
        elif (batch.documents is None) != (self._documents is None):
            raise InputError("documents: must be given in all calls of a cache or in none")
        order = self._order(batch.valid, tokens)
        joined = fresh or (self.ring and tokens > self.max_rollback + 1)
        if joined:
            # Writing first would overwrite keys that the chunk's first queries still see.
            seen = self._joined(batch, tensors, order, fresh)
        self._write(batch, tensors, order)
        return seen if joined else self._read(batch, order)

    def _order(self, valid: Tensor | None, tokens: int) -> Tensor:
        """The places of new tokens in their rows, (1, T) where all rows are alike."""
        if valid is None and self._level:
            return torch.arange(self.bound, self.bound + tokens, device=self.lengths.device)[None]
        if valid is None and tokens == 1:
            return self.lengths[:, None]
        return self.lengths[:, None] + orders(valid, tokens, self.lengths.device)

    def _joined(self, batch: Batch, tensors: Mapping[str, Tensor], order: Tensor, fresh: bool) -> Cached:
        """The slots as they are, then the new tokens."""
        if fresh:
            return Cached(tensors, own_keys(batch, self.window))
        rows = len(self._rows)
        own = order if batch.valid is None else order.masked_fill(~batch.valid, -1)
        keys = torch.cat([self._keys(self.slots).expand(rows, -1), own.expand(rows, -1)], 1)
        documents = None
        if self._documents is not None and batch.documents is not None:
            documents = torch.cat([self._documents[:, : self.slots], batch.documents], 1)
        return Cached(
            {name: torch.cat([held, tensors[name].to(held.dtype)], 1) for name, held in self.tensors.items()},
            visible(order, keys, batch.documents, documents, self.window),
        )

    def _read(self, batch: Batch, order: Tensor) -> Cached:
        wrapped = self.ring and (self.bound >= self.slots or not self._level)
        end = self.slots if wrapped else self.bound
        tensors = {name: tensor[:, :end] for name, tensor in self._stored.items()}
        documents = None if self._documents is None else self._documents[:, :end]
        alike = self._level and documents is None
        if alike and order.shape[1] == 1 and (self.window is None or end <= self.window):
            return Cached(tensors, None)
        holes = self.ring and not self._level
        return Cached(
            tensors,
            visible(order, self._keys(end), batch.documents, documents, self.window, holes=holes),
        )

    def _keys(self, end: int) -> Tensor:
        """The order of the tokens in the first slots, (1, S) where all rows are alike."""
        places = self._places[:, :end]
        if not self.ring:
            return places
        newest = self.bound - 1 if self._level else self.lengths[:, None] - 1
        return newest - (newest - places) % self.slots

    def _write(self, batch: Batch, tensors: Mapping[str, Tensor], order: Tensor) -> None:
        """Writes all tokens that a later query can see, and moves every row on."""
        tokens, valid = order.shape[1], batch.valid
        pairs = [(self._stored[name], tensor) for name, tensor in tensors.items()]
        if self._documents is not None and batch.documents is not None:
            pairs.append((self._documents, batch.documents))
        skipped = max(tokens - self.slots, 0)
        start = (self.bound + skipped) % self.slots
        lengths = self.lengths + tokens if valid is None else order[:, -1] + 1
        if valid is None and self._level and start + tokens - skipped <= self.slots:
            for held, new in pairs:
                held[:, start : start + tokens - skipped] = new[:, skipped:]
        else:
            index = order % self.slots if self.ring else order
            if valid is not None:
                index = index.masked_fill(~valid, self.slots)
            if skipped:
                index = index.masked_fill(order < lengths[:, None] - self.slots, self.slots)
            for held, new in pairs:
                held[self._rows, index] = new.to(held.dtype)
        self.lengths = lengths
        self.bound += tokens
        self._level = self._level and valid is None

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        self.lengths, self._longest = rolled_back(counts, self.lengths, self._longest, self.max_rollback)
        self._settle()

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        index = index.to(self.lengths.device)
        self._stored = {name: tensor[index] for name, tensor in self._stored.items()}
        self._documents = None if self._documents is None else self._documents[index]
        self.lengths, self._longest = self.lengths[index], self._longest[index]
        self._rows = torch.arange(len(index), device=index.device)[:, None]
        self._settle()

    def _settle(self) -> None:
        shortest, longest = (int(n) for n in torch.aminmax(self.lengths)) if len(self.lengths) else (0, 0)
        self.bound, self._level = longest, shortest == longest


def rolled_back(
    counts: Int[Tensor, " B"], lengths: Int[Tensor, " B"], longest: Int[Tensor, " B"], max_rollback: int
) -> tuple[Tensor, Tensor]:
    """The rows' lengths without their last `counts` tokens, and the longest they have been.

    Raises InputError for counts that are not B integers, or that no row can forget.
    """
    check_integers("rollback counts", counts, len(lengths))
    counts = counts.to(lengths)
    longest = torch.maximum(longest, lengths)
    left = lengths - counts
    # Counted from the longest, for what a ring has overwritten does not come back with a second rollback.
    if bool(((counts < 0) | (left < 0) | (longest - left > max_rollback)).any()):
        raise InputError(
            f"cannot roll back {counts.tolist()} of {lengths.tolist()} tokens: the rows have been"
            f" {longest.tolist()} long, and max_rollback is {max_rollback}"
        )
    return left, longest
