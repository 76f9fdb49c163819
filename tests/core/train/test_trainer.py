"""From a spec to what trains: the parts it names, over each parameter once; and it learns."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from composeformer.assemble import build
from composeformer.decoder import Model
from composeformer.errors import ComposeError, InputError, SpecError
from composeformer.generation import generate
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trained, trainer

Fresh = Callable[[], Model]


def test_every_parameter_that_trains_is_there_once_by_its_own_name(fresh: Fresh) -> None:
    model = fresh()
    found = trained(model)
    assert {id(one.parameter) for one in found} == {id(parameter) for parameter in model.parameters()}
    assert len(found) == len(list(model.parameters()))
    assert [one.name for one in found if "head" in one.name] == []
    matrices = {one.name for one in found if one.is_matrix}
    assert {name for name in matrices if "norm" in name or name.endswith("bias")} == set()
    assert {"embedding.weight", "layers.1.mixer.q.weight"} <= matrices
    q = next(one for one in found if one.name == "layers.0.mixer.q.bias")
    assert q.linear is not None
    assert (q.linear.name, q.weight.shape, q.is_matrix) == ("q", (12,), False)


def test_a_frozen_parameter_is_left_out_and_a_stray_one_is_an_error(fresh: Fresh) -> None:
    model = fresh()
    model.get_parameter("embedding.weight").requires_grad_(False)
    assert "embedding.weight" not in [one.name for one in trained(model)]
    model.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="extra: no part of the model declares this parameter"):
        trained(model)


def test_the_spec_says_which_objective_and_optimizer(fresh: Fresh) -> None:
    model = fresh()
    spec = model.spec.with_(
        {"train.learning_rate": 0.5},
        optimizer={"kind": "adamw", "beta2": 0.5},
        objective={"kind": "next-token", "chunk_tokens": 3},
    )
    _, optimizer = trainer(model, spec)
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(0.5, (0.9, 0.5))] * 2
    assert spec.fingerprint == model.spec.fingerprint


def test_an_implementation_that_can_not_serve_says_why(fresh: Fresh) -> None:
    model = fresh()
    spec = model.spec.with_(optimizer={"kind": "adamw", "implementation": "fused"})
    with pytest.raises(SpecError) as caught:
        trainer(model, spec)
    assert len(caught.value.lines) == 1
    assert "for cuda, this model is on cpu" in caught.value.lines[0]


def test_tiny_llama_learns_a_text_by_heart() -> None:
    text = b"the quick brown fox jumps over the lazy dog, and then it sleeps. "
    model = build("tiny-llama", seed=0)
    objective, optimizer = trainer(model, model.spec.with_({"train.learning_rate": 3e-3}))
    batch = TokenBatch(torch.tensor([list(text)]))
    losses = [train_step(model, [batch], objective, optimizer, step=i, clip_norm=1.0).loss for i in range(60)]
    assert losses[0] > 5.0  # about ln 256
    assert losses[-1] < 0.1
    (made,) = generate(model, list(text[:10]), max_new_tokens=len(text) - 10)
    assert bytes(made.ids) == text[10:]


@pytest.mark.parametrize("slot", ["objective", "optimizer"])
def test_an_unknown_kind_is_refused_with_what_is_allowed(slot: str) -> None:
    with pytest.raises(SpecError, match=r"adamw|next-token"):
        Spec.load("tiny-llama").with_({f"{slot}.kind": "nothing"})


def test_half_precision_is_refused_where_adam_would_make_nan_of_it() -> None:
    with pytest.raises(ComposeError, match="train in bfloat16 or float32"):
        trainer(build("tiny-llama", dtype="float16"))
    assert trainer(build("tiny-llama", dtype="bfloat16"))
