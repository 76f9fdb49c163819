"""`compose verify --bisect` as a user calls it: a wrong folder beside the Hugging Face folder that it came from."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from composeformer.cli import main


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `compose ARGS` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compose", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_command_says_what_explains_the_difference(lab: Any, compose: Any) -> None:
    wrong = lab.planted("deepseek_v3", {"position.layout": "half-split"})
    code, out, _ = compose("verify", wrong, "--against", lab.folder("deepseek_v3"), "--bisect")
    assert code == 1
    lines = [
        line for line in " ".join(out.split()).split("bisect: ") if "explained" in line or "with it" in line
    ]
    assert lines[0].startswith("layers.0.mixer differs first (by 0.")
    assert 'explained by position.layout: "half-split" here, "interleaved" in the trusted folder' in lines[0]
    assert lines[1].startswith("with it the outputs are equal")


def test_a_foreign_folder_with_a_wrong_config_or_wrong_tensors_is_explained_too(
    lab: Any, compose: Any, tmp_path: Path
) -> None:
    trusted = lab.folder("deepseek_v3")
    shutil.copytree(trusted, tmp_path / "wrong")
    config = json.loads((trusted / "config.json").read_text())
    config["routed_scaling_factor"] = 1.0
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    tensors = load_file(trusted / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    latent, rope = tensors[name].split([16, 6])
    tensors[name] = torch.cat([latent, rope[0::2], rope[1::2]])
    save_file(tensors, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
    code, out, err = compose("verify", tmp_path / "wrong", "--against", trusted, "--bisect", "--json")
    assert code == 1, err
    found = json.loads(out)
    assert found["first_difference"]["where"] == "layers.0.mixer"
    explanation = found["explanation"]
    assert explanation["complete"]
    assert explanation["remaining"] is None
    assert [[c["name"] for c in step["changes"]] for step in explanation["steps"]] == [
        ["rotary layout of mixer mla"],
        ["router.routed_scaling_factor"],
    ]
    assert explanation["steps"][0]["changes"][0]["where"] == ["layers.0.mixer.kv_a.weight"]
    assert explanation["steps"][1]["first"]["where"] == "layers.1.ffn.router"
    assert explanation["steps"][1]["changes"][0] == {
        "name": "router.routed_scaling_factor",
        "source": "spec",
        "here": "1.0",
        "there": "2.5",
        "where": ["layers.1.ffn.router"],
        "told": "router.routed_scaling_factor: 1.0 here, 2.5 in the trusted folder",
    }
    assert len(explanation["told"]) == 3


def test_without_the_flag_a_difference_names_it(lab: Any, compose: Any) -> None:
    wrong = lab.planted("llama", {"norm.eps": 1e-3})
    code, out, _ = compose("verify", wrong, "--against", lab.folder("llama"))
    assert code == 1
    assert "--bisect searches for the conventions that explain it" in out
    assert "explained by" not in out
    code, out, _ = compose("verify", wrong, "--against", lab.folder("llama"), "--json")
    assert code == 1
    assert json.loads(out)["explanation"] is None


def test_equal_folders_are_told_so_with_the_flag_too(lab: Any, compose: Any) -> None:
    folder = lab.folder("llama")
    code, out, _ = compose("verify", folder, "--against", folder, "--bisect")
    assert code == 0
    assert "bisect: " not in out
    assert "--bisect" not in out
