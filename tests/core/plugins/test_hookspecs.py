"""Each hook is documented and tested, and reaches what is loaded."""

import ast
import inspect
from pathlib import Path

import pytest

from composeformer import hookspecs
from composeformer.plugins import HOOKS, load_plugins

FILES = """
@hookimpl
def {hook}():
    here = Path(__file__).parent
    return [here / "b.toml", here / "a.toml"]
"""

RESOURCE = """
import importlib.resources

@hookimpl
def compose_specs():
    yield importlib.resources.files("resource_package") / "tiny.toml"
"""
OBJECT = """
class Plugin:
    @hookimpl
    def compose_components(self):
        yield component("a")

plugin = Plugin()
"""


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_says_when_in_which_order_and_what_it_returns(hook):
    document = inspect.getdoc(getattr(hookspecs, hook))
    assert document is not None
    starts = [line.split()[0] for line in document.splitlines() if line.strip()]
    positions = [starts.index(word) for word in ("When:", "Order:", "Returns:")]
    assert positions == sorted(positions)
    assert positions[0] > 0


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_typed_and_its_spec_gives_nothing(hook):
    function = getattr(hookspecs, hook)
    assert str(inspect.signature(function).return_annotation).startswith("collections.abc.Iterable[")
    assert list(function()) == []


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_has_a_test_of_its_name(hook):
    names = {
        node.name
        for node in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert any(name.startswith(f"test_{hook}") for name in names)


def test_compose_components_registers_what_is_yielded(site):
    site.add("alpha", site.components('"a"', '"b", slot="norm", default=True, revision=2'))
    registry = load_plugins().registry
    assert registry.get("ffn", "a").implementations[0].name == "reference"
    assert registry.default("norm").revision == 2
    assert [(part.slot, part.kind) for part in registry] == [("ffn", "a"), ("norm", "b")]


def test_compose_dialects_are_found_in_order(site):
    for name in ("a", "b"):
        (site.folder / f"{name}.toml").write_text("")
    site.add("alpha", FILES.format(hook="compose_dialects"))
    plugins = load_plugins()
    assert [file.name for file in plugins.dialect_files] == ["b.toml", "a.toml"]
    assert plugins.infos[0].dialects == plugins.dialect_files
    assert plugins.spec_files == ()


def test_compose_specs_are_found_also_as_package_resources(site):
    package = site.folder / "resource_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tiny.toml").write_text("format = 1")
    site.modules.append("resource_package")
    site.add("alpha", RESOURCE)
    (file,) = load_plugins().spec_files
    assert file.read_text() == "format = 1"


def test_compose_topologies_are_found_in_order(site):
    for name in ("a", "b"):
        (site.folder / f"{name}.toml").write_text("")
    site.add("alpha", FILES.format(hook="compose_topologies"))
    plugins = load_plugins()
    assert [file.name for file in plugins.topology_files] == ["b.toml", "a.toml"]
    assert plugins.infos[0].topologies == plugins.topology_files
    assert plugins.spec_files == plugins.dialect_files == ()


def test_compose_hardware_is_found_in_order(site):
    for name in ("a", "b"):
        (site.folder / f"{name}.toml").write_text("")
    site.add("alpha", FILES.format(hook="compose_hardware"))
    plugins = load_plugins()
    assert [file.name for file in plugins.hardware_files] == ["b.toml", "a.toml"]
    assert plugins.infos[0].hardware == plugins.hardware_files


def test_compose_hooks_may_be_methods_of_an_object(site):
    module = site.add("alpha", OBJECT)
    (site.metadata / "alpha_dist-1.0.dist-info" / "entry_points.txt").write_text(
        f"[composeformer]\nalpha = {module}:plugin\n"
    )
    assert load_plugins(strict=True).registry.kinds("ffn") == ("a",)
