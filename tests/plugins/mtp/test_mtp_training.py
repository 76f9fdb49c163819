"""The predictor in training: what each depth sees, and which token it is to predict."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from composeformer.assemble import build
from composeformer.decoder import Layer, Model
from composeformer.spec import Spec
from composeformer.tensors import ModelOutput
from composeformer.train import TokenBatch, train_step, trainer

quick = settings(max_examples=20, deadline=None)


def tiny(depth: int = 2, **predictor: Any) -> Spec:
    return Spec.from_dict(
        {
            "model": {"vocab_size": 23, "hidden_size": 16, "max_position_embeddings": 64, "init_std": 0.3},
            "norm": {"kind": "rmsnorm"},
            "position": {"kind": "rope"},
            "mixer": {"kind": "gqa", "num_heads": 2},
            "ffn": {
                "dense": {"kind": "swiglu", "intermediate_size": 24},
                "experts": {
                    "kind": "moe",
                    "num_experts": 4,
                    "intermediate_size": 8,
                    "router": {"kind": "sigmoid-bias", "top_k": 2},
                },
            },
            "layers": [{"ffn": "dense"}, {"ffn": "experts"}],
            "predictor": {"kind": "mtp", "depth": depth, **predictor},
        }
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return build(tiny(3), dtype="float64", seed=4)


def by_hand(model: Model, ids: Tensor, depth: int) -> list[Tensor]:
    """Equations 21 to 24 for one row without padding, from the model's own parts."""
    with torch.no_grad():
        hidden = model(ids[None], predict=False).hidden[0]
        found = []
        for k, module in enumerate(model.predictor.depths[:depth], 1):
            count = len(ids) - k
            embedded = model.embedding(ids[k:])
            joined = [
                module.eh_proj(torch.cat([module.enorm(embedded[t]), module.hnorm(hidden[t])]))
                for t in range(count)
            ]
            # A layer alone: its parts are tested elsewhere.
            batch = model.batch(ids[None, k:], phase="train")
            stream, _ = Layer.forward(module, torch.stack(joined)[None], batch)
            hidden = module.residual.close(stream)[0]
            found.append(model.head(hidden))
        return found


