"""What is to go warns its user for one minor version; our own use of it is an error."""

import warnings
from collections.abc import Callable

import pluggy
import pytest

from composeformer import deprecation, discovery
from composeformer.deprecation import DEPRECATED, Deprecation, deprecated, warning
from composeformer.hookspecs import API_RANGE, API_VERSION

OLD = {"composeformer.mine.old": Deprecation(since="0.1", gone="0.2", instead="call new")}
TOLD = "composeformer.mine.old is deprecated since version 0.1 of the plugin API and gone in 0.2: call new"


def number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def old() -> str:
    deprecated("composeformer.mine.old")
    return "still there"


def called_from(module: str) -> Callable[[], str]:
    """A function of that module which uses what is deprecated."""
    code = compile("def use():\n    return old()\n", f"{module}.py", "exec")
    names = {"__name__": module, "old": old}
    used = code.co_consts[0]
    return type(old)(used, names)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecation, "DEPRECATED", OLD)


def test_a_plugin_that_uses_it_is_warned_at_its_own_line() -> None:
    with pytest.warns(DeprecationWarning, match="mine.old") as caught:
        assert called_from("somebodys.module")() == "still there"
    (one,) = caught
    assert (str(one.message), one.filename) == (TOLD, "somebodys.module.py")


@pytest.mark.parametrize("module", ["composeformer.train.step", "composeformer_moe.reference"])
def test_where_it_is_our_own_code_the_tests_fail(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        called_from(module)()


def test_a_hook_that_goes_warns_the_plugin_that_has_it() -> None:
    hookspec, hookimpl = pluggy.HookspecMarker("composeformer"), pluggy.HookimplMarker("composeformer")

    class Specs:
        @hookspec(warn_on_impl=warning("composeformer.mine.old"))
        def compose_old(self) -> None:
            """Gone soon."""

    class Plugin:
        @hookimpl
        def compose_old(self) -> None:
            """Of a plugin that is not mended yet."""

    manager = pluggy.PluginManager("composeformer")
    manager.add_hookspecs(Specs)
    with pytest.warns(DeprecationWarning, match="composeformer.mine.old is deprecated"):
        manager.register(Plugin())


def test_nothing_stays_longer_than_it_was_to_or_goes_sooner() -> None:
    for name, one in {**DEPRECATED, **OLD}.items():
        assert number(one.since) <= number(API_VERSION) < number(one.gone), name


def test_the_version_of_the_api_is_that_of_composeformer() -> None:
    version = discovery.own_version()
    assert version is not None
    major, minor = number(API_VERSION)
    assert version.split(".")[:2] == [str(major), str(minor)]
    assert f">={API_VERSION},<{major}.{minor + 1}" == API_RANGE


def test_what_is_not_deprecated_can_not_be_warned_of() -> None:
    with warnings.catch_warnings(), pytest.raises(KeyError):
        deprecated("composeformer.mine.new")
