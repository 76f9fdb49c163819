"""Speculative decoding: the same text greedily, the same distribution when sampling, whatever the predictor."""

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.generation import Sampling, generate, stream
from composeformer.generation.sampling import Candidates, Draws, candidates
from composeformer.generation.speculation import accept
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
prompts = st.lists(st.integers(0, 10), min_size=1, max_size=9)
batches = st.lists(prompts, min_size=1, max_size=4, unique_by=tuple)


def predicting(depth: int, **model: Any) -> Spec:
    return Spec.from_dict(
        {
            "model": {"vocab_size": 11, "hidden_size": 16, "max_position_embeddings": 40, **model},
            "norm": {"kind": "rmsnorm"},
            "position": {"kind": "rope"},
            "mixer": {
                "all": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
                "near": {"kind": "gqa", "num_heads": 2, "window": 4},
                "latent": {
                    "kind": "mla",
                    "num_heads": 2,
                    "kv_lora_rank": 8,
                    "qk_nope_head_dim": 4,
                    "qk_rope_head_dim": 4,
                    "v_head_dim": 4,
                },
            },
            "ffn": {"kind": "swiglu", "intermediate_size": 24},
            "layers": [{"mixer": "all"}, {"mixer": "near"}, {"mixer": "latent"}],
            "predictor": {"kind": "mtp", "depth": depth},
        }
    )


@pytest.fixture(scope="module", params=[1, 2, 3])
def learnt(request: pytest.FixtureRequest) -> Model:
    """A model that has learnt some of what it predicts, so that some drafts are right and some are not."""
    model = build(predicting(request.param), dtype="float64", seed=1)
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 0.01}))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (1, 14), generator=generator).repeat(3, 2)
    for step in range(25):
        noise = torch.rand(ids.shape, generator=generator) < 0.15
        noisy = torch.where(noise, torch.randint(0, 11, ids.shape, generator=generator), ids)
        train_step(model, [TokenBatch(noisy)], objective, optimizer, step=step)
    return model.eval()


@few
@given(batches, st.integers(1, 28), st.none() | st.integers(1, 4), st.sets(st.integers(0, 10), max_size=2))
def test_greedy_ids_are_those_without_drafts(
    learnt: Model, batch: list[list[int]], new: int, chunk: int | None, stops: set[int]
) -> None:
    options: Any = {"max_new_tokens": new, "prefill_chunk": chunk, "stop_ids": sorted(stops)}
    plain = generate(learnt, batch, **options)
    drafted = generate(learnt, batch, speculate=True, **options)
    assert [(made.ids, made.finish_reason) for made in drafted] == [
        (made.ids, made.finish_reason) for made in plain
    ]
    for made in drafted:
        assert made.accepted <= made.drafted <= made.steps * learnt.predictor.num_drafts
        # Each step gives its accepted drafts and one token of the model's own, unless a stop cut it short.
        assert len(made.ids) <= made.steps + made.accepted
        assert made.finish_reason == "stop" or len(made.ids) == made.steps + made.accepted


def test_some_drafts_are_right_and_some_are_not(learnt: Model) -> None:
    made = generate(learnt, [[n, n + 1] for n in range(9)], max_new_tokens=25, speculate=True)
    assert 0 < sum(each.accepted for each in made) < sum(each.drafted for each in made)
    assert sum(each.steps for each in made) < sum(len(each.ids) for each in made)
    assert all(each.acceptance is None or 0 <= each.acceptance <= 1 for each in made)


@few
@given(batches, st.integers(1, 20), st.sampled_from([0.0, 1.0]))
def test_a_row_of_a_batch_is_drafted_for_as_if_alone(
    learnt: Model, batch: list[list[int]], new: int, temperature: float
) -> None:
    options: Any = {"max_new_tokens": new, "speculate": True, "sampling": Sampling(temperature=temperature)}
    together = generate(learnt, batch, **options)
    assert together == [generate(learnt, [prompt], **options)[0] for prompt in batch]


