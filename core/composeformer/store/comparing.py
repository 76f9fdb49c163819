"""Compare two models: meaning, tensors, outputs. The first component whose output differs is named.

Both run on the same token ids; every part's output is kept in the order of computation. Weights that one of the two
alone stores as codes are compared as the numbers that they stand for.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer.decoder import Model
from composeformer.errors import InputError, show
from composeformer.spec.fingerprint import meaning
from composeformer.store.bisecting import Explanation, explain, harmless
from composeformer.store.decoding import decoder
from composeformer.store.outputs import Difference, difference, first_of, gap, outputs, sample
from composeformer.tensors import DTYPES


@attrs.frozen(kw_only=True)
class Verdict:
    """What a comparison found. `outputs` holds every component's difference, in the order of computation;
    `explanation` what a search for the conventions behind them found, where one was asked for and they differ.
    """

    structure: tuple[str, ...]
    tensors: tuple[Difference, ...]
    outputs: tuple[Difference, ...]
    tolerance: float
    tokens: int
    explanation: Explanation | None = None

    @property
    def first(self) -> Difference | None:
        """The first component whose output differs by more than the tolerance."""
        return first_of(self.outputs, self.tolerance)

    @property
    def logits(self) -> float | None:
        return self.outputs[-1].relative if self.outputs else None

    @property
    def equal(self) -> bool:
        return not self.structure and not self.tensors and self.first is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "equal": self.equal,
            "tolerance": self.tolerance,
            "tokens": self.tokens,
            "structure": list(self.structure),
            "tensors": [attrs.asdict(d) for d in self.tensors],
            "first_difference": None if self.first is None else attrs.asdict(self.first),
            "logits": self.logits,
            "outputs": [attrs.asdict(d) for d in self.outputs],
            "explanation": None if self.explanation is None else self.explanation.to_dict(),
        }


def verify(
    model: Model,
    against: Model,
    *,
    tolerance: float = 1e-5,
    tokens: int = 64,
    seed: int = 0,
    bisect: bool = False,
) -> Verdict:
    """Compares `model` with a trusted one, on `tokens` random ids of two rows, one of them left-padded.

    With `bisect`, where they differ, the conventions that make outputs differ are searched for, in float32.
    Raises InputError for a length or a tolerance that compares nothing, and over several processes, of which each
    would compare its own experts alone.
    """
    if (size := max(model.placement.world.size, against.placement.world.size)) > 1:
        raise InputError(f"verify compares the models of one process, and there are {size}")
    ids, valid = sample(model, against, tokens, seed)
    if not (isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance = {tolerance}: must be a finite number, at least 0")
    ours, theirs = outputs(model, ids, valid), outputs(against, ids, valid)
    found = [difference(path, ours.get(path), output, valid) for path, output in theirs.items()]
    found += [
        Difference(where=path, relative=None, detail="only in the first")
        for path in ours
        if path not in theirs
    ]
    verdict = Verdict(
        structure=tuple(_structure(model, against)),
        tensors=tuple(_tensors(model, against)),
        outputs=tuple(found),
        tolerance=tolerance,
        tokens=int(valid.sum()),
    )
    if not bisect or verdict.equal:
        return verdict
    if verdict.first is None:
        return attrs.evolve(verdict, explanation=harmless(verdict.outputs))
    return attrs.evolve(verdict, explanation=explain(model, against, ids, valid, tolerance))


def _structure(model: Model, against: Model) -> list[str]:
    found: list[str] = []
    _walk(meaning(model.spec), meaning(against.spec), "", found)
    return found


def _walk(a: Any, b: Any, path: str, found: list[str]) -> None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            _walk(a.get(key), b.get(key), f"{path}.{key}" if path else str(key), found)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b)):
            _walk(x, y, f"{path}.{index}", found)
    elif isinstance(a, list) and isinstance(b, list) and path == "layers":
        found.append(f"layers: {len(a)} against {len(b)}")
    elif a != b:
        found.append(f"{path.replace('.fields.', '.')}: {_told(a, b)} against {_told(b, a)}")


def _told(value: Any, other: Any) -> str:
    """A meaning leaves out fields that have their default, and parts that are not there."""
    if value is None:
        return "nothing" if isinstance(other, Mapping) else "its default"
    return f"a {value['kind']}" if isinstance(value, Mapping) and "kind" in value else show(value)


def _tensors(model: Model, against: Model) -> list[Difference]:
    ours, theirs = _numbers(model, against), _numbers(against, model)
    found = []
    for name in {**theirs, **ours}:
        if name not in ours or name not in theirs:
            found.append(
                Difference(
                    where=name, relative=None, detail=f"only in the {'first' if name in ours else 'second'}"
                )
            )
        elif ours[name].shape != theirs[name].shape:
            shapes = f"{tuple(ours[name].shape)} against {tuple(theirs[name].shape)}"
            found.append(Difference(where=name, relative=None, detail=shapes))
        elif not _equal(ours[name].cpu(), theirs[name].cpu()):
            found.append(gap(name, ours[name], theirs[name]))
    return found


def _numbers(model: Model, other: Model) -> dict[str, Tensor]:
    """The tensors of a model, its codes decoded where the other stores that weight otherwise: to the dtype that it has
    there, or to fp32 where it holds codes of another form.
    """
    found = dict(model.state_dict())
    formats, others = model.spec.formats, other.spec.formats
    for name, parts in formats.coded.items():
        form, theirs = formats.tensors[name], others.tensors.get(name)
        if theirs is not None and theirs.codec != form.codec:
            dtype = torch.float32 if theirs.codec is not None else DTYPES[theirs.storage]
            found[name] = decoder(str(form.codec)).decode([found.pop(part) for part in parts], dtype)
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal numbers in the dtype of the first; codes, which stand for nothing alone, bit by bit."""
    if a.dtype == b.dtype and a.element_size() == 1:
        return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    return torch.equal(a, b.to(a.dtype))
