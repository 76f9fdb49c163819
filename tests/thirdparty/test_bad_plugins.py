"""Bad plugins from outside are refused, or failed by the laws, with the cause named; all else installed works."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli

BAD = Path(__file__).parent / "bad"
GOOD = {"gated-delta", "hash-router", "int4-groups"}
# Refused before anything of them is registered, and what is said.
REFUSED = {
    "raises-on-import": "its import raised ModuleNotFoundError: No module named 'a_library_that_nobody_has'",
    "misspelt-hook": "unknown hook 'compose_componets'; hooks: compose_components",
    "wrong-range": "requires composeformer<8,>=7",
    "half-registered": "compose_components raised OSError: the list of the other half is missing",
    "mutable-config": "norm 'mutable': config Mutable must be frozen: decorate it with @config",
}
ALL = sorted(path.name for path in BAD.iterdir() if path.is_dir())


def install(names: list[str], folder: Path) -> str:
    """The packages as pip would lay them out, in a folder for PYTHONPATH."""
    for name in names:
        project = tomli.loads((BAD / name / "pyproject.toml").read_text())["project"]
        module = name.replace("-", "_")
        if (BAD / name / module).is_dir():
            shutil.copytree(BAD / name / module, folder / module)
        else:
            shutil.copy(BAD / name / f"{module}.py", folder)
        info = folder / f"{module}-{project['version']}.dist-info"
        info.mkdir()
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {project['version']}"]
        metadata += [f"Requires-Dist: {needed}" for needed in project["dependencies"]]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        points = project["entry-points"]["composeformer"]
        lines = [f"{point} = {target}" for point, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[composeformer]", *lines]) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where all of them are installed."""
    return install(ALL, tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def listed(clean: Any, path: str) -> dict[str, Any]:
    """What `compose plugins` says of each plugin."""
    return {
        each["name"]: each for each in clean.json("compose", "plugins", "--json", PYTHONPATH=path)["plugins"]
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_plugin_is_refused_with_its_cause(name: str, listed: dict[str, Any]) -> None:
    plugin = listed[name]
    assert (plugin["distribution"], plugin["version"], plugin["status"]) == (name, "0.1.0", "failed")
    assert REFUSED[name] in plugin["cause"]
    assert plugin["components"] == plugin["dialects"] == []


def test_all_others_are_loaded(listed: dict[str, Any]) -> None:
    assert {name for name, plugin in listed.items() if plugin["status"] == "failed"} == set(REFUSED)
    assert {name for name, plugin in listed.items() if plugin["status"] == "loaded"} > GOOD | set(ALL) - set(
        REFUSED
    )


def test_of_two_parts_of_one_kind_neither_is_taken_until_one_is_chosen(
    clean: Any, path: str, listed: dict[str, Any]
) -> None:
    for name in ("duplicate-kind", "dense"):
        (conflict,) = listed[name]["conflicts"]
        assert 'mixer.kind = "gqa": registered by plugins dense (composeformer' in conflict
        assert "duplicate-kind (duplicate-kind 0.1.0)" in conflict
    refused = clean.run("compose", "check", "tiny-llama", PYTHONPATH=path)
    assert refused.returncode == 2
    assert "--no-plugin duplicate-kind" in refused.stderr
    chosen = clean.run("compose", "--no-plugin", "duplicate-kind", "check", "tiny-llama", PYTHONPATH=path)
    assert chosen.returncode == 0, chosen.stderr


def test_nothing_of_a_half_registered_plugin_can_be_had(clean: Any, path: str) -> None:
    asked = clean.run("compose", "check", "tiny-llama", "--set", 'norm.rms.kind="half"', PYTHONPATH=path)
    assert asked.returncode == 2
    assert 'kind = "half": unknown norm kind' in asked.stderr
    assert "half-registered (half-registered 0.1.0)" in asked.stderr


# Well-formed, and wrong: the law that fails each, the part, and what is said.
FAILED = {
    ("leaking-cache", "mixer.cached"): ("leaking", "new tokens beside the whole document: differs by"),
    ("lying-cost", "everywhere.flops"): ("cheap-products", "declared are"),
    ("lying-cost", "mixer.cache-bytes"): ("cheap-cache", "declared elements"),
    ("counts-evaluation", "everywhere.stateless"): ("balanced", "router.load after a forward"),
    ("foreign-names", "dialect.names"): (
        "astray.toml",
        "this model has no tensor layers.0.mixer.query.weight",
    ),
}
# Beside each wrong price stands a right one.
HELD = {
    ("lying-cost", "everywhere.flops"): "cheap-cache",
    ("lying-cost", "mixer.cache-bytes"): "cheap-products",
}


@pytest.mark.parametrize(("name", "law"), FAILED)
def test_a_part_that_is_wrong_is_failed_by_a_law_with_a_counterexample(
    name: str, law: str, clean: Any, path: str
) -> None:
    without = ("--no-plugin", "duplicate-kind")  # of which no part can be had while it is contested
    done = clean.run("compose", *without, "plugins", "check", name, "--law", law, "--json", PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    certificate = json.loads(done.stdout)
    assert certificate["held"] is False
    findings = {finding["kind"]: finding for finding in certificate["findings"]}
    kind, cause = FAILED[name, law]
    assert cause in findings[kind]["why"]
    broken = {kind for kind, finding in findings.items() if finding["verdict"] == "broken"}
    if law == "dialect.names":
        assert broken == {"astray.toml", "stranger.toml"}
        assert 'config.heads: "mixer.heads" leads nowhere' in findings["stranger.toml"]["why"]
        return
    assert broken == {kind}
    assert findings.keys() - broken == ({HELD[name, law]} if (name, law) in HELD else set())
    assert f"replay(\n        {law!r}," in findings[kind]["counterexample"]
