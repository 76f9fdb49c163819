"""What is refused before it can harm: the source as a target, somebody's files, codes read as weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import composeformer as cf
from composeformer.assemble import build
from composeformer.errors import ComposeError, DialectError, FolderError
from composeformer.spec import Spec
from composeformer.store import load, save

Convert = Callable[..., object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(build("tiny-llama"), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> Path:
    cf.export_model(model, tmp_path / "hf")
    return tmp_path / "hf"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("convert", [cf.export_model, cf.import_model])
def test_neither_source_nor_target_may_hold_the_other(
    convert: Convert, model: Path, plain: Path, tmp_path: Path
) -> None:
    source = model if convert is cf.export_model else plain
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "config.json").write_text("{}")
    before = contents(tmp_path)
    for target, word in (
        (source, "the source itself"),
        (tmp_path / "link", "the source itself"),
        (source / ".." / source.name, "the source itself"),
        (tmp_path, "holds the source"),
        (source / "below", "lies in the source"),
    ):
        with pytest.raises(FolderError, match=word):
            convert(source, target, replace=True)
    assert contents(tmp_path) == before


def test_files_that_are_no_part_of_a_model_are_never_replaced(model: Path) -> None:
    for name in ("my_notes.txt", "runs/log.txt", "train.py"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("years of work")
    before = contents(model)
    with pytest.raises(FolderError, match=r"no part of a model: my_notes\.txt, runs, train\.py"):
        save(build("tiny-llama"), model, replace=True)
    assert contents(model) == before


def test_a_models_own_files_are_replaced(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer_config.json").write_text("{}")

    def readme(folder: Path) -> None:
        (folder / "README.md").write_text("written with the model, so in its manifest")

    save(build("tiny-llama"), model, replace=True, tokenizer=readme)
    save(build("tiny-llama"), model, replace=True)
    assert not (model / "README.md").exists()


@pytest.mark.parametrize("kept", ["compose.lock", "manifest.json"])
def test_a_folder_of_ours_without_its_spec_says_so(model: Path, tmp_path: Path, kept: str) -> None:
    for name in {"spec.toml", "compose.lock", "manifest.json"} - {kept}:
        (model / name).unlink()
    with pytest.raises(FolderError, match=r"spec\.toml is missing: " + kept):
        load(model)
    with pytest.raises(FolderError, match=r"spec\.toml is missing"):
        cf.import_model(model, tmp_path / "out")


def test_a_manifest_of_another_tool_is_no_sign(plain: Path) -> None:
    (plain / "manifest.json").write_text('{"name": "a web page"}')
    assert load(plain).spec.plan.tensors


def test_dialect_errors_name_the_file_once(model: Path, plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_act": "tanh", "surprise": 1}))
    with pytest.raises(DialectError) as told:
        load(other)
    assert len(told.value.lines) >= 2
    assert all(line.count(f"{other / 'config.json'}: ") == 1 for line in told.value.lines)
    shutil.copy(plain / "config.json", other / "config.json")
    weights = load_file(other / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, other / "model.safetensors")
    with pytest.raises(DialectError) as told:
        load(other)
    assert told.value.lines == (f"{other}: model.norm.weight: is missing",)
    (other / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(DialectError, match=r"^" + str(other / "config.json") + ": model_type"):
        load(other)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_weights_of_a_dtype_that_needs_a_codec_are_listed(
    plain: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    weights = load_file(plain / "model.safetensors")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    weights |= {name: weights[name].to(dtype) for name in names}
    save_file(weights, plain / "model.safetensors")
    for action in (lambda: load(plain), lambda: cf.import_model(plain, tmp_path / "out")):
        with pytest.raises(FolderError) as told:
            action()
        stored = str(dtype).removeprefix("torch.")
        assert {line.partition(";")[0] for line in told.value.lines} == {
            f"{plain}: {name}: is stored as {stored}" for name in names
        }
        assert len(told.value.lines) == 2
    assert not (tmp_path / "out").exists()


def test_weights_under_our_own_names_are_held_to_the_same_dtypes(tmp_path: Path) -> None:
    save(build(Spec.load("tiny-llama", ["embedding={kind='token', scale=2.0}"])), tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["embedding.weight"] = weights["embedding.weight"].to(torch.int32)
    save_file(weights, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "manifest.json").unlink()
    from composeformer.folder import write_manifest

    write_manifest(tmp_path / "m")
    with pytest.raises(FolderError, match=r"embedding\.weight: is stored as int32"):
        load(tmp_path / "m")


def test_a_broken_tokenizer_is_refused_at_import(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (plain / "tokenizer.json").write_text('{"model": "nothing"}')
    with pytest.raises(FolderError, match=str(plain / "tokenizer.json") + ": not a tokenizer"):
        cf.import_model(plain, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]


@pytest.mark.parametrize("value", ["two", 2.5, True, [1, "x"], {"id": 2}])
def test_an_end_token_that_is_no_integer_is_refused_at_import(
    plain: Path, tmp_path: Path, value: object
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(plain / "tokenizer.json"))
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(FolderError, match=r"generation_config\.json: eos_token_id = "):
        cf.import_model(plain, tmp_path / "out")
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    cf.import_model(plain, tmp_path / "out")


def test_verify_speaks_of_defaults_in_the_words_of_a_spec() -> None:
    trusted = build(Spec.load("tiny-llama", ["model.tie_embeddings=false"]))
    verdict = cf.verify(build("tiny-llama"), trusted)
    assert "model.tie_embeddings: true against its default" in verdict.structure


def test_a_name_for_the_spec_comes_from_any_folder(plain: Path, tmp_path: Path) -> None:
    odd = plain.rename(tmp_path / "odd\x1b[31m")
    assert "\x1b" not in cf.import_model(odd, tmp_path / "out").name
    assert isinstance(load(tmp_path / "out").spec.name, str)


def test_verify_refuses_a_tolerance_that_compares_nothing() -> None:
    model = build("tiny-llama")
    for tolerance in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ComposeError, match="tolerance"):
            cf.verify(model, model, tolerance=tolerance)
