"""AdamW: what decays, and states that resume by name."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from composeformer.contracts import Linear, Weight
from composeformer.train import Trained
from composeformer_training.adamw import make
from composeformer_training.config import AdamW

LINEAR = Linear(name="q", inputs=3, outputs=4, bias=True)
STACK = Linear(name="up", inputs=3, outputs=4, groups=2, bias=True)
NORM = Weight(name="weight", shape=(5,))
TABLE = Weight(name="weight", shape=(6, 3))


def parts() -> list[Trained]:
    declared: list[tuple[str, Weight, Linear | None]] = [
        ("a.q.weight", LINEAR.weights[0], LINEAR),
        ("a.q.bias", LINEAR.weights[1], LINEAR),
        ("b.up.weight", STACK.weights[0], STACK),
        ("b.up.bias", STACK.weights[1], STACK),
        ("norm.weight", NORM, None),
        ("embedding.weight", TABLE, None),
    ]
    random = torch.Generator().manual_seed(0)
    made = []
    for name, weight, linear in declared:
        values = torch.randn(weight.shape, generator=random, dtype=torch.float64)
        made.append(Trained(name, nn.Parameter(values), weight, linear))
    return made


DECAYING = ["a.q.weight", "b.up.weight", "embedding.weight"]


def test_decay_alone_moves_matrices_and_neither_norms_nor_biases_of_stacks() -> None:
    trained = parts()
    before = {one.name: one.parameter.detach().clone() for one in trained}
    optimizer = make(AdamW(weight_decay=0.5), trained, 0.1)
    for one in trained:
        one.parameter.grad = torch.zeros_like(one.parameter)
    optimizer.step()
    moved = [one.name for one in trained if not torch.equal(one.parameter, before[one.name])]
    assert moved == DECAYING


def test_a_state_resumes_by_name_as_if_never_stopped() -> None:
    def run(optimizer: torch.optim.Optimizer, trained: list[Trained], steps: range) -> None:
        for step in steps:
            for one in trained:
                one.parameter.grad = torch.sin(one.parameter.detach() * (step + 1))
            optimizer.step()

    whole, parted = parts(), parts()
    run(make(AdamW(), whole, 0.1), whole, range(6))
    first = make(AdamW(), parted, 0.1)
    run(first, parted, range(3))
    second = make(AdamW(), parted, 0.1)
    second.load_state_dict(first.state_dict())
    run(second, parted, range(3, 6))
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(whole, parted))
    names = [name for group in first.state_dict()["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(one.name for one in whole)


@pytest.mark.parametrize("keep", [lambda one: one.is_matrix, lambda one: not one.is_matrix])
def test_a_model_of_one_sort_of_parameter_has_one_group(keep: Callable[[Trained], bool]) -> None:
    optimizer = make(AdamW(), [one for one in parts() if keep(one)], 0.1)
    assert len(optimizer.param_groups) == 1
