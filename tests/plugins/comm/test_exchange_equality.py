"""`collective` is `local` bit for bit, and what partial sums in bfloat16 lose; the rest are laws.

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
from composeformer_comm.config import Collective, Hierarchical
from composeformer_comm.remote import RemoteExchange

few = settings(max_examples=4, deadline=None, derandomize=True)
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def within(found, wanted, scale, factor, unit):
    """Each element within factor times unit times its own scale."""
    return bool(((found.double() - wanted.double()).abs() <= factor * unit * scale * (1 + 2**-20)).all())


@pytest.mark.parametrize("ranks", [4])
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
def test_bf16_partial_sums_are_rounded_once_a_hop(lab, kind):
    """Forward: at each hop, and at the end as `local`; backward once more, where an expert's ranks sum their rows."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(4, 30, 8, generator=generator).argsort(-1)[:, :, :6].tolist()
    case = lab.case(tuple(tuple(map(tuple, tokens)) for tokens in chosen), 6, width=16, dtype=torch.bfloat16)
    config = lab.configs[kind](4)
    (found,) = lab.spread([case], config)
    wanted, scales, together = lab.alone(case), lab.scales(case), lab.joined(found)
    hops, unit = len(config.hops(4)), UNIT[torch.bfloat16]
    assert torch.equal(together.to_weights, wanted.to_weights)
    assert within(together.y, wanted.y, scales.y, hops + 2.1, unit)
    assert within(together.to_x, wanted.to_x, scales.to_x, hops + 3.1, unit)


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
