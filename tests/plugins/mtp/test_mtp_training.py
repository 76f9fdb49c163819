"""The predictor in training: what each depth sees, and which token it is to predict."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from composeformer.assemble import build
from composeformer.decoder import Layer, Model
from composeformer.spec import Spec
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


def test_training_lowers_the_loss_of_every_depth() -> None:
    model = build(tiny(2), dtype="float32", seed=1)
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 0.01}))
    ids = torch.randint(0, 23, (1, 10), generator=torch.Generator().manual_seed(0)).repeat(4, 4)
    results = [train_step(model, [TokenBatch(ids)], objective, optimizer, step=step) for step in range(40)]
    for k in (1, 2):
        first, last = (result.metrics[f"predictor.depth_{k}"] for result in (results[0], results[-1]))
        assert last < first / 2
