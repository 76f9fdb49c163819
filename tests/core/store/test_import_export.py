"""Import and export of folders: bit-exact both ways, and transformers reads what we write."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import composeformer as cf
from composeformer.errors import ComposeError
from composeformer.store.loading import open_any


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=3e-6,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("hf")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_import_then_export_is_bit_exact(hugging_face: Path, tmp_path: Path) -> None:
    cf.import_model(hugging_face, tmp_path / "ours")
    assert cf.export_model(tmp_path / "ours", tmp_path / "theirs") == "llama"
    before, after = weights(hugging_face), weights(tmp_path / "theirs")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert not (tmp_path / "theirs" / "spec.toml").exists()


def test_transformers_loads_the_export_and_agrees(hugging_face: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    cf.import_model(hugging_face, tmp_path / "ours")
    cf.export_model(tmp_path / "ours", tmp_path / "theirs")
    ids = torch.arange(40)[None] % 96
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        theirs: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        ours = cf.load(folder, dtype="float32")
        with torch.no_grad():
            a, b = ours(ids).logits, theirs(ids).logits
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-5


def test_verify_finds_equal_models_equal(hugging_face: Path, tmp_path: Path) -> None:
    cf.import_model(hugging_face, tmp_path / "ours")
    verdict = cf.verify(open_any(tmp_path / "ours"), open_any(hugging_face))
    assert verdict.equal
    assert verdict.logits == 0.0


def test_verify_names_the_first_component_that_differs(hugging_face: Path, tmp_path: Path) -> None:
    model, trusted = open_any(hugging_face), open_any(hugging_face)
    with torch.no_grad():
        model.state_dict()["layers.1.ffn.down.weight"].mul_(1.5)
    verdict = cf.verify(model, trusted)
    assert not verdict.equal
    assert verdict.first is not None
    assert verdict.first.where == "layers.1.ffn"
    assert [d.where for d in verdict.tensors] == ["layers.1.ffn.down.weight"]
    assert not verdict.structure


def test_verify_tells_a_structural_difference(hugging_face: Path) -> None:
    from composeformer.assemble import fill, skeleton

    trusted = open_any(hugging_face)
    model = skeleton(trusted.spec.with_({"model.max_position_embeddings": 63}))
    fill(model, trusted.state_dict().items(), "cpu")
    verdict = cf.verify(model, trusted)
    assert verdict.structure == ("model.max_position_embeddings: 63 against 64",)
    assert not verdict.equal


def test_import_into_an_existing_folder_keeps_it(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("five years")
    for replace in (False, True):
        with pytest.raises(ComposeError, match="full"):
            cf.import_model(hugging_face, tmp_path / "full", replace=replace)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "five years"


def test_remote_code_is_never_imported(hugging_face: Path, tmp_path: Path) -> None:
    import json
    import shutil

    source = tmp_path / "evil"
    shutil.copytree(hugging_face, source)
    (source / "canary.py").write_text(f"open({str(tmp_path / 'sung')!r}, 'w').close()")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "canary.Model"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ComposeError, match="auto_map"):
        cf.import_model(source, tmp_path / "out")
    assert not (tmp_path / "sung").exists()
