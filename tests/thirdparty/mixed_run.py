"""What the parts of `mixed.toml` do together, run where they are installed: one JSON document of facts.

Its arguments are the spec, and the folder to save the model in.
"""

import json
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import composeformer as cf
from composeformer.contracts import Cache
from composeformer.decoder import Model
from composeformer.generation import generate
from composeformer.train import TokenBatch, train_step, trained, trainer

ROWS, STEPS, NEW = 3, 12, 14


def text() -> Tensor:
    """Rows of real text to learn from."""
    data = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()
    return torch.tensor([min(byte, 127) for byte in data[: 60 * 48]]).view(-1, 48)


def told(model: Model) -> dict[str, Any]:
    """What was declared beside what there is."""
    costs = [
        cost
        for layer in model.spec.plan.layers
        for cost in layer["mixer"].part.config.cost(layer["mixer"].site, "decode")
    ]
    declared = sum(cost.elements(40) for cost in costs if isinstance(cost, Cache))
    bits = {role: model.spec.formats.tensors[f"{role}.weight"].bits for role in model.spec.plan.linears}
    values = {}
    for role in bits:
        matrix = model.get_submodule(role).matrix().detach()
        groups = torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % 32)).unflatten(-1, (-1, 32))
        values[role] = max(len(group.unique()) for group in groups.flatten(0, -2))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cache": [
            ROWS * model.activations.itemsize * declared,
            model.new_cache(ROWS, 40).num_bytes,
            model.new_cache(ROWS, 40, 2).num_bytes,
        ],
        "choices": model.choices["layers.0.mixer"],
        "bits": bits,
        "values": values,
    }


def learnt(model: Model, rows: Tensor) -> dict[str, Any]:
    """Losses, and the parameters that a few steps left as they were."""
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 0.01}))
    before = {one.name: one.parameter.detach().clone() for one in trained(model)}
    losses = []
    for step in range(STEPS):
        batch = [TokenBatch(rows[4 * step : 4 * step + 4]), TokenBatch(rows[4 * step + 4 : 4 * step + 8])]
        losses.append(train_step(model, batch, objective, optimizer, step=step, clip_norm=1.0).loss)
    still = [one.name for one in trained(model) if torch.equal(before[one.name], one.parameter)]
    return {"losses": losses, "still": still}


def lost(model: Model, prompt: Sequence[int], made: Sequence[int]) -> float:
    """How far the worst token made is from the best of a forward without a cache, in units of all logits' rms."""
    with torch.no_grad():
        logits = (
            model(torch.tensor([[*prompt, *made]]), predict=False).logits[0, len(prompt) - 1 : -1].double()
        )
    short = logits.amax(-1) - logits.gather(1, torch.tensor(made)[:, None])[:, 0]
    return float(short.max() / logits.square().mean().sqrt())


def written(model: Model, prompts: list[list[int]]) -> dict[str, Any]:
    """Texts with and without drafts."""
    plain = generate(model, prompts, max_new_tokens=NEW)
    drafted = generate(model, prompts, max_new_tokens=NEW, speculate=True)
    return {
        "plain": [list(row.ids) for row in plain],
        "drafted": [list(row.ids) for row in drafted],
        "accepted": [row.accepted for row in drafted],
        "lost": max(
            lost(model, prompt, row.ids)
            for rows in (plain, drafted)
            for prompt, row in zip(prompts, rows, strict=True)
        ),
    }


def main(spec: str, folder: str) -> None:
    model = cf.build(spec, seed=1)
    rows = text()
    found = {"built": told(model), "learnt": learnt(model, rows)}
    cf.save(model, folder)
    loaded = cf.load(folder)
    state = model.state_dict()
    found["different"] = [name for name, x in loaded.state_dict().items() if not torch.equal(x, state[name])]
    # Rows of several lengths, so that their caches are rolled back and padded each by its own measure.
    prompts = [rows[50, :11].tolist(), rows[51, :4].tolist(), rows[52, :30].tolist()]
    found["text"] = written(loaded, prompts)
    # Beside float64's rounding no two logits are near.
    found["exact"] = written(cf.load(folder, dtype="float64"), prompts)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
