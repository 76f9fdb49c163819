"""Plugins from outside, built into wheels and installed where nothing of this tree is, alone and together."""

import re
import shutil
from math import log, prod, sqrt
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tomli

HERE = Path(__file__).parent
SPEC = HERE / "mixed.toml"
BRINGS = {
    "gated-delta": ("mixer", "gated-delta", ["chunked", "reference"]),
    "hash-router": ("router", "hash", ["reference"]),
    "int4-groups": ("precision", "int4-groups", ["reference"]),
}


@pytest.fixture(scope="module")
def facts(clean: Any) -> Any:
    """What `mixed_run.py` finds in the clean environment."""
    return clean.json("python", str(HERE / "mixed_run.py"), str(SPEC), "folder")


@pytest.mark.parametrize("name", BRINGS)
def test_a_package_has_the_shape_of_a_third_partys(name: str) -> None:
    folder = HERE / name
    project = tomli.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == name
    assert project["dependencies"] == ["composeformer>=0.1,<0.2"]
    assert set(project["entry-points"]) == {"composeformer"}
    assert (folder / "README.md").exists()
    (laws,) = folder.glob("tests/test_*_laws.py")
    assert f'test_laws = laws_of("{name}")' in laws.read_text().splitlines()


def test_they_are_listed_with_what_they_bring(clean: Any) -> None:
    plugins = {plugin["name"]: plugin for plugin in clean.json("compose", "plugins", "--json")["plugins"]}
    assert {plugin["status"] for plugin in plugins.values()} == {"loaded"}
    for name, (slot, kind, implementations) in BRINGS.items():
        assert str(clean.folder) in plugins[name]["origin"]
        assert plugins[name]["distribution"] == name
        (component,) = clean.json("compose", "plugins", "info", name, "--json")["components"]
        assert (component["slot"], component["kind"]) == (slot, kind)
        assert [each["name"] for each in component["implementations"]] == implementations
        assert all(each["help"] for each in component["fields"].values() if each["affects"] != "execution")


def test_the_schema_checks_their_fields(clean: Any) -> None:
    schema = clean.json("compose", "schema")
    data = tomli.loads(SPEC.read_text())
    jsonschema.validate(data, schema)
    for path in (
        ("mixer", "delta", "num_heads"),
        ("ffn", "hashed", "router", "top_k"),
        ("precision", "group_size"),
    ):
        wrong = tomli.loads(SPEC.read_text())
        table = wrong
        for step in path[:-1]:
            table = table[step]
        table[path[-1]] = 0
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
        done = clean.run("compose", "check", str(SPEC), "--set", f"{'.'.join(path)}=0")
        assert done.returncode == 2
        assert f"{'.'.join(path)} = 0: must be" in done.stderr


def test_costs_and_the_tree_are_what_is_built(clean: Any, facts: Any) -> None:
    """The cost of a state is the same at any length; it is in fp32, and told in elements of bfloat16."""
    counts = clean.json("compose", "cost", str(SPEC), "--json")["parameters"]
    assert counts["total"] + counts["predictor"] == facts["built"]["parameters"]
    declared, allocated, with_journal = facts["built"]["cache"]
    assert declared == allocated
    heads, keys, values, rows, back, layers = 2, 16, 32, 3, 2, 2
    # Where a cache has a slot for every token, none is added for what may be rolled back; a state adds its journal.
    assert with_journal - allocated == layers * 4 * rows * back * heads * (keys + values + 2)
    state = layers * prod((heads, keys, values)) * 4
    costs = [
        clean.json("compose", "cost", str(SPEC), "--context", str(n), "--json")["cache_bytes_at_context"]
        for n in (1, 100)
    ]
    latent = 2 * (32 + 16)
    assert costs == [state + latent, state + 100 * latent]

    tree = clean.json("compose", "show", str(SPEC), "--json")["tree"]
    parts = [layer[slot] for layer in tree["layers"] for slot in ("mixer", "ffn")]
    assert [part["kind"] for part in parts] == ["gated-delta", "swiglu", "mla", "moe", "gated-delta", "moe"]
    assert parts[3]["children"]["router"]["kind"] == "hash"
    assert parts[0]["implementations"] == ["chunked", "reference"]
    assert facts["built"]["choices"] == {"train": "chunked", "prefill": "chunked", "decode": "reference"}


