"""Where each key of a TOML text stands: tomli gives values without positions, this positions without values.

A lexer that knows just enough TOML 1.1 to find keys, headers and the tables of arrays. Every character is
read once and nothing recurses. It is more permissive than tomli and stops in silence at what it can not read,
so on any prefix that tomli accepts both see the same keys: run before tomli, its two limits bound the nesting
and the number of keys, in whose product tomli's time grows.
"""

import json
import re
from contextlib import suppress

import attrs
import tomli

Path = tuple[str | int, ...]
"""A place in a document: `("layers", 0, "mixer", "window")`."""

MAX_DEPTH = 100
MAX_NAMES = 50_000

# Loops are unrolled, each character in one way: possessive groups are matched wrongly before Python 3.11.5.
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_KEY = re.compile(_BARE.pattern + r"|" r'"(?!"")[^"\\\n]*(?:\\.[^"\\\n]*)*"' r"|" r"'(?!'')[^'\n]*'")
_STRING = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""(?:"{0,2})|'
    r"'''[^']*(?:'(?!'')[^']*)*'''(?:'{0,2})|" + _KEY.pattern.partition("|")[2],
    re.DOTALL,
)
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"[ \t\n]*(?:#[^\n]*[ \t\n]*)*")
_BETWEEN = re.compile(r"[ \t\n,]*(?:#[^\n]*[ \t\n,]*)*")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_ITEMS = re.compile(r"[^\[\]{}\"'#]*")
_COMMENT = re.compile(r"#[^\n]*")


class Refused(Exception):
    """A text that is nested too deep, or has too many keys, to be read: `line` and `reason`."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason


class Unreadable(Exception):
    """A text that is not TOML; saying why is tomli's part."""


def key_lines(text: str, max_depth: int = MAX_DEPTH, max_names: int = MAX_NAMES) -> dict[Path, int]:
    """The line, from 1, of every key, table and table in an array, in the order in which they are met.

    A table that a longer header mentions before its own header stands at its own. On text that is not TOML:
    the lines up to what can not be read. Raises Refused when a path has more than `max_depth` parts, or the
    keys' parts, arrays and inline tables together are more than `max_names`.
    """
    scan = _Scan(text.replace("\r\n", "\n"), max_depth, max_names)
    with suppress(Unreadable):
        scan.document()
    return scan.lines


def read_key(text: str, pos: int = 0, max_parts: int = MAX_DEPTH) -> tuple[list[str], int]:
    """The parts of the dotted key at `pos`, and where the text goes on after it and its white space.

    Raises Unreadable where no key stands, Refused (line 1) when it has more than `max_parts`.
    """
    parts: list[str] = []
    while True:
        found = _KEY.match(text, _end(_SPACE, text, pos))
        if found is None:
            raise Unreadable
        if len(parts) >= max_parts:
            raise Refused(1, f"nested deeper than {max_parts} levels")
        parts.append(_unquoted(found.group()))
        pos = _end(_SPACE, text, found.end())
        if not text.startswith(".", pos):
            return parts, pos
        pos += 1


def dotted(path: Path) -> str:
    """A path as TOML and `--set` write it: `layers.0.mixer`, `a."b.c"`; always one printable line."""
    return ".".join(str(part) if isinstance(part, int) else _quoted(part) for part in path)


@attrs.define
class _Open:
    """An array or inline table whose end is still to come; `index` is the array's next entry."""

    path: Path
    index: int | None


