"""Rules give roles the formats of other precision components: the first match decides, and parts never notice."""

from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer.assemble import build
from composeformer.cli.show_command import precision
from composeformer.errors import SpecError
from composeformer.precision import matches
from composeformer.spec import Spec
from composeformer.store import load, save
from composeformer.train import TokenBatch, train_step, trainer

TINY = Spec.load("tiny-deepseek-v3")
ROLES = tuple(TINY.formats.tensors)
PATTERNS = ("layers.*.mixer", "*.router", "head", "layers.0", "*.kv_b", "embedding", "*", "layers.*.ffn.down", "*norm*")
FORMATS: tuple[Any, ...] = ("full", "bf16", {"kind": "full", "dtype": "bfloat16"})


def with_rules(*rules: tuple[str, Any], kind: str = "bf16") -> Spec:
    tables = [{"roles": roles, "format": form} for roles, form in rules]
    return TINY.with_(precision={"kind": kind, "rules": tables})


def test_a_star_is_any_text_and_a_part_is_all_that_is_in_it() -> None:
    assert matches("layers.*.mixer.*", "layers.3.mixer.q_a")
    assert matches("*.router", "layers.3.ffn.router.gate")
    assert matches("*.router", "predictor.depths.0.ffn.router.bias")
    assert matches("layers.1", "layers.1.mixer.o")
    assert not matches("layers.1", "layers.10.mixer.o")
    assert not matches("router", "layers.3.ffn.router.gate")
    assert not matches("layers.*.mixer.q", "layers.3.mixer.q_a")
    assert matches("a.b+", "a.b+")
    assert not matches("a.b", "aXb")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(PATTERNS), st.sampled_from(FORMATS)), max_size=4))
def test_the_first_rule_that_matches_decides(rules: list[tuple[str, Any]]) -> None:
    spec = with_rules(*rules)
    base = TINY.with_(precision={"kind": "bf16"}).formats.tensors
    for name, found in spec.formats.tensors.items():
        linear = spec.plan.linears.get(name.rpartition(".")[0])
        role = name if linear is None else name.rpartition(".")[0]
        first = next((form for roles, form in rules if matches(roles, role)), None)
        if first is None:
            assert found == base[name]
            continue
        fixed = spec.plan.tensors[name].dtype
        dtype = first["dtype"] if isinstance(first, dict) else "float32"
        assert found.storage == (fixed or dtype)
        multiplied = "bfloat16" if first == "bf16" and linear is not None else dtype
        assert found.compute == (fixed or multiplied)
        assert found.why.startswith("rule ")


def test_a_sensitive_map_is_as_the_rule_says() -> None:
    assert with_rules().formats.tensors["head.projection.weight"].compute == "float32"
    assert with_rules(("head", "bf16")).formats.tensors["head.projection.weight"].compute == "bfloat16"


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (
            '{ roles = "layers.*.mixr", format = "full" }',
            "precision.rules.0.roles = \"layers.*.mixr\": matches no linear map and no weight of this model",
        ),
        ('{ roles = "*", format = "bf17" }', "precision.rules.0.format = \"bf17\": must be a kind of precision"),
        ('{ roles = "*" }', "precision.rules.0.format: must be a kind of precision"),
        ('{ format = "full" }', "precision.rules.0.roles: is required"),
        ('{ roles = 3, format = "full" }', "precision.rules.0.roles = 3: must be a string"),
        ('{ roles = "*", format = "full", when = 1 }', "precision.rules.0.when = 1: unknown key"),
        ('"bf16"', 'precision.rules.0 = "bf16": must be a list of tables'),
        (
            '{ roles = "*", format = { kind = "full", rules = [{ roles = "*", format = "bf16" }] } }',
            "precision.rules.0.format.rules: a rule's format has no rules of its own",
        ),
        ('{ roles = "*", format = { kind = "full", dtyp = "float32" } }', "precision.rules.0.format.dtyp"),
    ],
)
def test_a_wrong_rule_is_one_line_with_its_place(tmp_path: Path, rule: str, told: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'extends = "tiny-deepseek-v3"\n[precision]\nkind = "bf16"\nrules = [\n  {rule},\n]\n')
    with pytest.raises(SpecError) as raised:
        Spec.load(path)
    lines = str(raised.value).splitlines()
    line = 5 if rule.startswith("{") else 4  # plain values of a list have its place
    assert lines[0].startswith(f"{path}:{line}: {told}"), lines
    assert len(lines) == 1


def test_the_nearest_role_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"did you mean 'layers\.\*\.mixer\.kv_b'"):
        with_rules(("layers.*.mixer.kv_bb", "full"))


def test_rules_are_no_part_of_the_architecture_and_survive_a_round_trip() -> None:
    spec = with_rules(("*.router", "full"), ("head", {"kind": "full", "dtype": "bfloat16"}))
    assert spec.fingerprint == TINY.fingerprint
    again = Spec.from_toml(spec.to_toml())
    assert again == spec
    assert again.formats.tensors == spec.formats.tensors
    assert tomli.loads(spec.to_toml())["precision"]["rules"][1]["format"]["dtype"] == "bfloat16"


def test_one_setting_replaces_the_rules() -> None:
    spec = with_rules(("*.router", "full")).overridden(['precision.rules=[{roles = "head", format = "bf16"}]'])
    assert [rule.roles for rule in spec.formats.rules] == ["head"]
    assert spec.overridden(['precision.rules.0.roles="*.kv_b"']).formats.rules[0].roles == "*.kv_b"


