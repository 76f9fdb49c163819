"""A document as TOML text: what introduces a spec first, then plain values, then tables in their given order.

tomli-w writes keys and values. The frame is ours, because `layers` shall read as `[[layers]]`, one entry a
paragraph, with the refinements of an entry in one line each.
"""

from collections.abc import Iterator, Mapping

import tomli_w

from composeformer.spec.document import from_data

MAX_LINE = 100
FIRST = ("format", "name", "extends")


def dumps(data: Mapping[str, object]) -> str:
    """TOML text that reads back as `data`; comments are not data and are lost. Raises as `from_data` does."""
    table = from_data(data).data
    first = {key: table[key] for key in FIRST if key in table}
    return "\n".join(_paragraphs(first | table, "")) or "\n"


def _paragraphs(table: Mapping[str, object], name: str, entry: bool = False) -> Iterator[str]:
    """A table's own lines under its header, then each table in it as a paragraph of its own."""
    nested: list[tuple[str, Mapping[str, object], bool]] = []
    lines: list[str] = []
    for key, value in table.items():
        header = f"{name}.{_key(key)}" if name else _key(key)
        if isinstance(value, Mapping) and not (entry and _is_short(value)):
            nested.append((header, value, False))
        elif isinstance(value, list) and value and all(isinstance(below, Mapping) for below in value):
            nested.extend((header, below, True) for below in value)
        else:
            lines.append(_line(key, value))
    if entry or (name and (lines or not nested)):
        lines.insert(0, f"[[{name}]]\n" if entry else f"[{name}]\n")
    if lines:
        yield "".join(lines)
    for header, below, is_entry in nested:
        yield from _paragraphs(below, header, is_entry)


def _line(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return f"{_key(key)} = {_short(value)}\n"
    if isinstance(value, list) and not any(isinstance(below, Mapping | list) for below in value):
        line = f"{_key(key)} = [{', '.join(_line('k', below)[4:-1] for below in value)}]\n"
        if len(line) <= MAX_LINE:
            return line
    return tomli_w.dumps({key: value})


def _is_short(table: Mapping[str, object]) -> bool:
    flat = not any(isinstance(below, Mapping | list) for below in table.values())
    return flat and len(_short(table)) <= MAX_LINE


def _short(table: Mapping[str, object]) -> str:
    return f"{{ {', '.join(_line(key, below)[:-1] for key, below in table.items())} }}" if table else "{}"


def _key(key: str) -> str:
    return tomli_w.dumps({key: 0}).removesuffix(" = 0\n")
