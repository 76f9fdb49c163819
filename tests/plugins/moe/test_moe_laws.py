"""What every implementation of moe obeys as a feed-forward network, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

quick = settings(max_examples=12, deadline=None, derandomize=True)
implementations = pytest.mark.parametrize("implementation", ["reference", "batched"])
routers = pytest.mark.parametrize("router", ["sigmoid-bias", "softmax", "softmax-groups"])


@pytest.fixture(scope="module")
def models(lab):
    made = {}

    def get(router, implementation):
        key = router, implementation
        if key not in made:
            made[key] = lab.model(router, ffn={"implementation": implementation})
        return made[key]

    return get


def naive(ffn, x, routing):
    """The definition, token by token and expert by expert."""
    y = torch.zeros_like(x)
    for b, t in [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]:
        token = x[b, t]
        for expert, weight in zip(routing.indices[b, t].tolist(), routing.weights[b, t], strict=True):
            gate, up, down = (m.weight[expert] for m in (ffn.gate, ffn.up, ffn.down))
            y[b, t] += weight * (down @ (silu(gate @ token) * (up @ token)))
        gate, up, down = (m.weight for m in (ffn.shared_gate, ffn.shared_up, ffn.shared_down))
        y[b, t] += down @ (silu(gate @ token) * (up @ token))
    return y


@implementations
@routers
@quick
@given(rows=st.integers(1, 3), tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_it_is_the_weighted_sum_of_chosen_experts_and_the_shared_ones(
    lab, models, router, implementation, rows, tokens, seed
):
    model, x = models(router, implementation), lab.stream(rows, tokens, seed)
    ffn = model.layers[0].ffn
    with torch.no_grad():
        routing = ffn.router(x, lab.batch(x))
        lab.close(lab.run(model, x).hidden, naive(ffn, x, routing))


@implementations
@routers
@quick
@given(tokens=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_token_alone_and_in_any_order(lab, models, router, implementation, tokens, seed):
    model, x = models(router, implementation), lab.stream(1, tokens, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y, aux = lab.run(model, x)
        lab.close(torch.cat([lab.run(model, x[:, t : t + 1]).hidden for t in range(tokens)], 1), y)
        shuffled, shuffled_aux = lab.run(model, x[:, order])
    lab.close(shuffled, y[:, order])
    for name, count in aux.counts.items():
        assert torch.equal(count, shuffled_aux.counts[name])
    for name, loss in aux.losses.items():
        lab.close(shuffled_aux.losses[name], loss)


@implementations
@routers
@quick
@given(left=st.integers(0, 4), right=st.integers(0, 3), seed=st.integers(0, 99))
def test_padding_is_in_no_output_count_loss_or_gradient(
    lab, models, router, implementation, left, right, seed
):
    model, x = models(router, implementation), lab.stream(2, 5, seed)
    nan = torch.full((2, 1, lab.hidden), torch.nan, dtype=x.dtype)
    padded = torch.cat([nan.expand(-1, left, -1), x, nan.expand(-1, right, -1)], 1)
    valid = torch.zeros(2, left + 5 + right, dtype=torch.bool)
    valid[:, left : left + 5] = True
    cotangent = lab.stream(2, left + 5 + right, seed + 1)
    wanted = lab.gradients(model, x, cotangent=cotangent[:, left : left + 5])
    found = lab.gradients(model, padded, valid, cotangent)
    for name in ("output", "input"):
        assert not found[name][:, :left].any()
        assert not found[name][:, left + 5 :].any()
        found[name] = found[name][:, left : left + 5]
    lab.close(found, wanted)
    counts, padded_counts = (lab.run(model, *args).aux.counts for args in ((x,), (padded, valid)))
    assert counts.keys() == padded_counts.keys() == {"layers.0.ffn.router.load"}
    for name in counts:
        assert torch.equal(counts[name], padded_counts[name])


@implementations
@routers
def test_nothing_but_padding_gives_zeros_everywhere(lab, models, router, implementation):
    model = models(router, implementation)
    x = torch.full((2, 3, lab.hidden), torch.nan, dtype=torch.float64)
    valid = torch.zeros(2, 3, dtype=torch.bool)
    found = lab.gradients(model, x, valid, lab.stream(2, 3))
    assert len(found) > 6
    assert not any(each.any() for each in found.values())
    assert not lab.run(model, x, valid).aux.counts["layers.0.ffn.router.load"].any()


@implementations
@routers
def test_no_tokens_at_all(lab, models, router, implementation):
    model = models(router, implementation)
    found = lab.gradients(model, lab.stream(2, 0))
    assert found.pop("output").shape == (2, 0, lab.hidden)
    assert not any(each.any() for each in found.values())


@implementations
@routers
def test_micro_batches_add(lab, models, router, implementation):
    """Losses, counts and gradients of rows, of which some are padded, are those of all rows at once."""
    model, x = models(router, implementation), lab.stream(4, 6)
    valid = torch.arange(6)[None] >= torch.tensor([[0], [2], [5], [6]])
    cotangent = lab.stream(4, 6, seed=1)
    whole = lab.gradients(model, x, valid, cotangent)
    halves = [lab.gradients(model, *args) for args in zip(x.split(2), valid.split(2), cotangent.split(2))]
    for name in whole:
        if name in ("output", "input"):
            lab.close(torch.cat([half[name] for half in halves]), whole[name])
        else:
            lab.close(halves[0][name] + halves[1][name], whole[name])
    loads = [
        lab.run(model, *a).aux.counts["layers.0.ffn.router.load"] for a in zip(x.split(2), valid.split(2))
    ]
    assert torch.equal(loads[0] + loads[1], lab.run(model, x, valid).aux.counts["layers.0.ffn.router.load"])


@routers
def test_counts_are_exact_int64_and_only_of_training(lab, models, router):
    model, x = models(router, "reference"), lab.stream(2, 7)
    valid = torch.arange(7)[None] >= torch.tensor([[3], [0]])
    load = lab.run(model, x, valid).aux.counts["layers.0.ffn.router.load"]
    assert load.dtype == torch.int64
    indices = model.layers[0].ffn.router(x, lab.batch(x)).indices[valid]
    assert torch.equal(load, torch.bincount(indices.flatten(), minlength=8))
    for phase in ("prefill", "decode"):
        assert lab.run(model, x, valid, phase).aux == ({}, {}, {})


def test_only_the_routed_part_is_scaled_by_the_factor(lab):
    """And linearly; with all experts' outputs at zero the shared part is left, untouched by it."""
    for normalize in (True, False):
        tables = [
            {**lab.routers["sigmoid-bias"], "normalize": normalize, "routed_scaling_factor": f}
            for f in (1.0, 3.0)
        ]
        once, thrice = (lab.model(table) for table in tables)
        x = lab.stream(2, 5)
        with torch.no_grad():
            shared = once.layers[0].ffn.shared(x)
            routed = lab.run(once, x).hidden - shared
            lab.close(lab.run(thrice, x).hidden, 3 * routed + shared)
            for model in (once, thrice):
                model.layers[0].ffn.down.weight.zero_()
                assert torch.equal(lab.run(model, x).hidden, shared)
    assert routed.any()