@few
@given(prompts, st.sampled_from([0.0, 0.7]))
def test_streamed_drafts_joined_are_those_of_generate(
    learnt: Model, prompt: list[int], temperature: float
) -> None:
    options: Any = {"max_new_tokens": 16, "speculate": True, "sampling": Sampling(temperature=temperature)}
    (whole,) = generate(learnt, prompt, **options)
    pieces = list(stream(learnt, prompt, **options))
    assert tuple(index for piece in pieces for index in piece.ids) == whole.ids
    assert pieces[-1].drafting == (whole.steps, whole.drafted, whole.accepted)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0, seed=5), Sampling(temperature=0.7, top_k=3, seed=6)],
    ids=["temperature", "top-k"],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_samples_have_the_model_s_distribution(depth: int, sampling: Sampling) -> None:
    # A predictor that learnt nothing is confidently wrong, which is when the correction matters.
    model = build(predicting(depth, vocab_size=4, init_std=0.5), dtype="float64", seed=2).eval()
    prompt, new, count = [1, 3], depth + 2, 4000
    exact = {}
    with torch.no_grad():
        for tail in product(range(4), repeat=new):
            logits = model(torch.tensor([[*prompt, *tail]]), predict=False).logits[0]
            chance = 1.0
            for place, token in enumerate(tail):
                kept = candidates(logits[len(prompt) - 1 + place], sampling)
                chance *= float(kept.probabilities[kept.ids == token].sum())
            exact[tail] = chance
    made = generate(model, [prompt] * count, max_new_tokens=new, sampling=sampling, speculate=True)
    found = Counter(each.ids for each in made)
    assert 0.05 < sum(e.accepted for e in made) / sum(e.drafted for e in made) < 0.95
    assert sum(exact.values()) == pytest.approx(1)
    assert set(found) <= {tail for tail, chance in exact.items() if chance}
    likely = {tail: chance for tail, chance in exact.items() if count * chance >= 5}
    squares = sum((found[t] - count * p) ** 2 / (count * p) for t, p in likely.items())
    # Chi-squared by Wilson and Hilferty's normal form: seven standard deviations.
    freedom = len(likely)
    assert ((squares / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5 < 7


def distribution(weights: list[int]) -> Candidates:
    kept = torch.tensor(weights, dtype=torch.float64)
    ids = kept.nonzero()[:, 0]
    return Candidates(ids, kept[ids] / kept.sum())


weights = st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any)


@settings(max_examples=10, deadline=None)
@given(weights, weights)
def test_an_accepted_or_corrected_draft_is_distributed_as_the_model_says(
    wanted: list[int], offered: list[int]
) -> None:
    p, q = distribution(wanted), distribution(offered)
    found = torch.zeros(4, dtype=torch.float64)
    count = 4000
    for seed in range(count):
        draws = Draws(seed, [1, 2])
        place = int(torch.searchsorted(q.probabilities.cumsum(0), draws.uniform(0, b"draft"), right=True))
        found[accept(p, int(q.ids[min(place, len(q.ids) - 1)]), q, draws, 0)] += 1
    expected = torch.zeros(4, dtype=torch.float64)
    expected[p.ids] = p.probabilities
    spread = (expected * (1 - expected) / count).sqrt()
    assert bool(((found / count - expected).abs() <= 6 * spread).all())


def test_a_model_without_a_predictor_says_that_it_can_not_speculate(model: Model) -> None:
    with pytest.raises(InputError, match="needs a model with a predictor"):
        generate(model, [1, 2], speculate=True)


def test_drafts_and_the_cache_of_a_predictor_are_refused_in_a_cached_forward(learnt: Model) -> None:
    cache = learnt.new_cache(1, 4)
    with pytest.raises(InputError, match="predict: with a cache"):
        learnt(torch.tensor([[1]]), cache=cache, predict=True)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=3), Sampling(temperature=1.0)]
)
def test_drafts_that_are_not_finite_are_told_as_such(sampling: Sampling) -> None:
    model = build(predicting(2), seed=1).eval()
    with torch.no_grad():
        model.predictor.depths[1].eh_proj.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="prompt 0, draft of new token 2: the logits are not finite"):
        generate(model, [[1, 2]], speculate=True, max_new_tokens=4, sampling=sampling)


def test_drafts_after_an_end_are_not_counted() -> None:
    model = build(predicting(3, vocab_size=5), seed=0)
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 0.01}))
    for step in range(40):
        train_step(model, [TokenBatch((torch.arange(33) % 5)[None])], objective, optimizer, step=step)
    (made,) = generate(model.eval(), [[0, 1]], speculate=True, stop_ids=[3], max_new_tokens=30)
    assert made.ids == (2, 3)
    assert (made.steps, made.drafted, made.accepted) == (2, 1, 1)


def test_predictions_are_refused_where_nothing_predicts(model: Model) -> None:
    with pytest.raises(InputError, match="has no predictor"):
        model(torch.tensor([[1, 2]]), predict=True)
