"""The page on the plugin API is true: its version, its hooks, its public names; and plugins need no other."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from composeformer import hookspecs
from composeformer.deprecation import DEPRECATED
from composeformer.plugins import HOOKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plugin_api.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TABLE = re.search(r"^\| module \| names \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)


def public() -> dict[str, list[str]]:
    """The names of each module, as the page lists them."""
    assert TABLE is not None
    rows = [
        [re.findall(r"`([\w.]+)`", cell) for cell in row.split("|")[1:3]] for row in TABLE[1].splitlines()
    ]
    return {module: names for (module,), names in rows}


def imported(text: str) -> Iterator[tuple[str, str]]:
    """What a module takes from composeformer: module and name; a module itself has the name `*`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "composeformer":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.split(".")[0] == "composeformer"]
            yield from ((name, "*") for name in found if name != "composeformer")


def sources() -> list[tuple[str, str]]:
    """What is written against the API: the built-in plugins, those of a third party's shape, templates, snippets."""
    files = [
        *(ROOT / "plugins").rglob("composeformer_*/**/*.py"),
        *(path for path in (ROOT / "tests" / "thirdparty").glob("*/*/*.py") if "bad" not in path.parts),
        *(ROOT / "core" / "composeformer" / "scaffold" / "templates").rglob("*.py.txt"),
    ]
    found = [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in sorted(files)]
    for page in ("plugins.md", "tutorial.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        # A fragment that is no file of its own may be no whole Python.
        whole = [code for words, code in FENCE.findall(text) if "fragment" not in words or ".py" in words]
        found += [(f"docs/{page}, block {number}", code) for number, code in enumerate(whole)]
    return found


def test_the_version_and_the_range_are_those_of_the_code() -> None:
    assert f"The version is **{hookspecs.API_VERSION}**" in PAGE
    assert f'dependencies = ["composeformer{hookspecs.API_RANGE}"]' in PAGE


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_listed_with_its_signature(hook: str) -> None:
    signature = str(inspect.signature(getattr(hookspecs, hook)))
    short = signature.replace("collections.abc.", "").replace("'", "")
    assert f"\n{hook}{short}\n" in PAGE


def test_no_other_hook_is_listed() -> None:
    assert set(re.findall(r"^(compose_\w+)\(", PAGE, re.MULTILINE)) == set(HOOKS)


@pytest.mark.parametrize("module", public())
def test_each_public_name_exists_once(module: str) -> None:
    names = public()[module]
    assert len(set(names)) == len(names)
    found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []
    assert [name for name in names if name.startswith("_")] == []


def test_what_a_module_exports_is_what_is_public_of_it() -> None:
    for module, names in public().items():
        exported = getattr(importlib.import_module(module), "__all__", None)
        if exported is not None and module not in ("composeformer.assemble", "composeformer.testing"):
            assert set(names) == {name for name in exported if not name.startswith("_")}, module


def test_plugins_need_nothing_that_is_not_public() -> None:
    listed = public()
    strangers = {
        f"{place}: {module}.{name}"
        for place, text in sources()
        for module, name in imported(text)
        if name not in listed.get(module, ()) and f"{module}.{name}" not in listed
    }
    assert strangers == set()


def test_description_modules_are_said_to_import_no_torch_as_the_contract_has_it() -> None:
    import tomli

    contracts = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (quiet,) = [one["source_modules"] for one in contracts if "never imports torch" in one["name"]]
    modules = [name for name in public() if name not in ("composeformer", "composeformer.testing")]
    upper = modules[: modules.index("composeformer.plugins") + 1]
    lower = modules[len(upper) :]
    covered = [name for name in modules if any(name == q or name.startswith(f"{q}.") for q in quiet)]
    assert covered == upper
    assert lower


def test_each_deprecation_is_told() -> None:
    for name, one in DEPRECATED.items():
        assert f"`{name}`" in PAGE, name
        assert one.instead in PAGE, name
    assert ("Deprecated now: nothing." in PAGE) == (not DEPRECATED)
