"""The spec language: how names, references, refinements and patterns become parts and layers."""

from time import perf_counter
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.config import Config, config, field, part
from composeformer.contracts import Component, Implementation, Part
from composeformer.errors import ComposeError, SpecError, one_of
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.spec import Spec
from composeformer.spec.document import from_data

MODEL = {"vocab_size": 8, "hidden_size": 16, "max_position_embeddings": 64}
GQA = {"kind": "gqa", "num_heads": 2}
SWIGLU = {"kind": "swiglu", "intermediate_size": 8}


def data(**tables: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "model": MODEL,
        "norm": {"kind": "rmsnorm"},
        "position": {"kind": "rope"},
        "mixer": GQA,
        "ffn": SWIGLU,
        "layers": [{}],
    }
    return {key: value for key, value in {**whole, **tables}.items() if value is not None}


def spec(**tables: Any) -> Spec:
    return Spec.from_dict(data(**tables))


def wrong(**tables: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        spec(**tables)
    return [line.removeprefix("python: ") for line in caught.value.lines]


def mixer(found: Spec, layer: int = 0) -> Part:
    held = found.layers[layer].mixer
    assert held is not None
    return held


def test_a_table_with_a_kind_is_one_component_named_like_its_slot() -> None:
    assert mixer(spec()).name == "mixer"
    assert spec(layers=[{"mixer": "mixer", "ffn": "ffn"}]).plan is not None


def test_a_sole_named_component_is_meant_where_none_is_named() -> None:
    assert mixer(spec(mixer={"only": GQA})).name == "only"


def test_where_there_are_several_one_must_be_named() -> None:
    lines = wrong(mixer={"a": GQA, "b": GQA}, layers=[{}, {"mixer": "b"}])
    assert lines == ["layers.0.mixer: is required: this spec names several mixer components: a, b"]


def test_a_kind_beside_names_is_one_clear_error() -> None:
    lines = wrong(mixer={**GQA, "x": GQA}, layers=[{"mixer": "x"}, {}])
    assert len(lines) == 1
    assert lines[0].startswith(
        "mixer.x: [mixer] with a kind is the only mixer, and mixer.x can not stand beside it"
    )


def test_a_model_has_one_of_each_end() -> None:
    assert wrong(residual={"main": {"kind": "pre-norm"}}) == [
        "residual.main: a model has one residual, which has no name: write [residual] with the kind"
    ]


def test_no_component_of_a_slot_says_what_to_add() -> None:
    (line,) = wrong(ffn=None)
    assert line.startswith("layers.0.ffn: is required: this spec has no ffn; add [ffn] with a kind: swiglu")


def test_a_reference_to_another_slot_says_whose_name_it_is() -> None:
    (line,) = wrong(norm={"rms": {"kind": "rmsnorm"}}, mixer={**GQA, "position": "rms"})
    assert line == "mixer.position = \"rms\": no position has this name; allowed: position ('rms' is a norm)"


def test_registered_defaults_fill_the_ends() -> None:
    found = spec()
    kinds = {slot: found.single(slot).kind for slot in ("embedding", "head", "residual", "precision")}
    assert kinds == {"embedding": "token", "head": "linear", "residual": "pre-norm", "precision": "full"}


def test_a_refinement_keeps_what_it_does_not_say() -> None:
    entry = {"mixer": {"use": "a", "window": 4}}
    found = spec(mixer={"a": {**GQA, "cap": 3.0}, "b": GQA}, layers=[entry, {"mixer": "a"}])
    assert (mixer(found).config.window, mixer(found).config.cap) == (4, 3.0)
    assert mixer(found, 1).config.window is None
    assert mixer(found) == attrs.evolve(
        mixer(found, 1), config=attrs.evolve(mixer(found, 1).config, window=4)
    )


@pytest.mark.parametrize(
    ("above", "theta", "kind"),
    [
        ({"theta": 5.0}, 5.0, "rope"),
        ({"kind": "rope", "theta": 5.0}, 5.0, "rope"),
        ({"kind": "linear", "factor": 2.0}, 10000.0, "linear"),
        ({"use": "other"}, 9.0, "rope"),
        ("other", 9.0, "rope"),
    ],
)
def test_a_refined_part_merges_unless_it_is_another(above: Any, theta: float, kind: str) -> None:
    """The same rule as that of `extends`."""
    found = spec(
        position={"other": {"kind": "rope", "theta": 9.0}},
        mixer={**GQA, "position": {"kind": "rope", "theta": 3.0}},
        layers=[{"mixer": {"use": "mixer", "position": above}}],
    )
    position = mixer(found).config.position
    assert (position.kind, position.config.theta) == (kind, theta)


def test_a_refinement_of_a_refinement_merges_too() -> None:
    found = spec(
        position={"other": {"kind": "rope", "theta": 9.0}},
        mixer={**GQA, "position": {"use": "other", "fraction": 0.5}},
        layers=[{"mixer": {"use": "mixer", "position": {"layout": "interleaved"}}}],
    )
    position = mixer(found).config.position.config
    assert (position.theta, position.fraction, position.layout) == (9.0, 0.5, "interleaved")


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ({"use": "mixer", "kind": "gqa"}, 'mixer.kind = "gqa": what `use` names has its kind already'),
        ({"use": 3}, "mixer.use = 3: must be the name of a mixer: mixer"),
        ({"use": "mixr"}, 'mixer.use = "mixr": no mixer has this name; allowed: mixer; did you mean'),
        ({"window": 3}, "mixer: needs `use` with a name or `kind`: {mixers}"),
        ({"ues": "mixer"}, 'mixer.ues = "mixer": unknown key; a mixer needs `use`; did you mean'),
        (True, "mixer = true: must be the name of a mixer, a table with `use` or `kind`, or false"),
        ([1], "mixer: must be the name of a mixer, a table with `use` or `kind`, or false"),
    ],
)
def test_what_is_no_reference_is_one_clear_error(reference: Any, line: str) -> None:
    lines = wrong(layers=[{"mixer": reference}])
    assert len(lines) == 1
    mixers = one_of(current().registry.kinds("mixer"))
    assert lines[0].startswith(f"layers.0.{line}".replace("{mixers}", mixers))


