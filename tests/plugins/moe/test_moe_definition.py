"""What moe is, in float64: the weighted sum of its experts, beside the shared ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

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


def test_a_layer_of_one_expert_for_all_is_dense(lab):
    model = lab.model({"kind": "softmax", "top_k": 1}, ffn={"num_experts": 1, "num_shared_experts": 0})
    ffn, x = model.layers[0].ffn, lab.stream(2, 4)
    gate, up, down = (each.weight[0] for each in (ffn.gate, ffn.up, ffn.down))
    lab.close(lab.run(model, x).hidden, (silu(x @ gate.T) * (x @ up.T)) @ down.T)
