"""Tensors moved between their names and ours, one transfer at a time, by moving bytes only.

Reading accounts for every tensor before it moves the first: what is missing, unexpected or mis-shaped is told
in one error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from composeformer.dialects.rules import Side, Transfer, cut
from composeformer.errors import DialectError


class Weights(Protocol):
    """Where tensors are read from: `names()` maps each to something with a `shape`; `get` loads one."""

    def names(self) -> Mapping[str, Any]: ...

    def get(self, name: str, /) -> Tensor: ...


def read(transfers: Sequence[Transfer], source: Weights, label: str) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, loaded as they are asked for. Raises DialectError at once for misfits."""
    account(transfers, {name: tuple(info.shape) for name, info in source.names().items()}, label)
    return _read(transfers, source)


def lookup(transfers: Sequence[Transfer], source: Weights, label: str) -> Callable[[str], Tensor]:
    """Our tensors one at a time in any order, at most one transfer in memory. Raises DialectError as `read` does."""
    account(transfers, {name: tuple(info.shape) for name, info in source.names().items()}, label)
    owners = {name: t for t in transfers if t.ours is not None for name in t.ours.names}
    # Copies of shared tensors are compared now: nobody will ask for them.
    for _ in _read([t for t in transfers if t.ours is None], source):
        pass
    held: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in held:
            held.clear()
            held.update(_read([owners[name]], source))
        return held.pop(name)

    return get


def _read(transfers: Sequence[Transfer], source: Weights) -> Iterator[tuple[str, Tensor]]:
    present = source.names()
    for transfer in transfers:
        if transfer.ours is not None:
            joined = _joined(transfer.theirs, source.get)
            yield from _parted(transfer.ours, _turned(transfer, joined).reshape(transfer.ours.joined()))
        elif transfer.same_as is not None:
            for name in transfer.theirs.names:
                if name in present and not _equal(source.get(name), source.get(transfer.same_as)):
                    raise DialectError(f"{name}: must equal {transfer.same_as} in this model, but differs")


def write(transfers: Sequence[Transfer], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by name, made one transfer at a time from ours."""
    written: dict[str, Transfer] = {name: t for t in transfers if t.kind == "move" for name in t.theirs.names}
    for transfer in transfers:
        if transfer.kind == "move":
            yield from _written(transfer, get)
        elif transfer.kind == "same" and transfer.copy:
            again = dict(_written(written[str(transfer.same_as)], get))[str(transfer.same_as)]
            yield from ((name, again.clone()) for name in transfer.theirs.names)


def account(transfers: Sequence[Transfer], found: Mapping[str, tuple[int, ...]], label: str) -> None:
    """Raises DialectError that lists every tensor that is missing, mis-shaped or unexpected."""
    wanted = {
        n: shape for t in transfers if t.kind == "move" for n, shape in t.theirs.tensor_shapes().items()
    }
    allowed = {name for t in transfers if t.kind != "move" for name in t.theirs.names}
    problems = [f"{name}: is missing" for name in wanted if name not in found]
    problems += [
        f"{name}: has shape {found[name]}, {label} wants {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    extra = [name for name in found if name not in wanted and name not in allowed]
    problems += [f"{name}: is unexpected, {label} has no place for it" for name in extra]
    if problems:
        raise DialectError(*cut(problems))


def _written(transfer: Transfer, get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    assert transfer.ours is not None
    joined = _joined(transfer.ours, get)
    return _parted(transfer.theirs, _returned(transfer, joined).reshape(transfer.theirs.joined()))


def _turned(transfer: Transfer, x: Tensor) -> Tensor:
    x = x if transfer.view is None else x.reshape(transfer.view)
    return x if transfer.permute is None else x.permute(transfer.permute)


def _returned(transfer: Transfer, x: Tensor) -> Tensor:
    """The inverse of `_turned`."""
    if transfer.permute is None:
        return x
    viewed = transfer.view or transfer.theirs.joined()
    x = x.reshape([viewed[dim] for dim in transfer.permute])
    inverse = sorted(range(len(transfer.permute)), key=lambda i: transfer.permute[i])  # type: ignore[index]
    return x.permute(inverse)


def _joined(side: Side, get: Callable[[str], Tensor]) -> Tensor:
    parts = [torch.stack([*map(get, part)]) if side.stacked else get(part[0]) for part in side.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, side.axis)


def _parted(side: Side, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    sizes = [shape[side.axis] for shape in side.shapes]
    pieces = [x] if len(side.parts) == 1 else torch.split(x, sizes, side.axis)
    for part, piece in zip(side.parts, pieces, strict=True):
        if side.stacked:
            yield from ((name, piece[index].contiguous()) for index, name in enumerate(part))
        else:
            yield part[0], piece.contiguous()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal bits: a NaN equals itself, zeros of either sign differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