def test_use_is_for_references_alone() -> None:
    (line,) = wrong(mixer={"a": GQA, "b": {"use": "a", "window": 3}}, layers=[{"mixer": "a"}])
    assert line.startswith(
        f'mixer.b.use = "a": a named mixer has a kind: {one_of(current().registry.kinds("mixer"))}'
    )
    (line,) = wrong(mixer={**GQA, "use": "a"})
    assert line.startswith('mixer.use = "a": unknown key; `use` refines a component where one is taken')


def test_a_layer_may_lack_one_sublayer_and_not_both() -> None:
    found = spec(layers=[{"mixer": False}, {"ffn": False}])
    assert [[slot for slot, _ in layer.items()] for layer in found.layers] == [["ffn"], ["mixer"]]
    assert wrong(layers=[{"mixer": False, "ffn": False}]) == ["layers.0: a layer needs a mixer or an ffn"]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_patterns_expand_to_what_they_spell_out(draw: st.DataObject) -> None:
    def entries(depth: int) -> tuple[list[dict[str, Any]], list[int]]:
        made, flat = [], []
        for _ in range(draw.draw(st.integers(1, 3))):
            repeat = draw.draw(st.integers(1, 3))
            if depth < 3 and draw.draw(st.booleans()):
                below, windows = entries(depth + 1)
                made.append({"repeat": repeat, "layers": below})
            else:
                windows = [draw.draw(st.integers(1, 9))]
                made.append({"repeat": repeat, "mixer": {"use": "mixer", "window": windows[0]}})
            flat += windows * repeat
        return made, flat

    layers, windows = entries(0)
    found = spec(layers=layers)
    assert [mixer(found, index).config.window for index in range(len(found.layers))] == windows


@pytest.mark.parametrize(
    "layers",
    [
        [{"repeat": 10**12}],
        [{"repeat": 10_001}],
        [{"repeat": 5_000}, {"repeat": 5_001}],
        [{"repeat": 101, "layers": [{"repeat": 100}]}],
        [{"repeat": 10_000, "layers": [{"repeat": 10_000, "layers": [{"repeat": 10_000}]}]}],
        [{"layers": [{"repeat": 10_000, "layers": [{}, {}]}]}],
    ],
)
def test_too_many_layers_are_refused_before_they_are_made(layers: Any) -> None:
    started = perf_counter()
    (line,) = wrong(layers=layers)
    assert perf_counter() - started < 1
    assert "10000" in line
    assert ".repeat = " in line


def test_patterns_nest_eight_deep() -> None:
    layers: Any = [{}]
    for _ in range(8):
        layers = [{"layers": layers}]
    assert len(spec(layers=layers).layers) == 1
    (line,) = wrong(layers=[{"layers": layers}])
    assert line.endswith("patterns nest at most 8 deep")


