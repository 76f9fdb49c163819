"""A step over processes is that of one process: losses, gradients, their norm, counts, biases and weights.

Everything is in float64, where a sum of n terms in another order differs by at most n eps times the terms' sizes.
Here no sum has more than some thousand terms, and numbers are of the order of one, or are compared with what is
largest: `CLOSE` is a thousand eps. AdamW moves a weight by lr g / (|g| + eps'), which a difference d of g changes by no
more than lr d / eps' in each step, and later gradients by as much again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.train import StepResult

from .conftest import (
    EPS,
    LAYOUTS,
    LEARNING_RATE,
    Plan,
    Rows,
    Steps,
    distance,
    joined,
    plans,
    spec,
    steps,
    together,
)

CLOSE = 1000 * torch.finfo(torch.float64).eps
few = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))


def assert_equal(many: Sequence[Steps], one: Steps, experts: int, close: float = CLOSE) -> None:
    """Holds what processes did to what one did with all batches."""
    for here in many:
        for got, wanted in zip(here.results, one.results, strict=True):
            assert_result(got, wanted, close)
            assert got.counts.keys() == many[0].results[got.step].counts.keys()
        assert [numbers(r) for r in here.results] == [numbers(r) for r in many[0].results]
    assert_close(joined([m.gradients for m in many], experts), whole(one.gradients), close)
    moved = len(one.results) * LEARNING_RATE * close / EPS
    assert_close(joined([m.weights for m in many], experts), whole(one.weights), close + moved)


def numbers(result: StepResult) -> tuple[Any, ...]:
    """What a result says, as plain numbers: equal in every process, bit by bit."""
    counts = {path: count.tolist() for path, count in result.counts.items()}
    plain = (result.loss, result.grad_norm, result.tokens, result.weight, result.skipped)
    return (*plain, dict(result.losses), dict(result.metrics), counts)


def assert_result(got: StepResult, wanted: StepResult, close: float) -> None:
    assert (got.tokens, got.weight, got.skipped) == (wanted.tokens, wanted.weight, wanted.skipped)
    assert got.counts.keys() == wanted.counts.keys()
    for path, count in wanted.counts.items():
        assert torch.equal(got.counts[path], count)
    pairs = [(got.loss, wanted.loss), (got.grad_norm, wanted.grad_norm)]
    for mine, other in ((got.losses, wanted.losses), (got.metrics, wanted.metrics)):
        assert mine.keys() == other.keys()
        pairs += [(mine[path], other[path]) for path in other]
    for a, b in pairs:
        assert abs(a - b) <= close * max(1.0, abs(b))


def whole(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: each.value for name, each in found.items()}


def assert_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], close: float) -> None:
    assert got.keys() == wanted.keys()
    largest = max(float(each.abs().max()) for each in wanted.values())
    for name, each in wanted.items():
        assert distance(got[name], each) <= close * max(largest, 1.0), name


def layouts(size: int) -> list[tuple[int, bool, str]]:
    """Every way to put a model on so many processes, expert groups, sharded or not; and by each backend."""
    found = [
        (experts, shard, "local" if experts == 1 else "collective")
        for ranks, experts in LAYOUTS
        if ranks == size
        for shard in (False, True)
    ]
    return [*found, *([(size, size == 2, "hierarchical")] if size > 1 else [])]


FULL: Plan = [
    [
        [Rows(2, 7, 2, True, 10 * rank + step), Rows(1, 5, 0, False, 100 + 10 * rank + step)]
        for rank in range(4)
    ]
    for step in range(3)
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_steps_are_those_of_one_process_at_every_layout(size: int) -> None:
    plan = [bring[:size] for bring in FULL[: 2 if size == 4 else 3]]
    ways = layouts(size)
    one = steps(range(size), spec(), plan, 0.5)
    assert min(result.grad_norm for result in one.results) > 0.5
    many = together(size, [(spec(*way), plan, 0.5) for way in ways])
    for (experts, _, _), found in zip(ways, many, strict=True):
        assert_equal(found, one, experts)


@few
@given(st.data())
def test_any_batches_of_two_processes(data: Any) -> None:
    plan = data.draw(plans(2, 2))
    experts, shard, kind = data.draw(st.sampled_from(layouts(2)))
    tied = data.draw(st.booleans())
    case = (spec(experts, shard, kind, model__tie_embeddings=tied), plan)
    assert_equal(together(2, [case])[0], steps(range(2), *case), experts)
