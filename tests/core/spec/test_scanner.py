"""The scanner finds every key of a valid document, no other, and the line that each was written in."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import tomli
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composeformer.spec.scanner import Path, Refused, Unreadable, dotted, key_lines, read_key

BARE = "abz-_09"
QUOTE = '"'
NAMES = st.one_of(
    st.text(BARE, min_size=1, max_size=2),
    st.sampled_from(
        [
            "",
            " ",
            "a.b",
            "é",
            "\n",
            "\t",
            "'",
            '"',
            "\\",
            "]",
            "[x]",
            "#",
            "=",
            "{",
            ",",
            "\x7f",
            "\U0001f600",
        ]
    ),
)
TRAPS = st.sampled_from(
    [
        "[trap]",
        "[[trap]]",
        "trap = 1",
        "# trap",
        "",
        "}",
        "]",
        ",",
        "a.b = {",
        '\\"',
        "\\\\",
        "'",
        '"',
        "''",
        '""',
        "é",
    ]
)


class Writer:
    """Writes a random valid document and notes where its keys land."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.text = ""
        self.lines: dict[Path, int] = {}
        self.children: dict[Path, set[str]] = {(): set()}
        self.implicit: dict[Path, bool] = {}  # of each table that a header may enter: does it lack its own?
        self.dotted: dict[Path, list[Path]] = {}
        self.last: dict[Path, int] = {}

    def line(self) -> int:
        return self.text.count("\n") + 1

    def one(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def new(self, table: Path) -> str:
        taken = self.children.setdefault(table, set())
        name = str(self.draw(NAMES))
        while name in taken:
            name += "z"
        taken.add(name)
        return name

    def key(self, parts: list[str]) -> None:
        for index, part in enumerate(parts):
            self.text += self.one(".", ".", " . ", ".\t") if index else ""
            styles = ["basic"]
            if part and set(part) <= set(BARE):
                styles += ["bare"] * 3
            if "'" not in part and part.isprintable():
                styles.append("literal")
            style = self.one(*styles)
            self.text += {"bare": part, "literal": f"'{part}'", "basic": f'"{self.escaped(part)}"'}[style]

    def escaped(self, text: str) -> str:
        return "".join(
            f"\\U{ord(c):08x}" if c in '"\\' or not c.isprintable() or self.one(0, 0, 1) else c for c in text
        )

    def gap(self) -> None:
        self.text += self.one("", " ", "\n", "\n \t", " # x = 1 ]}\n", "\n#[a]\n\n")

    def value(self, path: Path, depth: int) -> None:
        kind = self.one("plain", "plain", "line", "lines", *(["array", "table"] * 2 if depth < 4 else []))
        if kind == "plain":
            self.text += self.one("1", "0x1f", "-1.5e3", "true", "nan", "07:32:00", "1979-05-27 07:32:00")
        elif kind == "line":
            trap = self.draw(TRAPS)
            self.text += f"'{trap}'" if "'" not in trap and self.one(0, 1) else f'"{self.escaped(trap)}"'
        elif kind == "lines":
            body = "\n".join(self.draw(st.lists(TRAPS, max_size=4)))
            if self.one(0, 1) and "''" not in body:
                end = self.one("", "x", "x'", "x''")
                self.text += f"'''{body}{end}'''"
            else:
                # The last quotes are the string's own, though they touch the three that end it.
                body = body.replace("\\", "\\\\").replace('""', '"\\"')
                end = self.one("\\\n  ", "x", "x" + QUOTE, "x" + QUOTE * 2)
                self.text += f'"""\n{body}{end}"""'
        elif kind == "array":
            self.array(path, depth)
        else:
            self.table(path, depth)

    def array(self, path: Path, depth: int) -> None:
        self.text += "["
        entries = self.one(0, 1, 2, 3)
        for index in range(entries):
            self.text += "," if index else ""
            self.gap()
            here = (*path, index)
            before, line = len(self.text), self.line()
            self.value(here, depth + 1)
            if self.text[before] == "{":
                self.lines[here] = line
            self.gap()
        self.text += self.one("", ",") if entries else ""
        self.gap()
        self.text += "]"

    def table(self, path: Path, depth: int) -> None:
        self.text += "{"
        for index in range(self.one(0, 1, 2, 3)):
            self.text += "," if index else ""
            self.gap()
            self.entry(path, depth + 1)
            self.gap()
        self.text += "}"

    def entry(self, table: Path, depth: int) -> None:
        line = self.line()
        # A dotted key makes tables, which other dotted keys of the same table go on to fill.
        here: Path = self.one(table, *self.dotted.get(table, []))
        parts = [str(part) for part in here[len(table) :]]
        for more in range(self.one(1, 1, 2, 3)):
            if more:
                self.dotted.setdefault(table, []).append(here)
            parts.append(self.new(here))
            here = (*here, parts[-1])
            self.lines[here] = line
        self.key(parts)
        self.text += self.one("=", " = ", "\t=")
        self.value(here, depth)

    def header(self) -> Path:
        """Enters a new table, one that so far was only mentioned, or the next entry of an array of tables."""
        line = self.line()
        choice = self.one("new", "new", "array", "mentioned", "next")
        mentioned = [path for path, lacking in self.implicit.items() if lacking and self.current(path)]
        arrays = [path for path in self.last if self.current(path)]
        path: Path
        if choice == "mentioned" and mentioned:
            path = self.one(*mentioned)
        elif choice == "next" and arrays:
            path = self.append(self.one(*arrays))
        else:
            path = self.one((), *(path for path in self.implicit if self.current(path)))
            for _ in range(self.one(1, 1, 2, 3)):
                path = (*path, self.new(path))
                self.lines[path] = line
                self.implicit[path] = True
            if choice == "array":
                del self.implicit[path]
                path = self.append(path)
        self.lines[path] = line
        self.implicit[path] = False
        double = isinstance(path[-1], int)
        self.text += "[[" if double else "["
        self.key([part for part in path if isinstance(part, str)])
        self.text += "]]" if double else "]"
        return path

    def append(self, array: Path) -> Path:
        self.last[array] = self.last.get(array, -1) + 1
        return (*array, self.last[array])

    def current(self, path: Path) -> bool:
        """Whether every array entry on the way is its array's last, the one that headers reach."""
        return all(self.last[path[:i]] == part for i, part in enumerate(path) if isinstance(part, int))


@st.composite
def documents(draw: Any) -> tuple[str, dict[Path, int]]:
    writer = Writer(draw)
    table: Path = ()
    for _ in range(draw(st.integers(0, 10))):
        writer.text += writer.one("", "", " ", "\n", "\n# a = 1\n\t")
        if writer.one(0, 1):
            table = writer.header()
        else:
            writer.entry(table, 0)
        writer.text += writer.one("\n", " \n", " # [c]\n")
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return writer.text.rstrip(draw(st.sampled_from(["", "\n"]))).replace("\n", end), writer.lines


def paths(value: object, here: Path = ()) -> Iterator[Path]:
    """What has a line, by tomli's result."""
    if isinstance(value, dict):
        if here and isinstance(here[-1], int):
            yield here
        for key, below in value.items():
            yield (*here, key)
            yield from paths(below, (*here, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from paths(below, (*here, index))


@settings(deadline=None, max_examples=400)
@example(('"00"="""\n\\\n  """\n"0"=1\n', {("00",): 1, ("0",): 4}))
@given(documents())
def test_every_key_has_the_line_it_was_written_in_and_no_other_is_found(
    document: tuple[str, dict[Path, int]],
) -> None:
    text, lines = document
    found = key_lines(text)
    assert set(found) == set(paths(tomli.loads(text)))
    assert found == lines


FRAGMENTS = [
    "a",
    "b",
    ".",
    "=",
    "1",
    "\n",
    "\n",
    " ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "#",
    '"',
    "'",
    '"""',
    "'''",
    "\\",
    "\r\n",
    "a=",
    "[a]\n",
]


@settings(deadline=None, max_examples=600)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
def test_scanning_ends_on_any_text_and_agrees_with_tomli_where_tomli_accepts(text: str) -> None:
    found = key_lines(text)
    try:
        data = tomli.loads(text)
    except tomli.TOMLDecodeError:
        return
    assert set(found) == set(paths(data))


@settings(deadline=None)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=4))
def test_a_dotted_path_is_printable_and_reads_back(parts: list[str]) -> None:
    parts = [part.encode(errors="ignore").decode() for part in parts]
    text = dotted(tuple(parts))
    assert text.isprintable()
    assert read_key(text) == (parts, len(text))


def test_a_table_stands_at_its_own_header_not_where_it_is_first_mentioned() -> None:
    lines = key_lines("[a.b.c]\nx = 1\n[a]\n[[d.e]]\n[d]\n")
    assert (lines["a",], lines["a", "b"], lines["d",], lines["d", "e"]) == (3, 1, 5, 4)


def test_steps_grow_with_the_length_of_the_text_and_not_faster() -> None:
    def text(entries: int) -> str:
        part = '[[a]]\nb.c = [1, {{d = "{0}"}}, [[2]]]\n[a.e]\n"f g" = """\n[x]\n"""\nh = {{i = {{j = 1}}}}\n'
        return "".join(part.format(entry) for entry in range(entries))

    def steps(text: str) -> int:
        count = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            key_lines(text, max_names=100_000)
        finally:
            sys.settrace(before)
        return count

    small, large = text(500), text(4000)
    assert len(large) > 300_000
    assert steps(large) < 8.2 * steps(small)


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 20_000) + " = 1",
        "[" + ".".join(["a"] * 101) + "]",
        "x = " + "[" * 101,
        "x = " + "{a = " * 101,
        "[" + ".".join(["a"] * 60) + "]\n" + ".".join(["a"] * 60) + " = 1",
    ],
)
def test_text_nested_too_deep_is_refused_before_tomli_sees_it(text: str) -> None:
    with pytest.raises(Refused, match="nested deeper than 100 levels"):
        key_lines(text)


def test_text_with_too_many_keys_is_refused_at_the_line_that_has_one_too_many() -> None:
    with pytest.raises(Refused, match="line 4: more than 3 keys"):
        key_lines("a = 1\nb = 2\nc = 3\nd = 4\n", max_names=3)


@pytest.mark.parametrize("text", ["", "=", "a..b", ".a", '"a', '"\\q"', "a.", "'''a'''"])
def test_no_key_is_read_where_none_stands(text: str) -> None:
    with pytest.raises(Unreadable):
        read_key(text)
