"""What is installed is read from metadata alone: once, in a stable order, with its requirement checked."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composeformer import discovery
from composeformer.plugins import load_plugins


def test_our_own_come_first_then_the_others_by_name(site):
    for name in ("zeta", "alpha", "mid"):
        site.add(name, site.components(f'"{name}"'))
    module = site.add("plain", site.components('"plain"'))
    points = f"[composeformer]\nown = {module}\nbuilt_in = {module}\n"
    (site.metadata / "composeformer-1.2.0.dist-info" / "entry_points.txt").write_text(points)
    found = discovery.find()
    assert [candidate.name for candidate in found] == ["built_in", "own", "alpha", "mid", "plain", "zeta"]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_order_of_the_path_changes_what_is_loaded(data, shared_site):
    if not shared_site.modules:
        for name in ("alpha", "beta", "gamma"):
            shared_site.add(name, shared_site.components(f'"{name}"', '"both"'))
    points = list(shared_site.entry_points().values())
    plugins = load_plugins(entry_points=data.draw(st.permutations(points * 2)))
    assert [info.name for info in plugins.infos] == ["alpha", "beta", "gamma"]
    assert plugins.digest() == load_plugins(entry_points=points).digest()


def test_a_distribution_found_twice_counts_once_as_the_first_on_the_path(site, tmp_path, monkeypatch):
    module = site.add("alpha", site.components('"first"'))
    second = tmp_path / "second"
    info = second / "alpha_dist-9.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Alpha_Dist\nVersion: 9.0\n")
    (info / "entry_points.txt").write_text(f"[composeformer]\nalpha = {module}\nmore = {module}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
    (found,) = discovery.find()
    assert (found.name, found.version) == ("alpha", "1.0")
    # The other way round, what only the later one has is shadowed as its modules are.
    monkeypatch.setattr(sys, "path", [str(second), *sys.path])
    assert [(c.name, c.version) for c in discovery.find()] == [("alpha", "9.0"), ("more", "9.0")]


@pytest.mark.parametrize(
    ("requires", "shown"),
    [
        ([], None),
        (["composeformer"], "composeformer"),
        (["composeformer>=1.0,<2"], "composeformer<2,>=1.0"),
        (["Composeformer [text] ~=1.1"], "composeformer~=1.1"),
        (["composeformer (>=1.2)"], "composeformer>=1.2"),
        (["composeformer>=9; python_version < '3'", "composeformer>=1"], "composeformer>=1"),
        (["composeformer>=9; extra == 'new'"], None),
        (["composeformer-moe>=9", "numpy"], None),
        (["composeformer @ file:///somewhere"], "composeformer"),
    ],
)
def test_a_requirement_that_is_met_is_shown(requires, shown, site):
    site.add("alpha", site.components('"a"'), requires=requires)
    (info,) = load_plugins().infos
    assert (info.status, info.requires) == ("loaded", shown)


@pytest.mark.parametrize(
    ("requires", "cause"),
    [
        (["composeformer>=2"], "it requires composeformer>=2, and this is composeformer 1.2.0"),
        (["composeformer<1.2"], "it requires composeformer<1.2, and this is composeformer 1.2.0"),
        (
            ["composeformer>=1", "composeformer==3; python_version > '3'"],
            "it requires composeformer==3,>=1, and",
        ),
        (["composeformer>=="], "its requirement 'composeformer>==' can not be read"),
    ],
)
def test_a_requirement_that_is_not_met_is_refused_before_import(requires, cause, site):
    module = site.add("alpha", "raise AssertionError('imported')\n", requires=requires)
    (info,) = load_plugins().infos
    assert info.status == "failed"
    assert cause in info.cause
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("ours", "requirement", "met"),
    [
        ("1.3.0rc1", "composeformer>=1.2", True),
        ("1.3.0.dev4", "composeformer>=1.2,<2", True),
        ("1.3.0rc1", "composeformer>=1.3", False),
        ("1.3.0rc1", "composeformer>=1.3.0rc1", True),
        ("1.2.0+local", "composeformer==1.2.0", True),
    ],
)
def test_a_prerelease_of_ours_counts_by_its_place_in_the_order(ours, requirement, met, site, monkeypatch):
    monkeypatch.setattr(discovery, "own_version", lambda: ours)
    site.add("alpha", site.components('"a"'), requires=[requirement])
    assert load_plugins().infos[0].status == ("loaded" if met else "failed")


def test_our_own_distribution_is_not_held_to_a_requirement(site):
    module = site.add("alpha", site.components('"a"'))
    info = site.metadata / "composeformer-1.2.0.dist-info"
    (info / "entry_points.txt").write_text(f"[composeformer]\nown = {module}\n")
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: composeformer\nVersion: 1.2.0\nRequires-Dist: composeformer[text]>=9\n"
    )
    assert {info.name: info.status for info in load_plugins().infos} == {"own": "loaded", "alpha": "loaded"}


def test_loading_imports_neither_torch_nor_what_implementations_name(site):
    site.add("alpha", site.components('"a"'))
    script = (
        "import sys; from composeformer.plugins import current; assert current().registry.get('ffn', 'a')\n"
        "heavy = {'torch', 'numpy', 'rich', 'click', 'packaging', 'pkg_resources', 'never'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=site.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
