"""What the README shows of the program's output is what the program prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def block(start: str) -> str:
    """The fenced block that begins so."""
    found = re.search(rf"^```\w+\n({re.escape(start)}.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def compose(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, "-m", "composeformer", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_mistakes_of_the_readme_are_told_as_it_says(tmp_path: Path) -> None:
    spec = block("format = 1")
    wrong = spec.replace('kind = "rmsnorm"\n', 'kind = "rmsnorm"\nesp = 1e-05\n').replace(
        "num_kv_heads = 2", "num_kv_heads = 3"
    )
    (tmp_path / "my-model.toml").write_text(wrong, encoding="utf-8")
    done = compose(tmp_path, "check", "my-model.toml")
    assert (done.returncode, done.stderr) == (2, block("compose: my-model.toml"))


def test_what_a_build_prints_is_what_the_readme_shows(tmp_path: Path) -> None:
    done = compose(tmp_path, "build", "smollm2-135m", "--device", "meta")
    assert done.returncode == 0, done.stderr
    lines = block("smollm2-135m").splitlines()
    # The last line has the machine and the time.
    assert [line.rstrip() for line in done.stdout.splitlines()][: len(lines) - 1] == lines[:-1]
    assert lines[-1].startswith("weights: 538.06 MB on cpu, assembled in ")
