"""Every backend equals `local`: outputs, every gradient, counts; on 1, 2 and 4 ranks, whatever the routing.

Experts are linear, so of the results only sums over a token's experts and over an expert's tokens can be taken in
another order. A sum of m terms in any two orders differs by at most 2 (m - 1) u times the sum of magnitudes, to
first order in the roundoff u.
"""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composeformer_comm import remote
from composeformer_comm.config import Collective, Hierarchical, Local
from composeformer_comm.local import LocalExchange
from composeformer_comm.remote import RemoteExchange

few = settings(max_examples=4, deadline=None, derandomize=True)
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def within(found, wanted, scale, factor, unit):
    """Each element within factor times unit times its own scale."""
    return bool(((found.double() - wanted.double()).abs() <= factor * unit * scale * (1 + 2**-20)).all())


@pytest.mark.parametrize("ranks", [2, 4])
@few
@given(data=st.data())
def test_collective_is_local_bit_for_bit_in_every_dtype(lab, ranks, data):
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    cases = [data.draw(lab.cases(ranks, dtype=dtype), label=str(dtype)) for dtype in kinds for _ in range(2)]
    for case, found in zip(cases, lab.spread(cases, Collective()), strict=True):
        wanted = lab.alone(case)
        together = lab.joined(found)
        for name, a, b in zip(wanted._fields, together[:5], wanted[:5]):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["collective, once per rank", "hierarchical"])
@pytest.mark.parametrize("ranks", [2, 4])
@few
@given(data=st.data())
def test_partial_sums_differ_by_the_order_alone(lab, kind, ranks, data):
    cases = [
        data.draw(lab.cases(ranks, dtype=dtype), label=str(dtype))
        for dtype in (torch.float32, torch.float64)
        for _ in range(3)
    ]
    for case, found in zip(cases, lab.spread(cases, lab.configs[kind](ranks)), strict=True):
        wanted, scales, together = lab.alone(case), lab.scales(case), lab.joined(found)
        unit, tokens = UNIT[case.dtype], sum(map(len, case.indices))
        assert torch.equal(together.counts, wanted.counts)
        # A product of one token's row and gradient: the same numbers in the same order.
        assert torch.equal(together.to_weights, wanted.to_weights)
        for name, terms in (("y", case.top_k), ("to_x", case.top_k), ("to_matrices", tokens)):
            a, b, scale = (getattr(each, name) for each in (together, wanted, scales))
            assert within(a, b, scale, 2 * max(terms, 1), unit), name


