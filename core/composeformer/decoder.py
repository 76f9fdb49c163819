"""The decoder: embedding, layers joined by a residual, head. It knows slots, never components.

One call shape: token ids (B, T), with positions, documents and a mask where they matter, and a cache when
decoding. Rotary tables are made once per forward, in fp32.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from composeformer.cache import MixerCache, ModelCache
from composeformer.contracts import Phase
from composeformer.errors import InputError
from composeformer.spec import Spec
from composeformer.tensors import Batch, ModelOutput, Output, merge


class Layer(nn.Module):
    """A mixer and an ffn, either of which may be missing, joined by the residual."""

    def __init__(self, mixer: nn.Module | None, ffn: nn.Module | None, residual: nn.Module) -> None:
        super().__init__()
        self.mixer, self.ffn, self.residual = mixer, ffn, residual

    def forward(self, stream: Tensor, batch: Batch, cache: MixerCache | None = None) -> Output:
        """`stream` is the residual's: (B, T, D) or what its `open` made of it."""
        sublayers: dict[str, Any] = {}
        mixer, ffn = self.mixer, self.ffn
        if mixer is not None:
            sublayers["mixer"] = lambda x: mixer(x, batch, cache)
        if ffn is not None:
            sublayers["ffn"] = lambda x: ffn(x, batch)
        output: Output = self.residual(stream, batch, sublayers)
        return output


class Model(nn.Module):
    """A built model. `choices` says which implementation serves each phase, by path; `folder` where its
    values were read, None for initial ones.
    """

    folder: Path | None = None

    def __init__(
        self,
        spec: Spec,
        embedding: nn.Module,
        layers: Sequence[Layer],
        residual: nn.Module,
        head: nn.Module,
        tables: Mapping[str, nn.Module],
        activations: torch.dtype,
        choices: Mapping[str, Mapping[Phase, str]],
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.residual: Any = residual
        self.head = head
        self.spec = spec
        self.activations = activations
        self.choices = choices
        self._tables = dict(tables)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        positions: Int[Tensor, "B T"] | None = None,
        documents: Int[Tensor, "B T"] | None = None,
        valid: Bool[Tensor, "B T"] | None = None,
        cache: ModelCache | None = None,
        last_only: bool = False,
        phase: Phase | None = None,
    ) -> ModelOutput:
        """Logits (B, T, V) and side results; with `last_only` the logits of the last position alone.

        `valid` is False at padding; `documents` numbers packed documents, which do not see each other and
        whose positions start anew. With a `cache` the tokens follow those it holds. Raises InputError where
        a sequence is longer than the cache or the model allows.
        """
        batch = self.batch(ids, positions, documents, valid, cache, phase)
        stream = self.residual.open(self.embedding(ids).to(self.activations))
        aux = []
        for index, layer in enumerate(self.layers):
            held = cache.get(f"layers.{index}.mixer") if cache is not None else None
            stream, side = layer(stream, batch, held)
            aux.append(side)
        if cache is not None:
            cache.advance(batch)
        hidden = self.residual.close(stream)
        if last_only:
            hidden = hidden[:, -1:]
        return ModelOutput(self.head(hidden), hidden, merge(aux))

    def batch(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        valid: Tensor | None = None,
        cache: ModelCache | None = None,
        phase: Phase | None = None,
    ) -> Batch:
        """The tokens as parts see them: positions counted where they are not given, rotary tables made."""
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise InputError(f"token ids must be int64 of shape (B, T), got {ids.dtype} {tuple(ids.shape)}")
        limit = self.spec.model.max_position_embeddings
        if ids.shape[1] > limit:
            raise InputError(f"{ids.shape[1]} tokens exceed max_position_embeddings ({limit})")
        if positions is None:
            positions = count_positions(ids, documents, valid)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        if phase is None:
            phase = "train" if cache is None else "decode" if ids.shape[1] == 1 else "prefill"
        tables = {key: table(positions) for key, table in self._tables.items()}
        return Batch(ids, positions, documents, valid, tables, phase)

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> ModelCache:
        """Empty caches for `batch_size` rows of at most `max_length` tokens, padding included."""
        if batch_size < 1 or max_length < 1:
            raise InputError(f"a cache needs rows and tokens, got {batch_size} and {max_length}")
        caches: dict[str, MixerCache] = {}
        for index, layer in enumerate(self.layers):
            mixer: Any = layer.mixer
            if mixer is not None:
                caches[f"layers.{index}.mixer"] = mixer.new_cache(batch_size, max_length, max_rollback)
        return ModelCache(caches, batch_size, max_length, self.device)


def count_positions(ids: Tensor, documents: Tensor | None, valid: Tensor | None) -> Int[Tensor, "B T"]:
    """Positions from 0 within each document, real tokens only; padding repeats its predecessor's."""
    rows, tokens = ids.shape
    if valid is None:
        count = torch.arange(1, tokens + 1, device=ids.device).expand(rows, tokens)
    else:
        count = valid.cumsum(1)
    if documents is not None:
        # The count just before each document's first token, carried along the document.
        first = torch.ones_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        own = torch.ones_like(count) if valid is None else valid.long()
        count = count - torch.where(first, count - own, 0).cummax(1).values
    return (count - 1).clamp(min=0)
