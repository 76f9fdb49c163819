"""Codes and scales through what is done to whole models: casts, copies, training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import composeformer as cf
from composeformer.decoder import Model
from composeformer.errors import DialectError, InputError, SpecError
from composeformer.train import trainer

STORED: dict[str, dict[str, Any]] = {
    "block": {"kind": "fp8-block", "weights": "float8_e4m3fn"},
    "tensor": {"kind": "fp8-tensor", "weights": "float8_e4m3fn", "implementation": "reference"},
    "int8": {"kind": "int8"},
}
IDS = torch.arange(48).view(2, 24) * 5 % 256


def made(precision: dict[str, Any], seed: int = 0) -> Model:
    model: Model = cf.build(cf.Spec.load("tiny-moe").with_(precision=precision), seed=seed)
    return model.eval()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.uint8)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
@pytest.mark.parametrize("name", STORED)
def test_casts_of_a_model_leave_codes_and_scales(name: str, cast: str) -> None:
    model = made(STORED[name])
    held = {each for parts in model.spec.formats.coded.values() for each in parts}
    before = {each: tensor.clone() for each, tensor in model.state_dict().items() if each in held}
    assert before
    getattr(model, cast)()
    after = model.state_dict()
    for each, tensor in before.items():
        assert after[each].dtype == tensor.dtype
        assert torch.equal(bits(after[each]), bits(tensor))
    # What is high was stored in bfloat16, which each of these holds; fp16 alone has too few exponents.
    assert after["embedding.weight"].dtype == {"half": torch.float16}.get(cast, getattr(torch, cast))
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", STORED)
def test_copies_and_states_hold_the_very_codes(name: str) -> None:
    model, other = made(STORED[name]), made(STORED[name], seed=1)
    with torch.no_grad():
        expected = model(IDS).logits
        assert not torch.equal(other(IDS).logits, expected)
        assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IDS).logits, expected)
    moved = copy.deepcopy(model).to("meta")
    assert {k: v.dtype for k, v in moved.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", STORED)
def test_trainer_refuses_codes_in_one_line_before_any_work(name: str) -> None:
    model = cf.build(cf.Spec.load("tiny-moe").with_(precision=STORED[name]), device="meta")
    with pytest.raises(SpecError) as told:
        trainer(model)
    (line,) = told.value.lines
    assert f'precision.kind = "{STORED[name]["kind"]}": layers.0.mixer.q.weight and' in line
    assert "more weights are stored as codes, which do not train; train under" in line


def test_trainer_names_the_rule_that_stores_codes() -> None:
    rules = [
        {"roles": "layers.0", "format": {"kind": "bf16"}},
        {"roles": "layers.1.mixer.o", "format": {"kind": "int8"}},
    ]
    model = cf.build(cf.Spec.load("tiny-moe").with_(precision={"kind": "full", "rules": rules}), device="meta")
    with pytest.raises(SpecError) as told:
        trainer(model)
    (line,) = told.value.lines
    assert 'precision.rules.1.format.kind = "int8": layers.1.mixer.o.weight is stored as codes' in line


def test_codes_of_several_forms_are_saved_and_opened_as_they_are(tmp_path: Path) -> None:
    """No dialect says both forms; a folder of ours does."""
    rules = [{"roles": "*.down", "format": {"kind": "int8"}}]
    model = made({**STORED["block"], "rules": rules})
    assert {form.codec for form in model.spec.formats.tensors.values()} == {None, "f8-128x128", "int8-row"}
    assert cf.save(model, tmp_path / "model") == "native"
    again = cf.load(tmp_path / "model").eval()
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(bits(tensor), bits(state[name])), name
    decoded = cf.load(tmp_path / "model", weights="float32")
    down = model.layers[1].ffn.down  # type: ignore[union-attr, index]
    assert torch.equal(decoded.get_parameter("layers.1.ffn.down.weight"), down.matrix())  # type: ignore[union-attr, operator]
    with pytest.raises(DialectError, match="by the codec int8-row, for which no dialect has names"):
        cf.export_model(tmp_path / "model", tmp_path / "exported")


def test_weight_that_can_not_be_coded_is_named(tmp_path: Path) -> None:
    model = made({"kind": "full"})
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.o.weight")[0, 0] = torch.nan
    cf.save(model, tmp_path / "model")
    with pytest.raises(InputError) as told:
        cf.load(tmp_path / "model", overrides=["precision.kind=int8"])
    (line,) = told.value.lines
    assert line == "layers.1.mixer.o.weight: int8-row: a weight holds NaN or infinity, which integers can not"
