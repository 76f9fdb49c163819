"""A source whose weights are codes, read as numbers: each tensor is decoded when it is asked for, and only then.

Codes are found by their dtype and what stands beside them, as a coding names it, never by what a config lists: mixed
folders, where some weights are codes and some are not, are the rule. All that does not fit is told before the first
weight is read.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import Tensor

from composeformer import lazy
from composeformer.contracts import Component, Weight
from composeformer.dialects.coding import Coding, Stated, codec
from composeformer.dialects.rules import cut
from composeformer.dialects.transfer import Weights, taken
from composeformer.errors import FolderError
from composeformer.folder import TensorInfo, WeightReader
from composeformer.plugins import current
from composeformer.policy import Codec


@attrs.frozen
class Held:
    """What holds one weight: its tensors, codes first, and the kind of their codec."""

    codec: str
    parts: tuple[Weight, ...]


def found(reader: WeightReader, coding: Coding, stated: Stated | None = None) -> dict[str, Held]:
    """The weights of a folder that are stored as codes, by the name of the codes.

    Raises FolderError with a line for each tensor that is missing, mis-shaped or of a dtype that can not be read,
    that belongs to codes which are not there, or that the config says to be no codes.
    """
    held: dict[str, Held] = {}
    problems: list[str] = []
    names = reader.names()
    for name, info in names.items():
        if spelled(info.dtype) != coding.codes:
            continue
        if len(info.shape) < 2:
            problems.append(f"{name}: is stored as {coding.codes} with shape {info.shape}; codes are matrices")
            continue
        parts = coding.stored(name, info.shape)
        problems += _misfits(names, coding, parts)
        if stated is not None and stated.excepts(name):
            told = f"{', '.join(coding.plain)} says that it is not"
            problems.append(f"{name}: is stored as {coding.codes}, but {told}")
        held[name] = Held(coding.codec, parts)
    problems += _strays(names, coding, {part.name for each in held.values() for part in each.parts})
    if problems:
        raise FolderError(*(f"{reader.folder}: {line}" for line in cut(problems)))
    return held


def _misfits(names: Mapping[str, TensorInfo], coding: Coding, parts: tuple[Weight, ...]) -> Iterator[str]:
    """What is wrong with the tensors beside codes."""
    codes = f"{parts[0].name} {parts[0].shape}"
    for companion, part in zip(coding.companions, parts[1:], strict=True):
        info = names.get(part.name)
        allowed = (str(part.dtype), *companion.also)
        if info is None:
            yield f"{part.name}: is missing, and {parts[0].name} is stored as {coding.codes}"
        elif info.shape != part.shape:
            yield f"{part.name}: has shape {info.shape}, {codes} needs {part.shape}"
        elif spelled(info.dtype) not in allowed:
            yield f"{part.name}: is stored as {spelled(info.dtype)}; allowed: {', '.join(allowed)}"


def _strays(names: Mapping[str, TensorInfo], coding: Coding, claimed: set[str]) -> Iterator[str]:
    """Tensors that are named as what stands beside codes, where there are none."""
    for name, info in names.items():
        for other in (each.name(name) for each in coding.companions):
            # A module's scales may be named after it alone; they are its weight's, and not its bias's.
            apart = other != name and claimed.isdisjoint((name, other))
            if other in names and apart and len(info.shape) > 1:
                stored = f"{name}, which is stored as {spelled(info.dtype)} and not as {coding.codes}"
                yield f"{other}: belongs to {stored}"


class Decoded:
    """The tensors of a folder with its codes decoded to one dtype, shown and read as if they were stored so."""

    def __init__(self, reader: WeightReader, held: Mapping[str, Held], dtype: torch.dtype) -> None:
        self.folder = reader.folder
        self.dtype = dtype
        # All that is given is a copy, so that no page of a file that was gone through has to stay.
        reader.one_file = True
        self._reader = reader
        self._held = held

    @cached_property
    def _names(self) -> Mapping[str, TensorInfo]:
        beside = {part.name for held in self._held.values() for part in held.parts[1:]}
        return MappingProxyType(
            {
                name: attrs.evolve(info, dtype=self.dtype) if name in self._held else info
                for name, info in self._reader.names().items()
                if name not in beside
            }
        )

    def names(self) -> Mapping[str, TensorInfo]:
        """What the folder holds, without what belongs to codes."""
        return self._names

    def get(self, name: str) -> Tensor:
        """One tensor. Raises FolderError for a name that the folder lacks, and for numbers that hold no codes."""
        return self._decoded(name, slice(None))

    def get_slice(self, name: str) -> "Slice":
        """A view whose leading dimension can be sliced; only that part is read, and decoded."""
        return Slice(lambda groups: self._decoded(name, groups))

    def cut(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """[start, stop) of dimension -2 or -1 of a matrix, as a shard of it reads them: no other block is touched.

        A shard that begins inside a block takes that block's scale.
        """
        held = self._held.get(name)
        if held is None:
            return self._piece(name, dim, start, stop)
        edges = codec(held.codec).cut(dim, start, stop)
        parts = [self._piece(part.name, dim, *edge) for part, edge in zip(held.parts, edges, strict=True)]
        self._check(held, parts)
        return decoder(held.codec).decode(parts, self.dtype).narrow(dim, start - edges[0][0], stop - start)

    def _piece(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        rank = len(self._reader.names()[name].shape)
        index = [slice(None)] * rank
        index[dim] = slice(start, stop)
        piece: Tensor = self._reader.get_slice(name)[tuple(index)]
        return piece

    def _decoded(self, name: str, groups: slice) -> Tensor:
        held = self._held.get(name)
        whole = groups == slice(None)
        if held is None:
            return self._reader.get(name).clone() if whole else self._reader.get_slice(name)[groups].clone()
        parts = [
            self._reader.get(part.name) if whole else self._reader.get_slice(part.name)[groups]
            for part in held.parts
        ]
        self._check(held, parts)
        return decoder(held.codec).decode(parts, self.dtype)

    def _check(self, held: Held, parts: list[Tensor]) -> None:
        for place, (part, tensor) in enumerate(zip(held.parts, parts, strict=True)):
            check(held.codec, place, tensor, f"{self.folder}: {part.name}")


class Slice:
    """A tensor of a source, to be indexed by a slice of its leading dimension."""

    def __init__(self, take: Callable[[slice], Tensor]) -> None:
        self._take = take

    def __getitem__(self, groups: slice) -> Tensor:
        return self._take(groups)


class Checked:
    """A source whose codes are kept: what belongs to them is checked as it is read, `places` say by which codec."""

    def __init__(self, source: Weights, places: Mapping[str, tuple[str, int]], where: Path) -> None:
        self._source = source
        self._places = places
        self._where = where

    def names(self) -> Mapping[str, Any]:
        """What the source holds."""
        return self._source.names()

    def get(self, name: str) -> Tensor:
        """One tensor. Raises FolderError for numbers that belong to no codes."""
        return self._fine(name, self._source.get(name))

    def get_slice(self, name: str) -> Slice:
        """A view whose leading dimension can be sliced."""
        return Slice(lambda groups: self._fine(name, taken(self._source, name, (groups.start, groups.stop))))

    def _fine(self, name: str, tensor: Tensor) -> Tensor:
        if name in self._places:
            check(*self._places[name], tensor, f"{self._where}: {name}")
        return tensor


def check(kind: str, place: int, tensor: Tensor, where: str) -> None:
    """Raises FolderError for numbers that no encoder of a codec writes at this place of what holds a weight."""
    reason = decoder(kind).wrong(place, tensor)
    if reason is not None:
        raise FolderError(f"{where}: has {reason}")


def decoder(kind: str) -> Codec:
    """The codec of a kind, made once. Raises ComposeError where no plugin brings it."""
    return _made(current().registry.get("codec", kind))


@cache
def _made(component: Component) -> Codec:
    config: Any = component.config
    made: Codec = lazy.load(component.implementations[0].module)(config())
    return made


def spelled(dtype: torch.dtype) -> str:
    """A dtype by its name in specs."""
    return str(dtype).removeprefix("torch.")


__all__ = ["Checked", "Decoded", "Held", "check", "decoder", "found", "spelled"]
