"""Static caches of per-token tensors, with rollback and reorder; the decoder's bundle of them.

A `TokenCache` keeps named tensors for each cached token, in slots allocated once: keys and values, or a
latent and a rotary key. Beside them stand each slot's position and document, so that what a query may see
is decided by positions alone (`tensors.visible`): padding and unwritten slots stand at position -1.

A window keeps `window + max_rollback` slots as a ring. Lengths are a device tensor per row, and `bound` is
a host number no row exceeds, so that reads stay short without asking the device.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from composeformer.errors import InputError
from composeformer.tensors import Batch


class MixerCache(Protocol):
    """What every mixer's cache can do; the mixer alone appends to it."""

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        """Forgets the last `counts[b]` tokens of row b, down to `max_rollback` below its longest so far."""

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        """Row i becomes what row `index[i]` was."""

    @property
    def num_bytes(self) -> int:
        """Bytes of payload allocated."""


class Cached(NamedTuple):
    """What a query may read: the tensors (B, S, ...) by name, and each slot's position and document (B, S)."""

    tensors: Mapping[str, Tensor]
    positions: Int[Tensor, "B S"]
    documents: Int[Tensor, "B S"]


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
        self.ring = window is not None and window + max_rollback < max_length
        self.slots = window + max_rollback if self.ring and window is not None else max_length
        self.tensors = {
            name: torch.zeros(batch_size, self.slots, *shape, device=device, dtype=dtype)
            for name, shape in shapes.items()
        }
        self.positions = torch.full((batch_size, self.slots), -1, device=device)
        self.documents = torch.zeros(batch_size, self.slots, device=device, dtype=torch.int64)
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self._longest = torch.zeros_like(self.lengths)  # at the last rollback; lengths grow between rollbacks
        self.bound = 0
        self._level = True  # every row is `bound` long

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def append(self, batch: Batch, **tensors: Tensor) -> Cached:
        """Adds T tokens (B, T, ...) and returns all that their queries may see.

        Raises InputError when a row would exceed `max_length`.
        """
        tokens = batch.ids.shape[1]
        if self.bound + tokens > self.max_length:
            raise InputError(
                f"the cache is full: {self.bound} + {tokens} tokens exceed max_length {self.max_length}"
            )
        positions = batch.positions if batch.valid is None else batch.positions.masked_fill(~batch.valid, -1)
        documents = torch.zeros_like(positions) if batch.documents is None else batch.documents
        if self.ring and tokens > self.max_rollback + 1:
            # Writing first would overwrite keys that the chunk's first queries still see.
            seen = self._joined(tensors, positions, documents)
            kept = min(tokens, self.slots)
            self._write(
                {name: tensor[:, -kept:] for name, tensor in tensors.items()},
                positions[:, -kept:],
                documents[:, -kept:],
                tokens - kept,
            )
            return seen
        self._write(tensors, positions, documents, 0)
        end = self.slots if self.ring else self.bound
        return Cached(
            {name: tensor[:, :end] for name, tensor in self.tensors.items()},
            self.positions[:, :end],
            self.documents[:, :end],
        )

    def _joined(self, tensors: Mapping[str, Tensor], positions: Tensor, documents: Tensor) -> Cached:
        if not self.bound:
            return Cached(tensors, positions, documents)
        return Cached(
            {
                name: torch.cat([self.tensors[name], tensor.to(self.tensors[name].dtype)], 1)
                for name, tensor in tensors.items()
            },
            torch.cat([self.positions, positions], 1),
            torch.cat([self.documents, documents], 1),
        )

    def _write(
        self, tensors: Mapping[str, Tensor], positions: Tensor, documents: Tensor, skipped: int
    ) -> None:
        """Writes after `skipped` tokens that no later query can see; advances every row by both."""
        tokens = positions.shape[1]
        pairs = [(self.tensors[name], tensor) for name, tensor in tensors.items()]
        pairs += [(self.positions, positions), (self.documents, documents)]
        start = (self.bound + skipped) % self.slots
        if self._level and start + tokens <= self.slots:
            for held, new in pairs:
                held[:, start : start + tokens] = new
        else:
            index = (
                self.lengths[:, None] + skipped + torch.arange(tokens, device=positions.device)
            ) % self.slots
            rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
            for held, new in pairs:
                held[rows, index] = new.to(held.dtype)
        self.lengths += skipped + tokens
        self.bound += skipped + tokens

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        counts = counts.to(self.lengths)
        longest = torch.maximum(self._longest, self.lengths)
        left = self.lengths - counts
        deepest = int(counts.max())
        # Counted from the longest, for what a ring has overwritten does not come back with a second rollback.
        if bool(((counts < 0) | (left < 0) | (longest - left > self.max_rollback)).any()):
            raise InputError(
                f"cannot roll back {counts.tolist()} of {self.lengths.tolist()} tokens: the rows have been"
                f" {longest.tolist()} long, and max_rollback is {self.max_rollback}"
            )
        if not deepest:
            return
        # The last `deepest` slots of each row; those a row keeps are written back unchanged.
        back = torch.arange(1, deepest + 1, device=counts.device)[None, :]
        index = (self.lengths[:, None] - back) % self.slots
        gone = back <= counts[:, None]
        rows = torch.arange(counts.shape[0], device=counts.device)[:, None]
        self.positions[rows, index] = torch.where(gone, -1, self.positions[rows, index])
        self.lengths, self._longest = left, longest
        self._settle()

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        index = index.to(self.lengths.device)
        self.tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        self.positions, self.documents = self.positions[index], self.documents[index]
        self.lengths, self._longest = self.lengths[index], self._longest[index]
        self._settle()

    def _settle(self) -> None:
        shortest, longest = (int(n) for n in torch.aminmax(self.lengths)) if len(self.lengths) else (0, 0)
        self.bound, self._level = longest, shortest == longest


class ModelCache:
    """The caches of a model's mixers by path, and how many real tokens each row has seen."""

    def __init__(
        self, caches: Mapping[str, MixerCache], batch_size: int, max_length: int, device: torch.device
    ) -> None:
        self.caches = dict(caches)
        self.max_length = max_length
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)

    def get(self, path: str) -> MixerCache | None:
        """The cache of the mixer at `path`, or None where there is none."""
        return self.caches.get(path)

    def advance(self, batch: Batch) -> None:
        """Counts a forward's real tokens."""
        self.lengths += batch.ids.shape[1] if batch.valid is None else batch.valid.sum(1)

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self._all())

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        """Forgets the last `counts[b]` tokens of each row, in every layer; they must not be padding."""
        for cache in self._all():
            cache.rollback(counts)
        self.lengths -= counts.to(self.lengths)

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        """Row i becomes what row `index[i]` was, in every layer; the batch may grow or shrink."""
        for cache in self._all():
            cache.reorder(index)
        self.lengths = self.lengths[index.to(self.lengths.device)]

    def _all(self) -> Iterable[MixerCache]:
        return self.caches.values()
