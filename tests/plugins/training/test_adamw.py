"""AdamW: algorithm 2 of its paper, with decay on matrices alone."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.5, 0.999]),
    st.sampled_from([1e-8, 1e-2]),
    st.sampled_from([0.0, 0.3]),
)
def test_steps_follow_the_paper(beta1: float, beta2: float, eps: float, decay: float) -> None:
    lr, trained = 0.1, parts()
    optimizer = make(AdamW(beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay), trained, lr)
    expected = {one.name: one.parameter.detach().clone() for one in trained}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    random = torch.Generator().manual_seed(1)
    for step in range(1, 4):
        for one in trained:
            gradient = torch.randn(one.parameter.shape, generator=random, dtype=torch.float64)
            one.parameter.grad = gradient
            m = first[one.name] = beta1 * first[one.name] + (1 - beta1) * gradient
            v = second[one.name] = beta2 * second[one.name] + (1 - beta2) * gradient**2
            update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
            shrink = decay if one.name in DECAYING else 0.0
            expected[one.name] = expected[one.name] - lr * (update + shrink * expected[one.name])
        optimizer.step()
    for one in trained:
        torch.testing.assert_close(one.parameter.detach(), expected[one.name], rtol=1e-12, atol=1e-12)


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
