"""The JSON Schema of specs: valid itself, and of one mind with the parser wherever a schema can know."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from composeformer.errors import ComposeError
from composeformer.plugins import current
from composeformer.registry import Registry
from composeformer.spec import Spec, shipped
from composeformer.spec.schema import schema
from composeformer.testing.specs import specs

ROOT = Path(__file__).parents[3]
DRAWN = ROOT / "docs" / "spec.schema.json"
SHIPPED = sorted((ROOT / "core/composeformer/specs").glob("*.toml"))

# What only the parser knows: names, combinations of values, the number of layers.
BEYOND = re.compile(
    "|".join(
        (
            "no .* has this name",
            "is required: this spec (names several|has no)",
            "a layer needs a mixer or an ffn",
            "must divide",
            r"must be <= (num_experts|num_groups|\d+, the experts in)",
            "needs groups of two experts or more",
            "a softmax after the choice is normalised",
            "there are no shared experts",
            "must be < max_position_embeddings",
            "must give an even rotary width",
            "must be even",
            r"must be (>|>=) (low_freq_factor|beta_slow)",
            "must be the path of a value that this spec states",
            "layers in all",
            "patterns nest",
        )
    )
)


def builtin() -> dict[str, Any]:
    """The schema for the plugins of this distribution, whatever else is installed."""
    ours = [info for info in current().infos if info.distribution == "composeformer"]
    return schema(Registry(ours))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(builtin())


def parses(data: dict[str, Any]) -> tuple[bool, list[str]]:
    try:
        Spec.from_dict(data)
    except ComposeError as error:
        return False, list(error.lines)
    return True, []


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(builtin())


def test_the_published_schema_is_current() -> None:
    assert DRAWN.is_file(), "write it: compose schema -o docs/spec.schema.json"
    published = json.loads(DRAWN.read_text("utf-8"))
    assert published == builtin(), "regenerate it: compose schema -o docs/spec.schema.json"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_are_valid(validator: Draft202012Validator, path: Path) -> None:
    assert path.stem in shipped()
    assert [error.message for error in validator.iter_errors(tomli.loads(path.read_text("utf-8")))] == []


@settings(deadline=None, max_examples=60)
@given(specs())
def test_what_the_parser_reads_is_valid(validator: Draft202012Validator, data: dict[str, Any]) -> None:
    assert parses(data)[0]
    assert validator.is_valid(data)


VALUES: list[Any] = [
    True,
    False,
    0,
    1,
    2,
    -1,
    0.5,
    2**50,
    "x",
    "gqa",
    [],
    [1],
    {},
    {"kind": "x"},
    {"use": "x"},
]
KEYS = ["kind", "use", "implementation", "repeat", "layers", "eps", "windw", "extends", "mixer"]


def tables(value: Any) -> list[Any]:
    """Every table and array of a document."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value] if isinstance(value, dict | list) else []
    return found + [table for one in below for table in tables(one)]


@settings(deadline=None, max_examples=300)
@given(specs(), st.data())
def test_schema_and_parser_agree_when_one_key_is_changed(
    validator: Draft202012Validator, data: dict[str, Any], draw: st.DataObject
) -> None:
    data = copy.deepcopy(data)
    table = draw.draw(st.sampled_from([found for found in tables(data) if found]))
    keys = list(table) if isinstance(table, dict) else list(range(len(table)))
    way = draw.draw(st.sampled_from(["change", "delete", "add"]))
    if way == "add" and isinstance(table, dict):
        table[draw.draw(st.sampled_from(KEYS))] = draw.draw(st.sampled_from(VALUES))
    elif way == "delete":
        del table[draw.draw(st.sampled_from(keys))]
    else:
        table[draw.draw(st.sampled_from(keys))] = draw.draw(st.sampled_from(VALUES))
    if "extends" in data:
        return
    accepted, lines = parses(data)
    if not validator.is_valid(data):
        assert not accepted, [error.message for error in validator.iter_errors(data)]
    elif not accepted and not _refined(data):
        assert any(BEYOND.search(line) for line in lines), lines


def _refined(data: dict[str, Any]) -> bool:
    """A refinement has the fields of what it refines, which the schema can not follow."""
    return any(isinstance(table, dict) and "use" in table for table in tables(data))


def test_declared_differences() -> None:
    """JSON has one sort of number: 3.0 is an integer there. And a schema can not follow a name."""
    found = Draft202012Validator(builtin())
    base = Spec.load("tiny-llama").to_dict()
    whole = base | {"model": base["model"] | {"hidden_size": 64.0}}
    assert found.is_valid(whole)
    assert not parses(whole)[0]
    refined = base | {"layers": [{"mixer": {"use": "attention", "windw": 3}}]}
    assert found.is_valid(refined)
    assert not parses(refined)[0]


def test_a_spec_that_extends_may_leave_out_what_it_inherits() -> None:
    found = Draft202012Validator(builtin())
    child = {"extends": "tiny-llama", "mixer": {"attention": {"window": 8}}, "model": {"vocab_size": 8}}
    assert found.is_valid(child)
    assert parses(child)[0]
    assert not found.is_valid({key: value for key, value in child.items() if key != "extends"})
    assert not found.is_valid(child | {"mixer": {"attention": {"windw": 8}}})
    assert not found.is_valid(child | {"extends": 3})


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({"layers": [{"mixer": False}]}, True),
        ({"layers": [{"mixer": True}]}, False),
        ({"layers": []}, False),
        ({"layers": [{"repeat": 2, "layers": [{"ffn": False}]}]}, True),
        ({"layers": [{"mixer": "attention", "layers": [{}]}]}, False),
        ({"layers": [{"repeat": 10_001}]}, False),
        ({"mixer": {"kind": "gqa", "num_heads": 4, "x": {"kind": "gqa", "num_heads": 4}}}, False),
        ({"mixer": {"kind": "gqa", "num_heads": 4}}, True),
        ({"mixer": {"kind": "gqa"}}, False),
        ({"norm": {"kind": "none"}}, False),
        ({"mixer": {"kind": "gqa", "num_heads": 4, "implementation": {"decode": "reference"}}}, True),
        ({"mixer": {"kind": "gqa", "num_heads": 4, "implementation": "sdp"}}, False),
        ({"mixer": {"kind": "gqa", "num_heads": 4, "position": {"kind": "none"}}}, True),
        ({"mixer": {"kind": "gqa", "num_heads": 4, "position": {"kind": "rmsnorm"}}}, False),
        ({"unverified": ["norm.rms.eps"]}, True),
        ({"unverified": "norm.rms.eps"}, False),
        ({"format": 2}, False),
    ],
)
def test_examples(change: dict[str, Any], valid: bool) -> None:
    data = Spec.load("tiny-llama").to_dict() | change
    if "mixer" in change:
        data["layers"] = [{}]
    assert Draft202012Validator(builtin()).is_valid(data) == valid
    assert parses(data)[0] == valid