def test_every_map_is_what_the_policy_from_outside_makes_of_it(facts: Any) -> None:
    bits, values = facts["built"]["bits"], facts["built"]["values"]
    for part in ("layers.1.mixer.kv_b", "layers.1.ffn.up", "layers.0.mixer.q", "predictor.depths.0.ffn.down"):
        assert bits[part] == 4
    for part in ("layers.2.ffn.router.gate", "layers.0.mixer.a"):
        assert bits[part] == 32
    assert {role for role, width in bits.items() if width == 4} == {
        role for role, several in values.items() if several <= 15
    }


def test_a_model_that_mixes_them_learns_and_is_the_same_when_loaded(facts: Any) -> None:
    losses = facts["learnt"]["losses"]
    assert (
        max(losses[-3:]) < log(128) - 1 < losses[0]
    )  # of 128 tokens, unlearnt, each is as likely as any other
    assert facts["learnt"]["still"] == []
    assert facts["different"] == []


def test_speculative_decoding_over_states_and_latents_is_greedy_decoding(facts: Any) -> None:
    exact, lossy = facts["exact"], facts["text"]
    assert exact["drafted"] == exact["plain"]
    assert sum(exact["accepted"]) > 0
    assert exact["lost"] == 0
    # Three layers of at most seven products and three, and the head, each rounded to bfloat16; their errors' squares
    # add up, and the largest of two logits' over a few dozens is below four times the root mean square.
    assert lossy["lost"] <= 2 * 4 * sqrt(3 * 10 + 1) * 2**-8
    assert [len(row) for row in lossy["drafted"]] == [len(row) for row in lossy["plain"]] == [14] * 3


# A tenth of the laws' cases: here it is tried that they are all there and hold; how far is a matter of longer runs.
PROFILE = """
from hypothesis import settings

settings.register_profile("tenth", max_examples=10)
"""


def test_their_own_suites_hold_all_laws_where_they_are_installed(clean: Any) -> None:
    """Each has the one line, which makes a test of every law of its slot and of every slot. Laws of whole models are
    left to longer runs: they are of all that is installed.
    """
    suites = clean.folder / "suites"
    for name in BRINGS:
        shutil.copytree(HERE / name / "tests", suites / name)
    (suites / "conftest.py").write_text(PROFILE)
    options = ("-v", "-p", "no:cacheprovider", "--import-mode=importlib", "--hypothesis-profile=tenth")
    done = clean.run("python", "-m", "pytest", *options, "-k", "not model.", "suites")
    assert done.returncode == 0, done.stdout
    outcomes = re.findall(r"^suites/([^/]+)/\S+::test_laws\[(\S+)\] (\w+)", done.stdout, re.MULTILINE)
    assert {outcome for _, _, outcome in outcomes} == {"PASSED"}
    for name, (slot, kind, implementations) in BRINGS.items():
        tried = {law for owner, law, _ in outcomes if owner == name}
        for implementation in implementations:
            own = {law for law in tried if law.endswith(f"-{kind}-{implementation}")}
            assert {law.partition(".")[0] for law in own} == {slot, "everywhere"}
            tried -= own
        assert tried == set()


def test_a_certificate_has_every_law_with_its_cases_and_its_bound(clean: Any) -> None:
    certificate = clean.json(
        "compose", "plugins", "check", "hash-router", "--slot", "router", "--examples", "3", "--json"
    )
    assert certificate["held"] is True
    for finding in certificate["findings"]:
        assert (finding["slot"], finding["kind"]) == ("router", "hash")
        assert (finding["verdict"], finding["why"]) == ("held", "") or finding["verdict"] == "does not apply"
        assert finding["error"] <= finding["bound"]
        assert finding["cases"] > 0 or finding["verdict"] == "does not apply"