@pytest.mark.parametrize("router", ["sigmoid-bias", "softmax"])
def test_renumbered_experts_are_the_same_function(lab, router):
    table = {**lab.routers[router], "num_groups": 1, "top_k_groups": 1}
    model, x = lab.model(table), lab.stream(2, 6)
    wanted = lab.run(model, x)
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    ffn = model.layers[0].ffn
    with torch.no_grad():
        renumbered = [m.weight for m in (ffn.gate, ffn.up, ffn.down, ffn.router.gate)]
        renumbered += [ffn.router.bias] if router == "sigmoid-bias" else []
        for tensor in renumbered:
            tensor.copy_(tensor[order])
    found = lab.run(model, x)
    lab.close(found.hidden, wanted.hidden)
    load = wanted.aux.counts["layers.0.ffn.router.load"]
    assert torch.equal(found.aux.counts["layers.0.ffn.router.load"], load[order])
    assert load.unique().numel() > 2


@implementations
@routers
def test_recomputed_activations_choose_alike_and_count_once(lab, models, router, implementation):
    model, x = models(router, implementation), lab.stream(2, 6)
    wanted = lab.gradients(model, x)
    ffn, chosen = model.layers[0].ffn, []
    hook = ffn.router.register_forward_hook(lambda module, inputs, routing: chosen.append(routing.indices))
    x = x.requires_grad_()
    model.zero_grad()
    y, aux = checkpoint(ffn, x, lab.batch(x), use_reentrant=False)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    ((y * cotangent).sum() + sum(aux.losses.values())).backward()
    hook.remove()
    assert len(chosen) == 2
    assert torch.equal(*chosen)
    assert aux.counts["layers.0.ffn.router.load"].sum() == chosen[0].numel()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in found:
        assert torch.equal(found[name], wanted[name])
    assert torch.equal(x.grad, wanted["input"])


def test_the_reference_does_the_declared_operations(lab, models):
    model, x = models("sigmoid-bias", "reference"), lab.stream(2, 7)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lab.run(model, x)
    linears = model.spec.plan.linears.items()
    declared = sum(linear.flops for role, linear in linears if role.startswith("layers.0.ffn."))
    assert counter.get_total_flops() == 14 * declared


def test_a_layer_of_one_expert_for_all_is_dense(lab):
    model = lab.model({"kind": "softmax", "top_k": 1}, ffn={"num_experts": 1, "num_shared_experts": 0})
    ffn, x = model.layers[0].ffn, lab.stream(2, 4)
    gate, up, down = (each.weight[0] for each in (ffn.gate, ffn.up, ffn.down))
    lab.close(lab.run(model, x).hidden, (silu(x @ gate.T) * (x @ up.T)) @ down.T)
