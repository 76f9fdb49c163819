"""What must stay true of the tree as a whole, kept by test and not by memory."""

import ast
import re
import statistics
import subprocess
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks or would add; without git (an unpacked archive), every file below the known folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        return [ROOT / name for name in listed if name and (ROOT / name).exists()]
    except (OSError, subprocess.CalledProcessError):
        folders = ("core", "plugins", "tests", "benchmarks", "docs")
        return [p for folder in folders for pattern in patterns for p in (ROOT / folder).rglob(pattern)]


def source_files() -> list[Path]:
    return tracked("*.py")


def test_no_file_is_over_500_lines_and_half_are_under_150() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 500} == {}
    assert statistics.median(lengths.values()) < 150


def test_folders_entry_points_wheel_and_test_folders_agree() -> None:
    folders = {
        path.name for path in (ROOT / "plugins").iterdir() if path.is_dir() and any(path.rglob("plugin.py"))
    }
    points = PYPROJECT["project"]["entry-points"]["composeformer"]
    packages = {f"plugins/{name}/composeformer_{name}" for name in folders}
    wheel = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert set(points) == folders
    assert all(points[name] == f"composeformer_{name}.plugin" for name in folders)
    assert wheel == packages | {"core/composeformer"}
    assert {
        path.name
        for path in (ROOT / "tests" / "plugins").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    } == folders
    for name in folders:
        assert (ROOT / "plugins" / name / "README.md").exists(), name
        assert (ROOT / "plugins" / name / f"composeformer_{name}" / "py.typed").exists(), name


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in source_files() if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    "path", [p for p in source_files() if ROOT / "tests" not in p.parents], ids=lambda p: p.name
)
def test_nothing_unpickles_evaluates_or_trusts_remote_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cPickle", "dill", "marshal", "shelve"} & {
                name.split(".")[0] for name in names
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in (
                "eval",
                "exec",
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "__import__",
            ), called
            trusting = [
                k for k in node.keywords if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"
            ]
            assert not trusting, ast.unparse(node)


@pytest.mark.parametrize(
    "path", [p for p in source_files() if "/composeformer" in str(p.relative_to(ROOT))], ids=lambda p: p.name
)
def test_parts_make_no_linear_map_of_their_own(path: Path) -> None:
    called = {
        ast.unparse(n.func)
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Call)
    }
    assert not called & {"nn.Linear", "torch.nn.Linear"}


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        if text.strip() and ast.get_docstring(ast.parse(text)) is None and ROOT / "tests" not in path.parents:
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_no_path_of_one_machine_and_nothing_unfinished() -> None:
    unwanted = re.compile("/ro" + "ot/|/wo" + "rk/|TO" + "DO|FIX" + "ME|raise NotImplemented" + "Error")
    found = []
    for path in tracked("*.py", "*.md", "*.toml", "*.json", "*.sh"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if unwanted.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_readme_tells_of_every_plugin_and_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python3 dev.py demo" in readme
    assert "python3 dev.py test" in readme
    assert "dev.py test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for name in PYPROJECT["project"]["entry-points"]["composeformer"]:
        assert f"plugins/{name}" in readme, name


def test_direct_dependencies_are_pinned_for_the_tests() -> None:
    pins = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [*PYPROJECT["project"]["dependencies"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower() for requirement in wanted} - {"composeformer"}
    assert names <= pins
