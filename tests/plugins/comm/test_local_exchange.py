"""The exchange of one process: the judge of all others."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import composeformer as cf
from composeformer.tensors import Routing
from composeformer_comm.config import Local
from composeformer_comm.local import LocalExchange

quick = settings(max_examples=40, deadline=None, derandomize=True)
WIDTH = 5


def maps(experts, seed=0, dtype=torch.float64):
    """A matrix for each expert, and what computes them on sorted rows."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(experts, WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    matrices.requires_grad_()

    def compute(rows, counts):
        assert counts.dtype == torch.int64
        assert counts.shape == (experts,)
        parts = rows.split([*counts.tolist(), len(rows) - int(counts.sum())])
        found = [part @ matrix.tanh() for part, matrix in zip(parts, matrices)]
        return torch.cat([*found, torch.zeros_like(parts[-1])])

    return matrices, compute


def naive(x, routing, matrices):
    """Token by token."""
    tokens = []
    for token, experts, weights in zip(x, routing.indices.tolist(), routing.weights, strict=True):
        terms = [
            weight * (token @ matrices[expert].tanh())
            for expert, weight in zip(experts, weights)
            if expert < len(matrices)
        ]
        tokens.append(sum(terms, token * 0))
    return torch.stack(tokens) if tokens else x * 0


@st.composite
def routings(draw):
    """Up to six tokens and experts; some choose nobody, some all the same."""
    experts, tokens = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    top_k = draw(st.integers(1, experts))
    row = st.permutations(range(experts)).map(lambda order: order[:top_k]) | st.just(list(range(top_k)))
    chosen = [draw(row) if draw(st.integers(0, 3)) else [experts] * top_k for _ in range(tokens)]
    weights = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    return experts, Routing(torch.tensor(chosen, dtype=torch.int64).view(tokens, top_k), weights)


@quick
@given(case=routings(), seed=st.integers(0, 99))
def test_it_is_the_weighted_sum_over_experts_with_every_gradient(case, seed):
    experts, routing = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(routing.indices), WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    routing.weights.requires_grad_()
    matrices, compute = maps(experts, seed)
    found, beside = LocalExchange(Local(), experts).exchange(x, routing, compute)
    wanted = naive(x, routing, matrices)
    assert beside is None
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(
            y, [x, routing.weights, matrices], cotangent, allow_unused=True, materialize_grads=True
        )
        for y in (found, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(LocalExchange(Local(), experts).exchange(x, routing, compute)[0], found)


@quick
@given(case=routings())
def test_rows_are_sorted_by_expert_in_the_tokens_order_and_counted(case):
    experts, routing = case
    tokens, top_k = routing.indices.shape
    x = torch.arange(tokens, dtype=torch.float64)[:, None].expand(-1, WIDTH)
    rows, counts, _ = LocalExchange(Local(), experts).dispatch(x, routing)
    pairs = sorted((e, t) for t in range(tokens) for e in routing.indices[t].tolist())
    assert rows[:, 0].tolist() == [float(t) for _, t in pairs]
    assert rows.shape == (tokens * top_k, WIDTH)
    assert counts.tolist() == [sum(e == each for e, _ in pairs) for each in range(experts)]


def test_any_leading_dimensions_and_what_is_computed_beside_once():
    calls = []

    def beside():
        calls.append(1)
        return "shared"

    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    routing = Routing(torch.tensor([[0, 1], [1, 2], [2, 0]]).expand(2, -1, -1), torch.rand(2, 3, 2).double())
    matrices, compute = maps(3)
    found, given_back = LocalExchange(Local(), 3).exchange(x, routing, compute, beside)
    assert (calls, given_back) == ([1], "shared")
    flat = Routing(routing.indices.flatten(0, 1), routing.weights.flatten(0, 1))
    assert torch.allclose(found, naive(x.flatten(0, 1), flat, matrices).view(2, 3, WIDTH), rtol=1e-12)


def test_nobodys_weight_may_be_anything():
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[0.5, torch.nan], [torch.inf, torch.nan], [0.25, 0.75]], dtype=torch.float64)
    weights.requires_grad_()
    _, compute = maps(2)
    routing = Routing(torch.tensor([[0, 2], [2, 2], [1, 0]]), weights)
    found, _ = LocalExchange(Local(), 2).exchange(x, routing, compute)
    assert not found[1].any()
    for each in (found, *torch.autograd.grad(found.sum(), [x, weights])):
        assert torch.isfinite(each).all()


def test_narrow_rows_are_weighed_and_summed_in_fp32():
    """256 and seven ones: in bfloat16 each one would be lost."""
    x = torch.tensor([[256.0] * 8] + [[1.0] * 8] * 7).bfloat16()
    weights = torch.tensor([[1 + 2**-12] + [1.0] * 7])
    routing = Routing(torch.arange(8)[None], weights)
    found, _ = LocalExchange(Local(), 8).exchange(
        torch.zeros(1, 8).bfloat16(), routing, lambda rows, counts: x
    )
    assert found.dtype == torch.bfloat16
    assert (found == 264).all()
    _, _, sent = LocalExchange(Local(), 8).dispatch(torch.zeros(1, 8).bfloat16(), routing)
    combined = LocalExchange(Local(), 8).combine(x, sent)
    assert combined.dtype == torch.float32
    assert (combined == 256 * (1 + 2**-12) + 7).all()


def test_narrow_gradients_of_a_tokens_rows_are_summed_in_fp32():
    x = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    routing = Routing(torch.arange(8)[None], torch.ones(1, 8))
    rows, _, _ = LocalExchange(Local(), 8).dispatch(x, routing)
    rows.backward(torch.tensor([[256.0] * 8] + [[1.0] * 8] * 7).bfloat16())
    assert (x.grad == 264).all()


def test_the_same_again_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, WIDTH, generator=generator)
    routing = Routing(
        torch.rand(400, 8, generator=generator).argsort(-1)[:, :4], torch.rand(400, 4, generator=generator)
    )
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        matrices, compute = maps(8, dtype=torch.float32)
        found, _ = LocalExchange(Local(), 8).exchange(leaf, routing, compute)
        results.append([found, *torch.autograd.grad(found.sin().sum(), [leaf, matrices])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_model_gets_it_by_default():
    for table in ({}, {"comm": {"kind": "local"}}):
        spec = cf.Spec.from_dict({**cf.Spec.load("tiny-moe").to_dict(), **table})
        model = cf.build(spec, device="meta")
        exchange = model.layers[0].ffn.comm
        assert isinstance(exchange, LocalExchange)
        assert exchange.groups == 8
