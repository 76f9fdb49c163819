"""The plugin that the documentation writes, installed as it stands: it builds, is priced, is the same cached."""

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documented")
    (folder / "my_mixer").mkdir()
    (folder / "my_mixer" / "__init__.py").write_text("")
    plugin, module = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (folder / "my_mixer" / "plugin.py").write_text(plugin)
    (folder / "my_mixer" / "module.py").write_text(module)
    info = folder / "my_mixer-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-mixer\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[composeformer]\nmy_mixer = my_mixer.plugin\n")
    (folder / "spec.toml").write_text(SPEC)
    return folder


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site, env=environment, capture_output=True, text=True
    )


def test_documented_plugin_is_at_most_80_lines(site: Path) -> None:
    lines = [
        line
        for file in ("plugin.py", "module.py")
        for line in (site / "my_mixer" / file).read_text().splitlines()
    ]
    assert len(lines) <= 80


def test_documented_plugin_builds_is_priced_and_caches(site: Path) -> None:
    done = run(site, "-c", USE, "spec.toml")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gap"] < 1e-12
    # Priced at two bytes an element, built in float64: two rows of twenty tokens.
    assert found["held"] == found["cache"] * 4 * 2 * 20


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
