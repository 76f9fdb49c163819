"""A clean environment with a wheel of this tree and one of each package here that has a third party's shape.

The packages' own tests run there, not here.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

collect_ignore_glob = ["*/tests/*"]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Clean:
    """A virtual environment, and what runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, run in its folder; `more` are environment variables."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMPOSE"))}
        program, *arguments = command
        return subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.folder,
            env={**kept, **more},
            capture_output=True,
            text=True,
        )

    def json(self, *command: str, **more: str) -> Any:
        """The document that it prints."""
        done = self.run(*command, **more)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def packages() -> Sequence[Path]:
    """The folders of the packages."""
    return sorted(path.parent for path in HERE.glob("*/pyproject.toml"))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """Built and installed without an index; the packages of the tests' own environment are seen through a .pth file."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("clean")
    offline = ("--no-index", "--no-deps", "--quiet")
    pip("wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(ROOT), *map(str, packages()))
    venv.create(folder, with_pip=False)
    pip("--python", str(folder / "bin" / "python"), "install", *offline, *map(str, wheels.glob("*.whl")))
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Clean(folder)
