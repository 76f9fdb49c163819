"""Streams that are closed, full, gone or of another encoding, and signals: exit status and words stay right."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from composeformer.cli.streams import visible

COMPOSE = f"{sys.executable} -m composeformer"


def shell(line: str, **more: str) -> tuple[int, str, str]:
    """`line` in bash, where `compose` is ours: (exit status, stdout, stderr)."""
    script = f'compose() {{ {COMPOSE} "$@"; }}\n{line}'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, **more}, encoding="utf-8"
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["--help", "show tiny-llama", "check tiny-llama", "schema"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    code, out, err = shell(f"compose {command} | true; echo ${{PIPESTATUS[0]}}")
    assert (code, out.strip(), err) == (0, "0", "")


def test_a_failure_that_was_found_outlives_the_reader() -> None:
    for unbuffered in ("", "1"):
        line = "compose check nowhere.toml --json | true; echo ${PIPESTATUS[0]}"
        assert shell(line, PYTHONUNBUFFERED=unbuffered)[1].strip() == "2"


@pytest.mark.parametrize("command", ["show tiny-llama", "check tiny-llama", "schema"])
@pytest.mark.parametrize("place", [">/dev/full", ">&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_can_not_be_written_is_one_line_and_exit_2(
    command: str, place: str, unbuffered: str
) -> None:
    code, out, err = shell(f"compose {command} {place}", PYTHONUNBUFFERED=unbuffered)
    assert (code, out) == (2, "")
    assert err.startswith("compose: standard output: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", ["2>/dev/full", "2>&-"])
def test_messages_that_nobody_hears_change_nothing(place: str) -> None:
    assert shell(f"compose check nowhere.toml {place}")[0] == 2
    assert shell(f"compose bild {place}")[0] == 2
    code, out, _ = shell(f"compose cost tiny-llama --json {place}")
    assert code == 0
    assert json.loads(out)["name"] == "tiny-llama"


def test_an_ascii_terminal_is_served(tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text('extends = "tiny-llama"\nname = "\N{GREEK SMALL LETTER LAMDA}"\n', encoding="utf-8")
    for command in ("show", "cost", "check"):
        assert shell(f"compose {command} {spec}", PYTHONIOENCODING="ascii")[0] == 0
    code, out, _ = shell(f"compose show {spec} --json", PYTHONIOENCODING="ascii")
    assert code == 0
    assert json.loads(out)["name"] == "\N{GREEK SMALL LETTER LAMDA}"


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("schema -o ''", "Is a directory"),
        ("schema -o nowhere/schema.json", "nowhere/schema.json"),
        (f"cost ./{'n' * 300}", "file name too long"),
        (f"verify {'n' * 300} --against x", "File name too long"),
        (f"import {'n' * 300} -o x", "File name too long"),
        (f"check {'n' * 300}", "no shipped spec"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_exit_2(tmp_path: Path, command: str, word: str) -> None:
    code, out, err = shell(f"cd {tmp_path}; compose {command}")
    assert (code, out) == (2, "")
    assert word in err
    assert err.count("\n") == 1


def test_termination_ends_with_143_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = """
import os, signal
# A test run in the background ignores interrupts, and its children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
import composeformer.store.saving as saving
write = saving.write_shards
def slow(folder, *rest, **more):
    write(folder, *rest, **more)
    os.kill(os.getpid(), signal.SIGNAL)
saving.write_shards = slow
import sys
sys.argv = ["compose", "build", "tiny-llama", "-o", "m"]
from composeformer.cli import main
main()
"""
    for name, status in (("SIGTERM", 143), ("SIGINT", 130)):
        done = subprocess.run(
            [sys.executable, "-c", script.replace("SIGNAL", name)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_during_the_first_imports_is_one_line(tmp_path: Path) -> None:
    # A package that click would be, interrupted as by Ctrl-C while it is imported.
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "composeformer", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "compose: interrupted\n")


def test_the_handler_of_a_caller_is_put_back(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from composeformer.cli import main

    before = signal.getsignal(signal.SIGTERM), sys.stdout, sys.stderr
    monkeypatch.setattr(sys, "argv", ["compose", "check", "tiny-llama"])
    with pytest.raises(SystemExit):
        main()
    assert (signal.getsignal(signal.SIGTERM), sys.stdout, sys.stderr) == before


def test_nothing_that_a_terminal_obeys_stays(capsys: Any) -> None:
    assert visible("a\x1b[31m\n\x9b\u202e\udcff") == r"a\x1b[31m \x9b\u202e\udcff"
    assert visible("Grüße, 語") == "Grüße, 語"
