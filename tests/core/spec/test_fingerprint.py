"""The fingerprint stands for the function that a model computes, and for nothing else that a spec says."""

import json
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.config import FieldFacts, facts_of
from composeformer.contracts import LayerParts, Part
from composeformer.errors import SpecError
from composeformer.spec import Spec, shipped
from composeformer.spec.fingerprint import fingerprint, meaning
from composeformer.testing.specs import specs

# A change here says that folders written before are of another architecture: mean it, and say why.
GOLDEN = {
    "deepseek-v2": "cb86e36508f54f25c262d6f9d62b4be37839bd66791ebc3374b5c54d57f31f24",
    "deepseek-v2-lite": "3675a860671d0283852eea6a049d63cc35ff8c3efac7c92c9b94cdb57b85b5fe",
    "deepseek-v3": "3f01a3b80e7b31f3821e450a44d253c8628c6a896011c4907659f301ddf7af7e",
    "llama-2-7b": "3710ebddad0dbca9ca1ab8eb365d36969259dcc09f6a77aee369f02fdc0b9497",
    "llama-3.1-405b": "b4530f748c151a2d7436f4b5a88099f08908fab0e25feb1284d727919ccfbdfb",
    "llama-3.1-8b": "0837945faa4681a341f7d87dec2460d5401575492325ef96f7e0176733ac5f81",
    "mixtral-8x7b": "df74164574c9fd85facdf7404823d2223400c0cd735e572c20b46963fd192570",
    "qwen2.5-72b": "771b64309417e9dcc803a98a2e733eda64280c991343c5dc35eb955d1b4ebbb5",
    "qwen3-30b-a3b": "c733e1735211cf36b0c1b1c3e702674d33708befd007e38c4110910908aba12c",
    "smollm2-135m": "9fd81204f390fb6a49f0e79b9064e03121371e59b4b1858aeb66d3e611f674fc",
    "tiny-deepseek-v3": "21282bc021ba2343871f8bdac5fdea9c5a7084a295353fc84168fc7b941d246a",
    "tiny-llama": "7d4e5f693611ef19c8cb127dd6a090933e9525bcf04fd674b3632396bedc6863",
    "tiny-moe": "90ee2d035e71f90662e3ef2f5d9f69c7a48120833308f264a1d97dcfefa40eb9",
}


def test_fingerprints_of_shipped_specs_never_change() -> None:
    assert {name: Spec.load(name).fingerprint for name in shipped()} == GOLDEN


@settings(deadline=None, max_examples=50)
@given(specs(), st.randoms())
def test_order_and_formatting_do_not_count(data: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(below) for below in value] if isinstance(value, list) else value

    one = Spec.from_dict(data)
    other = Spec.from_dict(shuffled(data))
    assert one == other
    assert hash(one) == hash(other)
    assert one.fingerprint == other.fingerprint
    assert Spec.from_toml("# a comment\n\n" + one.to_toml()).fingerprint == one.fingerprint


@settings(deadline=None, max_examples=50)
@given(specs())
def test_names_of_components_do_not_count(data: dict[str, Any]) -> None:
    slots = [slot for slot in ("norm", "position", "router", "mixer", "ffn") if slot in data]
    names = {slot: {n: f"{n}-renamed" for n in data[slot]} for slot in slots if "kind" not in data[slot]}

    def reference(slot: str, found: Any) -> Any:
        if isinstance(found, str):
            return names.get(slot, {}).get(found, found)
        if isinstance(found, dict):
            renamed = {key: reference(_slot(key, key), value) for key, value in found.items()}
            return renamed | ({"use": reference(slot, found["use"])} if "use" in found else {})
        return found

    def entries(layers: list[Any]) -> list[Any]:
        return [
            {
                key: entries(value) if key == "layers" else reference(key, value)
                for key, value in entry.items()
            }
            for entry in layers
        ]

    renamed = dict(data, name="renamed", layers=entries(data["layers"]))
    for slot in (*slots, "residual", "predictor"):
        if slot in names:
            renamed[slot] = {names[slot][n]: reference(slot, table) for n, table in data[slot].items()}
        elif slot in data:
            renamed[slot] = reference(slot, data[slot])
    assert Spec.from_dict(renamed).fingerprint == Spec.from_dict(data).fingerprint


