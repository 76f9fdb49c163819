"""Two spellings of one thing in Hugging Face's config.json, and GGUF's floats.

transformers 4 has `rope_theta` beside a nullable table `rope_scaling`, transformers 5 one table
`rope_parameters`; lines of a dialect know only the second. Written are both, so that either version loads.
"""

import struct
from collections.abc import Mapping
from typing import Any

from composeformer.errors import DialectError, show

TABLE = "rope_parameters"
BESIDE = ("rope_theta", "partial_rotary_factor")


def fold(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with one rotary table, its keys as `rope_parameters.KEY`.

    Raises DialectError where the spellings disagree.
    """
    rest = dict(config)
    new, old = _table(rest, TABLE), _table(rest, "rope_scaling")
    if new and old:
        for name in sorted((new.keys() | old.keys()) - set(BESIDE)):
            if new.get(name) != old.get(name):
                found = f"{show(new.get(name))} in {TABLE} and {show(old.get(name))} in rope_scaling"
                raise DialectError(f"{name} is {found}: which is meant?")
    table = {**new, **old}
    for name in BESIDE:
        beside = rest.pop(name, None)
        stated = [each[name] for each in (new, old) if name in each]
        if beside is not None:
            stated.append(beside)
        if any(value != stated[0] for value in stated):
            raise DialectError(f"{name} is {' and '.join(map(show, stated))}: which is meant?")
        if stated:
            table[name] = stated[0]
    return rest | {f"{TABLE}.{name}": value for name, value in table.items()}


def unfold(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with nested tables, and the rotary one in both spellings."""
    nested: dict[str, Any] = {}
    for name, value in config.items():
        table, _, key = name.rpartition(".")
        if table:
            nested.setdefault(table, {})[key] = value
        else:
            nested[name] = value
    if TABLE in nested:
        table = nested[TABLE]
        old = {name: value for name, value in table.items() if name not in BESIDE}
        nested["rope_scaling"] = old if old.get("rope_type") != "default" else None
        nested.update({name: table[name] for name in BESIDE if name in table})
    return nested


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.pop(name, None)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise DialectError(f"{name} = {show(found)}: must be a table or null")
    table = dict(found)
    if "type" in table:
        old = table.pop("type")
        if table.setdefault("rope_type", old) != old:
            new = show(table["rope_type"])
            raise DialectError(f"{name} has type {show(old)} and rope_type {new}: which is meant?")
    return table


def decimal(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    packed = _float32(value)
    if packed is not None and struct.unpack("<f", packed)[0] == value:
        for digits in range(1, 10):
            short = float(f"{value:.{digits}g}")
            if _float32(short) == packed:
                return short
    return value


def _float32(value: float) -> bytes | None:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return None
