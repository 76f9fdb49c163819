"""The search itself: several mistakes at once, those that cancel, noise, rounding, and what nothing explains."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import composeformer as cf
from composeformer import lazy
from composeformer.config import Config, config
from composeformer.contracts import Component, Declared, Implementation, Linear
from composeformer.conventions import Convention, Order, Shift, Swap
from composeformer.errors import PluginError
from composeformer.plugins import current
from composeformer.registry import PluginInfo, Registry
from composeformer.site import Site
from composeformer.spec import Spec
from composeformer.spec.document import from_data
from composeformer.store import verify
from composeformer.store.loading import open_any
from composeformer.tensors import Output, merge

State = dict[str, Tensor]


def pairs(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2), 1).flatten(0, 1)


def rotated(state: State) -> State:
    """Queries and keys of `llama` with each head's features in interleaved pairs."""
    names = [name for name in state if name.endswith(("mixer.q.weight", "mixer.k.weight"))]
    return {name: torch.cat([pairs(head) for head in state[name].split(8)]) for name in names}


def exchanged(state: State) -> State:
    found = {}
    for name in state:
        if name.endswith("ffn.gate.weight"):
            other = name.replace("gate", "up")
            found |= {name: state[other], other: state[name]}
    return found


def exchanged_in_experts(state: State) -> State:
    return exchanged({name: tensor for name, tensor in state.items() if tensor.ndim == 3})


def less_one(state: State) -> State:
    return {name: t - 1 for name, t in state.items() if name.endswith("mixer_norm.weight")}


def heads_first(state: State) -> State:
    return {name: t.roll(64, 1) for name, t in state.items() if name.endswith("eh_proj.weight")}


# What can be planted together: changes of the spec, or of tensors, and the name that each is found by.
LLAMA: dict[str, Any] = {
    "position.theta": {"position.theta": 500.0},
    "norm.eps": {"norm.eps": 1e-3},
    "ffn.activation": {"ffn.activation": "relu"},
    "head.cap": {"head.cap": 5.0},
    "embedding.scale": {"embedding.scale": 2.0},
    "rotary layout of mixer gqa": rotated,
    "gate and up of ffn swiglu": exchanged,
    "weight of norm rmsnorm": less_one,
}
DEEPSEEK: dict[str, Any] = {
    "position.layout": {"position.layout": "half-split"},
    "position.mscale_all_dim": {"position.mscale_all_dim": None},
    "norm.eps": {"norm.eps": 1e-2},
    "router.group_score": {"router.group_score": "max"},
    "router.normalize": {"router.normalize": False},
    "router.routed_scaling_factor": {"router.routed_scaling_factor": 1.0},
    "gate and up of ffn moe": exchanged_in_experts,
    "inputs of eh_proj of predictor mtp": heads_first,
}


