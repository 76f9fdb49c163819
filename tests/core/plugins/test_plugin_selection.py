"""`--no-plugin` and COMPOSE_PLUGINS: what is not wanted is not imported, and a wrong name is told."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composeformer import plugins as under_test
from composeformer.errors import PluginError
from composeformer.plugins import configure, current, load_plugins

NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch):
    monkeypatch.delenv("COMPOSE_PLUGINS", raising=False)
    configure()
    yield
    configure()


@pytest.fixture
def three(site):
    return {name: site.add(name, site.components(f'"{name}"')) for name in NAMES}


def status(plugins):
    return {info.name: info.status for info in plugins.infos}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocked=st.sets(st.sampled_from(NAMES)),
    allowed=st.none() | st.sets(st.sampled_from(NAMES)),
    by_distribution=st.booleans(),
)
def test_only_the_wanted_are_imported(blocked, allowed, by_distribution, three):
    for module in three.values():
        sys.modules.pop(module, None)
    end = "-dist" if by_distribution else ""
    plugins = load_plugins(
        blocked=[name + end for name in blocked],
        allowed=None if allowed is None else [name + end for name in allowed],
    )
    wanted = (set(NAMES) if allowed is None else allowed) - blocked
    assert {name for name, module in three.items() if module in sys.modules} == wanted
    assert set(plugins.registry.kinds("ffn")) == wanted
    assert status(plugins) == {name: "loaded" if name in wanted else "blocked" for name in NAMES}
    assert plugins.problems == ()


def test_a_blocked_plugin_is_still_described(site, three):
    info = next(info for info in load_plugins(blocked=["beta"]).infos if info.name == "beta")
    assert (info.distribution, info.version, info.origin) == ("beta-dist", "1.0", three["beta"])
    assert info.cause == "blocked by --no-plugin"
    info = next(info for info in load_plugins(allowed=["alpha"]).infos if info.name == "beta")
    assert info.cause == "not listed in COMPOSE_PLUGINS"


def test_a_loaded_plugin_tells_its_file(site, three):
    for info in load_plugins().infos:
        assert info.origin == str(site.folder / f"{three[info.name]}.py")


@pytest.mark.parametrize("arguments", [{"blocked": ["gama"]}, {"allowed": ["alpha", "gama"]}])
def test_an_unknown_name_is_told_with_the_nearest(arguments, three):
    with pytest.raises(
        PluginError, match="gama: no such plugin; installed: alpha, beta, gamma; did you mean 'gamma'"
    ):
        load_plugins(**arguments)
    assert not set(three.values()) & set(sys.modules)


def test_names_are_compared_as_package_names(site):
    site.add("my_own", site.components('"own"'), distribution="My.Dist")
    for name in ("my-own", "my_own", "my-dist", "MY_DIST", "my-dist:my-own"):
        assert status(load_plugins(blocked=[name])) == {"my_own": "blocked"}


def test_equal_names_are_told_apart_by_distribution(site):
    site.add("same", site.components('"kind"'), distribution="one")
    points = "[composeformer]\nsame = " + site.modules[0] + "\n"
    site.distribution("two", points)
    plugins = load_plugins()
    (contest,) = plugins.registry.contests
    assert "--no-plugin one:same or --no-plugin two:same" in str(contest)
    plugins = load_plugins(blocked=["two:same"])
    assert [(info.distribution, info.status) for info in plugins.infos] == [
        ("one", "loaded"),
        ("two", "blocked"),
    ]
    assert plugins.problems == ()


def test_the_environment_lists_what_is_loaded(three, monkeypatch):
    monkeypatch.setenv("COMPOSE_PLUGINS", " alpha, gamma,")
    assert current().registry.kinds("ffn") == ("alpha", "gamma")
    configure(blocked=["gamma"])
    assert current().registry.kinds("ffn") == ("alpha",)
    configure(allowed=["beta"])
    assert current().registry.kinds("ffn") == ("beta",)
    configure()
    monkeypatch.setenv("COMPOSE_PLUGINS", "")
    assert current().registry.kinds("ffn") == NAMES
    configure()
    monkeypatch.setenv("COMPOSE_PLUGINS", "alpa")
    with pytest.raises(PluginError, match=r"COMPOSE_PLUGINS alpa: no such plugin.*did you mean 'alpha'"):
        current()


def test_current_loads_once(three, monkeypatch):
    first = current()
    monkeypatch.setattr(under_test, "load_plugins", lambda **_: pytest.fail("loaded again"))
    assert current() is first


def test_strict_settings_reach_current(site, three):
    site.add("broken", "raise ValueError('boom')\n")
    assert status(current())["broken"] == "failed"
    configure(strict=True)
    with pytest.raises(PluginError, match="boom"):
        current()
    configure(strict=True, blocked=["broken"])
    assert current().registry.kinds("ffn") == NAMES


def test_a_new_process_has_the_same_digest(site, three):
    script = "from composeformer.plugins import current; print(current().digest())"
    done = subprocess.run(
        [sys.executable, "-c", script], env=site.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == load_plugins().digest()