@quick
@given(st.integers(1, 9), st.integers(0, 99))
def test_each_depth_is_what_the_equations_say(model: Model, tokens: int, seed: int) -> None:
    ids = torch.randint(0, 23, (tokens,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        out = model(ids[None])
    wanted = by_hand(model, ids, min(3, tokens - 1))
    assert len(out.predictions) == len(wanted)
    for made, expected in zip(out.predictions, wanted, strict=True):
        torch.testing.assert_close(made.logits[0], expected, rtol=1e-12, atol=1e-12)


def labels(batch: TokenBatch, k: int) -> dict[tuple[int, int], int]:
    """For each row and token its label at depth k: token t + k + 1, all between real and of one document."""
    found = {}
    for row, ids in enumerate(batch.ids.tolist()):
        for t in range(len(ids) - k - 1):
            span = slice(t, t + k + 2)
            real = batch.valid is None or bool(batch.valid[row, span].all())
            one = batch.documents is None or len(set(batch.documents[row, span].tolist())) == 1
            if real and one:
                found[row, t] = ids[t + k + 1]
    return found


@st.composite
def packed(draw: st.DrawFn) -> TokenBatch:
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    size = {"min_size": rows * tokens, "max_size": rows * tokens}
    shape = (rows, tokens)
    ids = torch.tensor(draw(st.lists(st.integers(0, 22), **size))).view(shape)
    valid = torch.tensor(draw(st.lists(st.booleans(), **size))).view(shape) if draw(st.booleans()) else None
    documents = None
    if draw(st.booleans()):
        documents = torch.tensor(draw(st.lists(st.integers(0, 1), **size))).view(shape).cumsum(1)
    return TokenBatch(ids, valid, documents)


@quick
@given(packed())
def test_the_label_of_depth_k_is_the_token_k_plus_one_places_on_or_none(
    model: Model, batch: TokenBatch
) -> None:
    objective, _ = trainer(model)
    with torch.no_grad():
        out = model(batch.ids, valid=batch.valid, documents=batch.documents)
    found = [ModelOutput(p.logits, p.hidden) for p in out.predictions]
    ahead = [(ModelOutput(out.logits, out.hidden), batch.seen())]
    ahead += list(zip(found, (p.batch for p in out.predictions), strict=True))
    for k, (outputs, seen) in enumerate(ahead):
        total, weight = objective(outputs, seen)
        wanted = labels(batch, k)
        assert int(weight) == len(wanted)
        losses = [
            cross_entropy(outputs.logits[row, t], torch.tensor(label)) for (row, t), label in wanted.items()
        ]
        torch.testing.assert_close(
            total, sum(losses, torch.zeros((), dtype=torch.float64)), rtol=1e-12, atol=1e-12
        )


@quick
@given(packed())
def test_main_logits_and_counts_are_those_of_a_model_without_a_predictor(
    model: Model, batch: TokenBatch
) -> None:
    given_ = {"valid": batch.valid, "documents": batch.documents}
    with torch.no_grad():
        with_, without = model(batch.ids, **given_), model(batch.ids, predict=False, **given_)
    assert torch.equal(with_.logits, without.logits)
    assert without.predictions == ()
    assert {path for path in with_.aux.counts if not path.startswith("predictor")} == set(without.aux.counts)


def test_no_document_reaches_another_through_the_predictor() -> None:
    # Experts would see products of other sizes, and round otherwise.
    model = build(tiny(3).with_(layers=[{"ffn": "dense"}] * 2), dtype="float64", seed=4)
    documents = torch.tensor([[0] * 5 + [1] * 6])
    ids = torch.randint(0, 23, (1, 11), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :5] = (ids[:, :5] + 7) % 23
    with torch.no_grad():
        one, two = (model(each, documents=documents).predictions for each in (ids, other))
        alone = model(ids[:, 5:]).predictions
    for k, (a, b, c) in enumerate(zip(one, two, alone, strict=True), 1):
        assert torch.equal(a.logits[:, 5:], b.logits[:, 5:])
        torch.testing.assert_close(a.logits[:, 5:], c.logits, rtol=1e-12, atol=1e-12)
        # What comes before a document's last k tokens does not see the next one either.
        third = ids.clone()
        third[:, 5:] = (ids[:, 5:] + 3) % 23
        with torch.no_grad():
            changed = model(third, documents=documents).predictions[k - 1]
        assert torch.equal(a.logits[:, : 5 - k], changed.logits[:, : 5 - k])
        assert a.batch.valid is not None
        assert a.batch.valid[0].tolist() == [t < 5 - k or t >= 5 for t in range(11 - k)]


def test_padding_is_in_no_count_of_the_predictor_s_experts(model: Model) -> None:
    ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(1))
    valid = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
    out = model(ids, valid=valid)
    for k in range(1, 4):
        load = out.aux.counts[f"predictor.depths.{k - 1}.ffn.router.load"]
        assert load.dtype == torch.int64
        assert int(load.sum()) == 2 * ((6 - k) + (9 - k))


def test_the_loss_is_weighed_as_the_paper_says_and_as_scheduled() -> None:
    ids = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(2))
    objective, _ = trainer(build(tiny(2), dtype="float64"))
    grads = {}
    for weight in (0.0, 0.3, 0.6):
        model = build(tiny(2, loss_weight=0.6), dtype="float64")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        values = {} if weight == 0.6 else {"predictor.loss_weight": weight}
        result = train_step(model, [TokenBatch(ids)], objective, optimizer, step=0, values=values)
        grads[weight] = model.embedding.weight.grad.clone()
        labels_at = [2 * 8, 2 * 7, 2 * 6]
        for k in (1, 2):
            mean = result.metrics[f"predictor.depth_{k}"]
            share = weight / 2 * mean * labels_at[k] / labels_at[0]
            assert result.losses[f"predictor.depth_{k}"] == pytest.approx(share, rel=1e-12)
    torch.testing.assert_close(grads[0.6] - grads[0.0], 2 * (grads[0.3] - grads[0.0]), rtol=1e-9, atol=1e-12)


def test_micro_batches_give_the_gradients_of_one_batch_with_a_predictor() -> None:
    ids = torch.randint(0, 23, (4, 9), generator=torch.Generator().manual_seed(3))
    found = []
    for parts in ([ids], [ids[:1], ids[1:]]):
        model = build(tiny(2), dtype="float64")
        objective, _ = trainer(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        result = train_step(model, [TokenBatch(p) for p in parts], objective, optimizer, step=0)
        bias = model.predictor.depths[1].ffn.router.bias.clone()
        found.append(([p.grad for p in model.parameters()], result.counts, bias))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert all(torch.equal(count, found[1][1][path]) for path, count in found[0][1].items())
    assert torch.equal(found[0][2], found[1][2])
    assert bool(found[0][2].any())  # the bias of an expert layer in the predictor moves too


def test_embedding_and_head_are_the_model_s_own_and_counted_once(model: Model) -> None:
    names = [name for name in model.state_dict() if name.startswith("predictor.")]
    assert not any("embedding" in name or "head" in name for name in names)
    fresh = build(tiny(1), dtype="float64")
    fresh(torch.tensor([[1, 2, 3]])).predictions[0].logits.sum().backward()
    assert fresh.head.projection.weight.grad is not None
    assert fresh.embedding.weight.grad is not None


def test_training_lowers_the_loss_of_every_depth() -> None:
    model = build(tiny(2), dtype="float32", seed=1)
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 0.01}))
    ids = torch.randint(0, 23, (1, 10), generator=torch.Generator().manual_seed(0)).repeat(4, 4)
    results = [train_step(model, [TokenBatch(ids)], objective, optimizer, step=step) for step in range(40)]
    for k in (1, 2):
        first, last = (result.metrics[f"predictor.depth_{k}"] for result in (results[0], results[-1]))
        assert last < first / 2