@attrs.define
class _Scan:
    text: str
    max_depth: int
    max_names: int
    pos: int = 0
    line: int = 1
    counted: int = 0
    names: int = 0
    lines: dict[Path, int] = attrs.field(factory=dict)
    last: dict[Path, int] = attrs.field(factory=dict)  # of each array of tables, the entry that is open

    def document(self) -> None:
        header: Path = ()
        while True:
            self.skip(_BLANK)
            if self.pos >= len(self.text):
                return
            if self.text[self.pos] == "[":
                header = self.header()
            else:
                self.value(self.entry(header))

    def header(self) -> Path:
        """`[a.b]` or `[[a.b]]`: the path of the table that the next lines fill."""
        brackets = 2 if self.text.startswith("[[", self.pos) else 1
        line = self.here()
        self.pos += brackets
        parts = self.key(())
        path: Path = ()
        for part in parts[:-1]:
            path = (*path, part)
            self.lines.setdefault(path, line)
            if path in self.last:
                path = (*path, self.last[path])
        path = (*path, parts[-1])
        if brackets == 2:
            self.lines.setdefault(path, line)
            self.last[path] = self.last.get(path, -1) + 1
            path = (*path, self.last[path])
        self.lines[path] = line
        self.expect("]" * brackets)
        return path

    def entry(self, table: Path) -> Path:
        """`a.b =`: the path of the value that follows."""
        line = self.here()
        for part in self.key(table):
            table = (*table, part)
            self.lines.setdefault(table, line)
        self.expect("=")
        self.skip(_SPACE)
        return table

    def value(self, path: Path | None) -> None:
        """The value at `path` with all that is nested in it."""
        nest: list[_Open] = []
        while path is not None:
            start = self.text[self.pos : self.pos + 1]
            if start in ("[", "{"):
                self.count(1, len(path))
                if start == "{" and isinstance(path[-1], int):
                    self.lines[path] = self.here()
                nest.append(_Open(path, 0 if start == "[" else None))
                self.pos += 1
            else:
                self.skip(_STRING if start in ("'", '"') else _SCALAR)
            path = self.following(nest)

    def following(self, nest: list[_Open]) -> Path | None:
        """Closes what ends here and finds the next value that can hold keys, if the outermost one goes on."""
        while nest:
            top = nest[-1]
            if top.index is None:
                self.skip(_BETWEEN)
                if not self.text.startswith("}", self.pos):
                    return self.entry(top.path)
                nest.pop()
                self.pos += 1
                continue
            start = self.pos
            self.skip(_ITEMS)
            top.index += self.text.count(",", start, self.pos)
            match self.text[self.pos : self.pos + 1]:
                case "]":
                    nest.pop()
                    self.pos += 1
                case "[" | "{":
                    return (*top.path, top.index)
                case "#":
                    self.skip(_COMMENT)
                case "'" | '"':
                    self.skip(_STRING)
                case _:
                    raise Unreadable
        return None

    def key(self, table: Path) -> list[str]:
        try:
            parts, self.pos = read_key(self.text, self.pos, self.max_depth)
        except Refused as refused:
            raise Refused(self.here(), refused.reason) from None
        self.count(len(parts), len(table) + len(parts))
        return parts

    def count(self, names: int, depth: int) -> None:
        self.names += names
        if depth > self.max_depth:
            raise Refused(self.here(), f"nested deeper than {self.max_depth} levels")
        if self.names > self.max_names:
            raise Refused(self.here(), f"more than {self.max_names} keys, arrays and tables")

    def here(self) -> int:
        self.line += self.text.count("\n", self.counted, self.pos)
        self.counted = self.pos
        return self.line

    def skip(self, pattern: re.Pattern[str]) -> None:
        self.pos = _end(pattern, self.text, self.pos)

    def expect(self, mark: str) -> None:
        if not self.text.startswith(mark, self.pos):
            raise Unreadable
        self.pos += len(mark)


def _end(pattern: re.Pattern[str], text: str, pos: int) -> int:
    found = pattern.match(text, pos)
    if found is None:
        raise Unreadable
    return found.end()


def _unquoted(key: str) -> str:
    if key[0] not in "\"'":
        return key
    if "\\" not in key:
        return key[1:-1]
    try:
        value = tomli.loads(f"k = {key}")["k"]
    except tomli.TOMLDecodeError:
        raise Unreadable from None
    assert isinstance(value, str)
    return value


def _quoted(key: str) -> str:
    if _BARE.fullmatch(key):
        return key
    # JSON's escapes are TOML's, but JSON leaves DEL and the terminal's other controls as they are.
    return "".join(
        char if char.isprintable() else f"\\U{ord(char):08x}" for char in json.dumps(key, ensure_ascii=False)
    )
