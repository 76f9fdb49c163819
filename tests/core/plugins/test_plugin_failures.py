"""A broken plugin costs nobody else anything, and is told by distribution, version and cause."""

import logging
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composeformer.errors import PluginError
from composeformer.plugins import load_plugins

GOOD = 'yield component("good")'


def hook(*lines: str, name: str = "compose_components") -> str:
    """The source of a hook with these lines as its body."""
    return f"@hookimpl\ndef {name}():\n" + "".join(f"    {line}\n" for line in lines)


def component_of(arguments: str) -> str:
    return hook(GOOD, f"yield component({arguments})")


def config_of(field: str, decorator: str = "@config") -> str:
    return f"{decorator}\nclass Odd(Config):\n    {field}\n" + component_of('"odd", config=Odd')


def implementation_of(arguments: str) -> str:
    return component_of(f'"odd", implementations=(Implementation({arguments}),)')


# Every way in which a plugin is known to be broken, and what must be said of it.
BAD: dict[str, tuple[str, str]] = {
    "missing_import": (
        "import nowhere_to_be_found\n",
        "its import raised ModuleNotFoundError: No module named",
    ),
    "syntax_error": ("def (:\n", "its import raised SyntaxError"),
    "exits": ("raise SystemExit(3)\n", "its import raised SystemExit: 3"),
    "skips": ("import pytest\npytest.skip('x', allow_module_level=True)\n", "its import raised Skipped"),
    "mute_error": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute\n",
        "Mute: (its message can not be shown)",
    ),
    "many_lines": ("raise ValueError('one\\ntwo\\n' + 'x' * 999)\n", "ValueError: one two xxx"),
    "raising_hook": (hook("raise ValueError('boom')"), "compose_components raised ValueError: boom"),
    "exiting_hook": (hook("raise SystemExit"), "compose_components raised SystemExit"),
    "half_generator": (hook(GOOD, "raise ValueError('half')"), "compose_components raised ValueError: half"),
    "second_hook_raises": (
        hook(GOOD) + hook("raise OSError('late')", name="compose_specs"),
        "compose_specs raised OSError: late",
    ),
    "misspelt": (
        hook(GOOD) + hook(GOOD, name="compose_componets"),
        "unknown hook 'compose_componets'; hooks: compose_components, compose_dialects, compose_specs, "
        "compose_topologies, "
        "compose_hardware; did you mean 'compose_components'?",
    ),
    "wrong_arguments": (
        f"@hookimpl\ndef compose_components(registry):\n    {GOOD}\n",
        "its hook is refused: compose_components(registry): Argument(s) {'registry'} are declared",
    ),
    "unmarked": (hook(GOOD).removeprefix("@hookimpl\n"), "compose_components is not marked with @hookimpl"),
    "wrapper": (
        "@hookimpl(wrapper=True)\ndef compose_components():\n    return (yield)\n",
        "compose_components is a wrapper",
    ),
    "no_hook": ("x = 1\n", "it implements no hook; hooks: compose_components"),
    "returns_none": (hook("component('good')"), "compose_components returned None"),
    "returns_one": (hook("return component('good')"), "compose_components returned Component instead of an"),
    "returns_text": (hook("return 'good'"), "compose_components returned str instead of an iterable"),
    "no_component": (hook(GOOD, "yield 3"), "it registers 3, which is not a Component"),
    "unknown_slot": (
        component_of('"odd", slot="mixr"'),
        "'odd': unknown slot; allowed: embedding, head, mixer",
    ),
    "unhashable_slot": (component_of('"odd", slot=[]'), "compose_components raised TypeError"),
    "odd_kind": (component_of('"no spaces"'), "a kind is made of letters, digits"),
    "no_kind": (component_of("None"), "a kind is made of letters, digits"),
    "odd_revision": (component_of('"odd", revision=0'), "revision = 0: must be an integer >= 1"),
    "odd_strategy": (
        component_of('"odd", strategy="tiny"'),
        "strategy = 'tiny': must be 'package.module:name'",
    ),
    "odd_claims": (component_of('"odd", claims="causal"'), "claims = 'causal': must be a tuple"),
    "no_reference": (
        implementation_of('"fast", "a.b:C"'),
        "no implementation named 'reference'; it has: fast",
    ),
    "no_implementation": (component_of('"odd", implementations=()'), "no implementation named 'reference'"),
    "listed": (component_of('"odd", implementations=[]'), "implementations must be a tuple"),
    "same_name": (
        component_of('"odd", implementations=(Implementation("reference", "a:B"),) * 2'),
        "implementations of the same name: reference, reference",
    ),
    "no_class": (
        implementation_of('"reference", "a.b.C"'),
        "module = 'a.b.C': must be 'package.module:Class'",
    ),
    "path_as_module": (implementation_of('"reference", "../a:B"'), "module = '../a:B': must be"),
    "module_object": (implementation_of('"reference", Path'), "must be 'package.module:Class'"),
    "odd_phase": (
        implementation_of('"reference", "a:B", phases=("fly",)'),
        "phases = ('fly',): must be some of",
    ),
    "odd_needs": (implementation_of('"reference", "a:B", needs=3'), "needs must be a function or None"),
    "no_config": (
        component_of('"odd", config=dict'),
        "config = <class 'dict'>: must be a subclass of Config",
    ),
    "config_value": (component_of('"odd", config=3'), "config = 3: must be a subclass"),
    "plain_config": (config_of("size: int = 3", ""), "config Odd must be decorated with @config"),
    "inheriting": (
        "class Odd(Size):\n    pass\n" + component_of('"odd", config=Odd'),
        "config Odd must be decorated with @config",
    ),
    "mutable_config": (
        config_of("size: int = field(default=3)", "@attrs.define"),
        "config Odd must be frozen",
    ),
    "mutable_empty": (
        "@attrs.define(slots=False)\nclass Odd(Config):\n    pass\n" + component_of('"o", config=Odd'),
        "config Odd must be frozen",
    ),
    "mutable_slots": (
        "@attrs.define\nclass Odd(Config):\n    pass\n" + component_of('"odd", config=Odd'),
        "config Odd must be frozen",
    ),
    "same_file": (
        hook(
            "here = Path(__file__).with_name('one.toml')",
            "here.write_text('')",
            "return [here] * 2",
            name="compose_specs",
        ),
        "compose_specs: one.toml is shipped twice",
    ),
    "list_field": (config_of("sizes: list[int] = field()"), "config Odd.sizes: list[int] is not int, float"),
    "dict_field": (config_of("sizes: dict[str, int] = field()"), "config Odd.sizes: dict[str, int] is not"),
    "no_field": (config_of("size: int = 3"), "config Odd.size is not made with field(), part(), layer() or records()"),
    "unknown_type": (config_of('size: "Nowhere" = field()'), "config name 'Nowhere' is not defined"),
    "list_default": (
        config_of("sizes: tuple[int, ...] = field([1])"),
        "Odd.sizes = [1]: the default must be a",
    ),
    "bad_default": (
        config_of("size: int = field(default=0, minimum=1)"),
        "config Odd.size = 0: must be >= 1",
    ),
    "wrong_default": (
        config_of('size: int = field(default="x")'),
        'config Odd.size = "x": must be an integer',
    ),
    "none_default": (config_of("size: int = field(default=None)"), "config Odd.size: must be an integer"),
    "twice": (hook(GOOD, GOOD), "compose_components: ffn 'good' is registered twice"),
    "two_defaults": (
        hook('yield component("a", default=True)', 'yield component("b", default=True)'),
        "ffn has two defaults, 'a' and 'b'",
    ),
    "no_file": (
        hook(GOOD) + hook("yield Path('gone.toml')", name="compose_specs"),
        "gone.toml does not exist",
    ),
    "no_toml": (hook(GOOD) + hook("yield Path(__file__)", name="compose_dialects"), "is not a .toml file"),
    "no_path": (hook(GOOD) + hook("yield 'a.toml'", name="compose_dialects"), "'a.toml' is not a path"),
    "asks_back": (
        "from composeformer import plugins\n" + hook("plugins.current()", GOOD),
        "compose_components raised PluginError: a plugin asks for the plugins while they are being loaded",
    ),
}

