"""What users are told of folders, names and plugins; what a plugin prints is no output."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composeformer.cli import main
from composeformer.plugins import configure


@pytest.fixture
def compose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compose", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    yield run
    configure()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_folder_is_a_spec_by_path_and_by_bare_name(compose: Any, here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "spec.toml").write_text('extends = "tiny-llama"\nname = "mine"\n')
    for ref in ("mine", "./mine", here / "mine", "mine/"):
        for command in ("show", "cost", "check"):
            code, out, err = compose(command, ref)
            assert (code, err) == (0, "")
            assert "mine" in out
    (here / "tiny-llama").mkdir()
    (here / "tiny-llama" / "spec.toml").write_text('extends = "tiny-llama"\nname = "mine"\n')
    assert json.loads(compose("show", "tiny-llama", "--json")[1])["name"] == "tiny-llama"


def test_an_existing_path_that_is_no_spec_is_called_what_it_is(compose: Any, here: Path) -> None:
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe")
    (here / "link").symlink_to("nowhere")
    for name, word in (
        ("folder", "folder: is a folder without a spec.toml"),
        ("pipe", "pipe: is neither a file nor a folder"),
        ("link", "link: is a link that leads nowhere"),
    ):
        code, _, err = compose("check", name)
        assert code == 2
        assert word in err


@pytest.mark.parametrize("name", ["", "  ", "\x1b]0;owned\x07", "\x9b31m"])
def test_a_name_that_shows_nothing_or_commands_a_terminal_is_refused(
    compose: Any, here: Path, name: str
) -> None:
    Path("bad.toml").write_text(f'extends = "tiny-llama"\nname = {json.dumps(name)}\n')
    code, out, err = compose("show", "bad.toml")
    assert code == 2
    assert "bad.toml:2: name" in err
    assert out + err == "".join(c for c in out + err if c == "\n" or c.isprintable())


def test_tables_escape_what_a_terminal_would_obey(capsys: Any) -> None:
    from rich.table import Table

    from composeformer.cli.options import console, print_json

    table = Table("\x9b31mhead")
    table.add_row("cell \x1b]0;owned\x07")
    console().print(table)
    print_json({"name": "\x1b[31m\x9b"})
    out = capsys.readouterr().out
    assert "cell \\x1b" in out
    assert not {"\x1b", "\x9b", "\x07"} & set(out)
    assert json.loads(out[out.index("{") :]) == {"name": "\x1b[31m\x9b"}


@pytest.mark.parametrize("command", [["plugins", "list"], ["cost", "tiny-llama"], ["show", "tiny-llama"]])
def test_json_is_one_document_whatever_a_plugin_prints(command: list[str], tmp_path: Path) -> None:
    info = tmp_path / "noisy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[composeformer]\nnoisy = noisy_plugin\nrude = rude_plugin\n")
    (tmp_path / "noisy_plugin.py").write_text(
        "print('imported')\n"
        "from composeformer.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def compose_components():\n"
        "    print('asked')\n"
        "    yield from ()\n"
    )
    (tmp_path / "rude_plugin.py").write_text("raise RuntimeError('\\x1b]0;owned\\x07')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    for tail in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "composeformer", *command, *tail],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert "imported" not in done.stdout
        assert "asked" not in done.stdout
        assert "imported\nasked\n" in done.stderr
        assert "\\x1b]0;owned\\x07" in done.stderr
        assert not {"\x1b", "\x07"} & set(done.stderr + done.stdout)
    assert isinstance(json.loads(done.stdout), dict)


def test_what_is_printed_while_json_is_made_goes_to_stderr(
    compose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from composeformer.costs import report

    cost = report.cost

    def noisy(*arguments: Any, **more: Any) -> Any:
        print("a hook says hello")
        return cost(*arguments, **more)

    monkeypatch.setattr(report, "cost", noisy)
    _, out, err = compose("cost", "tiny-llama", "--json")
    assert json.loads(out)["name"] == "tiny-llama"
    assert "hello" in err


def test_one_layer_is_one_layer(compose: Any, here: Path) -> None:
    Path("one.toml").write_text('extends = "tiny-llama"\nlayers = [{mixer = "attention", ffn = "dense"}]\n')
    for command in ("check", "show"):
        code, out, err = compose(command, "one.toml")
        assert code == 0, err
        assert "1 layer," in out


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_tolerance_must_be_finite(compose: Any, value: str) -> None:
    code, _, err = compose("verify", "x", "--against", "y", "--tolerance", value)
    assert code == 2
    assert "finite" in err


def test_verify_tells_in_words_what_is_not_finite(compose: Any, here: Path) -> None:
    import torch

    from composeformer.assemble import build
    from composeformer.store import save

    model = build("tiny-llama")
    save(model, "good")
    with torch.no_grad():
        model.state_dict()["layers.1.ffn.down.weight"][0, 0] = float("nan")
    save(model, "bad")
    for pair, word in ((("bad", "good"), "first"), (("bad", "bad"), "first and the second")):
        code, out, _ = compose("verify", pair[0], "--against", pair[1])
        assert code == 1
        assert f"the output of layers.1.ffn is not finite in the {word}" in out
        assert "nan" not in out
        code, out, _ = compose("verify", pair[0], "--against", pair[1], "--json")
        assert code == 1
        assert json.loads(out)["logits"] is None


def test_closed_standard_input_is_told(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from composeformer.cli import generate_command
    from composeformer.errors import InputError

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        generate_command._standard_input()


@pytest.mark.parametrize("words", ["import folder -o out", "export folder -o out", "verify folder --against out"])
def test_what_each_of_several_processes_would_do_whole_is_refused(
    compose: Any, here: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = compose(*words.split())
    line = f"compose: WORLD_SIZE = 2: compose {words.split()[0]} runs in one process; start it without torchrun\n"
    assert (code, err) == (2, line)
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert "folder" in compose(*words.split())[2]
