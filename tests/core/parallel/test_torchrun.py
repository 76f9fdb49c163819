"""torchrun starts it all: the one test that pays for starting processes from nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import composeformer as cf

from .conftest import Rows, spec, steps

SCRIPT = """
import json
import sys
from pathlib import Path

import composeformer as cf
from composeformer.cli import main
from composeformer.train import TokenBatch, train_step, trainer

spec, folder = sys.argv[1:]
model = cf.build(spec, seed=3)
objective, optimizer = trainer(model)
rank = model.placement.world.rank
rows = [int(word) for word in Path(spec).with_suffix(".rows").read_text().split()]
import torch
batch = TokenBatch(torch.tensor(rows).view(2, 2, -1)[rank])
result = train_step(model, [batch], objective, optimizer, step=0)
cf.save(model, folder)
again = cf.load(folder)
Path(f"{folder}-{rank}.json").write_text(json.dumps([result.loss, result.grad_norm, again.placement.world.size]))
sys.argv = ["compose", "build", spec, "--json"]
sys.exit(main())
"""
BRING = [Rows(2, 6, 0, False, seed) for seed in (1, 2)]


def test_a_script_and_a_command_under_torchrun(tmp_path: Path) -> None:
    found = spec(2)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "spec.toml").write_text(found.to_toml())
    ids = [str(number) for rows in BRING for number in rows.batch().ids.flatten().tolist()]
    (tmp_path / "spec.rows").write_text(" ".join(ids))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "spec.toml"), str(tmp_path / "folder")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    one = steps(range(2), found, [[[rows] for rows in BRING]])
    for rank in range(2):
        loss, norm, size = json.loads((tmp_path / f"folder-{rank}.json").read_text())
        assert size == 2
        assert abs(loss - one.results[0].loss) < 1e-12
        assert abs(norm - one.results[0].grad_norm) < 1e-12 * norm
    # The first process alone prints, and what it prints is one document.
    assert json.loads(done.stdout)["processes"] == 2
    assert cf.load(tmp_path / "folder").placement.world.size == 1
