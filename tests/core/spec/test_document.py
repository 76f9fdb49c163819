"""A document holds what a spec can, with the place of each value; all else is one clear line."""

import os
import pathlib
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import ComposeError, Source
from composeformer.spec.document import MAX_BYTES, MAX_VALUES, FileError, from_data, parse, places, read

FRAGMENTS = [
    "a",
    "b",
    ".",
    " = ",
    "1",
    "\n",
    "[",
    "]",
    "{",
    "}",
    ",",
    "#",
    '"',
    "'",
    "\\",
    "\x00",
    "\r",
    "\ufeff",
    "é",
]
FRAGMENTS += [
    '"""',
    "'''",
    "[a]\n",
    "[[a]]\n",
    "a = 1\n",
    "1979-05-27",
    "nan",
    "9" * 20,
    "9" * 5000,
    "\ud800",
]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_any_text_is_a_document_or_lines_that_name_the_file(text: str) -> None:
    try:
        document = parse(text, "x.toml")
    except ComposeError as error:
        for line in str(error).split("\n"):
            assert line.startswith("x.toml:")
            assert line.isprintable()
    else:
        assert set(document.sources) == {(), *places(document.data, ())}


@settings(deadline=None)
@given(st.binary(max_size=30))
def test_any_bytes_are_a_document_or_one_line(text: bytes) -> None:
    try:
        lines = parse(text, "x.toml").name.splitlines()
    except ComposeError as error:
        lines = str(error).splitlines()
    assert lines
    assert all(line.startswith("x.toml") for line in lines)


def test_a_source_is_the_key_itself_or_the_nearest_table_around_it() -> None:
    document = parse("[ffn]\nkind = 'moe'\nsizes = [1, 2]\n[[layers]]\nmixer = {use = 'a'}\n", "a.toml")
    assert document.source(("ffn", "kind")) == Source("a.toml", 2)
    assert document.source(("ffn", "missing")) == Source("a.toml", 1)
    assert document.source(("ffn", "sizes", 1)) == Source("a.toml", 3)
    assert document.source(("layers", 0, "mixer", "use")) == Source("a.toml", 5)
    assert document.source(("layers", 7, "x")) == Source("a.toml", 4)
    assert document.source(("other",)) == Source("a.toml")


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    assert parse(b"\xef\xbb\xbfa = 1", "a.toml").data == {"a": 1}


DEEP = "nested deeper than 100 levels"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a = 1\na = 2\n", "x.toml:2: this key, or a table of its name, stands above already"),
        ("[a]\n\n[a]\n", "x.toml:3: this table stands above already"),
        ("a = mla\n", "x.toml:1: not a TOML value (strings need quotes)"),
        (
            "\na = 1979-05-27\n",
            "x.toml:2: a = 1979-05-27: a date or time is no spec value; write it as a string",
        ),
        ("a = 07:32:00", "x.toml:1: a = 07:32:00: a date or time is no spec value; write it as a string"),
        ("[a]\nb = [1, nan]", "x.toml:2: a.b.1 = nan: must be a finite number"),
        ("a = -inf", "x.toml:1: a = -inf: must be a finite number"),
        ("a = 9223372036854775808", "x.toml:1: a: an integer must fit in 64 bits"),
        (f"a = 0x{'f' * 5000}", "x.toml:1: a: an integer must fit in 64 bits"),
        (f"\n\na = {'1' * 5000}", "x.toml:3: an integer must fit in 64 bits"),
        (b"a = 1\nb = '\xff'", "x.toml:2: not UTF-8 text (byte 0xff)"),
        ("a = 1\nb = '\ud800'", "x.toml:2: not Unicode text (a lone surrogate)"),
        ("\n" + ".".join(["a"] * 20_000) + " = 1", f"x.toml:2: {DEEP}"),
        ("a = 1\nb = " + "[" * 500_000, f"x.toml:2: {DEEP}"),
        ("a = " + "{b=" * 300_000, f"x.toml:1: {DEEP}"),
        ("a = 1\n" * 60_000, "x.toml:50001: more than 50000 keys, arrays and tables"),
        (
            "\n".join(f"[b{n}{'.a' * 98}]" for n in range(4900)),
            "x.toml:506: more than 50000 keys, arrays and tables",
        ),
        (f"a = [{'1,' * 450_000}]", f"x.toml: more than {MAX_VALUES} values"),
        ("#" * (MAX_BYTES + 1), f"x.toml: is larger than {MAX_BYTES} bytes"),
        ('a = "' + "\\n" * 450_000, "x.toml:1: Unterminated string"),
    ],
)
def test_a_wrong_text_is_one_line_in_short_time(text: str | bytes, line: str) -> None:
    start = time.process_time()
    with pytest.raises(ComposeError) as error:
        parse(text, "x.toml")
    assert str(error.value) == line
    assert time.process_time() - start < 5  # on a slow and busy machine; without limits it is minutes


