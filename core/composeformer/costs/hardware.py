"""A device on paper: what it computes, holds and moves at most, and what it draws.

A profile is a TOML file in which every number names its source and says whether it was read there. Peaks are dense, by
dtype, in operations a second; memory in bytes; bandwidths in bytes a second, of the link to other devices of a node
each way; power in watts.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import attrs

from composeformer.config import Config, config, field
from composeformer.costs.figures import Amount, Count, Figure, Reader
from composeformer.errors import InputError, SpecError, nearest, one_of
from composeformer.formats import BITS
from composeformer.plugins import current
from composeformer.spec.document import Document, parse, read


@attrs.frozen(kw_only=True)
class Hardware:
    """One kind of device. `year` is when it could be bought; `node` the number in one server."""

    name: str
    description: str
    year: int
    peaks: Mapping[str, Figure]
    memory: Figure
    bandwidth: Figure
    link: Figure
    network: Figure
    power: Figure
    node: Figure

    def peak(self, dtype: str) -> Figure:
        """The peak of a dtype. Raises InputError for one that the profile has no peak of."""
        if dtype not in self.peaks:
            near = nearest(dtype, self.peaks)
            hint = f"; did you mean {near!r}?" if near else ""
            told = f"hardware {self.name} has no peak of it, but of {one_of(self.peaks)}{hint}"
            raise InputError(f"cost.peak = {dtype}: {told}")
        return self.peaks[dtype]

    def figures(self) -> dict[str, Figure]:
        """Every number by name."""
        named = {
            name: getattr(self, name) for name in ("memory", "bandwidth", "link", "network", "power", "node")
        }
        return {f"peak of {dtype}": figure for dtype, figure in self.peaks.items()} | named


@config
class _Head(Config):
    name: str = field()
    description: str = field(default="")
    year: int = field(minimum=1990, maximum=2100)


AMOUNTS = ("memory", "bandwidth", "link", "network", "power")


def load(ref: "str | os.PathLike[str]") -> Hardware:
    """A profile from the path of a `.toml` file or a shipped name. Raises ComposeError, a line for each problem."""
    name = os.fsdecode(ref)
    if not isinstance(ref, str) or name.endswith(".toml") or os.sep in name:
        return hardware(read(Path(name), name))
    found = [file for file in (*_own(), *current().hardware_files) if Path(file.name).stem == name]
    if len(found) > 1:
        raise InputError(f"hardware {name}: several plugins ship one of this name: {one_of(map(str, found))}")
    if not found:
        near = nearest(name, shipped())
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"hardware {name}: must be a path or one of {one_of(shipped())}{hint}")
    return hardware(parse(found[0].read_text(encoding="utf-8"), found[0].name))


def shipped() -> list[str]:
    """The names of all profiles that there are: composeformer's, and those that plugins bring."""
    return sorted({Path(file.name).stem for file in (*_own(), *current().hardware_files)})


def _own() -> list[Path]:
    return sorted((Path(__file__).parents[1] / "hardware").glob("*.toml"))


def hardware(document: Document) -> Hardware:
    """What a document describes. Raises SpecError with every problem found."""
    reader = Reader(document)
    head = reader.table(_Head, (), ("peaks", "node", *AMOUNTS))
    stated = reader.mapping(("peaks",), BITS)
    peaks = {dtype: reader.figure(Amount, ("peaks", dtype)) for dtype in stated or () if dtype in BITS}
    if stated == {}:
        reader.problem(("peaks",), None, "is required: a table with a peak for one dtype at least")
    amounts = {name: reader.figure(Amount, (name,)) for name in AMOUNTS}
    node = reader.figure(Count, ("node",))
    for path, figure in [
        *((("peaks", d), f) for d, f in peaks.items()),
        *(((n,), f) for n, f in amounts.items()),
    ]:
        if figure is not None and figure.value < 1:
            told = (
                "must be > 0"
                if figure.value == 0
                else "must be >= 1: operations or bytes a second, bytes, watts"
            )
            reader.problem((*path, "value"), figure.value, told)
    if reader.problems or head is None:
        raise SpecError(reader.problems)
    return Hardware(**head, peaks=peaks, node=node, **amounts)  # type: ignore[arg-type]
