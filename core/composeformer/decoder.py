"""The decoder: embedding, layers joined by a residual, head. It knows slots, never components.

One call shape: token ids (B, T), with positions, documents and a mask where they matter, and a cache when
decoding. Rotary tables are made once per forward, in fp32.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from composeformer.blame import blame, described
from composeformer.cache import MixerCache
from composeformer.contracts import Phase
from composeformer.counting import count_documents, count_positions
from composeformer.errors import InputError, PluginError, one_of
from composeformer.inputs import check_counts, check_forward
from composeformer.model_cache import ModelCache
from composeformer.parallel import Placement
from composeformer.spec import Spec
from composeformer.tensors import Batch, ModelOutput, Output, Prediction, Rotary, merge


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
    values were read, None for initial ones; `placement` what of it this process holds.
    """

    folder: Path | None = None

    def __init__(
        self,
        spec: Spec,
        embedding: nn.Module,
        layers: Sequence[Layer],
        residual: nn.Module,
        head: nn.Module,
        predictor: nn.Module | None,
        tables: Mapping[str, nn.Module],
        activations: torch.dtype,
        choices: Mapping[str, Mapping[Phase, str]],
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.residual: Any = residual
        self.head = head
        self.predictor: Any = predictor
        self.spec = spec
        self.activations = activations
        self.choices = choices
        self.placement = Placement(spec=spec)
        self._tables = dict(tables)
        self._mixers = [
            f"layers.{index}.mixer" for index, layer in enumerate(layers) if layer.mixer is not None
        ]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and the like do; a cast leaves what a part declares in a dtype of its own as it is."""
        tensors = chain(self.named_parameters(), self.named_buffers())
        declared = self.spec.plan.tensors
        fixed = [name for name, _ in tensors if name in declared and declared[name].dtype is not None]
        before = {name: _named(self, name).data for name in fixed}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = _named(self, name)
            if new.dtype != old.dtype:
                new.data = old.to(new.device)
        return self

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
        predict: bool | None = None,
    ) -> ModelOutput:
        """Logits (B, T, V) and side results; with `last_only` the logits of the last position alone.

        With `predict` a model that has a predictor gives its predictions too; by default it does so without a
        cache while it is in training mode (`model.train()`).

        `valid` is False at padding, which may stand anywhere. `documents` are ids of packed documents, which
        do not see each other and whose positions start anew; an id that comes back after another is a new
        document. `positions` given replace those that are counted, and change nothing else: a query sees its
        document up to itself, in the order of the tokens. With a `cache` the tokens follow those it holds,
        and its last document goes on while its id does; documents are given in all of its calls or in none.

        Raises InputError for arguments of a wrong sort, a cache made for another model or number of rows,
        and a row that is longer than the cache or the model allows; on the CPU for values out of range too.
        """
        batch = self.batch(ids, positions, documents, valid, cache, phase)
        stream = self.residual.open(self.embedding(ids).to(self.activations))
        aux = []
        for index, layer in enumerate(self.layers):
            held = cache.get(f"layers.{index}.mixer") if cache is not None else None
            stream, side = layer(stream, batch, held)
            aux.append(side)
        if cache is not None:
            cache.advance(ids, documents, valid)
        hidden = self.residual.close(stream)
        logits = self.head(hidden[:, -1:] if last_only else hidden)
        predictions: Sequence[Prediction] = ()
        if self._predicts(predict, cache, batch):
            predictions = tuple(self.predictor(stream, hidden, batch))
            aux += [prediction.aux for prediction in predictions]
        return ModelOutput(logits, hidden, merge(aux), predictions)

    def _predicts(self, predict: bool | None, cache: ModelCache | None, batch: Batch) -> bool:
        if predict and self.predictor is None:
            raise InputError(f"predict: {self.spec.name} has no predictor")
        if predict and cache is not None:
            raise InputError("predict: with a cache a predictor drafts instead (`model.predictor.draft`)")
        if predict is None:
            return self.predictor is not None and self.training and cache is None and batch.phase == "train"
        return predict

    def batch(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        valid: Tensor | None = None,
        cache: ModelCache | None = None,
        phase: Phase | None = None,
    ) -> Batch:
        """The tokens as parts see them: positions counted where they are not given, documents numbered in
        order, rotary tables made.
        """
        sizes = self.spec.model
        limit = sizes.max_position_embeddings
        check_forward(ids, positions, documents, valid, phase, sizes.vocab_size, limit)
        if cache is not None:
            cache.check(self._mixers, ids, documents, valid, limit)
        if documents is not None:
            counted = count_documents(documents, valid) if cache is None else cache.count(documents, valid)
            documents = counted.number
            positions = (counted.tokens - 1).clamp(min=0) if positions is None else positions
        elif positions is None:
            positions = count_positions(ids, None, valid)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        if phase is None:
            phase = "train" if cache is None else "decode" if ids.shape[1] == 1 else "prefill"
        return Batch(ids, positions, documents, valid, self.rotary(positions), phase)

    def rotary(self, positions: Int[Tensor, "B T"]) -> dict[str, Rotary]:
        """The rotary tables of these positions, by key."""
        return {key: table(positions) for key, table in self._tables.items()}

    def new_cache(self, batch_size: int, max_length: int, max_rollback: int = 0) -> ModelCache:
        """Empty caches for `batch_size` rows of at most `max_length` tokens, padding included, of which a row
        can forget the last `max_rollback`. They are this process's alone. Raises InputError for what is no such count.
        """
        found = {"batch_size": batch_size, "max_length": max_length, "max_rollback": max_rollback}
        check_counts({"batch_size": 1, "max_length": 1, "max_rollback": 0}, found)
        caches: dict[str, MixerCache] = {}
        for index, layer in enumerate(self.layers):
            mixer: Any = layer.mixer
            if mixer is None:
                continue
            path = f"layers.{index}.mixer"
            node = self.spec.plan.layers[index]["mixer"]
            with blame(self.spec.registry, node.part, path, "new_cache"):
                caches[path] = mixer.new_cache(batch_size, max_length, max_rollback)
            lacking = [
                name for name in ("rollback", "reorder", "num_bytes") if not hasattr(caches[path], name)
            ]
            if lacking:
                told = f"new_cache gives a {type(caches[path]).__name__} without {one_of(lacking)}"
                raise PluginError(f"{described(self.spec.registry, node.part, path)}: {told}")
        return ModelCache(caches, batch_size, max_length, self.device, max_rollback)


def _named(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that full name."""
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), attribute)
    return found
