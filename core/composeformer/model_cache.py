"""The caches of a model's mixers, and what the decoder itself must remember of each row.

That is how many real tokens a row has, and where documents are packed the last token's document, its number
and its tokens so far, for each of the last `max_rollback + 1` tokens: forgetting tokens may lead back into an
earlier document.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from composeformer.cache import MixerCache, rolled_back
from composeformer.counting import Counted, count_documents, nothing_counted
from composeformer.errors import InputError
from composeformer.inputs import check_integers


class ModelCache:
    """The caches of a model's mixers by path, and how many real tokens each row has seen."""

    def __init__(
        self,
        caches: Mapping[str, MixerCache],
        batch_size: int,
        max_length: int,
        device: torch.device,
        max_rollback: int = 0,
    ) -> None:
        self.caches = dict(caches)
        self.max_length = max_length
        self.max_rollback = max_rollback
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self._longest = torch.zeros_like(self.lengths)  # at the last rollback
        self._bound = 0  # no row has more real tokens
        self._history: Counted | None = None  # (B, max_rollback + 1), the last token's last

    def get(self, path: str) -> MixerCache | None:
        """The cache of the mixer at `path`, or None where there is none."""
        return self.caches.get(path)

    def check(
        self,
        paths: Sequence[str],
        ids: Int[Tensor, "B T"],
        documents: Int[Tensor, "B T"] | None,
        valid: Bool[Tensor, "B T"] | None,
        limit: int,
    ) -> None:
        """Raises InputError where the cache is not of a model with mixers at `paths`, or can not take the
        tokens: other rows, documents in some calls alone, more than `limit` real tokens in a row.
        """
        if missing := [path for path in paths if path not in self.caches]:
            raise InputError(f"cache: made for another model, it has nothing for {missing[0]}")
        if len(self.caches) > len(paths):
            raise InputError(
                f"cache: made for another model, of {len(self.caches)} mixers and not {len(paths)}"
            )
        rows, tokens = ids.shape
        if rows != len(self.lengths):
            raise InputError(f"cache: has {len(self.lengths)} rows, the tokens have {rows}")
        if self._bound and (documents is None) != (self._history is None):
            told = "the tokens before them were given none" if self._history is None else "they are missing"
            raise InputError(f"documents: must be given in all calls of a cache or in none; {told}")
        if self._bound + tokens > limit:
            # Padding was counted as tokens until here; only the device knows better.
            longest = int((self.lengths + (tokens if valid is None else valid.sum(1))).max())
            if longest > limit:
                raise InputError(
                    f"{longest} tokens with those cached exceed max_position_embeddings ({limit})"
                )

    def count(self, documents: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"] | None) -> Counted:
        """Each token's document, its number and its tokens so far, continuing the row's last document."""
        last = None if self._history is None else Counted(*(each[:, -1] for each in self._history))
        return count_documents(documents, valid, last)

    def advance(
        self,
        ids: Int[Tensor, "B T"],
        documents: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> None:
        """Counts a forward's real tokens; `documents` are as its caller gave them."""
        if documents is not None:
            self._remember(self.count(documents, valid), valid)
        tokens = ids.shape[1]
        self.lengths = self.lengths + (tokens if valid is None else valid.sum(1))
        self._bound += tokens

    def _remember(self, counted: Counted, valid: Tensor | None) -> None:
        kept = self.max_rollback + 1
        history = self._history
        if history is None:
            none = nothing_counted(len(self.lengths), self.lengths.device)
            history = Counted(*(each[:, None].expand(-1, kept) for each in none))
        all_of = [torch.cat(pair, 1) for pair in zip(history, counted, strict=True)]
        if valid is None:
            self._history = Counted(*(each[:, -kept:] for each in all_of))
            return
        real = torch.cat([torch.ones_like(valid[:, :1]).expand(-1, kept), valid], 1)
        newest = real.long().argsort(dim=1, stable=True)[:, -kept:]
        self._history = Counted(*(each.gather(1, newest) for each in all_of))

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in self.caches.values())

    def rollback(self, counts: Int[Tensor, " B"]) -> None:
        """Forgets the last `counts[b]` real tokens of row b, in every layer; padding is passed over.

        Raises InputError, and changes nothing, for counts that are not B integers, negative, or lead more than
        `max_rollback` below the row's longest so far.
        """
        lengths, longest = rolled_back(counts, self.lengths, self._longest, self.max_rollback)
        for cache in self.caches.values():
            cache.rollback(counts)
        if self._history is not None:
            kept = self.max_rollback + 1
            index = torch.arange(kept, device=lengths.device) - (self.lengths - lengths)[:, None]
            self._history = Counted(*(each.gather(1, index.clamp(min=0)) for each in self._history))
        self.lengths, self._longest = lengths, longest
        self._settle()

    def reorder(self, index: Int[Tensor, " N"]) -> None:
        """Row i becomes what row `index[i]` was, in every layer; the batch may grow or shrink.

        Raises InputError for an index that is not of integers, or on the CPU for rows that are not there.
        """
        check_integers("reorder index", index)
        rows = len(self.lengths)
        if index.device.type == "cpu" and bool(((index < 0) | (index >= rows)).any()):
            raise InputError(f"reorder index = {index.tolist()}: must be rows 0 to {rows - 1}")
        index = index.to(self.lengths)
        for cache in self.caches.values():
            cache.reorder(index)
        self.lengths, self._longest = self.lengths[index], self._longest[index]
        if self._history is not None:
            self._history = Counted(*(each[index] for each in self._history))
        self._settle()

    def _settle(self) -> None:
        self._bound = int(self.lengths.max()) if len(self.lengths) else 0
        if not self._bound:
            self._history = None
