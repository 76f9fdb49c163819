"""A document: plain nested tables and arrays, and for each key where it was written.

Made from a file, from text or from Python data; in every case it holds only what a spec can: strings, 64-bit
integers, booleans, finite numbers, arrays and tables. NaN passes every comparison of a range check, and no
field of a spec is a date, so both are refused here, with their lines.
"""

import os
import pathlib
import re
import stat
from collections.abc import Mapping
from datetime import date, time
from math import isfinite

import attrs
import tomli

from composeformer.errors import ComposeError, Problem, Source, SpecError
from composeformer.spec.scanner import MAX_DEPTH, Path, Refused, dotted, key_lines

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000
MAX_PROBLEMS = 20

# What tomli calls internal, said to somebody who wrote a spec.
_SAYINGS = {
    "Cannot declare": "this table stands above already",
    "Cannot overwrite": "this key, or a table of its name, stands above already",
    "Cannot mutate": "this table or array is complete above and can not be added to",
    "Cannot redefine": "this table is complete above and can not be added to",
    "Invalid value": "not a TOML value (strings need quotes)",
}


class FileError(ComposeError):
    """A spec file that can not be read at all: `label` and `reason`."""

    def __init__(self, label: str, reason: str) -> None:
        super().__init__(f"{label}: {reason}")
        self.label = label
        self.reason = reason


@attrs.define
class Document:
    """`data` as TOML gives it; `sources` of every key, table and table in an array, `()` being the whole.

    `name` is what the user wrote: a path, the name of a shipped spec, or "python".
    """

    data: dict[str, object]
    sources: dict[Path, Source]
    name: str

    def source(self, path: Path) -> Source | None:
        """Where `path` was written: its own place, or that of the nearest table around it."""
        for length in range(len(path), -1, -1):
            found = self.sources.get(path[:length])
            if found is not None:
                return found
        return None


def read(path: pathlib.Path, label: str | None = None) -> Document:
    """The document in a file, which errors call `label`.

    Raises FileError for what is missing, not a regular file, not readable or too large; else as `parse`.
    """
    label = printable(str(path) if label is None else label)
    return parse(_bytes(path, label), label)


def parse(text: str | bytes, label: str) -> Document:
    """The document in a TOML text. Raises ComposeError, or SpecError for values that no spec can hold."""
    label = printable(label)
    text = _decoded(text, label)
    try:
        lines = key_lines(text)
        data = tomli.loads(text)
    except Refused as refused:
        raise ComposeError(f"{Source(label, refused.line)}: {refused.reason}") from None
    except tomli.TOMLDecodeError as error:
        saying = next((said for start, said in _SAYINGS.items() if error.msg.startswith(start)), error.msg)
        raise ComposeError(f"{Source(label, error.lineno)}: {printable(saying)}") from None
    except (ValueError, RecursionError) as error:
        # Python's own limit on the digits of an integer; tomli passes it on without a position.
        digits = re.search(r"[0-9_]{4300,}", text)
        line = 1 + text.count("\n", 0, digits.start()) if digits else None
        reason = "an integer must fit in 64 bits" if digits else printable(str(error))
        raise ComposeError(f"{Source(label, line)}: {reason}") from None
    sources: dict[Path, Source] = {(): Source(label)}
    sources.update((path, Source(label, line)) for path, line in lines.items())
    return _admitted(data, Document({}, sources, label))


def from_data(data: Mapping[str, object], label: str = "python") -> Document:
    """A document from nested mappings, lists and tuples, copied.

    Raises SpecError naming each value that no spec can hold, ComposeError for what is too deep or too large.
    """
    label = printable(label)
    document = Document({}, {(): Source(label)}, label)
    if not isinstance(data, Mapping):
        raise ComposeError(f"{label}: a spec must be a table, not {type(data).__name__}")
    document = _admitted(data, document)
    document.sources.update((path, Source(label)) for path in places(document.data, ()))
    return document


