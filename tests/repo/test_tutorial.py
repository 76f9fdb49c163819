"""The tutorial runs: its files are written, its commands executed in order, and what it shows is what they print.

It runs in a new virtual environment, where pip installs what `compose plugins new` writes, without an index and without
build isolation; packages of this environment are seen through a .pth file.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


class Block(NamedTuple):
    """One fenced block: `words` are those behind its language, `line` where it begins."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that it is, or changes."""
        return next((word for word in self.words if "/" in word or "." in word), None)

    @property
    def status(self) -> int:
        """What its last command ends with."""
        return int(self.words[self.words.index("status") + 1]) if "status" in self.words else 0


def blocks() -> Iterator[Block]:
    text = PAGE.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 1
        yield Block(match[1], tuple(match[2].split()), match[3], line)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees composeformer and what it needs, and has a `pip` and a `compose` of its own."""
    folder = tmp_path_factory.mktemp("tutorial")
    venv.create(folder / ".venv", with_pip=False)
    site = next(folder.glob(".venv/lib/python*/site-packages"))
    plugins = sorted(str(path) for path in (ROOT / "plugins").iterdir())
    seen = [sysconfig.get_paths()["purelib"], str(ROOT / "core"), *plugins]
    (site / "borrowed.pth").write_text("\n".join(seen) + "\n")
    for name, module in (("pip", "pip"), ("compose", "composeformer"), ("pytest", "pytest")):
        script = folder / ".venv" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "$(dirname "$0")/python" -m {module} "$@"\n')
        script.chmod(0o755)
    return folder


def execute(environment: Path, command: str) -> subprocess.CompletedProcess[str]:
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMPOSE", "PYTEST"))
    }
    path = f"{environment / '.venv' / 'bin'}{os.pathsep}{clean['PATH']}"
    return subprocess.run(
        ["/bin/sh", "-e", "-c", command],
        cwd=environment,
        env={**clean, **OFFLINE, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def changed(text: str, hunk: str) -> str:
    """The text with one hunk of a diff applied, which says uniquely where."""
    old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in " -")
    new = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in " +")
    assert text.count(old) == 1, old
    return text.replace(old, new)


def shown(wanted: str, printed: str) -> None:
    """What the page shows, a line after the other; `...` stands for anything, and a table's frame for nothing."""
    lines = [" ".join(re.sub("[│┃]", " ", line).split()) for line in printed.splitlines()]
    for line in wanted.splitlines():
        pattern = ".*".join(re.escape(piece) for piece in " ".join(line.split()).split("..."))
        while lines and not re.fullmatch(pattern, lines[0]):
            lines.pop(0)
        assert lines, f"{line}\nis not printed:\n{printed}"


def test_the_tutorial_runs_as_it_stands(environment: Path) -> None:
    printed = ""
    for block in blocks():
        place = f"{PAGE.name}:{block.line}"
        if block.language == "sh" and "fragment" not in block.words:
            done = execute(environment, block.text)
            printed = done.stdout
            assert done.returncode == block.status, f"{place}\n{printed}"
        elif block.language == "text":
            shown(block.text, printed)
        elif block.language == "diff":
            path = environment / str(block.file)
            path.write_text(changed(path.read_text(), block.text))
        elif block.file is not None:
            (environment / block.file).write_text(block.text)
    certificate = json.loads((environment / "my-decay" / "certificate.json").read_text())
    verdicts = {finding["law"]: finding["verdict"] for finding in certificate["findings"]}
    assert verdicts.pop("mixer.sees") == "held"
    assert "broken" not in verdicts.values()
    (wheel,) = (environment / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    assert names == {"my_decay/__init__.py", "my_decay/module.py", "my_decay/plugin.py"}


def test_the_mixer_of_the_tutorial_is_at_most_80_lines_a_file() -> None:
    files = {block.file: len(block.text.splitlines()) for block in blocks() if block.language == "python"}
    assert files["my-decay/my_decay/plugin.py"] < 80
    assert files["my-decay/my_decay/module.py"] < 80


def test_python_of_the_tutorial_is_what_this_python_reads() -> None:
    assert sys.version_info >= (3, 11)
    for block in blocks():
        if block.language == "python":
            compile(block.text, str(block.file), "exec")
