"""The command line, called as a user calls it: outputs, exit codes, one JSON document, no traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composeformer.cli import COMMANDS, main
from composeformer.plugins import configure


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs `compose ARGS` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compose", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    yield run
    # `--no-plugin` holds for the process.
    configure()


def test_help_names_every_command(compose: Any) -> None:
    code, out, _ = compose("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(compose: Any, name: str) -> None:
    code, out, _ = compose(name, "--help")
    assert code == 0
    assert "Usage: compose" in out


REPORTS = [
    ("build", "tiny-llama", "--device", "meta"),
    ("check", "tiny-llama", "smollm2-135m"),
    ("show", "tiny-llama"),
    ("show", "tiny-llama", "--values"),
    ("show", "tiny-deepseek-v3"),
    ("show", "tiny-deepseek-v3", "--values"),
    ("cost", "llama-3.1-405b"),
    ("plugins",),
    ("plugins", "list"),
    ("plugins", "info", "dense"),
    ("schema",),
    ("doctor",),
]


@pytest.mark.parametrize("arguments", REPORTS, ids=" ".join)
def test_json_is_one_document_and_the_table_is_text(compose: Any, arguments: tuple[str, ...]) -> None:
    code, out, _ = compose(*arguments, "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict)
    code, out, _ = compose(*arguments)
    assert code == 0
    assert out.strip()


def test_build_prints_tree_parameters_and_cost(compose: Any) -> None:
    code, out, _ = compose("build", "tiny-llama")
    assert code == 0
    for word in (
        "tiny-llama 155,072 parameters",
        "layers 0 to 2 (3 times)",
        "mixer gqa",
        "sdpa",
        "cache per token",
        "weights: 620",
    ):
        assert word in out, word


def test_build_json_carries_the_cost_of_the_design(compose: Any) -> None:
    _, out, _ = compose("build", "llama-3.1-8b", "--device", "meta", "--json")
    cost = json.loads(out)["cost"]
    assert cost["parameters"]["total"] == 8_030_261_248
    assert cost["parameters"]["predictor"] == 0
    assert cost["parameters"]["active"]["without_embeddings"] == 8_030_261_248 - 2 * 128256 * 4096
    assert cost["cache_bytes_per_token"] == 131_072
    assert cost["flops_per_token"]["convention"] == "causal, GEMMs only"


def test_build_writes_a_folder_that_generates(compose: Any, tmp_path: Path) -> None:
    assert compose("build", "tiny-llama", "-o", tmp_path / "m")[0] == 0
    code, _, err = compose("build", "tiny-llama", "-o", tmp_path / "m")
    assert code == 2
    assert "--force" in err
    assert compose("build", "tiny-llama", "-o", tmp_path / "m", "--force", "--seed", 1)[0] == 0
    code, out, _ = compose("verify", tmp_path / "m", "--against", tmp_path / "m", "--json")
    assert (code, json.loads(out)["equal"]) == (0, True)
    assert compose("build", "tiny-llama", "-o", tmp_path / "n")[0] == 0
    code, out, _ = compose("verify", tmp_path / "m", "--against", tmp_path / "n")
    assert code == 1
    assert "first difference: the output of embedding" in out
    code, _, err = compose("generate", tmp_path / "m", "--prompt", "x")
    assert code == 2
    assert "tokenizer" in err


WRONG = [
    (("check", "nowhere.toml"), "nowhere.toml"),
    (("build", "tiny-lama"), "tiny-llama"),
    (("build", "tiny-llama", "--set", "mixer.attention.num_heads=3"), "num_kv_heads"),
    (("build", "tiny-llama", "--set", "layers.7.repeat=2"), "layers.7"),
    (("build", "tiny-llama", "--device", "quantum"), "quantum"),
    (("build", "tiny-llama", "--dtype", "float8"), "float8"),
    (("build", "tiny-llama", "-o", "x", "--device", "meta"), "meta"),
    (("plugins", "info", "dens"), "dense"),
    (("bild",), "build"),
    (("generate", "nowhere", "--prompt", "x"), "nowhere"),
    (("generate", "nowhere"), "--prompt"),
    (("verify", "nowhere", "--against", "elsewhere"), "nowhere"),
    (("import", "nowhere", "-o", "y"), "nowhere"),
    (("export", "nowhere", "-o", "y"), "nowhere"),
    (("--no-plugin", "dens", "plugins", "list"), "dense"),
]


@pytest.mark.parametrize(
    ("arguments", "word"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None
)
def test_wrong_input_is_a_line_and_exit_2(
    compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = compose(*arguments)
    assert code == 2, err
    assert word in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_check_tells_all_problems_of_all_files(compose: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('extends = "tiny-llama"\n[ffn.dense]\nintermediate_sise = 3\n[norm.rms]\neps = "small"\n')
    code, _, err = compose("check", bad, "tiny-llama")
    assert code == 2
    assert f"{bad}:3: ffn.dense.intermediate_sise" in err
    assert "did you mean 'intermediate_size'" in err
    assert f"{bad}:5: norm.rms.eps" in err
    code, out, _ = compose("check", bad, "tiny-llama", "--json")
    found = json.loads(out)["specs"]
    assert code == 2
    assert [entry["valid"] for entry in found] == [False, True]


def test_a_plugin_that_ends_the_process_ends_no_command_as_if_it_were_done(
    compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composeformer.costs.report.cost", lambda *_, **__: sys.exit(0))
    code, out, err = compose("cost", "tiny-llama")
    assert (code, out) == (70, "")
    assert err.strip() == "compose: internal error: SystemExit: 0 (--debug shows the traceback)"


def test_internal_error_is_one_line_and_exit_70(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug\nof ours")

    monkeypatch.setattr("composeformer.costs.report.cost", fail)
    code, out, err = compose("cost", "tiny-llama")
    assert (code, out) == (70, "")
    assert err.strip() == "compose: internal error: RuntimeError: a bug of ours (--debug shows the traceback)"


def test_interrupt_is_exit_130(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("composeformer.costs.report.cost", interrupt)
    assert compose("cost", "tiny-llama")[0] == 130


def test_version_tells_plugins_too(compose: Any) -> None:
    code, out, _ = compose("--version")
    assert code == 0
    assert out.startswith("composeformer ")
    assert "dense (composeformer" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_speaks_of_compose(compose: Any, shell: str) -> None:
    code, out, _ = compose("completion", shell)
    assert code == 0
    assert "_COMPOSE_COMPLETE" in out


def test_blocked_dense_plugin_leaves_commands_working(compose: Any) -> None:
    environment_free = [sys.executable, "-m", "composeformer", "--no-plugin", "dense"]
    done = subprocess.run([*environment_free, "plugins", "list", "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    status = {p["name"]: p["status"] for p in json.loads(done.stdout)["plugins"]}
    assert status["dense"] == "blocked"
    done = subprocess.run([*environment_free, "check", "tiny-llama"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m composeformer schema | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("{")


@pytest.mark.parametrize(
    ("words", "found"), [("compose build smol", "smollm2-135m"), ("compose show tiny-", "tiny-llama")]
)
def test_completion_knows_commands_shipped_specs_and_files(words: str, found: str) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": "2", "_COMPOSE_COMPLETE": "bash_complete"}
    script = str(Path(sys.executable).with_name("compose"))
    done = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True)
    assert f"plain,{found}" in done.stdout.splitlines()
    assert any(line.startswith("file,") for line in done.stdout.splitlines())
