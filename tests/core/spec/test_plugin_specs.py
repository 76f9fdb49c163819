"""Specs that plugins ship are named like the built-in ones, and two of one name are told apart."""

from pathlib import Path

import pytest

from composeformer.errors import ComposeError
from composeformer.plugins import PluginInfo, Plugins
from composeformer.spec import inherit

WIDE = 'extends = "tiny-llama"\nname = "wide"\n[model]\nhidden_size = 128\n'


def plugin(name: str, *specs: Path) -> PluginInfo:
    return PluginInfo(name=name, distribution=name, version="1", origin=name, status="loaded", specs=specs)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.toml"
    path.write_text(WIDE)
    return path


def test_spec_of_a_plugin_is_found_by_name_and_extended(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherit, "current", lambda: Plugins([plugin("mine", wide)]))
    assert "wide" in inherit.shipped()
    document = inherit.load("wide")
    assert document.data["model"]["hidden_size"] == 128  # type: ignore[index]
    assert str(document.source(("model", "hidden_size"))) == "mine/wide.toml:4"
    assert inherit.resolve(inherit.parse('extends = "wide"', "x"), None).data["name"] == "wide"


def test_spec_that_two_plugins_ship_is_refused_with_both_names(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inherit, "current", lambda: Plugins([plugin("mine", wide), plugin("yours", wide)]))
    with pytest.raises(ComposeError, match="mine and yours both ship"):
        inherit.load("wide")


def test_built_in_spec_comes_before_a_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny-llama.toml"
    path.write_text(WIDE)
    monkeypatch.setattr(inherit, "current", lambda: Plugins([plugin("mine", path)]))
    assert inherit.load("tiny-llama").data["model"]["hidden_size"] == 64  # type: ignore[index]
