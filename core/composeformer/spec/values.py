"""Every value of a spec with where it came from: stated ones by file and line, the others as defaults."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from composeformer.config import Config, facts_of, plain
from composeformer.contracts import SUBLAYERS, LayerParts, Part
from composeformer.errors import DEFAULT, Source
from composeformer.spec.scanner import Path, dotted

if TYPE_CHECKING:
    from composeformer.spec.spec import Spec

FORMAT = 1


def values(spec: "Spec") -> Iterator[tuple[str, object, Source]]:
    """Each value once, by dotted path: what the document states, then the defaults of what is used. A price is used
    where the document has one.
    """
    document = spec.document
    stated = dict(leaves(document.data))
    for path, value in stated.items():
        yield dotted(path), value, document.source(path) or DEFAULT
    told = {path[:length] for path in stated for length in range(1, len(path) + 1)}
    for path, value in (*_frame(spec), *_parts(spec)):
        if path not in told:
            told.add(path)
            yield dotted(path), value, DEFAULT


def leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Values that are no tables; a list is one value unless it holds tables."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list) and any(isinstance(element, dict) for element in value):
        for index, below in enumerate(value):
            yield from leaves(below, (*path, index))
    elif path:
        yield path, value


def _frame(spec: "Spec") -> Iterator[tuple[Path, object]]:
    yield ("format",), FORMAT
    yield from _fields(("model",), spec.model)
    yield from _fields(("train",), spec.train)
    yield from _fields(("parallel",), spec.parallel)
    if "cost" in spec.document.data:
        yield from _fields(("cost",), spec.cost)
    sole: dict[str, object] = {}
    for slot in SUBLAYERS:
        names = spec.named[slot]
        default = None if names else spec.registry.default(slot)
        sole[slot] = next(iter(names)) if names else default.kind if default is not None else None
    yield from _entries(("layers",), spec.document.data["layers"], sole)


def _entries(path: Path, entries: Any, sole: dict[str, object]) -> Iterator[tuple[Path, object]]:
    for index, entry in enumerate(entries):
        yield (*path, index, "repeat"), 1
        if "layers" in entry:
            yield from _entries((*path, index, "layers"), entry["layers"], sole)
        else:
            yield from (((*path, index, slot), name) for slot, name in sole.items())


def _parts(spec: "Spec") -> Iterator[tuple[Path, object]]:
    roots = [part for named in spec.named.values() for part in named.values()]
    roots += [*spec.singles.values(), *(part for layer in spec.layers for _, part in layer.items())]
    seen: set[Path] = set()
    for root in roots:
        if root is not None:
            yield from _part(root, seen)


def _part(part: Part, seen: set[Path]) -> Iterator[tuple[Path, object]]:
    path = part.paths[0]
    if path in seen:
        return
    seen.add(path)
    # What a refinement leaves alone stands with what it refines.
    if len(part.paths) == 1:
        yield (*path, "kind"), part.kind
        yield from _fields(path, part.config)
    for name in facts_of(type(part.config)):
        below = getattr(part.config, name)
        for _, held in below.items() if isinstance(below, LayerParts) else [(name, below)]:
            if isinstance(held, Part):
                yield from _part(held, seen)


def _fields(path: Path, config: Config) -> Iterator[tuple[Path, object]]:
    for name, facts in facts_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, LayerParts):
            for slot, held in (("mixer", value.mixer), ("ffn", value.ffn)):
                yield (*path, name, slot), False if held is None else held.name
        else:
            # What is stated of records stands field by field.
            shown = value if facts.record is None else plain(value)
            yield (*path, name), value.name if isinstance(value, Part) else shown