def test_all_wrong_values_of_a_file_are_told_at_once() -> None:
    with pytest.raises(ComposeError) as error:
        parse("a = nan\nb = 1\nc = 07:00:00\n", "x.toml")
    assert [line.split(" = ")[0] for line in error.value.lines] == ["x.toml:1: a", "x.toml:3: c"]


def test_a_name_that_would_break_the_line_is_escaped() -> None:
    with pytest.raises(ComposeError) as error:
        parse('"a\\n\\u001b[31m" = nan', "x\ny\x1b.toml")
    assert str(error.value).isprintable()


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "large.toml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    os.mkfifo(tmp_path / "pipe.toml")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.toml", "no such file"),
        ("folder", "is a directory, not a spec file"),
        ("pipe.toml", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("large.toml", f"is {MAX_BYTES + 1} bytes; a spec has at most {MAX_BYTES}"),
        ("loop.toml", "too many levels of symbolic links"),
        ("n" * 300, "file name too long"),
        ("a\0b", "not a file name"),
        ("large.toml/x", "not a directory"),
    ],
)
def test_what_is_no_readable_file_is_one_line_and_nothing_waits(
    folder: pathlib.Path, name: str, reason: str
) -> None:
    with pytest.raises(FileError) as error:
        read(folder / name, "x.toml")
    assert str(error.value) == f"x.toml: {reason}"


def test_python_data_is_copied_with_its_source() -> None:
    data: dict[str, Any] = {"a": {"b": (1, {"c": True})}}
    document = from_data(data)
    data["a"]["b"] = 2
    assert document.data == {"a": {"b": [1, {"c": True}]}}
    assert document.source(("a", "b", 1, "c")) == Source("python")


def holding_itself() -> dict[str, object]:
    table: dict[str, object] = {}
    table["a"] = [table]
    return table


def doubling() -> dict[str, object]:
    table: dict[str, object] = {}
    for _ in range(60):
        table = {"a": table, "b": table}
    return table


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"a": {"b": None}}, "python: a.b: None is no TOML value; leave the key out"),
        ({"a": [{1, 2}]}, "python: a.0: must be a string, number, boolean, list or table: set"),
        ({"a": b"x"}, "python: a: must be a string, number, boolean, list or table: bytes"),
        ({"a": {3: 1}}, "python: a: a key must be a string, not int"),
        ({3: 1}, "python: a key must be a string, not int"),
        ({"a": float("nan")}, "python: a = nan: must be a finite number"),
        ({"a": 2**63}, "python: a: an integer must fit in 64 bits"),
        ({"a": "\ud800"}, "python: a: must be Unicode text (holds a lone surrogate)"),
        (["a"], "python: a spec must be a table, not list"),
        (holding_itself(), f"python: a.0.a.0.a...: {DEEP}"),
        (doubling(), f"python: more than {MAX_VALUES} values"),
    ],
)
def test_python_data_that_no_spec_can_hold_is_one_line(data: Any, line: str) -> None:
    with pytest.raises(ComposeError) as error:
        from_data(data)
    assert str(error.value) == line
