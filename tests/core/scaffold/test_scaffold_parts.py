"""What `compose plugins new` writes is a working part of its slot, in every slot that something reads."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from composeformer.contracts import SLOTS
from composeformer.scaffold import STARTS, Names
from composeformer.scaffold.names import LONGEST
from composeformer.scaffold.writing import rendered

from .conftest import ROOT, Site

# Each example is built, priced, trained where its weights train, saved, loaded, and continued.
USE = """
import json, sys, torch
import composeformer as cf
from composeformer.train import TokenBatch, train_step, trained, trainer
ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
valid = torch.ones(2, 20, dtype=torch.bool)
valid[1, :5] = False
told = {}
for slot in sys.argv[1:]:
    spec = cf.Spec.load(f"my-{slot}/example.toml")
    model = cf.build(spec, seed=1)
    found = {"spec": spec.to_toml(), "plan": sum(w.elements for w in spec.plan.tensors.values() if w.trains)}
    found["trained"] = sum(p.numel() for p in model.parameters())
    if not spec.formats.coded:
        objective, optimizer = trainer(model)
        before = {one.name: one.parameter.detach().clone() for one in trained(model)}
        batch = TokenBatch(ids, valid)
        found["losses"] = [train_step(model, [batch], objective, optimizer, step=s).loss for s in range(4)]
        found["still"] = [one.name for one in trained(model) if torch.equal(before[one.name], one.parameter)]
    with torch.no_grad():
        full = model(ids, valid=valid).logits
        cache = model.new_cache(2, 20)
        pieces = [model(ids[:, a:b], valid=valid[:, a:b], cache=cache).logits for a, b in ((0, 7), (7, 8), (8, 20))]
        scale = float(full[valid].abs().max())
        found["gap"] = float((torch.cat(pieces, 1) - full)[valid].abs().max()) / scale
    cf.save(model, f"saved-{slot}")
    prompts = [[1, 2, 3], [4, 5]]
    found["texts"] = [
        [one.ids for one in cf.generate(each, prompts, max_new_tokens=8)] for each in (model, cf.load(f"saved-{slot}"))
    ]
    if model.predictor is not None:
        found["texts"].append([one.ids for one in cf.generate(model, prompts, max_new_tokens=8, speculate=True)])
    told[slot] = found
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def used(written: Site) -> dict[str, dict[str, object]]:
    done = written.run("-c", USE, *STARTS)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, object]] = json.loads(done.stdout)
    return found


def test_every_slot_of_the_page_on_plugins_has_a_start() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    table = re.search(r"^\| slot \| module \| calls \|\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert table is not None
    slots = [slot for row in table[1].splitlines() for slot in row.split("|")[1].strip().split(", ")]
    assert sorted(slots) == sorted(STARTS)
    assert set(STARTS) < set(SLOTS)


def test_a_new_mixer_is_two_files_of_80_lines_together(written: Site) -> None:
    made = written.created["mixer"]
    code = sorted(made.folder.glob("my_mixer/*.py"))
    assert [path.name for path in code] == ["__init__.py", "module.py", "plugin.py"]
    lines = [len(path.read_text().splitlines()) for path in code]
    assert lines[0] == 0
    assert sum(lines) == made.code_lines <= 80


@pytest.mark.parametrize("slot", STARTS)
def test_the_plugin_names_no_torch_and_both_files_say_what_they_are(slot: str) -> None:
    texts = rendered(Names(distribution="abc", package="abc_", kind="k"), slot)
    for name in ("plugin", "module"):
        tree = ast.parse(texts[f"abc_/{name}.py"])
        assert ast.get_docstring(tree)
        imported = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        torch = [line for line in imported if "torch" in line.split()[1].split(".")]
        assert not (name == "plugin" and torch)
        assert not [line for line in imported if "composeformer_" in line], "another plugin's module"


@pytest.mark.parametrize("slot", STARTS)
def test_a_new_plugin_works_at_once(used: dict[str, dict[str, object]], slot: str) -> None:
    found = used[slot]
    assert f'kind = "my-{slot}"' in str(found["spec"])
    if slot == "codec":
        assert found["trained"] != found["plan"]  # codes do not train
    else:
        assert found["trained"] == found["plan"]
        losses = found["losses"]
        assert isinstance(losses, list)
        assert losses == sorted(losses, reverse=True)
        assert found["still"] == []
    texts = found["texts"]
    assert isinstance(texts, list)
    assert all(each == texts[0] for each in texts)


@pytest.mark.parametrize("slot", STARTS)
def test_pieces_read_with_a_cache_are_one_forward(used: dict[str, dict[str, object]], slot: str) -> None:
    # Three layers in fp32, or in bfloat16, whose unit is 2^-8: sums of at most 20 keys and 256 features.
    unit = 2.0**-8 if slot in ("precision", "codec") else 2.0**-24
    gap = used[slot]["gap"]
    assert isinstance(gap, float)
    assert gap <= 3 * 20 * unit


def test_what_is_written_passes_the_linter_even_under_the_longest_names(tmp_path: Path) -> None:
    long = "a" * LONGEST
    for slot in STARTS:
        for number, names in enumerate((Names(distribution="abc", package="abc", kind="k"), None)):
            for place, text in rendered(
                names or Names(distribution=long, package=long, kind=long), slot
            ).items():
                path = tmp_path / f"{slot}{number}" / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path)]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([*ruff, *command, *config], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


LAWS = """
import json, sys
from composeformer.testing import certify, subjects
found = {}
for slot in sys.argv[1:]:
    parts = [each for each in subjects(f"my-{slot}") if each.slot == slot]
    found[slot] = [[each.law, each.cases, str(each)] for each in certify(parts, examples=2) if not each.held]
    assert parts, slot
print(json.dumps(found))
"""


def test_a_new_plugin_obeys_the_laws_of_its_slot(written: Site) -> None:
    done = written.run("-c", LAWS, *STARTS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {slot: [] for slot in STARTS}
