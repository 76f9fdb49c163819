"""Dialect files are strict data: a slip at any place of one is refused and named."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.dialects import codings, family, load_all, spellings
from composeformer.errors import DialectError
from composeformer.plugins import current

TEXTS = {file.name: file.read_text(encoding="utf-8") for file in current().dialect_files}
Steps = tuple[Any, ...]


def tables(value: Any, path: Steps = ()) -> list[Steps]:
    """Every table of a document whose keys are the language's, not names of theirs."""
    found: list[Steps] = []
    if isinstance(value, dict):
        free = path in (("config",), ("shapes",), ("ours",), ("patterns",), ("precision",))
        free |= path[-1:] == ("values",)
        found += [] if free else [path]
        below = list(value.items())
    else:
        below = list(enumerate(value)) if isinstance(value, list) else []
    return found + [each for key, inner in below for each in tables(inner, (*path, key))]


def test_every_shipped_file_is_read() -> None:
    read = [*load_all(), *codings.load_all()]
    assert {f"{d.name.replace('-', '_')}.toml" for d in read} >= {*TEXTS} != set()


@settings(max_examples=60)
@given(st.data())
def test_an_unknown_key_at_any_place_is_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    document = tomli.loads(TEXTS[name])
    path = data.draw(st.sampled_from(tables(document)))
    changed = copy.deepcopy(document)
    table = changed
    for step in path:
        table = table[step]
    table["unheard_of"] = 1
    text = tomli_w.dumps(changed)
    language: Any = codings if codings.is_coding(TEXTS[name]) else family
    with pytest.raises(DialectError, match=r"unheard_of|one index") as caught:
        language.parse(text, name)
    assert str(caught.value).startswith(name)
    assert len(caught.value.lines) == 1


SMALL: dict[str, Any] = {
    "format": 1,
    "name": "small",
    "source": "huggingface",
    "model_type": "small",
    "architectures": ["Small"],
    "config": {"depth": {"ours": "num_layers"}, "width": {"ours": "model.hidden_size"}},
    "ours": {"mixer.kind": "gqa"},
    "tensors": [{"theirs": "w", "ours": "embedding.weight"}],
}


def changed(**changes: Any) -> str:
    return tomli_w.dumps(SMALL | changes)


def with_key(**key: Any) -> str:
    return changed(config=SMALL["config"] | {"x": key})


def with_tensor(**line: Any) -> str:
    return changed(tensors=[*SMALL["tensors"], line])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format = ", "small.toml"),
        (changed(format=2), "format must be 1"),
        (changed(source="elsewhere"), "must be one of huggingface, gguf"),
        (changed(architectures=[]), "architectures"),
        (changed(config={"width": {"ours": "model.hidden_size"}}), "no line fills num_layers"),
        (changed(tensors=7), "tensors"),
        (with_key(), "needs `ours`, `require`, `choices` or `refuse`"),
        (with_key(ours="attention.window"), "is no path of ours"),
        (with_key(ours="model"), "is no path of ours"),
        (with_key(ours="mixer.hidden_size"), "names both model.hidden_size and mixer.hidden_size"),
        (with_key(ours="mixer.a", default="= width // 2"), "uses width"),
        (with_key(ours="mixer.a", when="deep"), "uses deep"),
        (with_key(ours="mixer.a", null="maybe"), "null"),
        (with_key(ours="mixer.a", write="often"), "write"),
        (with_key(ours="mixer.a", values=[1]), "values must be a table"),
        (with_key(ours="mixer.a", when="import os"), "is no expression"),
        (with_key(ours=3), "must be text"),
        (changed(shapes={"w": {"ours": "model.a", "shape": "wide"}}), "must be a dimension"),
        (changed(patterns={"p": {"ours": "mixer.a", "choose": []}}), "list of tests"),
        (changed(patterns={"p": {"ours": "mixer.a", "choose": [{}]}}), "one of list, first"),
        (changed(patterns={"p": {"ours": "mixer.a", "choose": [{"list": "k"}]}}), "chosen"),
        (with_tensor(theirs="x{l", ours="y"), "is no tensor name"),
        (with_tensor(theirs="x{z}", ours="y"), "uses z"),
        (with_tensor(theirs="x", ours="y", same_as="w"), "needs one of"),
    ],
)
def test_a_slip_is_told_in_one_line_with_its_place(text: str, words: str) -> None:
    with pytest.raises(DialectError, match=words) as caught:
        family.parse(text, "small.toml")
    assert str(caught.value).startswith("small.toml")
    assert len(caught.value.lines) == 1


def test_the_small_file_itself_is_read() -> None:
    assert family.parse(changed(), "small.toml").names == {"num_layers", "hidden_size"}


@given(st.floats(min_value=2.0**-120, max_value=2.0**120, width=32))
def test_a_float32_becomes_a_short_decimal_that_rounds_to_it(value: float) -> None:
    short = spellings.decimal(value)
    assert spellings._float32(short) == spellings._float32(value)
    assert float(f"{short:.9g}") == short


def test_the_decimals_that_people_write_come_back() -> None:
    assert spellings.decimal(9.999999747378752e-06) == 1e-5
    assert spellings.decimal(500000.0) == 500000.0
    assert spellings.decimal(0.1) == 0.1


def test_configs_and_tensor_names_need_no_torch() -> None:
    code = """
import sys
from composeformer.dialects import expressing, find, load_all
from composeformer.spec import Spec
for dialect in load_all():
    if dialect.source == "huggingface":
        # The one class without a default that makes a model.
        needed = {"num_experts_per_tok": 6} if dialect.name == "deepseek_v2" else {}
        spec = Spec.from_dict(dialect.to_spec({"model_type": dialect.model_type} | needed))
        assert find(dialect.to_config(spec)) is dialect
        assert dialect.rules(spec)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
