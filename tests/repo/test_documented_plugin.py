"""The plugins that the documentation writes, installed as they stand: a mixer and a precision policy."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"
SPEC = """
extends = "tiny-llama"
[mixer.mean]
kind = "average"
[[layers]]
repeat = 2
layers = [{ mixer = "mean" }, { mixer = "attention" }]
"""
USE = """
import json, sys, torch
import composeformer as cf
model = cf.build(sys.argv[1], dtype="float64", seed=1)
ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
valid = torch.ones(2, 20, dtype=torch.bool)
valid[1, :5] = False
with torch.no_grad():
    full = model(ids, valid=valid).logits
    cache = model.new_cache(2, 20)
    parts = [model(ids[:, a:b], valid=valid[:, a:b], cache=cache).logits for a, b in ((0, 7), (7, 8), (8, 20))]
gap = float((torch.cat(parts, 1) - full)[valid].abs().max())
counts = cf.cost(sys.argv[1])
print(json.dumps({"gap": gap, "cache": counts.cache_bytes_per_token, "held": cache.num_bytes}))
"""


TERNARY = """
extends = "tiny-deepseek-v3"
name = "ternary"
[precision]
kind = "ternary"
rules = [
  { roles = "layers.0.ffn", format = "bf16" },
  { roles = "*.router", format = "ternary" },
]
"""
TRAIN = """
import json, sys, torch
import composeformer as cf
from composeformer.train import TokenBatch, train_step, trained, trainer
model = cf.build(sys.argv[1], seed=1)
bits, values = {}, {}
for role in model.spec.plan.linears:
    matrix = model.get_submodule(role).matrix().detach()
    bits[role] = model.spec.formats.tensors[f"{role}.weight"].bits
    values[role] = max(len(one.abs().unique()) for one in matrix.reshape(-1, *matrix.shape[-2:]))
objective, optimizer = trainer(model)
before = {one.name: one.parameter.detach().clone() for one in trained(model)}
batch = TokenBatch(torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0)))
losses = [train_step(model, [batch], objective, optimizer, step=step).loss for step in range(5)]
still = [one.name for one in trained(model) if torch.equal(before[one.name], one.parameter)]
cf.save(model, "trained")
texts = [cf.generate(each, [[1, 2, 3]], max_new_tokens=6)[0].ids for each in (model, cf.load("trained"))]
print(json.dumps({"bits": bits, "values": values, "losses": losses, "still": still, "texts": texts}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for name, (plugin, module) in {"my_mixer": found[:2], "my_ternary": found[2:]}.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
        (folder / name / "plugin.py").write_text(plugin)
        (folder / name / "module.py").write_text(module)
        distribution = name.replace("_", "-")
        info = folder / f"{name}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[composeformer]\n{name} = {name}.plugin\n")
    (folder / "spec.toml").write_text(SPEC)
    (folder / "ternary.toml").write_text(TERNARY)
    return folder


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", ["my_mixer", "my_ternary"])
def test_documented_plugin_is_at_most_80_lines(site: Path, name: str) -> None:
    lines = [
        line for file in ("plugin.py", "module.py") for line in (site / name / file).read_text().splitlines()
    ]
    assert len(lines) <= 80


def test_documented_plugin_builds_is_priced_and_caches(site: Path) -> None:
    done = run(site, "-c", USE, "spec.toml")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gap"] < 1e-12
    # Priced at two bytes an element, built in float64: two rows of twenty tokens.
    assert found["held"] == found["cache"] * 4 * 2 * 20


def test_documented_precision_trains_and_is_mixed_by_rules(site: Path) -> None:
    done = run(site, "-c", TRAIN, "ternary.toml")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    bits = found["bits"]
    assert bits["layers.1.ffn.up"] == bits["layers.0.mixer.o"] == bits["layers.1.ffn.router.gate"] == 2
    assert bits["layers.0.ffn.up"] == 16
    for role, values in found["values"].items():
        assert (values <= 2) == (bits[role] == 2), role  # zero, and one magnitude
    assert found["still"] == []
    assert found["losses"][-1] < found["losses"][0]
    assert found["texts"][0] == found["texts"][1]


def test_mistakes_of_a_plugin_are_told_as_its_own(site: Path) -> None:
    plugin = site / "my_mixer" / "plugin.py"
    good = plugin.read_text()
    wrong = {
        "my_mixer.module:Averag": "has no attribute 'Averag'",
        "my_mixer.modul:Average": "No module named 'my_mixer.modul'",
    }
    try:
        for name, told in wrong.items():
            plugin.write_text(good.replace("my_mixer.module:Average", name))
            done = run(site, "-m", "composeformer", "build", "spec.toml", "--device", "meta")
            assert done.returncode == 2, done.stderr
            assert "plugin my_mixer (my-mixer 0.1.0): mixer average at layers.0.mixer" in done.stderr
            assert told in done.stderr
    finally:
        plugin.write_text(good)