def places(value: object, path: Path) -> list[Path]:
    """The paths that have sources below `path`: every key, and every table in an array."""
    found: list[Path] = []
    if isinstance(value, dict):
        for key, below in value.items():
            found.append((*path, key))
            found += places(below, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            if isinstance(below, dict):
                found.append((*path, index))
            if isinstance(below, dict | list):
                found += places(below, (*path, index))
    return found


def printable(text: str) -> str:
    """A text as one line that no terminal obeys: controls and lone surrogates escaped, cut when long."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 500 else f"{text[:497]}..."


def _bytes(path: pathlib.Path, label: str) -> bytes:
    try:
        # Opening a pipe or a device can wait or act, so ask what it is first, and once more after opening.
        _require_file(path.stat(), label)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            _require_file(os.fstat(file.fileno()), label)
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileError(label, "no such file") from None
    except OSError as error:
        raise FileError(label, printable((error.strerror or str(error)).lower())) from None
    except ValueError:  # a NUL or a lone surrogate in the path
        raise FileError(label, "not a file name") from None
    return text


def _require_file(status: os.stat_result, label: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise FileError(label, "is a directory, not a spec file")
    if not stat.S_ISREG(status.st_mode):
        raise FileError(label, "is not a regular file")
    if status.st_size > MAX_BYTES:
        raise FileError(label, f"is {status.st_size} bytes; a spec has at most {MAX_BYTES}")


def _decoded(text: str | bytes, label: str) -> str:
    try:
        # A str is encoded too: it can hold lone surrogates, which no file can.
        raw = text.encode() if isinstance(text, str) else text
        if len(raw) > MAX_BYTES:
            raise FileError(label, f"is larger than {MAX_BYTES} bytes")
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        reason = f"not UTF-8 text (byte 0x{error.object[error.start]:02x})"
    except UnicodeEncodeError as error:
        line = 1 + error.object.count("\n", 0, error.start)
        reason = "not Unicode text (a lone surrogate)"
    raise ComposeError(f"{Source(label, line)}: {reason}") from None


def _admitted(data: Mapping[str, object], document: Document) -> Document:
    admission = _Admission(document)
    document.data = admission.table(data, ())
    if admission.problems:
        raise SpecError(admission.problems)
    return document


@attrs.define
class _Admission:
    """Copies data value by value, noting what no spec can hold."""

    document: Document
    problems: list[Problem] = attrs.field(factory=list)
    values: int = 0

    def value(self, value: object, path: Path) -> object:
        self.values += 1
        # A mapping can hold itself, or hold one mapping twice at each of many levels.
        if len(path) > MAX_DEPTH:
            source = self.document.source(path)
            raise ComposeError(f"{source}: {dotted(path[:5])}...: nested deeper than {MAX_DEPTH} levels")
        if self.values > MAX_VALUES:
            raise ComposeError(f"{self.document.source(())}: more than {MAX_VALUES} values")
        match value:
            case bool():
                return value
            case str():
                if _is_unicode(value):
                    return str.__str__(value)
                return self.problem(path, None, "must be Unicode text (holds a lone surrogate)")
            case int():
                if -(2**63) <= value < 2**63:
                    return int(value)
                return self.problem(path, None, "an integer must fit in 64 bits")
            case float():
                if isfinite(value):
                    return float(value)
                return self.problem(path, value, "must be a finite number")
            case Mapping():
                return self.table(value, path)
            case list() | tuple():
                return [self.value(below, (*path, index)) for index, below in enumerate(value)]
            case date() | time():
                return self.problem(path, value, "a date or time is no spec value; write it as a string")
            case None:
                return self.problem(path, None, "None is no TOML value; leave the key out")
            case _:
                kind = type(value).__name__
                return self.problem(path, None, f"must be a string, number, boolean, list or table: {kind}")

    def table(self, table: Mapping[str, object], path: Path) -> dict[str, object]:
        copied: dict[str, object] = {}
        for key, below in table.items():
            if not isinstance(key, str):
                self.problem(path, None, f"a key must be a string, not {type(key).__name__}")
            elif not _is_unicode(key):
                self.problem(path, None, "a key must be Unicode text (one holds a lone surrogate)")
            else:
                copied[str.__str__(key)] = self.value(below, (*path, key))
        return copied

    def problem(self, path: Path, found: object, allowed: str) -> object:
        """Notes a problem; returns what stands in for the value meanwhile."""
        source = self.document.source(path)
        if not path:
            raise ComposeError(f"{source}: {allowed}")
        self.problems.append(Problem(dotted(path), found, allowed, None, source))
        if len(self.problems) >= MAX_PROBLEMS:
            raise SpecError(self.problems)
        return None


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
