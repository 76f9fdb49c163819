"""Two plugins that register the same: told, not settled by order, and solved by blocking either."""

import logging

import pytest

from composeformer.errors import PluginError
from composeformer.plugins import load_plugins


@pytest.fixture
def rivals(site):
    site.add("one", site.components('"shared"', '"left"', '"n1", slot="norm", default=True'))
    site.add("two", site.components('"shared"', '"right"', '"n2", slot="norm", default=True'))


def test_a_conflict_is_logged_once_and_nothing_else_suffers(rivals, caplog):
    with caplog.at_level(logging.WARNING, "composeformer"):
        plugins = load_plugins()
    assert plugins.registry.kinds("ffn") == ("left", "right")
    assert [record.getMessage() for record in caplog.records] == list(plugins.problems)
    assert len(plugins.problems) == 2
    for info in plugins.infos:
        assert info.status == "loaded"
        assert info.conflicts == plugins.problems
    for lookup in (lambda: plugins.registry.get("ffn", "shared"), lambda: plugins.registry.default("norm")):
        with pytest.raises(PluginError, match=r"one \(one-dist 1.0\) and two \(two-dist 1.0\)"):
            lookup()
    assert plugins.registry.get("norm", "n1").kind == "n1"


@pytest.mark.parametrize(("blocked", "default"), [("one", "n2"), ("two", "n1")])
def test_blocking_either_settles_it(blocked, default, rivals):
    plugins = load_plugins(blocked=[blocked], strict=True)
    assert plugins.registry.get("ffn", "shared").kind == "shared"
    assert plugins.registry.default("norm").kind == default


def test_strict_raises_on_a_conflict(rivals):
    with pytest.raises(PluginError, match="registered by plugins one") as raised:
        load_plugins(strict=True)
    assert len(raised.value.lines) == 2