GOOD_KINDS = {"alpha": ["a1", "a2"], "omega": ["o1"]}


@pytest.fixture(scope="module")
def points(shared_site):
    """Entry points of every bad plugin and of two good ones, one early and one late in the order."""
    for name, kinds in GOOD_KINDS.items():
        shared_site.add(name, shared_site.components(*(f'"{kind}"' for kind in kinds)))
    for name, (body, _) in BAD.items():
        shared_site.add(name, body)
    return shared_site.entry_points()


@pytest.mark.parametrize("name", BAD)
def test_each_fault_is_told_by_distribution_version_and_cause(name, points, caplog):
    with caplog.at_level(logging.WARNING, "composeformer"):
        plugins = load_plugins(entry_points=[points[name]])
    (info,) = plugins.infos
    assert info.status == "failed"
    assert info.components == info.dialects == info.specs == ()
    assert BAD[name][1] in info.cause
    assert "\n" not in info.cause
    assert len(info.cause) < 500
    (record,) = caplog.records
    assert record.getMessage() == f"plugin {name} ({name}-dist 1.0) is not loaded: {info.cause}"
    assert len(plugins.registry) == 0
    assert plugins.manifest() == ()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from([*BAD, *GOOD_KINDS]), unique=True))
def test_good_plugins_are_whole_among_any_bad_ones(names, points):
    plugins = load_plugins(entry_points=[points[name] for name in names])
    good = [name for name in GOOD_KINDS if name in names]
    assert list(plugins.registry.kinds("ffn")) == [kind for name in good for kind in GOOD_KINDS[name]]
    assert [info.name for info in plugins.infos if info.status == "loaded"] == good
    assert sorted(info.name for info in plugins.infos) == sorted(names)
    assert len(plugins.problems) == len(names) - len(good)


