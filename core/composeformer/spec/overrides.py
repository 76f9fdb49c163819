"""`--set` settings: one value of a document, named by its dotted path, changed by the rule of `extends`.

A key is written as in TOML (`layers.0.repeat`, `a."b.c"`), numbers count an array's entries from 0. A value
is any TOML value; a plain word needs no quotes.
"""

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import tomli

from composeformer.errors import ComposeError, Problem, Source, SpecError, show
from composeformer.spec.document import Document, from_data, printable
from composeformer.spec.merge import NAMING, combine, copied
from composeformer.spec.scanner import Path, Refused, Unreadable, dotted, read_key

SET = Source("--set")

_WORD = re.compile(r"[\w./:@~+-]+")


def apply(document: Document, setting: str) -> Document:
    """`document` with `KEY=VALUE` set. Raises ComposeError for a setting that is not one or has no place."""
    keys, value = _read(setting)
    return _set(document, keys, value, SET)


def apply_all(document: Document, settings: Sequence[str]) -> Document:
    """`document` with settings applied in order, those that name a part first.

    Naming another part drops the old one's keys; this way it drops no key that another setting gave.
    """
    read = [_read(setting) for setting in settings]
    for keys, value in sorted(read, key=lambda setting: setting[0][-1] not in NAMING):
        document = _set(document, keys, value, SET)
    return document


def set_value(document: Document, key: str, value: object, source: Source = SET) -> Document:
    """`document` with the dotted path `key` set to `value`, a Python value. Raises as `apply` does."""
    keys, rest = _keys(key, key, source)
    if rest:
        raise ComposeError(f"{source}: {show(printable(key))}: must be one dotted key, such as a.b.c")
    return _set(document, keys, value, source)


def _read(setting: str) -> tuple[list[str], object]:
    keys, rest = _keys(setting, setting, SET)
    if not rest.startswith("="):
        raise ComposeError(f"{SET}: {show(printable(setting))}: must be KEY=VALUE, as in layers.0.repeat=2")
    text = rest[1:].strip()
    try:
        # In an array too: there a comment or a second line can not pass unseen.
        found = tomli.loads(f"value = {text}\narray = [{text}]")
        if set(found) == {"value", "array"} and len(found["array"]) == 1:
            return keys, found["value"]
    except (tomli.TOMLDecodeError, RecursionError):
        if _WORD.fullmatch(text):
            return keys, text
    except ValueError:  # Python's limit on the digits of an integer
        pass
    raise ComposeError(
        f"{SET}: {dotted(tuple(keys))} = {printable(text)[:80]}: must be a TOML value or a plain word; "
        "quote other strings for TOML and for the shell: 'KEY=\"some text\"'"
    )


def _keys(text: str, whole: str, source: Source) -> tuple[list[str], str]:
    try:
        keys, end = read_key(text)
    except Refused as refused:
        raise ComposeError(f"{source}: {refused.reason}") from None
    except Unreadable:
        said = show(printable(whole))
        raise ComposeError(f"{source}: {said}: must start with a dotted key, such as a.b.c") from None
    return keys, text[end:]


def _set(document: Document, keys: list[str], value: object, source: Source) -> Document:
    over = from_data(_wrapped(keys, value), str(source))
    path, entry = _located(document, keys, over, source)
    # Below the last array entry on the way, setting a value is merging a table that holds only it.
    above, below = _at(over.data, keys[: len(entry)]), _at(document.data, entry)
    depth = len(entry)
    sources = {at: said for at, said in document.sources.items() if at == entry or at[:depth] != entry}
    over = Document({}, {(): source}, over.name)
    combined = combine(document, below, over, above, entry, sources)
    if not entry:
        assert isinstance(combined, dict)
        return Document(combined, sources, document.name)
    if path == entry:
        sources[entry] = source
        if not isinstance(above, dict):
            sources[entry[:-1]] = source  # the array is one value
    data = copied(document, document.data, (), {})
    assert isinstance(data, dict)
    _at(data, entry[:-1])[entry[-1]] = combined
    return Document(data, sources, document.name)


def _located(document: Document, keys: list[str], over: Document, source: Source) -> tuple[Path, Path]:
    """The path that `keys` mean in `document`, and that of the last array entry on it."""
    if keys == ["extends"]:
        raise ComposeError(f"{source}: extends: can not be set; name the other spec instead")
    path: Path = ()
    entry: Path = ()
    here: object = document.data
    for key in keys:
        if isinstance(here, list):
            index = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else len(here)
            if index >= len(here):
                entries = f"with entries 0 to {len(here) - 1}" if here else "without entries"
                _refuse(keys, over, source, f"{dotted(path)} is an array {entries}")
            path = entry = (*path, index)
            here = here[index]
        elif isinstance(here, dict):
            path = (*path, key)
            here = here.get(key, {})
        else:
            _refuse(keys, over, source, f"{dotted(path)} is {show(here)}, not a table")
    return path, entry


def _refuse(keys: list[str], over: Document, source: Source, reason: str) -> NoReturn:
    value = _at(over.data, keys)
    found = None if isinstance(value, dict | list) else value
    raise SpecError([Problem(dotted(tuple(keys)), found, reason, None, source)])


def _wrapped(keys: list[str], value: object) -> dict[str, object]:
    for key in reversed(keys[1:]):
        value = {key: value}
    return {keys[0]: value}


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        value = value[part]
    return value
