"""Specs in Python: made from data, changed, written, compared; and where each of their values comes from."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.config import facts_of
from composeformer.contracts import LayerParts, Part
from composeformer.errors import DEFAULT, ComposeError, SpecError
from composeformer.spec import Spec, shipped
from composeformer.spec.values import leaves
from composeformer.testing.specs import specs


@settings(deadline=None, max_examples=100)
@given(specs())
def test_a_spec_written_and_read_is_the_same(data: dict[str, Any]) -> None:
    found = Spec.from_dict(data)
    again = Spec.from_toml(found.to_toml())
    assert again == found
    assert hash(again) == hash(found)
    assert again.to_toml() == found.to_toml()
    assert again.to_dict() == found.to_dict() == data
    assert (again.layers, again.model, again.train) == (found.layers, found.model, found.train)


@pytest.mark.parametrize("name", shipped())
def test_shipped_specs_written_and_read_are_the_same(name: str, tmp_path: Path) -> None:
    found = Spec.load(name)
    (tmp_path / "spec.toml").write_text(found.to_toml(), "utf-8")
    again = Spec.load(tmp_path / "spec.toml")
    assert again == found
    assert again.fingerprint == found.fingerprint


def test_data_is_copied_in_and_out() -> None:
    data = Spec.load("tiny-llama").to_dict()
    found = Spec.from_dict(data)
    data["model"]["hidden_size"] = 3
    found.to_dict()["model"]["hidden_size"] = 3
    assert found == Spec.load("tiny-llama")
    assert copy.deepcopy(found) is found


def test_specs_are_equal_when_their_documents_are() -> None:
    found = Spec.load("tiny-llama")
    changed = found.with_({"layers.0.repeat": 2})
    assert found != changed
    assert found != found.to_dict()
    assert len({found, changed, Spec.load("tiny-llama"), changed.with_({"layers.0.repeat": 3})}) == 2
    one, other = (found.with_({"mixer.attention.cap": value}) for value in (3, 3.0))
    assert one == other
    assert hash(one) == hash(other)


def test_dotted_changes_and_keyword_changes_are_one_rule() -> None:
    found = Spec.load("tiny-llama")
    dotted = found.with_({"mixer.attention.window": 8, "norm.rms.eps": 1e-4})
    keyword = found.with_(mixer={"attention": {"window": 8}}, norm={"rms": {"eps": 1e-4}})
    both = found.with_({"norm.rms.eps": 1e-4}, mixer={"attention": {"window": 8}})
    assert dotted == keyword == both
    assert found.overridden(["mixer.attention.window=8", "norm.rms.eps=1e-4"]) == dotted
    assert found.with_() == found


def test_a_change_replaces_arrays_and_parts_of_another_kind() -> None:
    found = Spec.load("tiny-llama").with_(position={"rope": {"kind": "none"}}, layers=[{"repeat": 5}])
    assert found.to_dict()["position"]["rope"] == {"kind": "none"}
    assert len(found.layers) == 5


def test_a_copy_keeps_its_name_and_its_original() -> None:
    bare = {key: value for key, value in Spec.load("tiny-llama").to_dict().items() if key != "name"}
    found = Spec.from_dict(bare, label="folder/mine.toml")
    assert found.name == found.with_({"layers.0.repeat": 2}).name == "mine"
    assert len(found.layers) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"model.hidden_size": "64"},
        {"model": 3},
        {"layers.7.repeat": 2},
        {"extends": "llama-2-7b"},
        {"a b": 1},
    ],
)
def test_a_wrong_change_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ComposeError):
        Spec.load("tiny-llama").with_(change)
    with pytest.raises(ComposeError):
        Spec.load("tiny-llama").with_(**change)


def test_python_data_may_extend_a_shipped_spec() -> None:
    found = Spec.from_dict({"extends": "tiny-llama", "layers": [{"repeat": 7}]})
    assert len(found.layers) == 7
    assert found.to_dict()["model"] == Spec.load("tiny-llama").to_dict()["model"]


def test_no_number_or_text_is_coerced() -> None:
    for path, value in (
        ("model.hidden_size", "64"),
        ("model.hidden_size", 64.0),
        ("model.hidden_size", True),
        ("model.tie_embeddings", 1),
        ("model.tie_embeddings", "true"),
        ("norm.rms.eps", True),
        ("norm.rms.eps", "1e-5"),
        ("layers.0.repeat", 2.0),
        ("format", True),
        ("format", 1.0),
    ):
        with pytest.raises(SpecError, match=path):
            Spec.load("tiny-llama").with_({path: value})


# Where values come from.


@settings(deadline=None, max_examples=60)
@given(specs())
def test_every_value_is_listed_once_with_its_source(data: dict[str, Any]) -> None:
    found = Spec.from_toml(Spec.from_dict(data).to_toml(), label="here.toml")
    listed = list(found.values())
    assert len({path for path, _, _ in listed}) == len(listed)
    stated = [(value, source) for _, value, source in listed if source != DEFAULT]
    assert [value for value, _ in stated] == [value for _, value in leaves(found.document.data)]
    assert all(source.file == "here.toml" and source.line is not None for _, source in stated)
    lines = found.to_toml().split("\n")
    for path, _, source in listed:
        if source != DEFAULT and source.line is not None and '"' not in path:
            assert path.rpartition(".")[2] in lines[source.line - 1]


@settings(deadline=None, max_examples=60)
@given(specs())
def test_every_field_of_every_part_is_listed_where_it_is_stated(data: dict[str, Any]) -> None:
    found = Spec.from_dict(data)
    listed = {path: value for path, value, _ in found.values()}

    def covered(part: Part) -> None:
        for name in facts_of(type(part.config)):
            value = getattr(part.config, name)
            places = [".".join(map(_key, (*path, name))) for path in part.paths]
            if isinstance(value, Part | LayerParts):
                for held in (value,) if isinstance(value, Part) else (value.mixer, value.ffn):
                    if held is not None:
                        covered(held)
                assert any(
                    place in listed or any(p.startswith(f"{place}.") for p in listed) for place in places
                )
            else:
                stated = [listed[place] for place in places if place in listed]
                assert stated[0] == (list(value) if isinstance(value, tuple) else value)

    for layer in found.layers:
        for _, part in layer.items():
            covered(part)
    covered(found.single("residual"))
    if found.singles["predictor"] is not None:
        covered(found.single("predictor"))


def _key(step: str | int) -> str:
    text = str(step)
    return (
        text
        if all(c.isascii() and (c.isalnum() or c in "-_") for c in text)
        else json.dumps(text, ensure_ascii=False)
    )


def test_sources_are_file_and_line_setting_or_default(tmp_path: Path) -> None:
    child = tmp_path / "child.toml"
    child.write_text('extends = "tiny-llama"\n\n[norm.rms]\neps = 1e-3\n')
    found = Spec.load(child, ["layers.0.repeat=2"])
    sources = {path: str(source) for path, _, source in found.values()}
    shipped_text = (Path(__file__).parents[3] / "core/composeformer/specs/tiny-llama.toml").read_text()
    line = shipped_text.splitlines().index("hidden_size = 64") + 1
    assert sources["norm.rms.eps"] == f"{child}:4"
    assert sources["model.hidden_size"] == f"composeformer/specs/tiny-llama.toml:{line}"
    assert sources["layers.0.repeat"] == "--set"
    assert sources["mixer.attention.window"] == sources["residual.kind"] == sources["head.cap"] == "default"
    assert sources["model.init_std"] == sources["train.steps"] == "default"


def test_values_of_a_price_are_listed_where_one_is_stated() -> None:
    """A spec that says nothing of cost is not told by thirty assumptions of one."""
    for changes, listed in (([], False), (["cost.rate=3"], True)):
        found = {path: str(source) for path, _, source in Spec.load("tiny-llama", changes).values()}
        assert any(path.startswith("cost.") for path in found) == listed
        assert found.get("cost.pue") == ("default" if listed else None)


def test_show_prints_every_value_with_its_source() -> None:
    text = run("show", "tiny-llama", "--values", "--json", "--set", "norm.rms.eps=0.5")
    document = json.loads(text)
    found = Spec.load("tiny-llama", ["norm.rms.eps=0.5"])
    assert document["values"] == [
        {"path": path, "value": value, "source": str(source)} for path, value, source in found.values()
    ]
    assert "norm.rms.eps" in run("show", "tiny-llama", "--values")


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "composeformer", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.booleans(), max_size=4))
def test_any_data_is_a_spec_or_an_error(data: dict[str, Any]) -> None:
    with pytest.raises(ComposeError):
        Spec.from_dict(data)


def test_what_is_written_is_toml_in_a_readable_order() -> None:
    text = Spec.load("tiny-llama").to_toml()
    assert list(tomli.loads(text))[:2] == ["format", "name"]
    assert "[[layers]]" in text