def test_a_wrong_repeat_hides_no_other_problem() -> None:
    lines = wrong(layers=[{"repeat": True, "mixr": "mixer", "ffn": "fn"}])
    assert [line.partition(" ")[0] for line in lines] == ["layers.0.repeat", "layers.0.mixr", "layers.0.ffn"]
    assert lines[1].endswith("did you mean 'mixer'?")


def test_settings_reach_into_layers() -> None:
    settings = ["layers.0.repeat=2", 'layers.0.mixer={use="attention"}', "layers.0.mixer.window=8"]
    found = Spec.load("tiny-llama", settings)
    assert [mixer(found, index).config.window for index in range(len(found.layers))] == [8, 8]


def test_implementations_are_chosen_for_all_phases_or_each() -> None:
    found = mixer(spec(mixer={**GQA, "implementation": {"decode": "reference"}}))
    assert [found.chosen(phase) for phase in ("train", "prefill", "decode")] == ["auto", "auto", "reference"]
    assert mixer(spec(mixer={**GQA, "implementation": "sdpa"})).chosen("train") == "sdpa"
    (line,) = wrong(mixer={**GQA, "implementation": "sdp"})
    assert line.endswith("allowed: auto, sdpa, reference; did you mean 'sdpa'?")
    (line,) = wrong(mixer={**GQA, "implementation": {"decod": "sdpa"}})
    assert line.startswith('mixer.implementation.decod = "sdpa": unknown phase')
    assert len(wrong(mixer={**GQA, "implementation": {"train": 3}})) == 1


# Parts within parts of one slot, which no built-in component has.


@config
class Wrap(Config):
    inner: Part | None = part("ffn", optional=True)
    other: Part | None = part("ffn", optional=True)
    size: int = field(default=1, minimum=1)

    def tensors(self, site: Any) -> Any:
        if self.inner is not None:
            yield site.part(self.inner, "inner")


@pytest.fixture(scope="module")
def wrapping() -> Registry:
    wrap = Component("ffn", "wrap", Wrap, (Implementation("reference", "never.imported:Wrap"),))
    info = PluginInfo(
        name="odd", distribution="odd", version="1", origin="", status="loaded", components=(wrap,)
    )
    return Registry([*current().registry.infos, info])


WAYS = [lambda name: name, lambda name: {"use": name}, lambda name: {"use": name, "size": 2}]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_of_references_is_one_error(wrapping: Registry, way: Any, length: int) -> None:
    names = [f"w{index}" for index in range(length)]
    ffn = {name: {"kind": "wrap", "inner": way(names[(i + 1) % length])} for i, name in enumerate(names)}
    with pytest.raises(SpecError) as caught:
        Spec(from_data(data(ffn=ffn, layers=[{"ffn": "w0"}])), wrapping)
    (line,) = caught.value.lines
    assert "refers to itself: ffn.w0 -> " in line


def test_refinements_that_multiply_are_refused(wrapping: Registry) -> None:
    """Two refinements in each of thirty components would make a tree of a billion parts."""
    ffn: dict[str, Any] = {"w30": {"kind": "wrap"}}
    for index in range(30):
        below = {"use": f"w{index + 1}", "size": 2}
        ffn[f"w{index}"] = {"kind": "wrap", "inner": below, "other": below}
    with pytest.raises(ComposeError, match="more than 20000 parts"):
        Spec(from_data(data(ffn=ffn, layers=[{"ffn": "w0"}])), wrapping)


def test_long_chains_of_references_are_refused(wrapping: Registry) -> None:
    ffn: dict[str, Any] = {f"w{i}": {"kind": "wrap", "inner": f"w{i + 1}"} for i in range(2000)}
    ffn["w2000"] = {"kind": "wrap"}
    with pytest.raises(SpecError, match="refer to one another more than 32 deep"):
        Spec(from_data(data(ffn=ffn, layers=[{"ffn": "w0"}])), wrapping)


def test_what_only_a_run_needs_may_be_contested() -> None:
    """Two plugins that bring default optimizers make no architecture invalid."""

    def plugin(name: str, slot: str) -> PluginInfo:
        component = Component(slot, name, Wrap, (Implementation("reference", "never:X"),), default=True)
        return PluginInfo(
            name=name, distribution=name, version="1", origin="", status="loaded", components=(component,)
        )

    registry = Registry([*current().registry.infos, plugin("a", "schedule"), plugin("b", "schedule")])
    found = Spec(from_data(data()), registry)
    with pytest.raises(ComposeError, match=r"a default is registered by plugins a .* and b"):
        found.single("schedule")
    registry = Registry([*current().registry.infos, plugin("a", "head")])
    with pytest.raises(SpecError, match=r"head: a default is registered by plugins dense .* and a"):
        Spec(from_data(data()), registry)