@settings(max_examples=15, deadline=None)
@given(names=st.lists(st.sampled_from([*BAD, *GOOD_KINDS]), unique=True))
def test_strict_raises_all_faults_or_none(names, points):
    bad = [name for name in sorted(names) if name in BAD]
    chosen = [points[name] for name in names]
    if not bad:
        load_plugins(entry_points=chosen, strict=True)
        return
    with pytest.raises(PluginError) as raised:
        load_plugins(entry_points=chosen, strict=True)
    assert [line.split()[1] for line in raised.value.lines] == bad


def test_an_interrupt_is_the_users(site):
    site.add("slow", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_plugins()
    assert load_plugins(blocked=["slow"]).problems == ()


@pytest.mark.parametrize("value", ["no such thing", "", ":", "os:nowhere", "os:sep"])
def test_an_odd_entry_point_is_told(value, site):
    site.distribution("odd-dist", f"[composeformer]\nodd = {value}\n")
    (info,) = load_plugins().infos
    assert (info.name, info.distribution, info.status) == ("odd", "odd-dist", "failed")


def test_unreadable_metadata_costs_only_its_own_plugin(site):
    site.distribution("torn", "[composeformer]\nno equals sign\n")
    site.distribution("unrelated", "[other]\nno equals sign\n")
    site.distribution("binary", "[composeformer]\nx = y\n")
    (site.folder / "binary-1.0.dist-info" / "entry_points.txt").write_bytes(b"[composeformer]\n\xff = a")
    (site.folder / "nameless-1.0.dist-info").mkdir()
    (site.folder / "nameless-1.0.dist-info" / "entry_points.txt").write_text(
        "[composeformer]\nlost = nowhere\n"
    )
    site.add("alpha", site.components('"a1"'))
    plugins = load_plugins()
    assert plugins.registry.kinds("ffn") == ("a1",)
    told = {info.distribution: info.cause for info in plugins.infos if info.status == "failed"}
    assert "entry_points.txt can not be read" in told["torn"]
    assert "nowhere" in told["unnamed distribution"]
    assert "unrelated" not in told


def test_warnings_reach_stderr_and_nothing_stdout(site):
    site.add("raising_hook", BAD["raising_hook"][0])
    script = "from composeformer.plugins import current; current(); current()"
    done = subprocess.run(
        [sys.executable, "-c", script], env=site.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("plugin raising_hook (raising_hook-dist 1.0) is not loaded: compose_")
