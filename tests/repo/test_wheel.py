"""The wheel works where nothing of this tree is: built, installed into a clean environment, run."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel; third-party packages are seen through a .pth file."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-index",
        "--no-deps",
        "--quiet",
    ]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COMPOSE"))}
    return subprocess.run(
        [str(environment / "bin" / "compose"), *arguments],
        cwd=environment,
        env=clean,
        capture_output=True,
        text=True,
    )


def test_wheel_holds_code_specs_dialects_and_types_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        path.name for path in [ROOT / "core" / "composeformer", *(ROOT / "plugins").glob("*/composeformer_*")]
    }
    for wanted in (
        "composeformer/py.typed",
        "composeformer/specs/tiny-llama.toml",
        "composeformer/scaffold/templates/mixer/module.py.txt",
        "composeformer_dense/dialects/llama.toml",
    ):
        assert wanted in names
    assert not [name for name in names if "test" in name.split("/")[-1].split("_") or name.endswith(".pyc")]


def test_installed_wheel_checks_and_builds(environment: Path) -> None:
    done = run(environment, "check", "tiny-llama", "llama-3.1-405b")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(environment, "plugins", "list", "--json")
    plugins = json.loads(done.stdout)["plugins"]
    assert {p["status"] for p in plugins} == {"loaded"}
    assert all(str(environment) in p["origin"] for p in plugins)
    done = run(environment, "build", "tiny-llama", "-o", "model")
    assert done.returncode == 0, done.stderr
    assert (environment / "model" / "model.safetensors").exists()
    done = run(environment, "plugins", "new", "my-mixer", "--slot", "mixer")
    assert done.returncode == 0, done.stderr
    assert (environment / "my-mixer" / "my_mixer" / "module.py").exists()
