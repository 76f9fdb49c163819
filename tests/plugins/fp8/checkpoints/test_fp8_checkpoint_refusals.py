"""Damaged, contradictory and unknown folders of codes are told in one line that names the tensor or the key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import composeformer as cf
from composeformer.errors import ComposeError

from .conftest import E4M3, TABLE, Change, dequantised, read, write

Make = Callable[[Change], Path]
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def refused(folder: Path, tmp_path: Path, weights: tuple[str | None, ...] = (None, "keep")) -> list[str]:
    """The lines that loading and importing tell, which write nothing."""
    told: list[list[str]] = []
    for each in weights:
        for action in (
            lambda each=each: cf.load(folder, weights=each),
            lambda each=each: cf.import_model(folder, tmp_path / "out", weights=each),
        ):
            with pytest.raises(ComposeError) as caught:
                action()
            told.append([line.replace(str(folder), "").lstrip(":/ ") for line in caught.value.lines])
    assert not (tmp_path / "out").exists()
    assert all(each == told[0] for each in told)
    return told[0]


def scaled(change: Callable[[Tensor], Tensor], name: str = KV_A) -> Change:
    def do(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        found[f"{name}_scale_inv"] = change(found[f"{name}_scale_inv"]).contiguous()

    return do


def test_a_missing_scale_is_named(changed: Make, tmp_path: Path) -> None:
    folder = changed(lambda found, _: found.pop(f"{KV_A}_scale_inv"))
    assert refused(folder, tmp_path) == [f"{KV_A}_scale_inv: is missing, and {KV_A} is stored as float8_e4m3fn"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda s: s[:-1], (4, 2)),  # floor in place of ceil
        (lambda s: s.T, (2, 5)),
        (lambda s: s.flatten(), (10,)),
        (lambda s: s.repeat_interleave(2, 0), (10, 2)),  # blocks of 64 rows
        (lambda s: s.max(), ()),
    ],
)
def test_a_scale_of_another_shape_is_told_with_the_right_one(
    changed: Make, tmp_path: Path, change: Callable[[Tensor], Tensor], found: tuple[int, ...]
) -> None:
    told = f"{KV_A}_scale_inv: has shape {found}, {KV_A} (576, 160) needs (5, 2)"
    assert refused(changed(scaled(change)), tmp_path) == [told]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.uint8])
def test_a_scale_of_a_dtype_that_means_something_else_is_refused(
    changed: Make, tmp_path: Path, dtype: torch.dtype
) -> None:
    stored = str(dtype).removeprefix("torch.")
    allowed = "allowed: float32, bfloat16, float8_e8m0fnu"
    told = f"{EXPERT}_scale_inv: is stored as {stored}; {allowed}"
    assert refused(changed(scaled(lambda s: s.to(dtype), EXPERT)), tmp_path) == [told]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_narrow_scales_are_decoded_and_not_kept(changed: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = changed(scaled(lambda s: s.to(dtype)))
    found = read(folder)
    judged = dequantised(found[KV_A], found[f"{KV_A}_scale_inv"])
    assert torch.equal(cf.load(folder).state_dict()["layers.0.mixer.kv_a.weight"], judged)
    (told,) = refused(folder, tmp_path, ("keep",))
    assert told.startswith(f"{KV_A}_scale_inv: is stored as {str(dtype).removeprefix('torch.')}")
    assert "decode the weights instead" in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_a_scale_that_is_no_positive_number_is_found_with_its_place(
    changed: Make, tmp_path: Path, value: float
) -> None:
    def change(scales: Tensor) -> Tensor:
        scales = scales.clone()
        scales[4, 1] = value
        return scales

    (told,) = refused(changed(scaled(change)), tmp_path)
    assert told == f"{KV_A}_scale_inv: has a scale of {value} at (4, 1), which must be finite and positive"


def test_a_scale_of_zero_in_an_expert_is_found_too(changed: Make, tmp_path: Path) -> None:
    (told,) = refused(changed(scaled(torch.zeros_like, EXPERT)), tmp_path, (None,))
    assert told.startswith(f"{EXPERT}_scale_inv: has a scale of 0.0 at (0, 0)")
    (told,) = refused(tmp_path / "changed", tmp_path, ("keep",))
    assert "_scale_inv: has a scale of 0.0 at" in told


def test_codes_without_a_config_that_tells_of_them_are_refused_by_name(released: Path, tmp_path: Path) -> None:
    found = {name: value for name, value in read(released).items() if not name.endswith("_scale_inv")}
    one = {name: v if name == KV_A or v.dtype != E4M3 else v.float() for name, v in found.items()}
    config = {k: v for k, v in config_of(released).items() if k != "quantization_config"}
    (told,) = refused(write(tmp_path / "bare", one, config), tmp_path)
    assert told.startswith(f"{KV_A}: is stored as float8_e4m3fn; weights are read from float32")
    assert "quantization_config" in told
    lines = refused(write(tmp_path / "scaled", read(released), config), tmp_path)
    assert all("is stored as float8_e4m3fn" in line or "more tensors" in line for line in lines)


def config_of(folder: Path) -> dict[str, Any]:
    from composeformer.store.loading import read_config

    return read_config(folder)


def test_a_scale_of_what_is_no_code_is_refused(changed: Make, tmp_path: Path) -> None:
    def beside_plain(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        found[KV_A] = dequantised(found[KV_A], found[f"{KV_A}_scale_inv"])

    told = f"{KV_A}_scale_inv: belongs to {KV_A}, which is stored as bfloat16 and not as float8_e4m3fn"
    assert refused(changed(beside_plain), tmp_path) == [told]


def test_a_scale_of_nothing_is_unexpected(changed: Make, tmp_path: Path) -> None:
    folder = changed(lambda found, _: found.update({"model.stray_scale_inv": torch.ones(1, 1)}))
    assert refused(folder, tmp_path) == ["model.stray_scale_inv: is unexpected, deepseek_v3 has no place for it"]


def test_codes_that_are_no_matrix_are_refused(changed: Make, tmp_path: Path) -> None:
    folder = changed(lambda found, _: found.update({NORM: found[NORM].to(E4M3)}))
    assert refused(folder, tmp_path) == [f"{NORM}: is stored as float8_e4m3fn with shape (160,); codes are matrices"]


def test_other_codes_are_not_taken_for_these(changed: Make, tmp_path: Path) -> None:
    def change(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        found[KV_A] = found[KV_A].float().to(torch.float8_e5m2)
        del found[f"{KV_A}_scale_inv"]

    folder = changed(change)
    (told,) = refused(folder, tmp_path, (None,))
    assert told.startswith(f"{KV_A}: is stored as float8_e5m2;")
    (told,) = refused(folder, tmp_path, ("keep",))
    assert "is stored as float8_e5m2; the spec's precision keeps it as float8_e4m3fn" in told


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_codes_of_a_module_that_is_said_to_have_none_are_refused(changed: Make, tmp_path: Path, key: str) -> None:
    table = {**TABLE, key: ["lm_head", "self_attn.kv_a_proj_with_mqa"]}
    lines = refused(changed(lambda _, config: config.update(quantization_config=table)), tmp_path)
    assert len(lines) == 3
    assert lines[0].startswith(f"{KV_A}: is stored as float8_e4m3fn, but ")
    assert all(key in line and "says that it is not" in line for line in lines)


def test_one_expert_without_codes_can_be_decoded_and_not_kept(changed: Make, tmp_path: Path) -> None:
    def change(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        found[EXPERT] = dequantised(found[EXPERT], found.pop(f"{EXPERT}_scale_inv"))

    folder = changed(change)
    assert torch.equal(cf.load(folder).state_dict()["layers.1.ffn.up.weight"][3], read(folder)[EXPERT])
    (told,) = refused(folder, tmp_path, ("keep",))
    assert f"{EXPERT} as bfloat16" in told
    assert "can not be kept; decode the weights instead" in told


def test_an_embedding_of_codes_can_be_decoded_and_not_kept(changed: Make, tmp_path: Path) -> None:
    from .conftest import quantised

    def change(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "model.layers.2.embed_tokens.weight"):
            found[name], found[f"{name}_scale_inv"] = quantised(found[name])

    folder = changed(change)
    found = read(folder)
    judged = dequantised(found["model.embed_tokens.weight"], found["model.embed_tokens.weight_scale_inv"])
    assert torch.equal(cf.load(folder).state_dict()["embedding.weight"], judged)
    (told,) = refused(folder, tmp_path, ("keep",))
    assert told.startswith("embedding.weight: is stored as float8_e4m3fn codes of f8-128x128")


def test_a_copy_that_differs_from_the_embedding_is_refused(changed: Make, tmp_path: Path) -> None:
    def change(found: dict[str, Tensor], _: dict[str, Any]) -> None:
        found["model.layers.2.embed_tokens.weight"] = found["model.embed_tokens.weight"] + 1

    (told,) = refused(changed(change), tmp_path)
    assert told == "model.layers.2.embed_tokens.weight: must equal model.embed_tokens.weight in this model, but differs"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quant_method": "gptq"}, "these weights can not be read; quant_method must be fp8"),
        ({"quant_method": "fp9"}, "quant_method must be fp8; did you mean 'fp8'?"),
        ({"fmt": "e5m2"}, 'quantization_config.fmt = "e5m2": must be "e4m3"'),
        ({"weight_block_size": [64, 128]}, "quantization_config.weight_block_size = [64, 128]: must be [128, 128]"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size = null: must have a value"),
        ({"activation_scheme": "static"}, 'activation_scheme = "static": must be "dynamic"'),
        ({"scale_fmt": "e4m3"}, 'scale_fmt = "e4m3": must be one of float, ue8m0'),
        ({"expert_dtype": "fp4"}, 'expert_dtype = "fp4": must be "fp8"'),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of module names"),
        ({"weight_blocksize": 1}, "could change the weights; did you mean 'weight_block_size'?"),
    ],
)
def test_a_config_that_says_something_else_is_refused_by_key(
    changed: Make, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    table = {**TABLE, **changes}
    (line,) = refused(changed(lambda _, config: config.update(quantization_config=table)), tmp_path)
    assert line.startswith("config.json: quantization_config")
    assert told in line


@pytest.mark.parametrize("table", [7, "fp8", [], {}])
def test_a_config_that_is_no_table_is_refused(changed: Make, tmp_path: Path, table: object) -> None:
    (line,) = refused(changed(lambda _, config: config.update(quantization_config=table)), tmp_path)
    assert line.startswith("config.json: quantization_config = ")
    assert "these weights can not be read" in line


def test_what_transformers_write_beside_it_is_understood(changed: Make) -> None:
    from transformers import FineGrainedFP8Config

    written = FineGrainedFP8Config().to_dict()
    assert written["quant_method"] == "fp8"
    folder = changed(lambda _, config: config.update(quantization_config={**written, "weight_block_size": [128, 128]}))
    assert cf.load(folder).spec.plan.tensors


def test_a_spec_that_was_changed_to_codes_does_not_take_plain_weights_for_them(
    released: Path, tmp_path: Path
) -> None:
    from composeformer.folder import write_manifest

    cf.import_model(released, tmp_path / "ours")
    path = tmp_path / "ours" / "spec.toml"
    text = cf.Spec.load(path).with_({"precision": {"kind": "fp8-block", "weights": "float8_e4m3fn"}}).to_toml()
    path.write_text(text)
    (tmp_path / "ours" / "manifest.json").unlink()
    write_manifest(tmp_path / "ours")
    with pytest.raises(ComposeError, match="is stored as bfloat16; the spec's precision keeps it as float8_e4m3fn"):
        cf.load(tmp_path / "ours")


def test_blocks_of_gguf_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for weights in ("keep", "bfloat16"):
        with pytest.raises(ComposeError, match=f"weights = {weights}: blocks of GGUF are decoded to float32 only"):
            cf.import_model(tmp_path / "m.gguf", tmp_path / "out", weights=weights)


def test_without_the_plugin_the_form_is_unknown(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from composeformer.dialects import codings

    monkeypatch.setattr(codings, "load_all", lambda: ())
    with pytest.raises(ComposeError, match="these weights can not be read; no plugin brings a coding"):
        cf.load(released)