def _slot(key: str, otherwise: str) -> str:
    return {"qk_norm": "norm"}.get(key, otherwise)


@settings(deadline=None, max_examples=30)
@given(specs(run=False))
def test_what_describes_a_run_does_not_count(data: dict[str, Any]) -> None:
    found = Spec.from_dict(data)
    run = found.with_(
        precision={"kind": "bf16", "weights": "bfloat16"},
        train={"steps": 3, "learning_rate": 0.5},
        model={"init_std": 0.5},
        description="other",
        source="other",
    )
    assert run.fingerprint == found.fingerprint


def test_the_choice_of_an_implementation_does_not_count() -> None:
    found = Spec.load("tiny-llama")
    chosen = found.with_(mixer={"attention": {"implementation": {"decode": "reference"}}})
    assert chosen.fingerprint == found.fingerprint
    assert chosen != found


@settings(deadline=None, max_examples=50)
@given(specs())
def test_stating_a_default_does_not_count(data: dict[str, Any]) -> None:
    """Every default written out, and every part written inline, is the same model."""
    found = Spec.from_dict(data)

    def table(config: Any) -> dict[str, Any]:
        fields = {name: getattr(config, name) for name in facts_of(type(config))}
        return {n: plain(v) for n, v in fields.items() if v is not None}

    def plain(value: Any) -> Any:
        if isinstance(value, LayerParts):
            return {"mixer": False, "ffn": False} | {slot: part(held) for slot, held in value.items()}
        return part(value) if isinstance(value, Part) else value

    def part(found: Part) -> dict[str, Any]:
        return {"kind": found.kind, **table(found.config)}

    plan = found.plan
    full: dict[str, Any] = {"model": table(found.model)}
    full |= {slot: part(found.single(slot)) for slot in ("embedding", "head", "residual")}
    full |= {} if plan.predictor is None else {"predictor": part(plan.predictor.part)}
    full["layers"] = [
        {slot: part(layer[slot].part) if slot in layer else False for slot in ("mixer", "ffn")}
        for layer in plan.layers
    ]
    assert Spec.from_dict(full).fingerprint == found.fingerprint


def test_defaults_that_depend_on_the_site_do_not_count_when_stated() -> None:
    found = Spec.load("tiny-llama")
    table = {"kind": "gqa", "num_heads": 4, "position": "rope"}
    base = found.with_({"mixer.attention": table | {"num_kv_heads": 4, "head_dim": 16}})
    bare = found.to_dict()
    bare["mixer"]["attention"] = table
    assert Spec.from_dict(bare).fingerprint == base.fingerprint != found.fingerprint


def test_a_pattern_is_the_layers_it_spells_out() -> None:
    found = Spec.load("tiny-llama")
    local = {"mixer": {"use": "attention", "window": 8}, "ffn": "dense"}
    pattern = found.with_(layers=[{"repeat": 2, "layers": [{}, local]}])
    assert pattern.fingerprint == found.with_(layers=[{}, local, {}, local]).fingerprint
    assert pattern.fingerprint != found.with_(layers=[{}, {}, local, local]).fingerprint


def test_a_predictors_layer_is_the_last_one_unless_it_says_otherwise() -> None:
    found = Spec.load("tiny-deepseek-v3")
    for same in ({"mixer": "mla", "ffn": "experts"}, {"ffn": "experts"}, {"ffn": {"use": "experts"}}):
        assert found.with_(predictor={"layer": same}).fingerprint == found.fingerprint
    for otherwise in (
        {"ffn": "dense"},
        {"ffn": False},
        {"mixer": {"use": "mla", "window": 8}, "ffn": "experts"},
    ):
        changed = found.with_(predictor={"layer": otherwise})
        assert changed.fingerprint != found.fingerprint
    # What the last layer is said to be by default counts as its own.
    longer = [*found.to_dict()["layers"], {"ffn": "dense"}]
    dense = found.with_(layers=longer)
    assert dense.fingerprint == dense.with_(predictor={"layer": {"ffn": "dense"}}).fingerprint
    assert dense.fingerprint != dense.with_(predictor={"layer": {"ffn": "experts"}}).fingerprint


