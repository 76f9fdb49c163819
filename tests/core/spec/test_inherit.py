"""Inheritance: tables merge, arrays and parts are replaced, every value keeps its file and line."""

import os
import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import ComposeError, Source
from composeformer.spec.document import from_data, parse, places
from composeformer.spec.inherit import load, merge, resolve, shipped

KEYS = st.sampled_from(["a", "b", "c", "kind", "use"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.integers(0, 2),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=8,
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


@settings(deadline=None)
@given(TABLES, TABLES)
def test_each_value_comes_with_the_source_of_the_document_that_gave_it(base: Any, over: Any) -> None:
    merged = merge(from_data(base, "base"), from_data(over, "over"))
    assert set(merged.sources) == {(), *places(merged.data, ())}
    for path, source in merged.sources.items():
        assert at({"base": base, "over": over}[source.file], path) is not None
        if not isinstance(at(merged.data, path), dict):
            assert at({"base": base, "over": over}[source.file], path) == at(merged.data, path)
        elif source.file == "base":
            with pytest.raises((KeyError, TypeError, IndexError)):
                at(over, path)


@settings(deadline=None)
@given(TABLES, TABLES, TABLES)
def test_merging_changes_nothing_twice_and_wins(base: Any, over: Any, more: Any) -> None:
    a, b = from_data(base, "a"), from_data(over, "b")
    merged = merge(a, b)
    assert merge(merged, b).data == merged.data
    assert merge(a, a).data == a.data == base
    assert list(merged.data) == [*base, *(key for key in over if key not in base)]
    for key, value in over.items():
        if not isinstance(value, dict):
            assert merged.data[key] == value


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"kind": "moe", "top_k": 2}, {"top_k": 4}, {"kind": "moe", "top_k": 4}),
        ({"kind": "moe", "top_k": 2}, {"kind": "moe", "n": 1}, {"kind": "moe", "top_k": 2, "n": 1}),
        ({"kind": "moe", "top_k": 2}, {"kind": "swiglu", "n": 1}, {"kind": "swiglu", "n": 1}),
        ({"kind": "moe", "top_k": 2}, {"use": "dense"}, {"use": "dense"}),
        ({"use": "a", "window": 2}, {"use": "b"}, {"use": "b"}),
        ({"sizes": [1, 2]}, {"sizes": [3]}, {"sizes": [3]}),
        ({"list": [{"a": 1, "b": 1}]}, {"list": [{"a": 2}]}, {"list": [{"a": 2}]}),
        (
            {"router": {"kind": "x", "k": 1}, "n": 1},
            {"router": {"kind": "y"}},
            {"router": {"kind": "y"}, "n": 1},
        ),
        ("name", {"kind": "x"}, {"kind": "x"}),
        ({"kind": "x"}, "name", "name"),
    ],
)
def test_tables_merge_but_arrays_and_other_parts_replace(base: Any, over: Any, merged: Any) -> None:
    assert merge(from_data({"ffn": base}), from_data({"ffn": over})).data == {"ffn": merged}


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    return tmp_path


def write(name: str, text: str) -> None:
    pathlib.Path(name).write_text(text)


def test_a_path_is_relative_to_the_file_that_says_it_and_sources_follow(folder: pathlib.Path) -> None:
    write("sub/a.toml", 'extends = "../b.toml"\nname = "a"\n[model]\nx = 1\n')
    write("b.toml", '# base\nextends = "sub/c.toml"\nname = "b"\n[model]\ny = 2\n[train]\nz = 0\n')
    write("sub/c.toml", "[model]\nx = 3\nw = 4\n")
    document = load("sub/a.toml", ["train.z=5"])
    assert document.data == {"model": {"x": 1, "w": 4, "y": 2}, "name": "a", "train": {"z": 5}}
    assert document.name == "sub/a.toml"
    said = {path[-1]: str(source) for path, source in document.sources.items() if path}
    assert said["x"] == "sub/a.toml:4"
    assert said["y"] == os.path.join("sub/../b.toml:5")
    assert said["w"] == os.path.join("sub/../sub/c.toml:3")
    assert said["z"] == "--set"
    assert document.source(()) == Source("sub/a.toml")


def test_an_absolute_path_and_path_objects_load_alike(folder: pathlib.Path) -> None:
    write("b.toml", "x = 1\n")
    write("a.toml", f'extends = "{(folder / "b.toml").as_posix()}"\n')
    assert load(folder / "a.toml").data == load(str(folder / "a.toml")).data == {"x": 1}


def test_a_shipped_spec_is_loaded_and_extended_by_its_bare_name(folder: pathlib.Path) -> None:
    name = shipped()[0]
    write("a.toml", f'extends = "{name}"\nname = "mine"\n')
    original, extended = load(name), load("a.toml")
    assert original.name == name
    assert extended.data == original.data | {"name": "mine"}
    assert extended.source(("model",)) == original.source(("model",))
    assert str(original.source(("model",))).startswith(f"composeformer/specs/{name}.toml:")
    assert resolve(from_data({"extends": name, "name": "mine"}), None).data == extended.data