@pytest.mark.parametrize(
    "rules",
    [
        [("layers.*.mixer", "full")],
        [("layers.0.mixer.q_b", "full"), ("layers.1.ffn.up", "full"), ("layers.1.ffn.shared_down", "full")],
        [("head", "bf16"), ("*.router", {"kind": "full", "dtype": "bfloat16"}), ("predictor", "full")],
        [("embedding", {"kind": "full", "dtype": "bfloat16"}), ("*", "full")],
    ],
)
@pytest.mark.parametrize("kind", ["bf16", "full"])
def test_parts_compute_on_whatever_a_rule_names(kind: str, rules: list[tuple[str, Any]]) -> None:
    spec = with_rules(*rules, kind=kind)
    model = build(spec, seed=0)
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, given, output: streams.append(output.hidden.dtype))
    objective, optimizer = trainer(model)
    before = float(train_step(model, [TokenBatch(ids)], objective, optimizer, step=0).loss)
    after = float(train_step(model, [TokenBatch(ids)], objective, optimizer, step=1).loss)
    assert after < before
    assert set(streams) == {model.activations}
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        whole = model(ids, phase="prefill").logits[:, -1]
        model(ids[:, :-1], cache=cache)
        stepped = model(ids[:, -1:], cache=cache).logits[:, -1]
    # bf16 keeps 8 bits, and absorbed decoding rounds in other places: a few units of 2^-8 of the largest logit.
    assert float((whole - stepped).abs().max()) <= 8 * 2**-8 * float(whole.abs().max())


def test_a_folder_keeps_its_rules(tmp_path: Path) -> None:
    model = build(with_rules(("*.router", {"kind": "full", "dtype": "bfloat16"}), ("head", "bf16")), seed=0)
    save(model, tmp_path / "kept")
    again = load(tmp_path / "kept")
    assert again.spec.formats.tensors == model.spec.formats.tensors
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["full", "bf16"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_folder_that_opens_decoded_has_no_rules_left(tmp_path: Path, kind: str, weights: str) -> None:
    """Not even where its policy is the very one that it opens in, whose fields a change would keep."""
    model = build(with_rules(("layers.*.mixer.o", "int8"), kind=kind), seed=0)
    save(model, tmp_path / "kept")
    again = load(tmp_path / "kept", weights=weights)
    assert not again.spec.formats.rules
    assert not again.spec.formats.coded
    fixed = {name for name, weight in again.spec.plan.tensors.items() if weight.dtype is not None}
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == (torch.float32 if name in fixed else getattr(torch, weights)), name
    exact = model.layers[1].mixer.o.matrix()  # type: ignore[union-attr, index]
    assert torch.equal(again.get_parameter("layers.1.mixer.o.weight"), exact.to(getattr(torch, weights)))


def tied(rules: list[tuple[str, Any]], kind: str = "bf16") -> Spec:
    tables = [{"roles": roles, "format": form} for roles, form in rules]
    return Spec.load("tiny-llama").with_({"model.tie_embeddings": True}, precision={"kind": kind, "rules": tables})


@pytest.mark.parametrize("form", [{"kind": "fp8-block", "weights": "float8_e4m3fn"}, "int8"])
def test_codes_for_a_head_that_is_the_embedding_are_refused_where_a_rule_means_that_alone(form: Any) -> None:
    with pytest.raises(SpecError) as told:
        tied([("head", form)])
    (line,) = told.value.lines
    assert "rules.0.format" in line
    assert "stores codes, but head.projection.weight is the tensor embedding.weight" in line
    coded = tied([("*", form)]).formats.coded
    assert coded
    assert not {"embedding.weight", "head.projection.weight"} & set(coded)


def test_what_is_told_of_a_tied_head_is_how_it_multiplies() -> None:
    spec = tied([("head", "fp8-block")])
    shared = spec.formats.shared["head.projection.weight"]
    assert (shared.compute, shared.storage, shared.moment) == ("float8_e4m3fn", "float32", "float32")
    assert shared.why.startswith("rule 1, 'head'")
    assert shared.why.endswith("the tensor is embedding.weight")
    assert spec.formats.tensors["embedding.weight"].compute == "float32"
    assert TINY.formats.shared == {}


def test_what_is_shown_of_one_tensor_has_its_number_and_of_several_a_star() -> None:
    spec = with_rules(("layers.1.mixer.q_a", "full"))
    rows = {(roles, form.why): count for (roles, form), count in precision(spec).items()}
    assert sum(rows.values()) == len(spec.formats.tensors)
    told = {why: count for (roles, why), count in rows.items() if roles == "layers.1.mixer.q_a.weight"}
    assert list(told.values()) == [1]
    assert next(iter(told)).startswith("rule 1, 'layers.1.mixer.q_a'")
    assert [count for (roles, _), count in rows.items() if roles == "layers.*.mixer.q_a.weight"] == [2]
    for (roles, _), count in rows.items():
        assert ("*" in roles) == (count > 1), roles


@pytest.mark.parametrize("kind", ["full", "bf16"])
def test_a_dtype_is_that_of_every_tensor_that_fixes_none(kind: str, tmp_path: Path) -> None:
    ruled = with_rules(("layers.0", "int8"), ("head", {"kind": "full", "dtype": "bfloat16"}), kind=kind)
    save(build(ruled, seed=0), tmp_path / "kept")
    for model in (build(ruled, dtype="float64", seed=0), load(tmp_path / "kept", dtype="float64")):
        assert not model.spec.formats.rules
        for name, weight in model.spec.plan.tensors.items():
            dtype = torch.float64 if weight.dtype is None else getattr(torch, weight.dtype)
            assert model.state_dict()[name].dtype == dtype, name
