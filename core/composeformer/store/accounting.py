"""What a source of weights is asked before it is believed, with errors that name the source."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from composeformer.dialects import load_all
from composeformer.dialects.transfer import Groups, Lookup, taken
from composeformer.errors import DialectError, FolderError, one_of, show
from composeformer.spec import Spec
from composeformer.store.decoding import check, spelled
from composeformer.store.lock import NATIVE

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


def read(spec: Spec, dialect: str, source: Tensors, where: Path) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of the spec by our names, from a source whose names are a dialect's."""
    get = lookup(spec, dialect, source, where)
    return ((name, get(name)) for name in spec.formats.stored)


def lookup(spec: Spec, dialect: str, source: Tensors, where: Path) -> Lookup:
    """The same one at a time: all are accounted for now, each is read when it is asked for.

    `get(name)` is a stored tensor of the spec, codes and scales where its format has a codec;
    `get(name, groups=(start, stop))` is that part of a stack's dimension 0, and nothing else of it is read. Raises
    FolderError or DialectError with a line for every tensor that is missing, unexpected, mis-shaped or of a dtype that
    holds no weights; later for scales that are none.
    """
    if dialect == NATIVE:
        wanted = {name: weight.dtype for name, weight in spec.formats.stored.items()}
        codes = {part: wanted[part] for parts in spec.formats.coded.values() for part in parts}
        _check_dtypes({name: codes.get(name) for name in wanted}, source, where)
        _account(spec, source, where)
        return _checked(spec, Lookup(lambda name, groups: taken(source, name, groups)), where)
    known = {d.name: d for d in load_all()}
    if dialect not in known:
        raise FolderError(
            f"{where}: tensors are named as by dialect {show(dialect)}; installed: {one_of(known)}"
        )
    with telling(where):
        moved = [t for t in known[dialect].rules(spec) if t.ours is not None]
        dtypes = {name: transfer.dtype for transfer in moved for name in transfer.theirs.names}
        _check_dtypes(dtypes, source, where)
        get = known[dialect].lookup(spec, source)
    return _checked(spec, get, where)


def _checked(spec: Spec, get: Lookup, where: Path) -> Lookup:
    """The same, with what belongs to codes checked as it is read."""
    formats = spec.formats
    places = {
        part: (str(formats.tensors[name].codec), place)
        for name, parts in formats.coded.items()
        for place, part in enumerate(parts)
    }

    def found(name: str, groups: Groups | None) -> Tensor:
        tensor = get(name, groups)
        if name in places:
            check(*places[name], tensor, f"{where}: {name}")
        return tensor

    return Lookup(found) if places else get


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
            wrong.append(f"{where}: {name}: is stored as {spelled(dtype)}; the spec's precision keeps it as {wanted}")
        elif wanted is None and dtype not in WEIGHT_DTYPES:
            told = f"weights are read from {allowed}, or from codes that a quantization_config tells of"
            wrong.append(f"{where}: {name}: is stored as {spelled(dtype)}; {told}")
    if len(wrong) > 20:
        wrong[20:] = [f"{where}: ... {len(wrong) - 20:,} more tensors like these"]
    if wrong:
        raise FolderError(*wrong)
