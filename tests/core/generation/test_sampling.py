"""Sampling: the filters are transformers', the draws are fair, repeatable and a row's own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from composeformer.errors import InputError
from composeformer.generation.sampling import Candidates, Draws, Sampling, candidates, choose, pick

values = st.builds(
    Sampling,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 0.999),
    min_p=st.none() | st.floats(0.0, 0.999),
)


def theirs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities by transformers' warpers in their order."""
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits.double()[None])
    for warper, value in (
        (TopKLogitsWarper, sampling.top_k),
        (TopPLogitsWarper, sampling.top_p),
        (MinPLogitsWarper, sampling.min_p),
    ):
        scores = scores if value is None else warper(value)(None, scores)
    return scores[0].softmax(0)


def dense(kept: Candidates, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.float64).index_put((kept.ids,), kept.probabilities)


@settings(max_examples=150, deadline=None)
@given(values, st.integers(1, 32), st.integers(0, 2**31))
def test_candidates_are_those_of_transformers(sampling: Sampling, size: int, seed: int) -> None:
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    ours, expected = dense(candidates(logits, sampling), size), theirs(logits, sampling)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_ties_with_the_last_of_top_k_stay_and_ties_of_top_p_go_to_the_lowest_id() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert candidates(logits, Sampling(temperature=1.0, top_k=2)).ids.tolist() == [0, 1, 2, 3]
    assert candidates(torch.zeros(8), Sampling(temperature=1.0, top_p=0.5)).ids.tolist() == [0, 1, 2, 3]


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0, -math.inf]), min_size=1, max_size=12))
def test_greedy_ties_go_to_the_lowest_id(scores: list[float]) -> None:
    best = max(scores)
    if best == -math.inf:
        return
    chosen = choose(torch.tensor([scores]), Sampling(), [Draws(0, [1])], [0], [0])
    assert chosen == [scores.index(best)]


def test_draws_follow_the_probabilities() -> None:
    """Chi-square at the 0.1% level, 29 degrees of freedom."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=0.8, top_k=30, seed=7)
    kept = candidates(logits, sampling)
    draws, total = Draws(7, [3, 1, 4]), 30_000
    uniforms = torch.tensor([draws.uniform(step) for step in range(total)], dtype=torch.float64)
    quantiles = torch.searchsorted(kept.probabilities.cumsum(0), uniforms, right=True)
    assert [int(kept.ids[q]) for q in quantiles[:200]] == [pick(kept, float(u)) for u in uniforms[:200]]
    counts = torch.bincount(quantiles, minlength=30).double()
    expected = kept.probabilities * total
    assert len(kept.ids) == 30
    assert float(((counts - expected) ** 2 / expected).sum()) < 58.30


@given(st.integers(0, 2**64), st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(0, 5))
def test_draws_are_a_function_of_seed_prompt_copy_and_step(seed: int, prompt: list[int], step: int) -> None:
    one = Draws(seed, prompt).uniform(step)
    assert 0 <= one < 1
    assert one == Draws(seed, list(prompt)).uniform(step)
    others = [Draws(seed + 1, prompt), Draws(seed, [*prompt, 0]), Draws(seed, prompt, copy=1)]
    assert one not in [other.uniform(step) for other in others] + [Draws(seed, prompt).uniform(step + 1)]


@pytest.mark.parametrize("uniform", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    kept = Candidates(torch.arange(5), torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64))
    assert pick(kept, uniform) in (1, 3)
    assert pick(kept, 1.0) == 3  # as if the product with the sum had been rounded up


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = torch.tensor([3.0, -1e30, 5.0, -math.inf])
    kept = candidates(logits, Sampling(temperature=1e-300, min_p=0.1))
    assert (kept.ids.tolist(), kept.probabilities.tolist()) == ([2], [1.0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("top_k", 0),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", "0.9"),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 1.0),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert len(caught.value.lines) == 1
    assert caught.value.lines[0].startswith(f"{field} = ")


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        Sampling(temperature=-1, top_k=0, top_p=2)
    assert [line.split(" ")[0] for line in caught.value.lines] == ["temperature", "top_k", "top_p"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error_even_if_only_one_is(bad: float) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = bad
    draws = [Draws(0, [1]), Draws(0, [2])]
    with pytest.raises(InputError, match=r"prompt 1, new token 3: the logits are not finite"):
        choose(logits, Sampling(), draws, [0, 3], [0, 1])
    assert choose(logits, Sampling(), draws, [0, 3], [0]) == [0]
