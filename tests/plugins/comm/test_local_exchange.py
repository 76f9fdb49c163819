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


def test_a_model_gets_it_by_default():
    for table in ({}, {"comm": {"kind": "local"}}):
        spec = cf.Spec.from_dict({**cf.Spec.load("tiny-moe").to_dict(), **table})
        model = cf.build(spec, device="meta")
        exchange = model.layers[0].ffn.comm
        assert isinstance(exchange, LocalExchange)
        assert exchange.groups == 8