@settings(deadline=None)
@given(st.sampled_from(shipped()))
def test_every_shipped_spec_resolves(name: str) -> None:
    assert "extends" not in load(name).data


MANY = f"shipped specs: {', '.join(shipped())}"
NONE = f"no shipped spec has this name; {MANY}"


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"a": 'extends = "a.toml"'},
            'a.toml:1: extends = "a.toml": a spec can not extend itself (a.toml -> a.toml)',
        ),
        (
            {"a": '\nextends = "b.toml"', "b": 'extends = "./a.toml"'},
            'b.toml:1: extends = "./a.toml": a spec can not extend itself (a.toml -> b.toml -> ./a.toml)',
        ),
        (
            {"a": "extends = 3"},
            "a.toml:1: extends = 3: must be the name of a shipped spec or the path of a file, as a string",
        ),
        ({"a": 'extends = "c.toml"'}, f'a.toml:1: extends = "c.toml": no such file; {MANY}'),
        (
            {"a": 'extends = "tiny-lama"'},
            f"a.toml:1: extends = \"tiny-lama\": {NONE}; did you mean 'tiny-llama'?",
        ),
        (
            {"a": 'extends = "b"', "b": ""},
            f'a.toml:1: extends = "b": {NONE}; for the file write ./b.toml',
        ),
        ({"a": 'extends = "./sub"'}, 'a.toml:1: extends = "./sub": is a directory, not a spec file'),
        ({"a": 'extends = "a\\u0000.toml"'}, None),
        (
            {"a": 'extends = ""'},
            f'a.toml:1: extends = "": {NONE}',
        ),
        ({"a": 'extends = "b.toml"', "b": "x = 1\ny = nan"}, "b.toml:2: y = nan: must be a finite number"),
        (
            {"a": 'extends = "b.toml"', "b": "x = 1\ny"},
            "b.toml:2: Expected '=' after a key in a key/value pair",
        ),
    ],
)
def test_what_can_not_be_extended_is_one_line_with_its_place(
    folder: pathlib.Path, files: dict[str, str], line: str | None
) -> None:
    for name, text in files.items():
        write(f"{name}.toml", text)
    with pytest.raises(ComposeError) as error:
        load("a.toml")
    assert "\n" not in str(error.value)
    assert line is None or str(error.value) == line


def test_a_chain_of_extends_has_an_end(folder: pathlib.Path) -> None:
    for number in range(40):
        write(f"s{number}.toml", f'extends = "s{number + 1}.toml"')
    write("s16.toml", "x = 1")
    assert load("s0.toml").data == {"x": 1}
    write("s16.toml", 'extends = "s17.toml"')
    with pytest.raises(ComposeError, match=r"^s16.toml:1: extends = \"s17.toml\": more than 16 specs"):
        load("s0.toml")


@pytest.mark.parametrize(
    ("ref", "line"),
    [
        (
            "tiny-lama",
            f"tiny-lama: {NONE}; did you mean 'tiny-llama'?",
        ),
        (
            "tiny-lama.toml",
            f"tiny-lama.toml: no such file; {MANY}; did you mean 'tiny-llama'?",
        ),
        ("plain", f"plain: {NONE}; for the file write ./plain"),
        ("empty", f"empty: is a folder without a spec.toml; {NONE}"),
        (".", ".: is a directory, not a spec file"),
        (
            pathlib.Path("tiny-llama"),
            f"tiny-llama: no such file; {MANY}; did you mean 'tiny-llama'?",
        ),
        (
            "../specs/tiny-llama",
            f"../specs/tiny-llama: no such file; {MANY}; did you mean 'tiny-llama'?",
        ),
        ("a\x1b\nb", f"a\\x1b\\nb: {NONE}"),
    ],
)
def test_what_can_not_be_found_is_one_line_that_says_what_can(
    folder: pathlib.Path, ref: str, line: str
) -> None:
    write("plain", "")
    (folder / "empty").mkdir()
    with pytest.raises(ComposeError) as error:
        load(ref)
    assert str(error.value) == line


def test_data_without_a_file_extends_only_shipped_specs_or_from_a_given_folder(folder: pathlib.Path) -> None:
    write("b.toml", "x = 1")
    document = parse('extends = "b.toml"', "python")
    with pytest.raises(
        ComposeError, match=r"python:1: extends = .b.toml.: a path needs a file that it is relative to"
    ):
        resolve(document, None)
    assert resolve(document, folder).data == {"x": 1}
    assert document.data == {"extends": "b.toml"}
