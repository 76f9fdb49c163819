"""What a source of weights is asked before it is believed, with errors that name the source."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from composeformer.contracts import Weight
from composeformer.dialects import load_all
from composeformer.dialects.transfer import Lookup, taken
from composeformer.errors import DialectError, FolderError, one_of, show
from composeformer.spec import Spec
from composeformer.store.decoding import Checked, spelled
from composeformer.store.lock import NATIVE
from composeformer.tensors import DTYPES

WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class Tensors(Protocol):
    """A source of named tensors: a folder's weights, or a GGUF file's."""

    def names(self) -> Mapping[str, Shaped]: ...

    def get(self, name: str, /) -> Tensor: ...


@contextmanager
def telling(where: Path) -> Iterator[None]:
    """Dialects know no files: each line of their errors gets the place that it is about."""
    try:
        yield
    except DialectError as error:
        lines = (line if line.startswith(f"{where}: ") else f"{where}: {line}" for line in error.lines)
        raise DialectError(*lines) from error


def read(
    spec: Spec,
    dialect: str,
    source: Tensors,
    where: Path,
    groups: Callable[[str], slice | None] = lambda name: None,
) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of the spec by our names, from a source whose names are a dialect's; of a stack the `groups`
    that are asked for, None for all.
    """
    get = lookup(spec, dialect, source, where)
    parts = ((name, groups(name)) for name in spec.formats.stored)
    return ((name, get(name, None if part is None else (part.start, part.stop))) for name, part in parts)


def lookup(spec: Spec, dialect: str, source: Tensors, where: Path) -> Lookup:
    """The same one at a time: all are accounted for now, each is read when it is asked for.

    `get(name)` is a stored tensor of the spec, codes and scales where its format has a codec;
    `get(name, groups=(start, stop))` is that part of a stack's dimension 0, and nothing else of it is read. Raises
    FolderError or DialectError with a line for every tensor that is missing, unexpected, mis-shaped or of a dtype that
    holds no weights; later for scales that are none.
    """
    formats = spec.formats
    places = {
        part: (str(formats.tensors[name].codec), place)
        for name, parts in formats.coded.items()
        for place, part in enumerate(parts)
    }
    if dialect == NATIVE:
        _check_dtypes({name: _exact(w, name in places) for name, w in formats.stored.items()}, source, where)
        _account(spec, source, where)
        checked = Checked(source, places, where)
        return Lookup(lambda name, groups: taken(checked, name, groups))
    known = {d.name: d for d in load_all()}
    if dialect not in known:
        raise FolderError(
            f"{where}: tensors are named as by dialect {show(dialect)}; installed: {one_of(known)}"
        )
    with telling(where):
        moved = [
            (t.theirs.names, t.ours.names[0], t.dtype)
            for t in known[dialect].rules(spec)
            if t.ours is not None
        ]
        _check_dtypes({name: dtype for names, _, dtype in moved for name in names}, source, where)
        theirs = {name: places[ours] for names, ours, _ in moved if ours in places for name in names}
        return known[dialect].lookup(spec, Checked(source, theirs, where) if theirs else source)


def _exact(weight: Weight, coded: bool) -> str | None:
    """The one dtype that a tensor is stored in: of codes, and of what a part declares as integers; None for weights."""
    integers = weight.dtype is not None and DTYPES[weight.dtype] not in WEIGHT_DTYPES
    return weight.dtype if coded or integers else None


def _account(spec: Spec, source: Tensors, where: Path) -> None:
    """Raises FolderError that lists every tensor that is missing, unexpected or mis-shaped."""
    found, wanted = source.names(), spec.formats.stored
    wrong = [f"{where}: {name}: missing" for name in wanted if name not in found]
    wrong += [f"{where}: {name}: unexpected" for name in found if name not in wanted]
    wrong += [
        f"{where}: {name}: has shape {tuple(found[name].shape)}, the spec wants {weight.shape}"
        for name, weight in wanted.items()
        if name in found and tuple(found[name].shape) != weight.shape
    ]
    if wrong:
        raise FolderError(*wrong)


def _check_dtypes(names: Mapping[str, str | None], source: Tensors, where: Path) -> None:
    """Numbers of other dtypes are codes: without their scales, a cast would make weights of noise.

    `names` are those that are read, with the dtype of what is kept as codes, None for weights.
    """
    found: Mapping[str, Any] = source.names()
    allowed = ", ".join(map(spelled, WEIGHT_DTYPES))
    wrong = []
    for name, wanted in names.items():
        # A GGUF file decodes its blocks itself, and says so by having no dtype.
        dtype = getattr(found.get(name), "dtype", None)
        if dtype is None:
            continue
        if wanted is not None and spelled(dtype) != wanted:
            wrong.append(
                f"{where}: {name}: is stored as {spelled(dtype)}; the spec's precision keeps it as {wanted}"
            )
        elif wanted is None and dtype not in WEIGHT_DTYPES:
            told = f"weights are read from {allowed}, or from codes that a quantization_config tells of"
            wrong.append(f"{where}: {name}: is stored as {spelled(dtype)}; {told}")
    if len(wrong) > 20:
        wrong[20:] = [f"{where}: ... {len(wrong) - 20:,} more tensors like these"]
    if wrong:
        raise FolderError(*wrong)
