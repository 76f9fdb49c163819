"""`[comm]` in a spec: what it builds in one process, what it never changes, and what is refused."""

from copy import deepcopy

import pytest
import torch

import composeformer as cf
from composeformer.errors import SpecError
from composeformer_comm.config import Collective, Hierarchical, Local
from composeformer_comm.local import LocalExchange
from composeformer_comm.remote import RemoteExchange

TABLES = {
    "collective": {"kind": "collective", "dispatch_format": "fp8", "combine_format": "bf16"},
    "once per rank": {"kind": "collective", "copies": "rank", "ranks_per_node": 1},
    "hierarchical": {"kind": "hierarchical", "ranks_per_node": 8},
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_in_one_process_the_same_model_computes_the_same(table):
    plain = cf.Spec.load("tiny-moe")
    spec = plain.with_(comm=table)
    assert spec.fingerprint == plain.fingerprint
    ids = torch.arange(12).view(2, 6)
    outputs = []
    for each in (plain, spec):
        model = cf.build(each, seed=1)
        out = model(ids)
        out.logits.sum().backward()
        outputs.append([out.logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    exchange = model.layers[0].ffn.comm
    assert isinstance(exchange, RemoteExchange)
    assert not list(exchange.ledger.steps())
    assert isinstance(spec.single("comm").config, Collective | Hierarchical)


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        (
            {"comm": {"kind": "hierarchical"}},
            "python: comm.ranks_per_node: is required: an integer >= 1 (ranks)",
        ),
        (
            {"comm": {"kind": "colective"}},
            "python: comm.kind = \"colective\": unknown comm kind; allowed: local, collective, hierarchical; "
            "did you mean 'collective'?",
        ),
        (
            {"comm": {"kind": "collective", "combine_format": "fp8"}},
            'python: comm.combine_format = "fp8": must be one of activations, bf16',
        ),
        (
            {"comm": {"kind": "collective", "dispatch_format": "fp16"}},
            'python: comm.dispatch_format = "fp16": must be one of activations, bf16, fp8; did you mean',
        ),
        (
            {"comm": {"kind": "hierarchical", "ranks_per_node": 3}, "parallel": {"expert": 4}},
            "python: comm.ranks_per_node = 3: must divide the number of ranks that share the experts (4); the "
            "nearest that does is 2",
        ),
        (
            {"comm": {"kind": "collective", "ranks_per_node": 8}, "parallel": {"expert": 4}},
            "python: comm.ranks_per_node = 8: must divide the number of ranks that share the experts (4); the "
            "nearest that does is 4",
        ),
        (
            {"comm": {"kind": "collective"}, "parallel": {"expert": 3}},
            "python: parallel.expert = 3: must divide the number of experts, 8 in layers.0.ffn",
        ),
    ],
)
def test_what_can_not_be_is_one_line(tables, line):
    with pytest.raises(SpecError) as told:
        cf.Spec.from_dict({**cf.Spec.load("tiny-moe").to_dict(), **tables})
    (found,) = told.value.lines
    assert found.startswith(line)


def test_more_experts_than_ranks_can_share_is_one_line_for_who_asks_directly(lab):
    import torch.distributed as dist

    from composeformer.errors import InputError
    from composeformer.testing.ranks import on_ranks

    def build(rank):
        lines = []
        for made, config, experts in (
            (RemoteExchange, Collective(), 9),
            (RemoteExchange, Hierarchical(ranks_per_node=3), 8),
            (LocalExchange, Local(), 8),
        ):
            with pytest.raises(InputError) as told:
                made(config, experts, dist.group.WORLD)
            lines.append(told.value.lines)
        return lines

    for lines in on_ranks(2, build):
        assert lines == [
            (
                "parallel.expert = 2: 9 experts can not be shared evenly by 2 ranks; the nearest number that "
                "divides them is 1",
            ),
            (
                "comm.ranks_per_node = 3: must divide the number of ranks that share the experts (2); the nearest "
                "that does is 2",
            ),
            (
                "comm.kind = local: moves tokens within one process, and 2 share the experts; collective and "
                "hierarchical serve several",
            ),
        ]


def test_a_copy_of_a_model_speaks_through_the_same_group_into_a_ledger_of_its_own(lab):
    import torch.distributed as dist

    from composeformer.testing.ranks import on_ranks

    case = lab.case((((0, 7), (1, 2)), ((3, 4),)), 2)

    def copied(rank):
        exchange = RemoteExchange(Collective(), lab.experts, dist.group.WORLD)
        again = deepcopy(exchange)
        found = lab.run(again, lab.inputs(case, rank))
        return found.y, found.ledger, exchange.ledger

    for rank, (y, ledger, first) in enumerate(on_ranks(2, copied)):
        declared = Collective().declared(case.indices, groups=8, ranks=2, rows=case.rows)
        assert len(y) == len(case.indices[rank])
        assert ledger == declared[rank]
        assert not list(first.steps())