def plant(names: Iterable[str], offered: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The spec's changes, and one edit of tensors, of all these mistakes."""
    chosen = [offered[name] for name in names]
    changes: dict[str, Any] = {}
    for each in chosen:
        changes |= each if isinstance(each, dict) else {}

    def edit(state: State) -> State:
        found: State = {}
        for each in chosen:
            found |= {} if isinstance(each, dict) else each(state | found)
        return found

    return changes, edit


def names_of(explanation: Any) -> list[str]:
    return [change.name for step in explanation.steps for change in step.changes]


@settings(max_examples=8)
@given(names=st.sets(st.sampled_from(sorted(LLAMA)), min_size=2, max_size=5))
def test_any_mistakes_together_are_found_and_no_others(lab: Any, names: set[str]) -> None:
    found = lab.verdict("llama", *plant(sorted(names), LLAMA)).explanation
    assert found.complete, found.lines
    assert sorted(names_of(found)) == sorted(names)


@settings(max_examples=8)
@given(names=st.sets(st.sampled_from(sorted(DEEPSEEK)), min_size=2, max_size=5))
def test_any_mistakes_of_deepseek_together_are_found_and_no_others(lab: Any, names: set[str]) -> None:
    found = lab.verdict("deepseek_v3+mtp", *plant(sorted(names), DEEPSEEK)).explanation
    assert found.complete, found.lines
    assert set(names_of(found)) == names


def test_steps_follow_the_order_of_computation(lab: Any) -> None:
    found = lab.verdict("llama", *plant(sorted(LLAMA), LLAMA)).explanation
    assert found.complete
    order = [step.first.where for step in found.steps]
    assert order[0] == "embedding"
    assert order[-1] == "logits"
    assert found.lines[1].startswith("with that, ")
    assert found.lines[-1].startswith(f"with all {len(LLAMA)} the outputs ")


def test_an_order_that_the_field_says_is_no_mistake(lab: Any) -> None:
    # Interleaved pairs under the layout that says so: the same function, though spec and tensors differ.
    verdict = lab.verdict("llama", {"position.layout": "interleaved"}, rotated)
    assert not verdict.equal
    assert verdict.first is None
    assert "changes nothing on these tokens" in verdict.explanation.lines[0]
    # Nor is it one beside mistakes that are, however many these are.
    wrong = {"position.layout": "interleaved", "norm.eps": 1e-3, "ffn.activation": "relu"}
    assert set(names_of(lab.verdict("llama", wrong, rotated).explanation)) == {"norm.eps", "ffn.activation"}


def test_equal_models_need_no_explanation(lab: Any) -> None:
    verdict = verify(lab.trusted("llama"), lab.trusted("llama"), bisect=True)
    assert verdict.equal
    assert verdict.explanation is None
    assert verdict.to_dict()["explanation"] is None


def test_what_nothing_explains_is_told_with_what_was_tried(lab: Any) -> None:
    def noise(state: State) -> State:
        name = "layers.1.mixer.k.weight"
        generator = torch.Generator().manual_seed(3)
        return {name: state[name] + torch.randn(state[name].shape, generator=generator)}

    found = lab.verdict("llama", {"ffn.activation": "relu", "norm.eps": 1e-3}, noise).explanation
    assert not found.complete
    # What comes before it is explained all the same.
    assert names_of(found) == ["norm.eps", "ffn.activation"]
    assert found.remaining.where == "layers.1.mixer"
    assert found.unrelated == ("layers.1.mixer.k.weight",)
    assert 'position.layout = "interleaved"' in found.tried
    assert "layers.1.mixer still differs" in found.lines[2]
    assert "nothing known explains it; tried: " in found.lines[2]
    assert found.lines[3] == (
        "no order, scale or exchange relates layers.1.mixer.k.weight to the trusted tensors"
    )


def test_another_depth_is_told(lab: Any) -> None:
    found = lab.verdict("llama", {"layers": [{"repeat": 1}]}).explanation
    assert not found.complete
    assert found.lines[0] == "1 layers here, 2 in the trusted folder"
    assert found.remaining.where == "layers.1.residual.mixer_norm"


def jittered(edit: Any) -> Any:
    """The same, and every tensor off by a thousandth: a copy that was trained on, or rounded."""

    def both(state: State) -> State:
        generator = torch.Generator().manual_seed(5)
        changed = state | edit(state)
        return {n: t + 1e-3 * t.std() * torch.randn(t.shape, generator=generator) for n, t in changed.items()}

    return both


def test_a_convention_is_seen_through_noise(lab: Any) -> None:
    found = lab.verdict("llama", {}, jittered(rotated), tolerance=0.02).explanation
    assert found.complete, found.lines
    assert names_of(found) == ["rotary layout of mixer gqa"]
    assert found.worst > 0


def test_a_choice_of_a_field_is_tried_where_no_part_states_a_convention(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        current().registry.get("mixer", "gqa").config, "conventions", lambda self, site: (), raising=True
    )
    found = lab.verdict("llama", {}, jittered(rotated), tolerance=0.02).explanation
    assert found.complete, found.lines
    assert names_of(found) == ["position.layout"]
    told = 'position.layout: "half-split" in both specs, but the tensors here are as "interleaved" has them'
    assert told in found.lines[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_conventions_are_found_in_any_dtype(lab: Any, dtype: str) -> None:
    trusted = cf.load(lab.folder("llama"), dtype=dtype)
    wrong = lab.planted("llama", {"norm.eps": 1e-3}, rotated, dtype=dtype)
    found = verify(open_any(wrong), trusted, bisect=True).explanation
    assert found.complete, found.lines
    assert names_of(found) == ["norm.eps", "rotary layout of mixer gqa"]


def test_what_rounds_otherwise_is_not_taken_for_a_convention(lab: Any) -> None:
    model = open_any(lab.folder("llama"))
    coarse = cf.load(lab.folder("llama"), overrides=["precision.kind=fp8-block"])
    verdict = verify(coarse, model, bisect=True)
    assert verdict.first is not None
    found = verdict.explanation
    assert found.complete
    assert found.steps == ()
    assert re.fullmatch(
        r"in float32 the outputs are equal; what differs is rounding: precision fp8-block in bfloat16 here, full in "
        r"float32 in the trusted folder",
        found.lines[0],
    )


def test_neither_model_is_changed(lab: Any) -> None:
    model, trusted = open_any(lab.planted("llama", {"norm.eps": 1e-3}, rotated)), lab.trusted("llama")
    before = [{n: t.clone() for n, t in each.state_dict().items()} for each in (model, trusted)]
    spec = model.spec.to_dict()
    verify(model, trusted, bisect=True)
    for each, old in zip((model, trusted), before):
        assert all(torch.equal(t, old[n]) for n, t in each.state_dict().items())
    assert model.spec.to_dict() == spec


# Parts that no plugin of ours has: a residual with its norms elsewhere, a feed-forward network with conventions.


class PostNorm(nn.Module):
    """norm(stream + sublayer(stream)), as in arXiv 1706.03762."""

    def __init__(self, config: Any, site: Any) -> None:
        super().__init__()
        for name in site.sublayers:
            setattr(self, f"{name}_norm", site.part(f"{name}_norm"))
        if site.layer is None:
            self.norm = site.part("norm")

    def forward(self, stream: Tensor, batch: Any, sublayers: Mapping[str, Any]) -> Output:
        aux = []
        for name, sublayer in sublayers.items():
            output = sublayer(stream)
            stream = getattr(self, f"{name}_norm")(stream + output.hidden)
            aux.append(output.aux)
        return Output(stream, merge(aux))

    def open(self, x: Tensor) -> Tensor:
        return x

    def close(self, stream: Tensor) -> Tensor:
        closed: Tensor = self.norm(stream)
        return closed


class Square(nn.Module):
    def __init__(self, config: Any, site: Any) -> None:
        super().__init__()
        self.inner, self.outer = site.linear("inner"), site.linear("outer")

    def forward(self, x: Tensor, batch: Any) -> Output:
        return Output(self.outer(self.inner(x).square()))


@config
class Squared(Config):
    """outer((inner x)^2)."""

    def tensors(self, site: Site) -> Iterable[Declared]:
        yield Linear(name="inner", inputs=site.width, outputs=site.width)
        yield Linear(name="outer", inputs=site.width, outputs=site.width)

    def conventions(self, site: Site) -> Iterable[Convention]:
        flipped = tuple(reversed(range(site.width)))
        order = Order(tensor="inner.weight", dim=-2, indices=flipped)
        yield Convention(name="direction", usual="upwards", other="downwards", changes=(order,))


@pytest.fixture
def with_parts(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The spec of `llama` with tables changed, in a registry that has these parts too."""
    true = lazy.load
    modules: dict[str, Any] = {"third:PostNorm": PostNorm, "third:Square": Square}
    monkeypatch.setattr(lazy, "load", lambda name: modules[name] if name in modules else true(name))
    base = current().registry.get("residual", "pre-norm")
    components = (
        Component("residual", "post-norm", base.config, (Implementation("reference", "third:PostNorm"),)),
        Component("ffn", "squared", Squared, (Implementation("reference", "third:Square"),)),
    )
    info = PluginInfo(
        name="third", distribution="third", version="1", origin="", status="loaded", components=components
    )
    registry = Registry([*current().registry.infos, info])
    data = lab.trusted("llama").spec.to_dict()
    return lambda **tables: Spec(from_data(data | tables), registry)


def test_the_place_of_norms_is_found(with_parts: Any) -> None:
    trusted = cf.build(with_parts(), seed=0)
    wrong = cf.build(with_parts(residual={"kind": "post-norm"}), seed=0)
    found = verify(wrong, trusted, bisect=True).explanation
    assert found.complete, found.lines
    assert names_of(found) == ["residual"]
    assert found.lines[0].startswith("layers.0.residual.mixer_norm differs first (")
    assert "explained by residual: post-norm here, pre-norm in the trusted folder" in found.lines[0]


def test_a_third_party_states_conventions_of_its_own(with_parts: Any) -> None:
    spec = with_parts(ffn={"kind": "squared"})
    trusted, wrong = cf.build(spec, seed=0), cf.build(spec, seed=0)
    with torch.no_grad():
        for name, tensor in wrong.state_dict().items():
            if name.endswith("ffn.inner.weight"):
                tensor.copy_(tensor.flip(0))
    found = verify(wrong, trusted, bisect=True).explanation
    assert found.complete, found.lines
    (change,) = found.steps[0].changes
    assert change.told == "direction of ffn squared: downwards here, upwards in the trusted folder"
    assert change.where == ("layers.0.ffn.inner.weight", "layers.1.ffn.inner.weight")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ((Shift(tensor="iner.weight", by=1.0),), "names a tensor iner.weight, which is not declared"),
        ((Swap(first="inner.weight", second="gone"),), "names a tensor gone, which is not declared"),
        (
            (Order(tensor="inner.weight", dim=-1, indices=(0, 0)),),
            "the indices for inner.weight are no order",
        ),
        ((Order(tensor="inner.weight", dim=-1, indices=(2, 1, 0)),), "blocks of 3 do not divide the 32"),
        ((Order(tensor="inner.weight", dim=0, indices=(1, 0)),), "dim = 0 of inner.weight, whose shape is"),
    ],
)
def test_a_wrong_convention_is_its_own_plugins_mistake(
    with_parts: Any, monkeypatch: pytest.MonkeyPatch, changes: Any, told: str
) -> None:
    stated = Convention(name="odd", usual="a", other="b", changes=changes)
    monkeypatch.setattr(Squared, "conventions", lambda self, site: (stated,))
    spec = with_parts(ffn={"kind": "squared"})
    trusted, wrong = cf.build(spec, seed=0), cf.build(spec, seed=1)
    with pytest.raises(
        PluginError, match=f"plugin third .*ffn squared at layers.0.ffn: conventions: odd: {told}"
    ):
        verify(wrong, trusted, bisect=True)


def test_every_change_says_how_many_places_it_has(lab: Any) -> None:
    found = lab.verdict("llama", {"ffn.activation": "relu"}).explanation
    (step,) = found.steps
    (change,) = step.changes
    assert change.where == ("layers.0.ffn", "layers.1.ffn")
    assert found.lines[0].endswith("(layers.0.ffn and 1 more)")
    assert attrs.asdict(step.first)["where"] == "layers.0.ffn"
