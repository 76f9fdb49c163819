"""Codes and scales are kept: import, export, save and import again change no bit, and no word of the config."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import composeformer as cf
from composeformer.errors import FolderError
from composeformer.folder import WeightReader
from composeformer.store import describe
from composeformer.store.lock import NATIVE

from .conftest import CONFIG, E4M3, EVEN, PLAIN, TABLE, Change, bits, dequantised, read, same, tensors, write

IDS = torch.arange(24).reshape(2, 12) * 7 % 96
COPIES = {
    "model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.2.shared_head.head.weight": "lm_head.weight",
}
Make = Callable[[Change], Path]
Compose = Callable[..., str]


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_import_and_export_give_the_released_tensors_back(released: Path, tmp_path: Path) -> None:
    spec = cf.import_model(released, tmp_path / "ours", weights="keep")
    assert spec.to_dict()["precision"] == {"kind": "fp8-block", "weights": "float8_e4m3fn"}
    assert cf.export_model(tmp_path / "ours", tmp_path / "theirs") == "deepseek_v3"
    for folder in ("ours", "theirs"):
        assert same(read(tmp_path / folder), read(released))
        assert config(tmp_path / folder)["quantization_config"] == TABLE
    cf.import_model(tmp_path / "theirs", tmp_path / "again", weights="keep")
    assert {**files(tmp_path / "again"), "spec.toml": b"", "manifest.json": b""} == {
        **files(tmp_path / "ours"),
        "spec.toml": b"",  # the spec's name is the folder's
        "manifest.json": b"",
    }


def test_a_loaded_model_is_saved_bit_by_bit(released: Path, tmp_path: Path) -> None:
    cf.import_model(released, tmp_path / "ours", weights="keep")
    for folder in (released, tmp_path / "ours"):
        model = cf.load(folder, weights="keep")
        assert cf.save(model, tmp_path / "saved", replace=True) == "deepseek_v3"
        assert same(read(tmp_path / "saved"), read(released))
        assert config(tmp_path / "saved")["quantization_config"] == TABLE
        assert config(tmp_path / "saved")["dtype"] == "bfloat16"


def test_transformers_open_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    source = write(tmp_path / "even", tensors(EVEN), {**EVEN, "quantization_config": TABLE})
    cf.import_model(source, tmp_path / "ours", weights="keep")
    cf.export_model(tmp_path / "ours", tmp_path / "theirs")
    # Without a GPU they decode to bfloat16, and say so.
    state = cf.load(source).state_dict()
    for folder in ("ours", "theirs"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.bfloat16, **PLAIN)
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, state["layers.0.ffn.up.weight"])
        assert torch.equal(model.model.layers[1].mlp.experts.down_proj, state["layers.1.ffn.down.weight"])


def test_the_words_of_the_config_are_kept_even_where_others_would_mean_the_same(
    changed: Make, tmp_path: Path
) -> None:
    worded = {**TABLE, "scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}
    folder = changed(lambda found, config: config.update(quantization_config=worded))
    spec = cf.import_model(folder, tmp_path / "ours", weights="keep")
    assert spec.to_dict()["precision"]["scales"] == "ue8m0"
    cf.export_model(tmp_path / "ours", tmp_path / "theirs")
    assert config(tmp_path / "theirs")["quantization_config"] == worded
    cf.save(cf.load(tmp_path / "ours"), tmp_path / "saved")
    assert config(tmp_path / "saved")["quantization_config"] == {**TABLE, "scale_fmt": "ue8m0"}


def test_kept_weights_compute_what_their_decoded_values_do_within_the_policys_bound(released: Path) -> None:
    kept, plain = cf.load(released, weights="keep"), cf.load(released, dtype="float32")
    role = "layers.0.mixer.kv_a"
    linear: Any = kept.get_submodule(role)
    assert torch.equal(linear.matrix().float(), plain.state_dict()[f"{role}.weight"])
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = linear(x).double()
    exact = x.double() @ plain.state_dict()[f"{role}.weight"].double().T
    policy = kept.spec.formats.policy.config
    # Only x is rounded here: the weight's codes are exact.
    largest = policy.recipe.floor(policy.recipe.activations) * x.double().abs().max()
    magnitude = (x.double().abs() + largest) @ linear.matrix().double().abs().T
    bound = policy.error_bound(160) * magnitude + exact.abs() * 2.0**-8
    assert bool(((a - exact).abs() <= bound).all())
    assert not any("weight" in name and p.dtype == E4M3 for name, p in kept.named_parameters())
    with torch.no_grad():
        assert kept(IDS, predict=True).logits.isfinite().all()


def test_verify_finds_a_kept_and_a_decoded_folder_equal_to_their_source(
    released: Path, tmp_path: Path, compose: Compose
) -> None:
    for weights in ("keep", "bfloat16", "float32"):
        compose("import", released, "-o", tmp_path / weights, "--weights", weights)
        found = compose("verify", tmp_path / weights, "--against", released, "--tokens", 8, "--json")
        assert json.loads(found)["equal"]
        assert json.loads(found)["logits"] == 0.0


def test_the_lock_names_the_codec_and_what_rules_bring(released: Path, tmp_path: Path) -> None:
    rule = {"roles": "layers.0.mixer.o", "format": {"kind": "full", "dtype": "bfloat16"}}
    spec = cf.load(released, weights="keep").spec.with_({"precision.rules": [rule]})
    cf.save(cf.build(spec), tmp_path / "ours")
    path = tmp_path / "ours" / "compose.lock"
    lock = tomli.loads(path.read_text())
    kinds = {(each["slot"], each["kind"]) for each in lock["components"]}
    assert {("codec", "f8-128x128"), ("precision", "fp8-block"), ("precision", "full")} <= kinds
    next(each for each in lock["components"] if each["slot"] == "codec")["revision"] += 1
    path.write_text(tomli_w.dumps(lock))
    with pytest.raises(FolderError, match="codec f8-128x128 had revision 2"):
        cf.load(tmp_path / "ours")


def test_verify_names_a_code_that_differs_by_a_bit(released: Path, tmp_path: Path) -> None:
    a, b = (cf.load(released, weights="keep") for _ in range(2))
    code = a.state_dict()["layers.1.ffn.up.weight"].view(torch.uint8)
    code[5, 3, 7] ^= 1
    verdict = cf.verify(a, b, tokens=8)
    assert [found.where for found in verdict.tensors] == ["layers.1.ffn.up.weight"]


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
def test_verify_compares_codes_with_decoded_weights_as_numbers(released: Path, weights: str) -> None:
    kept, plain = (cf.load(released, weights=each) for each in ("keep", weights))
    # The weights are the same numbers, which the two precisions multiply differently.
    for verdict in (cf.verify(kept, plain, tokens=8), cf.verify(plain, kept, tokens=8)):
        assert verdict.tensors == ()
        assert verdict.first is not None
    kept.state_dict()["layers.1.ffn.up.weight"].view(torch.uint8)[5, 3, 7] ^= 0x80
    for verdict in (cf.verify(kept, plain, tokens=8), cf.verify(plain, kept, tokens=8)):
        assert [found.where for found in verdict.tensors] == ["layers.1.ffn.up.weight"]


def test_verify_compares_codes_of_two_forms_as_numbers(released: Path) -> None:
    blocks = cf.load(released, weights="keep")
    rows = cf.load(released, weights="keep", overrides=["precision.rules=[]", "precision.kind=int8"])
    found = {each.where: each.relative for each in cf.verify(rows, blocks, tokens=8).tensors}
    name = "layers.1.ffn.up.weight"
    # Parts of a row's largest number: half a step of its integers, and what its scale loses in bfloat16.
    assert found[name] is not None
    assert 0 < found[name] <= (0.5 + 127 * 2**-9) / 127
    assert not any(each.endswith(("_scale", "_scale_inv")) for each in found)


def test_show_tells_what_is_kept_as_codes(released: Path, tmp_path: Path, compose: Compose) -> None:
    cf.import_model(released, tmp_path / "ours", weights="keep")
    assert "float8_e4m3fn" in compose("show", tmp_path / "ours")


def test_a_kept_folder_can_still_be_decoded_when_it_is_loaded(released: Path, tmp_path: Path) -> None:
    cf.import_model(released, tmp_path / "ours", weights="keep")
    for weights in ("bfloat16", "float32"):
        a = cf.load(tmp_path / "ours", weights=weights).state_dict()
        b = cf.load(released, weights=weights).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def test_a_folder_under_our_own_names_keeps_codes_too(released: Path, tmp_path: Path) -> None:
    spec = cf.load(released, weights="keep").spec.with_({"norm.eps": 1e-5})
    model = cf.build(spec, seed=2)
    assert cf.save(model, tmp_path / "ours") == NATIVE
    again = cf.load(tmp_path / "ours")
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    plain = cf.load(tmp_path / "ours", weights="float32").state_dict()
    name = "layers.1.ffn.down.weight"
    codes, scales = (model.state_dict()[n] for n in (name, f"{name}_scale_inv"))
    for expert in range(len(codes)):
        assert torch.equal(plain[name][expert], dequantised(codes[expert], scales[expert], torch.float32))


def test_a_folder_runs_under_another_precision_encoded_anew_where_that_has_codes(
    released: Path, tmp_path: Path
) -> None:
    name = "layers.1.ffn.down.weight"
    for weights in ("keep", "bfloat16"):
        cf.import_model(released, tmp_path / weights, weights=weights)
    wide = cf.load(released, weights="float32").state_dict()[name]
    kept = cf.load(released, weights="keep").state_dict()
    for folder, source in (("keep", wide), ("bfloat16", wide.bfloat16())):
        plain = cf.load(tmp_path / folder, overrides=['precision={kind="bf16", weights="bfloat16"}'])
        assert torch.equal(plain.state_dict()[name], wide.bfloat16())
        rows = cf.load(tmp_path / folder, overrides=['precision={kind="int8"}']).state_dict()
        assert torch.equal(rows[f"{name}_scale"], (source.float().abs().amax(-1, keepdim=True) / 127).bfloat16())
        asked = 'precision={kind="fp8-block", weights="float8_e4m3fn", gradients="e5m2"}'
        scales = cf.load(tmp_path / folder, overrides=[asked]).state_dict()[f"{name}_scale_inv"]
        # Codes of the same codec are not encoded again.
        assert torch.equal(scales, kept[f"{name}_scale_inv"]) is (folder == "keep")


# Mixed folders.


def plainly(found: dict[str, Tensor], names: list[str], dtype: torch.dtype = torch.bfloat16) -> None:
    for name in names:
        found[name] = dequantised(found[name], found.pop(f"{name}_scale_inv"), dtype)


def test_modules_that_are_not_converted_stay_as_they_are(changed: Make, tmp_path: Path) -> None:
    modules = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.shared_experts"]
    names = [f"{modules[0]}.weight", *(f"{modules[1]}.{p}_proj.weight" for p in ("gate", "up", "down"))]

    def change(found: dict[str, Tensor], config: dict[str, Any]) -> None:
        plainly(found, names)
        config["quantization_config"] = {**TABLE, "modules_to_not_convert": modules}

    folder = changed(change)
    spec = cf.import_model(folder, tmp_path / "ours", weights="keep")
    rules = [rule["roles"] for rule in spec.to_dict()["precision"]["rules"]]
    shared = [f"layers.*.ffn.shared_{projection}" for projection in ("down", "gate", "up")]
    assert sorted(rules) == [*shared, "layers.0.mixer.o"]
    model = cf.load(tmp_path / "ours")
    assert model.state_dict()["layers.0.mixer.o.weight"].dtype == torch.bfloat16
    assert model.state_dict()["layers.1.mixer.o.weight"].dtype == E4M3
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    cf.save(model, tmp_path / "saved")
    assert same(read(tmp_path / "saved"), read(folder))
    listed = config(tmp_path / "saved")["quantization_config"]["modules_to_not_convert"]
    assert sorted(listed) == sorted(name.removesuffix(".weight") for name in names)
    cf.export_model(tmp_path / "saved", tmp_path / "theirs")
    cf.import_model(tmp_path / "theirs", tmp_path / "again", weights="keep")
    assert same(read(tmp_path / "again"), read(folder))


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_folder_of_whole_tensors_is_held_as_it_is_stored(
    released: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Each map plain or not, and each plain tensor in any dtype; the experts of a stack alike."""
    found = read(released)
    kinds = st.sampled_from([None, None, torch.bfloat16, torch.float32, torch.float16])
    stacks: dict[str, torch.dtype | None] = {}
    for name in sorted(found):
        if name not in found or name.endswith("_scale_inv"):
            continue
        stack = re.sub(r"experts\.\d+", "experts", name)
        if stack not in stacks:
            stacks[stack] = data.draw(kinds, stack)
        dtype = stacks[stack]
        if f"{name}_scale_inv" in found:
            if dtype is not None:
                plainly(found, [name], dtype)
        elif dtype is not None and not name.endswith("e_score_correction_bias") and "layers.2." not in name:
            found[name] = found[name].to(dtype)
    for copy, name in COPIES.items():
        found[copy] = found[name].clone()
    root = tmp_path_factory.mktemp("any")
    folder = write(root / "a", found, {**CONFIG, "quantization_config": TABLE})
    model = cf.load(folder, weights="keep")
    cf.save(model, root / "b")
    assert same(read(root / "b"), found)


