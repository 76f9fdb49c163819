"""What a device holds, on paper: nothing is lost over stages and replicas, and one device holds what is built."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import composeformer as cf
from composeformer.costs import cost
from composeformer.costs.layout import Layout, layout
from composeformer.costs.memory import cached, largest, training
from composeformer.errors import InputError, SpecError
from composeformer.spec import Spec
from composeformer.train import TokenBatch, train_step, trainer

ONE = ("tiny-llama", "tiny-deepseek-v3", "tiny-moe")
PRECISIONS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "bf16": {"kind": "bf16"},
    "full-bfloat16": {"kind": "full", "dtype": "bfloat16"},
    "fp8-block": {"kind": "fp8-block"},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ONE)
def test_one_device_holds_what_is_built_and_trained(name: str, precision: str) -> None:
    spec = Spec.load(name).with_(precision=PRECISIONS[precision])
    (found,) = training(spec)
    model = cf.build(spec)
    objective, optimizer = trainer(model)
    ids = torch.randint(spec.model.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    train_step(model, [TokenBatch(ids)], objective, optimizer, step=0)
    parameters = list(model.parameters())
    assert found.parameters == sum(p.numel() for p in parameters)
    # What is updated is what is gathered, or a master of it.
    assert found.weights + found.master >= sum(p.nbytes for p in parameters)
    if not found.master:
        assert found.weights == sum(p.nbytes for p in parameters)
    assert found.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    kept = [t for state in optimizer.state.values() for k, t in state.items() if k.startswith("exp_avg")]
    assert found.moments == sum(tensor.nbytes for tensor in kept)
    assert found.buffers == sum(buffer.nbytes for buffer in model.buffers())


layouts = st.fixed_dictionaries(
    {
        "pipeline": st.integers(1, 4),
        "expert": st.sampled_from([1, 2, 4]),
        "zero": st.integers(0, 3),
        "replicas": st.integers(1, 4),
    }
)


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_all_devices_together_hold_every_parameter_once_or_as_often_as_it_is_replicated(
    drawn: dict[str, int],
) -> None:
    spec = Spec.load("tiny-deepseek-v3").with_(
        {f"parallel.{n}": drawn[n] for n in ("pipeline", "expert", "zero")}
    )
    devices = drawn["pipeline"] * drawn["expert"] * drawn["replicas"]
    placed = Layout(spec=spec, devices=devices)
    if drawn["pipeline"] > len(spec.layers):
        with pytest.raises(InputError, match="must be <= the number of layers"):
            placed.check()
        return
    placed.check()
    counts = cost(spec)
    whole = 0.0
    for stage in range(placed.pipeline):
        for held in placed.held(stage):
            if held.weight.trains:
                whole += held.elements * placed.stage_devices / held.replicas
    copied = 0 if placed.pipeline == 1 else sum(w.elements for _, w in spec.plan.embedding.tensors())
    assert whole == pytest.approx(counts.total + counts.predictor + copied)
    shared, alone = training(spec, placed), training(spec.with_({"parallel.zero": 0}), placed)
    for one, other in zip(shared, alone, strict=True):
        assert one.weights <= other.weights
        assert one.gradients <= other.gradients
        assert one.moments is not None
        assert other.moments is not None
        assert one.moments <= other.moments


def test_deepseek_v3_holds_on_the_mean_what_its_report_implies() -> None:
    """639M parameters of experts and 1,070M others a device; the largest is not the mean."""
    changes = {"parallel.pipeline": 16, "parallel.expert": 64, "parallel.zero": 1}
    spec = Spec.load("deepseek-v3").with_(changes)
    placed = layout(spec)
    assert (placed.devices, placed.stage_devices, placed.data) == (2048, 128, 128)
    experts = others = 0.0
    for stage in range(16):
        for held in placed.held(stage):
            if held.name.startswith("predictor") or not held.weight.trains:
                continue
            if stage == 15 and held.name.startswith("embedding"):
                continue  # the predictor's copy
            if held.replicas == 2:
                experts += held.elements
            else:
                others += held.elements
    assert experts / 16 == pytest.approx(639e6, rel=1e-3)
    assert others / 16 == pytest.approx(1070e6, rel=1e-3)
    found = training(spec, placed)
    most = max(found, key=lambda memory: memory.parameters)
    assert most.stage == 15
    assert most.parameters > 1.5 * sum(memory.parameters for memory in found) / 16
    # With activations those are largest that have four layers of experts.
    assert largest(found).stage == 3


@settings(max_examples=20, deadline=None)
@given(pipeline=st.integers(1, 3), tensor=st.sampled_from([1, 2]), context=st.integers(1, 512))
def test_stages_together_cache_what_the_model_does_and_heads_are_divided(
    pipeline: int, tensor: int, context: int
) -> None:
    for name, divided in (("tiny-llama", tensor), ("tiny-deepseek-v3", 1)):
        spec = Spec.load(name).with_({"parallel.pipeline": pipeline, "parallel.tensor": tensor})
        found = sum(cached(spec, layout(spec), stage, context) for stage in range(pipeline))
        assert found * divided == cost(spec, context=context).cache_bytes_at_context


def test_two_copies_are_kept_by_dualpipe() -> None:
    for tied in ("false", "true"):
        changes = ["parallel.pipeline=2", "parallel.zero=1", f"model.tie_embeddings={tied}"]
        plain = Spec.load("tiny-llama", changes)
        both = Spec.load("tiny-llama", [*changes, "parallel.schedule=dualpipe"])
        alone, together = training(plain), training(both)
        # The first and the last stage are on one device, which has a matrix of both ends once.
        shared = 4 * 256 * 64 if tied == "true" else 0
        for one, mirrored, two in zip(alone, reversed(alone), together, strict=True):
            assert two.weights == one.weights + mirrored.weights - shared
            assert two.gradients == one.gradients


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["parallel.pipeline=4"], "parallel.pipeline = 4: must be <= the number of layers (3)"),
        (["parallel.pipeline=3", "cost.gpus=4"], "= 3: must divide the number of devices (4)"),
        (
            ["parallel.tensor=3", "cost.gpus=3"],
            "parallel.tensor = 3: must divide the 4 units of layers.0.mixer.q",
        ),
        (["parallel.expert=2", "cost.gpus=3"], "parallel.expert = 2: must divide the devices of a stage (3)"),
    ],
)
def test_devices_that_can_not_be_divided_so_are_one_clear_error(changes: list[str], told: str) -> None:
    with pytest.raises((InputError, SpecError)) as refused:
        layout(Spec.load("tiny-llama", changes))
    assert told in str(refused.value)


def test_a_layout_that_is_only_priced_is_refused_by_processes_that_would_run_it() -> None:
    from composeformer.parallel.placement import _problems

    spec = Spec.load("tiny-llama", ["parallel.pipeline=2", "parallel.tensor=2"])
    told = [str(problem) for problem in _problems(spec, 2)]
    assert told == [
        "--set: parallel.pipeline = 2: is priced, and not run by this version; 1 runs",
        "--set: parallel.tensor = 2: is priced, and not run by this version; 1 runs",
    ]
