"""What a source of weights is asked before it is believed, with errors that name the source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from composeformer.dialects import load_all
from composeformer.errors import DialectError, FolderError, one_of, show
from composeformer.spec import Spec
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
    """Every tensor of the spec by our names, from a source whose names are a dialect's."""
    get = lookup(spec, dialect, source, where)
    return ((name, get(name)) for name in spec.plan.tensors)


def lookup(spec: Spec, dialect: str, source: Tensors, where: Path) -> Callable[[str], Tensor]:
    """The same one at a time: all are accounted for now, each is read when it is asked for.

    Raises FolderError or DialectError with a line for every tensor that is missing, unexpected, mis-shaped
    or of a dtype that holds no weights.
    """
    if dialect == NATIVE:
        _account(spec, source, where)
        _check_dtypes(spec.plan.tensors, source, where)
        return source.get
    known = {d.name: d for d in load_all()}
    if dialect not in known:
        raise FolderError(
            f"{where}: tensors are named as by dialect {show(dialect)}; installed: {one_of(known)}"
        )
    with telling(where):
        get = known[dialect].lookup(spec, source)
        moved = [t for t in known[dialect].rules(spec) if t.ours is not None]
    _check_dtypes((name for transfer in moved for name in transfer.theirs.names), source, where)
    return get


def _account(spec: Spec, source: Tensors, where: Path) -> None:
    """Raises FolderError that lists every tensor that is missing, unexpected or mis-shaped."""
    found, wanted = source.names(), spec.plan.tensors
    wrong = [f"{where}: {name}: missing" for name in wanted if name not in found]
    wrong += [f"{where}: {name}: unexpected" for name in found if name not in wanted]
    wrong += [
        f"{where}: {name}: has shape {tuple(found[name].shape)}, the spec wants {weight.shape}"
        for name, weight in wanted.items()
        if name in found and tuple(found[name].shape) != weight.shape
    ]
    if wrong:
        raise FolderError(*wrong)


def _check_dtypes(names: Iterable[str], source: Tensors, where: Path) -> None:
    """Numbers of other dtypes are codes: without their scales, a cast would make weights of noise."""
    found: Mapping[str, Any] = source.names()
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
    wrong = []
    for name in names:
        # A GGUF file decodes its blocks itself, and says so by having no dtype.
        dtype = getattr(found.get(name), "dtype", None)
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            told = str(dtype).removeprefix("torch.")
            wrong.append(f"{where}: {name}: is stored as {told}; weights are read from {allowed}")
    if len(wrong) > 20:
        wrong[20:] = [f"{where}: ... {len(wrong) - 20:,} more tensors like these"]
    if wrong:
        raise FolderError(*wrong)
