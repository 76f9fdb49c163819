"""`[[layers]]`: runs of equal layers and repeated patterns, as one list of layers.

An entry names the parts of a layer, or holds a list of entries, its pattern; `repeat` says how often. The
number of layers is bounded before any list of them is made.
"""

from collections.abc import Mapping
from typing import Any

from composeformer.contracts import SUBLAYERS, LayerParts
from composeformer.errors import nearest, one_of
from composeformer.spec.resolve import Resolver
from composeformer.spec.scanner import Path

MAX_LAYERS = 10_000
MAX_NESTED = 8


def layers(resolver: Resolver) -> list[LayerParts]:
    """The layers in order, repeats expanded; those that have problems are missing."""
    entries = resolver.document.data.get("layers")
    if entries is None:
        allowed = "is required: an array of tables, one `[[layers]]` for each run of equal layers"
        resolver.problem(("layers",), None, allowed)
        return []
    return _entries(resolver, entries, ("layers",), 1, 0)


def _entries(resolver: Resolver, entries: object, path: Path, times: int, depth: int) -> list[LayerParts]:
    """The layers of a list that itself is repeated `times` times."""
    if not isinstance(entries, list) or not entries:
        resolver.problem(path, entries, "must be an array of tables, at least one")
        return []
    found: list[LayerParts] = []
    for index, entry in enumerate(entries):
        here = (*path, index)
        if not isinstance(entry, dict):
            resolver.problem(here, entry, f"must be a table with {', '.join(SUBLAYERS)}, or with layers")
            continue
        repeat = _repeat(resolver, entry, here)
        allowed = ("repeat", "layers") if "layers" in entry else ("repeat", *SUBLAYERS, "layers")
        for key, value in entry.items():
            if key not in allowed:
                told = f"unknown key; allowed: {one_of(allowed)}"
                resolver.problem((*here, key), value, told, nearest(key, allowed), fatal=False)
        if "layers" not in entry:
            block = _layer(resolver, entry, here)
        elif depth < MAX_NESTED:
            block = _entries(resolver, entry["layers"], (*here, "layers"), times * repeat, depth + 1)
        else:
            resolver.problem((*here, "layers"), None, f"patterns nest at most {MAX_NESTED} deep")
            continue
        if (len(found) + len(block) * repeat) * times > MAX_LAYERS:
            resolver.problem((*here, "repeat"), repeat, f"makes more than {MAX_LAYERS} layers in all")
            return []
        found.extend(block * repeat)
    return found


def _repeat(resolver: Resolver, entry: Mapping[str, Any], path: Path) -> int:
    repeat = entry.get("repeat", 1)
    if type(repeat) is int and 1 <= repeat <= MAX_LAYERS:
        return repeat
    resolver.problem((*path, "repeat"), repeat, f"must be an integer from 1 to {MAX_LAYERS}")
    return 1


def _layer(resolver: Resolver, entry: Mapping[str, Any], path: Path) -> list[LayerParts]:
    made = resolver.layer(entry, (path,))
    return [] if made is None else [made]
