"""One optimizer step: micro-batches are one batch, a step that can not happen leaves everything alone."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.errors import InputError
from composeformer.train import TokenBatch, train_step, trainer

from .conftest import VOCAB, counting, gradients, rows

Fresh = Callable[[], Model]
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def split(batch: TokenBatch, places: list[int]) -> list[TokenBatch]:
    """The rows of a batch, cut at `places`."""
    ends = pairwise([0, *places, len(batch.ids)])
    ids, valid, documents, _ = batch
    assert valid is not None
    assert documents is not None
    return [TokenBatch(ids[a:b], valid[a:b], documents[a:b]) for a, b in ends]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


@few
@given(st.integers(0, 2**31), st.sets(st.integers(1, 5)), st.none() | st.just(0.5))
def test_micro_batches_are_one_batch(fresh: Fresh, seed: int, places: set[int], clip: float | None) -> None:
    batch, results, models, calls = rows(6, 9, seed), [], [], []
    for batches in ([batch], split(batch, sorted(places))):
        model = fresh()
        calls.append(counting(model))
        objective, optimizer = trainer(model)
        results.append(train_step(model, batches, objective, optimizer, step=0, clip_norm=clip))
        models.append(model)
    whole, parts = (gradients(model) for model in models)
    assert all(relative(parts[name], whole[name]) < 1e-12 for name in whole)
    for ours, theirs in zip(models[1].parameters(), models[0].parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for field in ("loss", "grad_norm", "tokens", "weight", "losses", "metrics"):
        assert getattr(results[1], field) == pytest.approx(getattr(results[0], field), rel=1e-12)
    if results[0].skipped is None:
        (one,), (other,) = calls
        assert torch.equal(one[0]["load"], other[0]["load"])


def test_the_loss_is_torchs_mean_cross_entropy_over_all_labels(fresh: Fresh) -> None:
    model, ids = fresh(), rows(3, 8, 1).ids
    batches = [TokenBatch(ids[:1]), TokenBatch(ids[1:])]
    objective, optimizer = trainer(model)
    expected = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    result = train_step(model, batches, objective, optimizer, step=0)
    assert result.loss == pytest.approx(expected.item(), rel=1e-14)
    assert (result.weight, result.tokens, result.skipped) == (3 * 7, 3 * 8, None)


def test_gradients_are_those_of_the_mean_loss_and_the_side_losses_over_the_labels(fresh: Fresh) -> None:
    model, judge, batch = fresh(), fresh(), rows(4, 8, 1)
    counting(model), counting(judge)
    objective, optimizer = trainer(model)
    result = train_step(model, split(batch, [1]), objective, optimizer, step=0)
    outputs = judge(batch.ids, valid=batch.valid, documents=batch.documents)
    total, weight = objective(outputs, batch.seen())
    side = outputs.aux.losses["layers.0.ffn.size"]
    assert side.item() > 0.01
    torch.autograd.backward((total + side) / weight)
    assert result.losses["layers.0.ffn.size"] == pytest.approx((side / weight).item(), rel=1e-12)
    found, expected = gradients(model), gradients(judge)
    assert all(relative(found[name], expected[name]) < 1e-12 for name in expected)


def test_appending_padding_rows_and_columns_changes_nothing(fresh: Fresh) -> None:
    batch = rows(3, 8, 2)
    wide = [torch.nn.functional.pad(tensor.long(), (0, 4, 0, 2)) for tensor in batch if tensor is not None]
    results, models = [], [fresh(), fresh()]
    for model, given_ in zip(models, (batch, TokenBatch(wide[0], wide[1].bool(), wide[2]))):
        objective, optimizer = trainer(model)
        results.append(train_step(model, [given_], objective, optimizer, step=0))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-13)
    first, second = (gradients(model) for model in models)
    assert all(relative(first[name], second[name]) < 1e-12 for name in first)


def test_packed_documents_learn_what_they_learn_apart(fresh: Fresh) -> None:
    one, two = torch.randint(0, VOCAB, (2, 1, 7), generator=torch.Generator().manual_seed(3))
    packed = TokenBatch(torch.cat([one, two], 1), documents=torch.tensor([[0] * 7 + [1] * 7]))
    models = [fresh(), fresh()]
    for model, batches in zip(models, ([packed], [TokenBatch(one), TokenBatch(two)])):
        objective, optimizer = trainer(model)
        train_step(model, batches, objective, optimizer, step=0)
    first, second = (gradients(model) for model in models)
    assert all(relative(first[name], second[name]) < 1e-12 for name in first)


def test_gradients_are_clipped_together_and_a_tied_matrix_counts_once(fresh: Fresh) -> None:
    ours, theirs, batch = fresh(), fresh(), rows(2, 8, 4)
    objective, optimizer = trainer(ours)
    free = train_step(ours, [batch], objective, optimizer, step=0)
    unclipped = gradients(ours)
    assert "head.projection.weight" not in unclipped
    norm = torch.stack([g.norm() for g in unclipped.values()]).norm()
    assert free.grad_norm == pytest.approx(norm.item(), rel=1e-13)
    objective, optimizer = trainer(theirs)
    result = train_step(theirs, [batch], objective, optimizer, step=0, clip_norm=0.25 * norm.item())
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-13)
    clipped = gradients(theirs)
    assert all(relative(clipped[name], 0.25 * unclipped[name]) < 1e-5 for name in clipped)


@pytest.mark.parametrize("poison", ["a gradient", "the loss", "no label"])
def test_a_step_that_can_not_happen_changes_nothing_and_says_why(fresh: Fresh, poison: str) -> None:
    model: Any = fresh()
    batch = rows(2, 8, 4)
    calls = counting(model)
    objective, optimizer = trainer(model)
    train_step(model, [batch], objective, optimizer, step=0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = str(optimizer.state_dict())
    handle = None
    if poison == "a gradient":
        handle = model.layers[1].mixer.q.weight.register_hook(lambda gradient: gradient * float("nan"))
    elif poison == "the loss":
        handle = model.head.register_forward_hook(lambda *found: found[-1] * float("inf"))
    else:
        batch = TokenBatch(batch.ids, torch.zeros_like(batch.ids, dtype=torch.bool))
    result = train_step(model, [batch], objective, optimizer, step=1, clip_norm=1.0)
    reasons = {
        "a gradient": "norm of the gradients",
        "the loss": "loss is not finite",
        "no label": "no token",
    }
    assert reasons[poison] in str(result.skipped)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert str(optimizer.state_dict()) == state
    assert len(calls) == 1
    if poison == "no label":
        assert (result.loss, result.weight, result.tokens) == (0.0, 0.0, 0)
    else:
        assert handle is not None
        handle.remove()
    after = train_step(model, [rows(2, 8, 4)], objective, optimizer, step=2)
    assert after.skipped is None
    assert len(calls) == 2


def test_checkpointed_activations_leave_gradients_and_counts_equal(fresh: Fresh) -> None:
    plain, sparing, batch = fresh(), fresh(), rows(4, 9, 6)
    results, calls = [], []
    layer: Any
    for layer in sparing.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for model in (plain, sparing):
        calls.append(counting(model))
        objective, optimizer = trainer(model)
        results.append(train_step(model, split(batch, [2]), objective, optimizer, step=0))
    first, second = gradients(plain), gradients(sparing)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(calls[0][0][0]["load"], calls[1][0][0]["load"])
    assert results[0].losses == results[1].losses


def test_a_step_without_batches_is_an_error(fresh: Fresh) -> None:
    model = fresh()
    objective, optimizer = trainer(model)
    with pytest.raises(InputError, match="at least one batch"):
        train_step(model, [], objective, optimizer, step=0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_can_not_clip_is_refused_before_anything_changes(clip_norm: float) -> None:
    model = build("tiny-llama")
    before = [p.detach().clone() for p in model.parameters()]
    objective, optimizer = trainer(model)
    batch = TokenBatch(torch.arange(8)[None])
    with pytest.raises(InputError, match="clip_norm"):
        train_step(model, [batch], objective, optimizer, step=0, clip_norm=clip_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