def test_how_a_predictor_and_a_router_are_trained_does_not_count() -> None:
    found = Spec.load("tiny-deepseek-v3")
    router = {"bias_update_speed": 0.5, "sequence_balance_alpha": 0.5}
    changed = found.with_(predictor={"loss_weight": 0.7}, ffn={"experts": {"router": router}})
    assert changed.fingerprint == found.fingerprint
    assert found.with_(predictor={"depth": 2}).fingerprint != found.fingerprint
    assert found.with_({"ffn.experts.router.top_k": 3}).fingerprint != found.fingerprint


def other(fact: FieldFacts, value: Any) -> st.SearchStrategy[Any]:
    """Other values of a field, by what it says of itself."""
    if fact.choices is not None:
        return st.sampled_from([choice for choice in fact.choices if choice != value])
    if fact.kind == "boolean":
        return st.just(not value)
    if fact.kind == "integer":
        first = int(fact.minimum or 0)
        return st.integers(first, first + 64).filter(lambda n: n != value)
    low = fact.minimum if fact.minimum is not None else fact.above if fact.above is not None else -1.0
    high = fact.maximum if fact.maximum is not None else low + 64.0
    return st.floats(low, high, exclude_min=fact.above is not None).filter(lambda x: x != value)


@settings(deadline=None, max_examples=200)
@given(specs(run=False), st.data())
def test_every_field_that_affects_the_function_counts_and_no_other(
    data: dict[str, Any], draw: st.DataObject
) -> None:
    found = Spec.from_dict(data)
    tables: list[tuple[str, Any]] = [("model", found.model)]
    for slot in ("mixer", "ffn"):
        used = [layer[slot] for layer in found.plan.layers if slot in layer]
        if used and len(found.named[slot]) == 1:
            name = next(iter(found.named[slot]))
            path = slot if name == slot else f'{slot}."{name}"'
            tables.append((path, used[0].part.config))
    path, config = draw.draw(st.sampled_from(tables))
    plain = [fact for fact in facts_of(type(config)).values() if fact.slot is None]
    fact = draw.draw(st.sampled_from(plain))
    value = draw.draw(other(fact, getattr(config, fact.name)))
    try:
        changed = found.with_({f"{path}.{fact.name}": value})
    except SpecError:
        return
    same = _effective(found) == _effective(changed)
    assert (changed.fingerprint == found.fingerprint) == (fact.affects != "function" or same)


def _effective(spec: Spec) -> Any:
    """The parts as they are built: a refinement may override what was changed, a default mean the same."""
    model = {name: value for name, value in vars(spec.model).items() if name != "init_std"}
    parts = [
        (node.path, node.part.kind, {name: getattr(node.part.config, name) for name in _plain(node.part.config)})
        for node in spec.plan.nodes()
    ]
    return model, parts


def _plain(config: Any) -> list[str]:
    return [fact.name for fact in facts_of(type(config)).values() if fact.slot is None]


@pytest.mark.parametrize("kind", ["linear", "yarn", "none"])
def test_a_kind_counts(kind: str) -> None:
    found = Spec.load("tiny-llama")
    table = {"kind": kind, "factor": 2.0, "original_max_position_embeddings": 64}
    fields = {"linear": ("kind", "factor"), "yarn": tuple(table), "none": ("kind",)}[kind]
    changed = found.with_(position={"rope": {key: table[key] for key in fields}})
    assert changed.fingerprint != found.fingerprint


def test_a_revision_counts() -> None:
    found = Spec.load("tiny-llama")
    before = fingerprint(found)
    for node in found.plan.nodes():
        if node.slot == "ffn":
            object.__setattr__(node.part, "component", attrs.evolve(node.part.component, revision=2))
    assert fingerprint(found) != before


def test_what_is_hashed_is_plain_data() -> None:
    plain = meaning(Spec.load("tiny-llama"))
    assert json.loads(json.dumps(plain)) == plain
    assert "attention" not in json.dumps(plain)
