"""Every Python and TOML snippet of the documentation runs as it stands; every `compose` line names a real command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            # "```toml fragment" shows a piece of a spec, or of another file.
            if match.group(1) == language and "fragment" not in match.group(2):
                line = text[: match.start()].count("\n") + 1
                found.append((f"{page.relative_to(ROOT)}:{line}", match.group(3)))
    return found


def ids(pair: tuple[str, str]) -> str:
    return pair[0]


@pytest.mark.parametrize("snippet", snippets("toml"), ids=ids)
def test_toml_snippet_is_a_valid_spec(snippet: tuple[str, str]) -> None:
    from composeformer.spec import Spec

    assert Spec.from_toml(snippet[1], snippet[0]).fingerprint


@pytest.mark.parametrize("snippet", snippets("python"), ids=ids)
def test_python_snippet_runs(snippet: tuple[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", snippet[1]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_commands_in_the_documentation_exist() -> None:
    from composeformer.cli import COMMANDS

    for page in PAGES:
        for command in re.findall(
            r"(?:^|\$ |`)compose ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE
        ):
            assert command in COMMANDS, f"{page.name}: compose {command}"
