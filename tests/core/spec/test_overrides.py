"""`--set KEY=VALUE` changes one value, by the rule of `extends`."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.errors import ComposeError, Source
from composeformer.spec.document import Document, from_data, parse
from composeformer.spec.inherit import merge
from composeformer.spec.overrides import apply, apply_all, set_value
from composeformer.spec.scanner import dotted
from composeformer.spec.writer import dumps

TEXT = """
[model]
size = 8
[ffn.experts]
kind = "moe"
top_k = 2
sizes = [1, 2]
[[layers]]
repeat = 3
mixer = { use = "mla", window = 4 }
[[layers]]
"""


@pytest.fixture
def document() -> Document:
    return parse(TEXT, "x.toml")


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("model.size=4", ("model", "size"), 4),
        ("  model . size =  0x10 ", ("model", "size"), 16),
        ("model.size=1.5", ("model", "size"), 1.5),
        ("model.tie=true", ("model", "tie"), True),
        ("model.tie=True", ("model", "tie"), "True"),
        ("model.name=tiny-llama", ("model", "name"), "tiny-llama"),
        ("model.name='a # b'", ("model", "name"), "a # b"),
        ('model.name="a=b"', ("model", "name"), "a=b"),
        ("data.text.path=./a/b.txt", ("data", "text", "path"), "./a/b.txt"),
        ('a."b.c"=1', ("a", "b.c"), 1),
        ("layers.0.repeat=2", ("layers", 0, "repeat"), 2),
        ("layers.1.repeat=2", ("layers", 1, "repeat"), 2),
        ("layers.1.mixer.use=gqa", ("layers", 1, "mixer", "use"), "gqa"),
        ("layers.0.mixer=gqa", ("layers", 0, "mixer"), "gqa"),
        ("layers.0={}", ("layers", 0), {"repeat": 3, "mixer": {"use": "mla", "window": 4}}),
        ("layers=[{repeat=1}]", ("layers",), [{"repeat": 1}]),
        ("ffn.experts.sizes.1=7", ("ffn", "experts", "sizes"), [1, 7]),
        (
            "ffn.experts={n=1, top_k=3}",
            ("ffn", "experts"),
            {"kind": "moe", "top_k": 3, "sizes": [1, 2], "n": 1},
        ),
        ("ffn.experts={kind='x', n=1}", ("ffn", "experts"), {"kind": "x", "n": 1}),
        ("ffn.experts.kind=swiglu", ("ffn", "experts"), {"kind": "swiglu"}),
        ("ffn.experts.kind=moe", ("ffn", "experts"), {"kind": "moe", "top_k": 2, "sizes": [1, 2]}),
        ("layers.0.mixer.use=gqa", ("layers", 0, "mixer"), {"use": "gqa"}),
    ],
)
def test_a_setting_changes_what_it_names(document: Document, setting: str, path: Any, value: object) -> None:
    before = dumps(document.data)
    changed: Any = apply(document, setting)
    found = changed.data
    for part in path:
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    assert dumps(document.data) == before
    assert changed.name == document.name


def test_only_the_value_set_has_the_settings_source(document: Document) -> None:
    changed = apply(apply(apply(document, "layers.0.mixer.window=9"), "train.x.y=1"), "ffn.experts.sizes.0=5")
    new = {path for path, source in changed.sources.items() if source == Source("--set")}
    assert new - {("ffn", "experts", "sizes", 0)} == {
        ("layers", 0, "mixer"),
        ("layers", 0, "mixer", "window"),
        ("train",),
        ("train", "x"),
        ("train", "x", "y"),
        ("ffn", "experts", "sizes"),
    }
    kept = {path: source for path, source in changed.sources.items() if path not in new}
    assert kept == {path: source for path, source in document.sources.items() if path not in new}


NAMES = st.sampled_from(["a", "b", "c", "kind", "d.e"])
SCALARS = st.one_of(st.integers(-3, 3), st.booleans(), st.sampled_from(["x", "two words", "'", "1"]))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda below: st.dictionaries(NAMES, below, max_size=3) | st.lists(below, max_size=2),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=3), st.lists(NAMES, min_size=1, max_size=3), VALUES)
def test_a_setting_is_what_extending_by_a_table_that_holds_it_is(
    data: Any, keys: list[str], value: Any
) -> None:
    over = value
    for key in reversed(keys):
        over = {key: over}
    base, here = from_data(data), data
    for key in keys[:-1]:
        here = here.get(key, {})
        if not isinstance(here, dict):
            with pytest.raises(ComposeError):
                set_value(base, dotted(tuple(keys)), value)
            return
    expected = merge(base, from_data(over))
    assert set_value(base, dotted(tuple(keys)), value).data == expected.data
    if not isinstance(value, dict | list):
        text = dumps({"v": value}).removeprefix("v = ").strip()
        assert apply(base, f"{dotted(tuple(keys))}={text}").data == expected.data


def test_settings_that_name_a_part_drop_no_key_that_another_setting_gave(document: Document) -> None:
    settings = ["ffn.experts.width=9", "model.size=1", "ffn.experts.kind=swiglu", "model.size=2"]
    changed = apply_all(document, settings)
    assert changed.data["ffn"] == {"experts": {"kind": "swiglu", "width": 9}}
    assert changed.data["model"] == {"size": 2}


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("layers.2.repeat=1", "--set: layers.2.repeat = 1: layers is an array with entries 0 to 1"),
        ("layers.-1.repeat=1", "--set: layers.-1.repeat = 1: layers is an array with entries 0 to 1"),
        (f"layers.{'9' * 5000}=1", None),
        ("layers.repeat=1", "--set: layers.repeat = 1: layers is an array with entries 0 to 1"),
        ("model.size.x=1", "--set: model.size.x = 1: model.size is 8, not a table"),
        ("ffn.experts.kind.x=1", '--set: ffn.experts.kind.x = 1: ffn.experts.kind is "moe", not a table'),
        ("extends=tiny-llama", "--set: extends: can not be set; name the other spec instead"),
        ("model.size", '--set: "model.size": must be KEY=VALUE, as in layers.0.repeat=2'),
        ("", '--set: "": must start with a dotted key, such as a.b.c'),
        ("=1", '--set: "=1": must start with a dotted key, such as a.b.c'),
        ("a..b=1", '--set: "a..b=1": must start with a dotted key, such as a.b.c'),
        ("a=1979-05-27", "--set: a = 1979-05-27: a date or time is no spec value; write it as a string"),
        ("a=nan", "--set: a = nan: must be a finite number"),
        ("a.b=99999999999999999999", "--set: a.b: an integer must fit in 64 bits"),
        (".".join("a" * 20_000) + "=1", "--set: nested deeper than 100 levels"),
        ("a=" + "[" * 50_000, None),
        ("a=" + "[" * 200 + "]" * 200, None),
        ("a=" + "1" * 5000, None),
        ("a=", None),
        ("a=[1, 2", None),
        ("a=two words", None),
        ("a=1 # b", None),
        ("a=1\nb=2", None),
        ("a=1]\nc=[1", None),
        ("a={}\n[value.b]", None),
        ("a=\ud800", None),
    ],
)
def test_a_wrong_setting_is_one_line(document: Document, setting: str, line: str | None) -> None:
    with pytest.raises(ComposeError) as error:
        apply(document, setting)
    assert str(error.value).startswith("--set: ")
    assert "\n" not in str(error.value)
    assert line is None or str(error.value) == line


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_setting_or_one_line(setting: str) -> None:
    try:
        lines = [apply(parse(TEXT, "x.toml"), setting).name]
    except ComposeError as error:
        lines = str(error).splitlines()
    assert len(lines) == 1
