"""Tensors moved between their names and ours, one transfer at a time, by moving bytes only.

Reading accounts for every tensor before it moves the first: what is missing, unexpected or mis-shaped is told
in one error. Of a stack, groups (experts) can be read and written alone, so that a process reads its own, and no
more than one is held.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from composeformer.dialects.rules import Side, Transfer, cut
from composeformer.errors import DialectError

Groups = tuple[int, int]


class Weights(Protocol):
    """Where tensors are read from: `names()` maps each to something with a `shape`; `get` loads one.

    A source may have `get_slice(name)`, a view to index like a tensor, which reads only the part asked for.
    """

    def names(self) -> Mapping[str, Any]: ...

    def get(self, name: str, /) -> Tensor: ...


class Lookup:
    """Our tensors by name: `get(name)`, or `get(name, groups=(start, stop))` of a stack's dimension 0."""

    def __init__(self, find: Callable[[str, Groups | None], Tensor]) -> None:
        self._find = find

    def __call__(self, name: str, groups: Groups | None = None) -> Tensor:
        return self._find(name, groups)


def taken(source: Weights, name: str, groups: Groups | None = None) -> Tensor:
    """A tensor of a source, or some of its groups; nothing else is read where the source can slice."""
    if groups is None:
        return source.get(name)
    sliced = getattr(source, "get_slice", None)
    whole: Any = source.get(name) if sliced is None else sliced(name)
    found: Tensor = whole[slice(*groups)]
    return found


def read(transfers: Sequence[Transfer], source: Weights, label: str) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by name, loaded as they are asked for. Raises DialectError at once for misfits."""
    account(transfers, {name: tuple(info.shape) for name, info in source.names().items()}, label)
    return _read(transfers, source)


def lookup(transfers: Sequence[Transfer], source: Weights, label: str) -> Lookup:
    """Our tensors one at a time in any order, at most one transfer in memory. Raises DialectError as `read` does."""
    account(transfers, {name: tuple(info.shape) for name, info in source.names().items()}, label)
    owners = {name: t for t in transfers if t.ours is not None for name in t.ours.names}
    # Copies of shared tensors are compared now: nobody will ask for them.
    for _ in _read([t for t in transfers if t.ours is None], source):
        pass
    held: dict[str, Tensor] = {}

    def get(name: str, groups: Groups | None) -> Tensor:
        owner = owners[name]
        if groups is not None:
            # What is a stack on their side alone has no groups here.
            if owner.by_groups and owner.ours is not None and not owner.ours.stacked:
                return dict(_moved(owner, source, groups))[name]
            return get(name, None)[slice(*groups)]
        if name not in held:
            held.clear()
            held.update(_moved(owner, source))
        return held.pop(name)

    return Lookup(get)


def _read(transfers: Sequence[Transfer], source: Weights) -> Iterator[tuple[str, Tensor]]:
    present = source.names()
    for transfer in transfers:
        if transfer.ours is not None:
            yield from _moved(transfer, source)
        elif transfer.same_as is not None:
            for name in transfer.theirs.names:
                if name in present and not _equal(source.get(name), source.get(transfer.same_as)):
                    raise DialectError(f"{name}: must equal {transfer.same_as} in this model, but differs")


def _moved(transfer: Transfer, source: Weights, groups: Groups | None = None) -> Iterator[tuple[str, Tensor]]:
    """Our tensors of one transfer, or some of their groups."""
    assert transfer.ours is not None
    theirs, ours = transfer.theirs, transfer.ours
    # The parts of a stack are groups themselves.
    inner = None if theirs.stacked else groups
    if groups is not None:
        theirs, ours = theirs.groups(*groups), ours.groups(*groups)
    joined = _joined(theirs, lambda name: taken(source, name, inner))
    return _parted(ours, _turned(transfer, joined).reshape(ours.joined()))


def write(transfers: Sequence[Transfer], get: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by name, made one transfer at a time from ours; from a `Lookup` one group at a time."""
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
    if isinstance(get, Lookup) and transfer.theirs.stacked and transfer.by_groups:
        for index in range(transfer.theirs.joined()[0]):
            theirs, ours = (side.groups(index, index + 1) for side in (transfer.theirs, transfer.ours))
            # The group of a stack, or what is a group itself.
            one = get if ours.stacked else partial(get, groups=(index, index + 1))
            yield from _parted(theirs, _joined(ours, one))
    else:
        joined = _joined(transfer.ours, get)
        yield from _parted(transfer.theirs, _returned(transfer, joined).reshape(transfer.theirs.joined()))


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
    parts = [_stack(part, get) if side.stacked else get(part[0]) for part in side.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, side.axis)


def _stack(names: Sequence[str], get: Callable[[str], Tensor]) -> Tensor:
    """The stack of tensors, which are never all held beside it; in a dtype that holds each."""
    first = get(names[0])
    if len(names) == 1:
        return first[None]
    whole = first.new_empty(len(names), *first.shape)
    whole[0] = first
    for place, name in enumerate(names[1:], 1):
        each = get(name)
        if each.dtype != whole.dtype:
            whole = whole.to(torch.promote_types(each.dtype, whole.dtype))
        whole[place] = each
    return whole


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
