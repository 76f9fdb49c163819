"""What evens out the loads of experts: losses of sequences, and the bias that moves after a step."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from composeformer.train import Run, TokenBatch, train_step, trainer

SPEED = 0.125  # exact in fp32
BIASED = {"kind": "sigmoid-bias", "top_k": 2, "bias_update_speed": SPEED}
LOAD = "layers.0.ffn.router.load"


def test_a_perfectly_even_router_has_a_balance_loss_of_one_for_each_token(lab):
    """Its least value: f and P are then 1 and 1 / E."""
    router = lab.router({"kind": "softmax", "top_k": 1, "balance_alpha": 1.0}, 4)
    x = 1e-4 * torch.eye(4)[None]
    (found,) = router(x, lab.batch(x)).aux.losses.values()
    assert abs(found - 4) < 1e-4


@pytest.mark.parametrize("table", [{"kind": "softmax", "top_k": 2}, {"kind": "sigmoid-bias", "top_k": 2}])
def test_there_is_no_loss_without_a_weight_or_outside_training(lab, table):
    x = torch.randn(1, 3, 8)
    assert not lab.router(table, 8)(x, lab.batch(x)).aux.losses
    alpha = "balance_alpha" if table["kind"] == "softmax" else "sequence_balance_alpha"
    router = lab.router({**table, alpha: 0.1}, 8)
    assert list(router(x, lab.batch(x)).aux.losses) == ["layers.0.ffn.router.balance"]
    for phase in ("prefill", "decode"):
        assert not router(x, lab.batch(x, phase=phase)).aux.losses


def run_of(router_table, **values):
    scheduled = {f"layers.0.ffn.router.{name}": value for name, value in values.items()}
    return Run(step=0, tokens=1, path="layers.0.ffn.router", config=router_table, values=scheduled)


def test_the_bias_is_a_saved_buffer_and_no_parameter(lab):
    model = lab.model(BIASED)
    name = "layers.0.ffn.router.bias"
    assert name in model.state_dict()
    assert name in dict(model.named_buffers())
    assert name not in dict(model.named_parameters())
    assert not model.state_dict()[name].requires_grad
    lab.gradients(model, lab.stream(1, 4))
    assert model.layers[0].ffn.router.bias.grad is None


CASTS = {
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "router alone": lambda model: model.layers[0].ffn.router.bfloat16(),
    "copied": lambda model: copy.deepcopy(model).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_model_keeps_its_bias_in_fp32_and_its_counts_in_int64(lab, cast):
    model = lab.model(BIASED)
    bias = model.layers[0].ffn.router.bias
    wanted = bias.clone()
    done = CASTS[cast](model)
    model = done if hasattr(done, "layers") else model
    router = model.layers[0].ffn.router
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias, wanted)
    assert (router.bias.data_ptr() == bias.data_ptr()) == (cast != "copied")
    assert dict(router.named_buffers())["bias"] is router.bias
    assert router.gate.weight.dtype == {"double": torch.float64, "half": torch.float16}.get(
        cast, torch.bfloat16
    )
    x = lab.stream(1, 5, dtype=router.gate.weight.dtype)
    assert model.layers[0].ffn(x, lab.batch(x)).aux.counts[LOAD].dtype == torch.int64


def test_the_bias_moves_to_another_device_and_is_loaded(lab):
    model = lab.model(BIASED)
    assert model.to("meta").layers[0].ffn.router.bias.device.type == "meta"
    a, b = lab.model(BIASED, seed=1), lab.model(BIASED, seed=2)
    b.to(torch.bfloat16).load_state_dict(a.state_dict())
    assert torch.equal(a.layers[0].ffn.router.bias, b.layers[0].ffn.router.bias)


def learner(lab, seed=0, **more):
    router = {**BIASED, "sequence_balance_alpha": 0.01}
    model = lab.model(router, seed=seed, layers=[{}, {"ffn": False}, {}], **more)
    return model, *trainer(model)


def rows(count, seed, padded=True):
    ids = torch.randint(0, 24, (count, 7), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(ids, torch.arange(7) >= torch.arange(count)[:, None] % 3 if padded else None)


def biases(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("bias")}


def test_a_state_dict_taken_before_training_sees_the_bias_move(lab):
    model, objective, optimizer = learner(lab)
    state = model.state_dict()
    old = {name: each.clone() for name, each in biases(model).items()}
    assert len(old) == 2
    for step in range(2):
        train_step(model, [rows(3, step)], objective, optimizer, step=step)
    for name, each in biases(model).items():
        assert not torch.equal(each, old[name])
        assert state[name].data_ptr() == each.data_ptr()
        # Multiples of the speed, for each step happened once.
        assert ((each - old[name]) / SPEED).round().abs().max() <= 2


def test_every_layer_moves_its_bias_by_its_own_load_once_a_step(lab):
    model, objective, optimizer = learner(lab)
    old = {name: each.clone() for name, each in biases(model).items()}
    result = train_step(model, [rows(3, 5)], objective, optimizer, step=0)
    for name, before in old.items():
        load = result.counts[name.replace("bias", "load")]
        assert load.sum() == 2 * result.tokens
        moved = torch.sign(load.sum() - load * len(load)) * SPEED
        assert torch.equal(biases(model)[name], before + moved)


def test_evaluation_between_steps_changes_no_trajectory(lab):
    found = []
    for evaluate in (False, True):
        model, objective, optimizer = learner(lab)
        for step in range(3):
            train_step(model, [rows(3, step)], objective, optimizer, step=step)
            if evaluate:
                with torch.no_grad():
                    model.eval()
                    model(rows(4, 99).ids)
                    model(rows(4, 98).ids, phase="prefill")
                    model.train()
        found.append({**biases(model), **dict(model.named_parameters())})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_accumulated_micro_batches_are_one_batch(lab):
    found = []
    whole = rows(6, 3)
    pieces = [TokenBatch(ids, valid) for ids, valid in zip(whole.ids.split(2), whole.valid.split(2))]
    for batches in ([whole], pieces):
        model, objective, optimizer = learner(lab)
        result = train_step(model, batches, objective, optimizer, step=0)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((biases(model), gradients, result))
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in found[0][0])
    lab.close(found[1][1], found[0][1])
    assert all(torch.equal(found[0][2].counts[name], found[1][2].counts[name]) for name in found[0][2].counts)
    for name, loss in found[0][2].losses.items():
        assert abs(found[1][2].losses[name] - loss) < 1e-12


def test_recomputation_moves_no_bias_twice(lab):
    found = []
    for recompute in (False, True):
        model, objective, optimizer = learner(lab)
        if recompute:
            for layer in model.layers:
                layer.forward = lambda *args, run=layer.forward: checkpoint(run, *args, use_reentrant=False)
        result = train_step(model, [rows(3, 1)], objective, optimizer, step=0)
        found.append({**biases(model), **result.counts, **dict(model.named_parameters())})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_step_reports_how_even_each_layers_load_was(lab):
    model, objective, optimizer = learner(lab)
    result = train_step(model, [rows(3, 1)], objective, optimizer, step=0)
    for layer in (0, 2):
        load = result.counts[f"layers.{layer}.ffn.router.load"].double()
        violation, least = (
            result.metrics[f"layers.{layer}.ffn.{key}"] for key in ("max_violation", "min_load")
        )
        assert violation == pytest.approx(float(load.max() / load.mean() - 1))
        assert least == pytest.approx(float(load.min() / load.mean()))
        assert violation > 0 < 1 - least


def test_metrics_of_no_tokens_are_those_of_balance_and_of_no_counts_none(lab):
    ffn = lab.model().layers[0].ffn
    told = ffn.after_step({"router.load": torch.zeros(8, dtype=torch.int64)}, run_of(None))
    assert {name: float(value) for name, value in told.items()} == {"max_violation": 0.0, "min_load": 1.0}
    assert ffn.after_step({}, run_of(None)) == {}


def test_the_bias_evens_out_the_load(lab):
    """With all other weights held, the most loaded expert of a lopsided router comes down to near the mean."""
    router = {"kind": "sigmoid-bias", "top_k": 2, "bias_update_speed": 0.02}
    model = lab.model(router)
    ffn, x = model.layers[0].ffn, lab.stream(8, 64)
    ffn.router.bias.copy_(torch.linspace(-0.5, 0.5, 8))
    config = model.spec.plan.layers[0]["ffn"].part.config.router.config
    worst = []
    for _ in range(60):
        load = ffn(x, lab.batch(x)).aux.counts[LOAD]
        worst.append(float(ffn.after_step({"router.load": load}, run_of(None))["max_violation"]))
        ffn.router.after_step({"load": load}, run_of(config))
    assert worst[0] > 1
    assert worst[-1] < 0.2
