"""Work after a step happens once for each part, however its module is wrapped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from composeformer.assemble import build
from composeformer.train import TokenBatch, train_step, trainer


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def nested(module: nn.Module) -> Any:
    return checkpoint_wrapper(checkpoint_wrapper(module))


@pytest.mark.parametrize("slot", ["router", "ffn", "layer"])
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, nested, compiled])
def test_a_bias_moves_once_a_step_under_any_wrapper(wrap: Callable[[nn.Module], Any], slot: str) -> None:
    found = []
    for wrapped in (False, True):
        model = build("tiny-deepseek-v3", seed=0)
        objective, optimizer = trainer(model)
        for index in (1, 2) if wrapped else ():
            layer: Any = model.layers[index]
            if slot == "router":
                layer.ffn.router = wrap(layer.ffn.router)
            elif slot == "ffn":
                layer.ffn = wrap(layer.ffn)
            else:
                model.layers[index] = wrap(layer)
        ids = torch.arange(18).view(2, 9)
        result = train_step(model, [TokenBatch(ids)], objective, optimizer, step=0)
        found.append(([b.clone() for b in model.buffers()], result.counts, result.metrics))
    (plain, counts, metrics), (moved, other_counts, other_metrics) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
    assert all(float(bias.abs().max()) == pytest.approx(0.001) for bias in moved)
    assert counts.keys() == other_counts.keys()
    assert metrics == pytest.approx(other_metrics)