def test_what_is_stored_in_another_dtype_stays_in_it(changed: Make, tmp_path: Path) -> None:
    def change(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        plainly(found, ["model.layers.1.self_attn.q_b_proj.weight"], torch.float32)
        for name in found:
            if "layernorm" in name or name.endswith("mlp.gate.weight"):
                found[name] = found[name].float() * 1.001

    folder = changed(change)
    cf.import_model(folder, tmp_path / "ours", weights="keep")
    cf.save(cf.load(tmp_path / "ours"), tmp_path / "saved")
    assert same(read(tmp_path / "saved"), read(folder))


def test_a_sensitive_map_that_is_stored_as_codes_is_kept_so(tmp_path: Path) -> None:
    coded = tensors(CONFIG, lambda name: "proj" in name)  # eh_proj included
    folder = write(tmp_path / "all", coded, {**CONFIG, "quantization_config": TABLE})
    spec = cf.import_model(folder, tmp_path / "ours", weights="keep")
    assert [rule["roles"] for rule in spec.to_dict()["precision"]["rules"]] == ["predictor.depths.*.eh_proj"]
    model = cf.load(tmp_path / "ours")
    assert model.state_dict()["predictor.depths.0.eh_proj.weight"].dtype == E4M3
    cf.save(model, tmp_path / "saved")
    assert same(read(tmp_path / "saved"), read(folder))
    with torch.no_grad():
        assert model(IDS, predict=True).predictions[0].logits.isfinite().all()


def test_a_folder_that_announces_codes_and_stores_none_is_read_as_it_is(
    released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read(released)
    plainly(found, [name for name in [*found] if f"{name}_scale_inv" in found])
    folder = write(tmp_path / "plain", found, {**CONFIG, "quantization_config": TABLE})
    for weights in (None, "keep"):
        model = cf.load(folder, weights=weights)
        assert same(dict(model.state_dict()), dict(cf.load(released).state_dict()))
    assert "no tensor is stored so" in caplog.text


sizes = st.integers(1, 260)


@settings(max_examples=6, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 3), st.booleans())
@example(17, 1, 1, 1, False)  # most elements are no codes, and bfloat16
def test_export_and_import_are_inverse_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory, hidden: int, inner: int, expert: int, heads: int, tied: bool
) -> None:
    small: dict[str, object] = {
        "model.hidden_size": hidden,
        "model.tie_embeddings": tied,
        "mixer.mla.num_heads": heads,
        "ffn.dense.intermediate_size": inner,
        "ffn.experts.intermediate_size": expert,
        "ffn.experts.num_experts": 4,
        "ffn.experts.router.top_k": 2,
        "ffn.experts.router.num_groups": 1,
        "ffn.experts.router.top_k_groups": 1,
        "precision": {"kind": "fp8-block", "weights": "float8_e4m3fn"},
    }
    root = tmp_path_factory.mktemp("inverse")
    model = cf.build(cf.Spec.load("tiny-deepseek-v3").with_(small), seed=hidden)
    assert cf.save(model, root / "a") == "deepseek_v3"
    cf.export_model(root / "a", root / "b")
    spec = cf.import_model(root / "b", root / "c", weights="keep")
    assert spec.formats.coded == model.spec.formats.coded
    assert same(read(root / "a"), read(root / "c"))
    again = cf.load(root / "c")
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    plain = cf.load(root / "b", weights="float32").state_dict()
    for name, held in model.spec.formats.coded.items():
        codes, scales = (model.state_dict()[each] for each in held)
        for value, c, s in zip(*(t if t.ndim == 3 else t[None] for t in (plain[name], codes, scales)), strict=True):
            assert torch.equal(value, dequantised(c, s, torch.float32))


def test_groups_of_a_kept_stack_are_read_alone(released: Path, tmp_path: Path) -> None:
    from composeformer.store.accounting import lookup

    cf.import_model(released, tmp_path / "ours", weights="keep")
    spec, dialect = describe(tmp_path / "ours")
    with WeightReader(tmp_path / "ours") as reader:
        get = lookup(spec, dialect, reader, tmp_path / "ours")
        for name in ("layers.1.ffn.up.weight", "layers.1.ffn.up.weight_scale_inv"):
            whole = get(name)
            assert torch.equal(bits(get(name, groups=(2, 5))), bits(whole[2:5]))
