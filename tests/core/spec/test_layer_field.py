"""A field that takes the parts of a layer: merged, refined, told and listed as an entry of `[[layers]]` is."""

from pathlib import Path
from typing import Any

import pytest

from composeformer.config import Config, config, layer
from composeformer.contracts import Component, Implementation, LayerParts, Part
from composeformer.errors import SpecError
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.spec import Spec
from composeformer.spec.document import parse

TINY = "tiny-deepseek-v3"


def held(spec: Spec) -> LayerParts:
    found = spec.single("predictor").config.layer
    assert isinstance(found, LayerParts)
    return found


def test_what_extends_a_layer_merges_with_it(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        f'extends = "{TINY}"\n[predictor.layer]\nmixer = {{ use = "mla", window = 8 }}\nffn = "dense"\n'
    )
    child = tmp_path / "child.toml"
    child.write_text('extends = "base.toml"\n[predictor.layer.mixer]\nkv_lora_rank = 16\n')
    found = held(Spec.load(child))
    assert found.mixer is not None
    assert found.ffn is not None
    assert (found.mixer.config.window, found.mixer.config.kv_lora_rank, found.ffn.name) == (8, 16, "dense")
    child.write_text('extends = "base.toml"\n[predictor.layer]\nmixer = false\n')
    found = held(Spec.load(child))
    assert (found.mixer, found.ffn and found.ffn.name) == (None, "dense")


def test_a_setting_reaches_into_it() -> None:
    found = held(Spec.load(TINY, ["predictor.layer.ffn=dense"]))
    assert found.ffn == Spec.load(TINY).layers[0].ffn
    with pytest.raises(SpecError, match=r"--set: predictor.layer.ffn = \"dens\": .* did you mean 'dense'\?$"):
        Spec.load(TINY, ["predictor.layer.ffn=dens"])


def test_its_values_are_listed_where_they_are_stated() -> None:
    spec = Spec.load(
        TINY, ['predictor.layer.mixer={ use = "mla", window = 8 }', "predictor.layer.ffn=experts"]
    )
    listed = {path: (value, str(source)) for path, value, source in spec.values()}
    assert listed["predictor.layer.mixer.window"] == (8, "--set")
    assert listed["predictor.layer.ffn"] == ("experts", "--set")
    assert "predictor.layer" not in listed
    sole = Spec.load("tiny-moe").with_(predictor={"kind": "mtp", "layer": {"mixer": False}})
    listed = {path: (value, str(source)) for path, value, source in sole.values()}
    assert listed["predictor.layer.mixer"] == (False, "python")
    assert listed["predictor.layer.ffn"] == ("experts", "default")
    assert {path: value for path, value, _ in Spec.load(TINY).values()}["predictor.layer"] is None


@config
class Twice(Config):
    """An ffn of a layer's parts."""

    inner: LayerParts | None = layer(help="What it runs.")


def with_twice(text: str) -> Spec:
    component = Component("ffn", "twice", Twice, (Implementation("reference", "never.imported:X"),))
    info = PluginInfo(
        name="odd", distribution="odd", version="1", origin="", status="loaded", components=(component,)
    )
    registry = Registry([*current().registry.infos, info])
    return Spec(parse(HEAD + text, "x.toml"), registry)


HEAD = """[model]
vocab_size = 8
hidden_size = 16
max_position_embeddings = 8
[norm]
kind = "rmsnorm"
[position]
kind = "rope"
[mixer]
kind = "gqa"
num_heads = 2
[ffn.plain]
kind = "swiglu"
intermediate_size = 8
"""
START = HEAD.count("\n") + 1
TWICE = '[ffn.twice]\nkind = "twice"\ninner = { mixer = false, ffn = { use = "plain", bias = true } }\n'


def inner(spec: Spec) -> Part:
    ffn: Any = spec.layers[0].ffn
    found: Part = ffn.config.inner.ffn
    return found


def test_a_refinement_refines_the_layer_within() -> None:
    refined = '[[layers]]\nffn = { use = "twice", inner = { ffn = { intermediate_size = 4 } } }\n'
    found = inner(with_twice(TWICE + refined))
    assert (found.config.intermediate_size, found.config.bias) == (4, True)
    assert found.paths == (
        ("layers", 0, "ffn", "inner", "ffn"),
        ("ffn", "twice", "inner", "ffn"),
        ("ffn", "plain"),
    )


def test_a_mistake_is_told_where_it_is_stated_and_once() -> None:
    wrong = TWICE.replace("bias = true", "bias = 3")
    with pytest.raises(SpecError) as caught:
        with_twice(wrong + '[[layers]]\nffn = { use = "twice", inner = { mixer = "mixer" } }\n')
    told = f"x.toml:{START + 2}: ffn.twice.inner.ffn.bias = 3: must be true or false"
    assert caught.value.lines == (told,)
    unknown = TWICE.replace("mixer = false", "mixr = false")
    with pytest.raises(SpecError) as caught:
        with_twice(unknown + '[[layers]]\nffn = { use = "twice", inner = { mixer = "mixer" } }\n')
    (line,) = caught.value.lines
    assert line.startswith(
        f"x.toml:{START + 2}: ffn.twice.inner.mixr = false: unknown key; allowed: mixer, ffn"
    )


def test_a_layer_that_holds_itself_is_refused() -> None:
    own = TWICE.replace('{ use = "plain", bias = true }', '"twice"')
    with pytest.raises(SpecError) as caught:
        with_twice(own + '[[layers]]\nffn = "twice"\n')
    (line,) = caught.value.lines
    assert line.startswith(f"x.toml:{START + 2}: ")
    assert "refers to itself: ffn.twice -> ffn.twice" in line
