"""Compare two models: meaning, tensors, outputs. The first component whose output differs is named.

Both run on the same token ids; every part's output is kept in the order of computation. A difference is
max|a - b| / max|b| over a tensor, b being the model that is trusted. Weights that one of the two alone stores as codes
are compared as the numbers that they stand for.
"""

from collections.abc import Mapping
from math import inf, isfinite
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from composeformer.decoder import Model
from composeformer.errors import InputError, show
from composeformer.spec.fingerprint import meaning
from composeformer.store.decoding import decoder
from composeformer.tensors import DTYPES


@attrs.frozen(kw_only=True)
class Difference:
    """`relative` is max|a - b| / max|b|; None where the two can not be subtracted, and `detail` says why."""

    where: str
    relative: float | None
    detail: str = ""


@attrs.frozen(kw_only=True)
class Verdict:
    """What a comparison found. `outputs` holds every component's difference, in the order of computation."""

    structure: tuple[str, ...]
    tensors: tuple[Difference, ...]
    outputs: tuple[Difference, ...]
    tolerance: float
    tokens: int

    @property
    def first(self) -> Difference | None:
        """The first component whose output differs by more than the tolerance."""
        return next((d for d in self.outputs if d.relative is None or not d.relative <= self.tolerance), None)

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
        }


def verify(
    model: Model, against: Model, *, tolerance: float = 1e-5, tokens: int = 64, seed: int = 0
) -> Verdict:
    """Compares `model` with a trusted one, on `tokens` random ids of two rows, one of them left-padded.

    Raises InputError for a length or a tolerance that compares nothing, and over several processes, of which each
    would compare its own experts alone.
    """
    if (size := max(model.placement.world.size, against.placement.world.size)) > 1:
        raise InputError(f"verify compares the models of one process, and there are {size}")
    vocab = min(model.spec.model.vocab_size, against.spec.model.vocab_size)
    longest = min(model.spec.model.max_position_embeddings, against.spec.model.max_position_embeddings)
    length = min(tokens, longest)
    if length < 1:
        raise InputError(f"tokens = {tokens}: must be at least 1")
    if not (isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance = {tolerance}: must be a finite number, at least 0")
    ids = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, : length // 4] = False
    ours, theirs = _outputs(model, ids, valid), _outputs(against, ids, valid)
    outputs = [_difference(path, ours.get(path), output, valid) for path, output in theirs.items()]
    outputs += [
        Difference(where=path, relative=None, detail="only in the first")
        for path in ours
        if path not in theirs
    ]
    return Verdict(
        structure=tuple(_structure(model, against)),
        tensors=tuple(_tensors(model, against)),
        outputs=tuple(outputs),
        tolerance=tolerance,
        tokens=int(valid.sum()),
    )


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
            found.append(_gap(name, ours[name], theirs[name]))
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


def _outputs(model: Model, ids: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Every part's output by path, in the order of computation, the logits last."""
    kept: dict[str, Tensor] = {}
    hooks = []

    def keep(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = getattr(output, "hidden", output)
            if isinstance(hidden, Tensor):
                # A predictor calls the embedding and the head again; the model's own call comes first.
                kept.setdefault(path, hidden.detach().cpu())

        return hook

    paths = {node.path for node in model.spec.plan.nodes() if node.slot != "position"}
    for path, module in model.named_modules():
        if path in paths:
            hooks.append(module.register_forward_hook(keep(path)))
    try:
        with torch.inference_mode():
            given = ids.to(model.device), valid.to(model.device)
            predict = model.predictor is not None
            logits = model(given[0], valid=given[1], phase="train", predict=predict).logits
    finally:
        for hook in hooks:
            hook.remove()
    # The head's own output is the logits, told once under the name that users know.
    kept.pop("head", None)
    kept["logits"] = logits.cpu()
    return kept


def _difference(path: str, a: Tensor | None, b: Tensor, valid: Tensor) -> Difference:
    if a is None:
        return Difference(where=path, relative=None, detail="only in the second")
    if a.shape != b.shape:
        return Difference(where=path, relative=None, detail=f"{tuple(a.shape)} against {tuple(b.shape)}")
    # What stands at padding is nobody's business; a predictor's outputs are of the first tokens alone.
    fits = a.shape[0] == valid.shape[0] and a.ndim > 1 and a.shape[1] <= valid.shape[1]
    real = valid[:, : a.shape[1]] if fits else torch.ones(a.shape[:2], dtype=torch.bool)
    return _gap(path, a[real], b[real])


def _gap(where: str, a: Tensor, b: Tensor) -> Difference:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    infinite = [name for name, x in (("first", a), ("second", b)) if not bool(x.isfinite().all())]
    if infinite:
        told = f"is not finite in the {' and the '.join(infinite)}"
        return Difference(where=where, relative=None, detail=told)
    scale = float(b.abs().max()) if b.numel() else 0.0
    gap = float((a - b).abs().max()) if b.numel() else 0.0
    if gap and not isfinite(gap / scale if scale else inf):
        return Difference(where=where, relative=None, detail="is 0 everywhere in the second only")
    return Difference(where=where, relative=gap / scale if gap else 0.0)