@pytest.mark.parametrize("kind", ["collective, once per rank", "hierarchical"])
def test_bf16_partial_sums_are_rounded_once_a_hop(lab, kind):
    """Forward: at each hop, and at the end as `local`; backward once more, where an expert's ranks sum their rows."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(4, 30, 8, generator=generator).argsort(-1)[:, :, :6].tolist()
    case = lab.case(
        tuple(tuple(map(tuple, tokens)) for tokens in chosen), 6, width=16, dtype=torch.bfloat16
    )
    config = lab.configs[kind](4)
    (found,) = lab.spread([case], config)
    wanted, scales, together = lab.alone(case), lab.scales(case), lab.joined(found)
    hops, unit = len(config.hops(4)), UNIT[torch.bfloat16]
    assert torch.equal(together.to_weights, wanted.to_weights)
    assert within(together.y, wanted.y, scales.y, hops + 2.1, unit)
    assert within(together.to_x, wanted.to_x, scales.to_x, hops + 3.1, unit)


UNEVEN = {
    "no token on a rank": lambda n, k: [0, 5, 0, 3][:n],
    "no token at all": lambda n, k: [0] * n,
    "all tokens on one rank": lambda n, k: [7, *[0] * (n - 1)],
    "uneven batches": lambda n, k: [1, 9, 4, 17][:n],
}


@pytest.mark.parametrize("kind", ["collective", "collective, once per rank", "hierarchical"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_extreme_loads(lab, kind, ranks):
    """Each distribution of tokens with each routing: all on one expert, all on the last, spread, nobody."""
    routings = {
        "one expert": [(3, 8, 8)],
        "the last rank's": [(7, 6, 8)],
        "everywhere": [(0, 3, 7), (5, 2, 1), (4, 6, 0)],
        "nobody": [(8, 8, 8)],
    }
    cases, names = [], []
    for name, sizes in UNEVEN.items():
        for routing, chosen in routings.items():
            tokens = [tuple(chosen[i % len(chosen)] for i in range(n)) for n in sizes(ranks, 3)]
            cases.append(lab.case(tuple(tokens), 3, width=4, dtype=torch.float64))
            names.append(f"{name}, {routing}")
    config = lab.configs[kind](ranks)
    for name, case, found in zip(names, cases, lab.spread(cases, config), strict=True):
        wanted, scales, together = lab.alone(case), lab.scales(case), lab.joined(found)
        assert torch.equal(together.counts, wanted.counts), name
        terms = sum(map(len, case.indices)) + 3
        for a, b, scale in zip(together.tensors, wanted.tensors, scales.tensors):
            assert within(a, b, scale, 2 * terms, UNIT[torch.float64]), name
        assert all(one.ledger == two for one, two in zip(found, declared(config, case))), name


def declared(config, case):
    return config.declared(case.indices, groups=8, ranks=case.ranks, rows=case.rows)


@pytest.mark.parametrize(
    "config",
    [
        Collective(),
        Collective(copies="rank", dispatch_format="bf16", combine_format="bf16"),
        Collective(dispatch_format="fp8"),
        Hierarchical(ranks_per_node=4, dispatch_format="fp8"),
    ],
    ids=str,
)
def test_one_process_is_local_and_says_so_once(lab, config, caplog):
    case = lab.case((((0, 3), (7, 8), (2, 1)),), 2, dtype=torch.bfloat16)
    wanted = lab.alone(case)
    remote.falls_back.cache_clear()
    with caplog.at_level(logging.INFO, logger="composeformer_comm"):
        for _ in range(2):
            found = lab.run(RemoteExchange(config, lab.experts), lab.inputs(case))
            assert all(torch.equal(a, b) for a, b in zip(found[:5], wanted[:5]))
            assert found.ledger == wanted.ledger
    assert [record.message for record in caplog.records] == [
        f"comm {type(config).__name__.lower()} falls back to local: one process holds all experts"
    ]
    (found,) = lab.spread([case], config)
    assert all(torch.equal(a, b) for a, b in zip(found[0][:5], wanted[:5]))
    assert list(declared(config, case)) == [found[0].ledger]


@pytest.mark.parametrize("kind", ["collective", "collective, once per rank", "hierarchical"])
def test_nobodys_weight_may_be_anything_on_any_rank(lab, kind):
    from composeformer.tensors import Routing
    from composeformer.testing.ranks import on_ranks

    def exchange(rank):
        weights = torch.tensor([[0.5, torch.nan], [torch.inf, torch.nan], [0.25, 0.75]], requires_grad=True)
        x = torch.ones(3, 4, requires_grad=True)
        routing = Routing(torch.tensor([[0, 8], [8, 8], [1, 7]]), weights)
        made = RemoteExchange(lab.configs[kind](2), 8, torch.distributed.group.WORLD)
        # Rows that belong to nobody may be read by nobody.
        y, _ = made.exchange(x, routing, lambda rows, counts: rows * 2)
        return y.detach(), *torch.autograd.grad(y.sum(), [x, weights])

    for y, to_x, to_weights in on_ranks(2, exchange):
        assert y.tolist() == [[1.0] * 4, [0.0] * 4, [2.0] * 4]
        assert to_x.tolist() == [[1.0] * 4, [0.0] * 4, [2.0] * 4]
        assert to_weights.tolist() == [[8.0, 0.0], [0.0, 0.0], [8.0, 8.0]]


@pytest.mark.parametrize("kind", ["collective", "collective, once per rank", "hierarchical"])
def test_without_gradients_the_same_outputs_and_half_the_bytes(lab, kind):
    from composeformer.tensors import Routing
    from composeformer.testing.ranks import on_ranks

    config = lab.configs[kind](2)
    case = lab.case((((0, 3), (7, 8)), ((2, 1), (4, 5), (1, 6))), 2)

    def both(rank):
        found = []
        for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            made = RemoteExchange(config, 8, torch.distributed.group.WORLD)
            inputs = lab.inputs(case, rank)
            with context:
                y, _ = made.exchange(
                    inputs.x, Routing(inputs.indices, inputs.weights), lambda rows, counts: rows.sin()
                )
            found.append(y.detach())
        return *found, made.ledger

    forward = config.declared(case.indices, groups=8, ranks=2, rows=case.rows, backward=False)
    for rank, (with_gradients, without, inference, ledger) in enumerate(on_ranks(2, both)):
        assert torch.equal(with_gradients, without)
        assert torch.equal(with_gradients, inference)
        assert ledger == forward[rank]
    assert isinstance(LocalExchange(Local(), 8).ledger, type(forward[0]))
