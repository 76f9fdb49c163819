"""Ledgers and means. That what is handed to collectives is what is declared, to the byte, is a law."""

from itertools import combinations, product

import pytest
import torch
import torch.distributed as dist

from composeformer.contracts import Exchange
from composeformer.costs.ledger import LINKS, Ledger, Rows, Step, Volume, total
from composeformer.errors import InputError
from composeformer.testing.ranks import on_ranks
from composeformer_comm.config import Collective, Hierarchical, Local


def test_a_ledger_accumulates_and_resets(lab):
    case = lab.case((((0, 7), (1, 2)), ((3, 4),)), 2)
    config = Collective(copies="rank")

    def twice(rank):
        from composeformer_comm.remote import RemoteExchange

        exchange = RemoteExchange(config, lab.experts, dist.group.WORLD)
        one = Ledger()
        one.update(lab.run(exchange, lab.inputs(case, rank)).ledger)
        both = Ledger()
        both.update(lab.run(exchange, lab.inputs(case, rank)).ledger)
        exchange.ledger.reset()
        return one, both, exchange.ledger

    for one, both, none in on_ranks(2, twice):
        assert both == total([one, one])
        assert both != one
        assert none == Ledger()
        assert dict(both.steps()) == {step: 2 for step, _ in one.steps()}


def test_results_of_another_dtype_are_declared_as_such(lab):
    """Experts that a rule keeps in fp32 under bf16 activations: per expert, results travel as they are."""
    from composeformer.tensors import Routing
    from composeformer_comm.remote import RemoteExchange

    case = lab.case((((0, 7), (1, 2)), ((3, 4),)), 2, dtype=torch.bfloat16)
    config = Collective()

    def run(rank):
        inputs = lab.inputs(case, rank)
        exchange = RemoteExchange(config, lab.experts, dist.group.WORLD)
        x = inputs.x.requires_grad_()
        y, _ = exchange.exchange(
            x, Routing(inputs.indices, inputs.weights), lambda rows, counts: rows.float()
        )
        y.sum().backward()
        return exchange.ledger

    rows = Rows(width=case.width, activation=2, result=4)
    assert tuple(on_ranks(2, run)) == config.declared(case.indices, groups=8, ranks=2, rows=rows)


def test_hierarchical_crosses_once_per_node_where_flat_crosses_once_per_expert():
    """Two nodes of four ranks, every token on four experts of the other node and four of its own."""
    token = [0, 2, 4, 6, 8, 10, 12, 14]
    indices = [[token] * 3 for _ in range(8)]
    sizes = {"groups": 16, "ranks": 8, "rows": Rows(width=128, activation=2)}
    crossing = {}
    for name, config in {
        "expert": Collective(ranks_per_node=4),
        "rank": Collective(copies="rank", ranks_per_node=4),
        "node": Hierarchical(ranks_per_node=4),
    }.items():
        (ledger, *_) = config.declared(indices, **sizes)
        crossing[name] = ledger.volume(
            purpose="dispatch", content="payload", link="inter", direction="forward"
        )
    row = 128 * 2
    assert {name: volume.sent / row for name, volume in crossing.items()} == {
        "expert": 3 * 4,
        "rank": 3 * 4,
        "node": 3,
    }
    assert all(volume.sent == volume.received for volume in crossing.values())


EXCHANGES = (
    Exchange(name="dispatch", elements=130, fan_out=2),
    Exchange(name="combine", elements=130, fan_out=2),
)


@pytest.mark.parametrize(
    "config",
    [
        Collective(dispatch_format="fp8", ranks_per_node=2),
        Collective(copies="rank", combine_format="bf16", ranks_per_node=2),
        Hierarchical(ranks_per_node=2, dispatch_format="fp8"),
        Hierarchical(ranks_per_node=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_expected_is_the_mean_over_all_routings(config, limit):
    """One token on each of four ranks, two of eight experts each; all that are allowed, as often as each."""
    nodes = 4 // (config.ranks_per_node or 4)
    each = 8 // nodes
    chosen = []
    for allowed in combinations(range(nodes), nodes if limit is None else limit):
        own = [expert for node in allowed for expert in range(node * each, (node + 1) * each)]
        chosen += list(combinations(own, 2))
    rows = Rows(width=130, activation=4)
    sums = Ledger()
    # Ranks choose alone and bytes add, so each token's choice is summed over with the others left out.
    for rank, token in product(range(4), chosen):
        indices = [[token] if r == rank else [] for r in range(4)]
        for ledger in config.declared(indices, groups=8, ranks=4, rows=rows):
            sums.update(ledger)
    found = config.expected(EXCHANGES, tokens=1, groups=8, ranks=4, activation=4, nodes=limit)
    for step, calls in found.steps():
        assert calls == 1
        for link in LINKS:
            for content in ("payload", "scales", "metadata"):
                mean = found.volume(step=step, link=link, content=content)
                summed = sums.volume(step=step, link=link, content=content)
                # Four ranks tell their counts whatever the routing; a token is one rank's alone.
                number = 4 * len(chosen) * (4 if step.hop.endswith("counts") else 1)
                assert summed.sent / number == pytest.approx(mean.sent, rel=1e-12)
                assert summed.received / number == pytest.approx(mean.received, rel=1e-12)


def test_apart_is_the_most_that_can_cross():
    sizes = {"tokens": 5, "groups": 8, "ranks": 4, "activation": 2}
    for config in (
        Collective(ranks_per_node=1),
        Collective(copies="rank", ranks_per_node=1),
        Hierarchical(ranks_per_node=1),
    ):
        found = config.expected(EXCHANGES, apart=True, **sizes)
        inter = found.volume(purpose="dispatch", direction="forward", content="payload", link="inter")
        assert inter == (5 * 2 * 130 * 2, 5 * 2 * 130 * 2)
        mean = config.expected(EXCHANGES, **sizes)
        assert mean.volume(content="payload", link="inter").sent < found.volume(content="payload").sent
        assert found.volume(content="payload", link="self") == (0, 0)


def test_one_rank_and_local_move_nothing():
    sizes = {"tokens": 5, "groups": 8, "activation": 2}
    for config in (Local(), Collective(), Hierarchical(ranks_per_node=8)):
        assert config.expected(EXCHANGES, ranks=1, **sizes) == Ledger()
        assert config.declared([[[0, 1]]], groups=8, ranks=1, rows=Rows(width=4, activation=2)) == (Ledger(),)
    assert Local().expected(EXCHANGES, ranks=4, **sizes) == Ledger()
    assert Local().declared([[]] * 2, groups=8, ranks=2, rows=Rows(width=4, activation=2)) == (Ledger(),) * 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ranks": 3}, "parallel.expert = 3: 8 experts can not be shared evenly by 3 ranks; the nearest"),
        ({"ranks": 2}, "comm.ranks_per_node = 4: must divide the number of ranks that share the experts (2)"),
        ({"nodes": 3}, "nodes = 3: must be from 1 to the 1 nodes of 4 ranks"),
        ({"exchanges": EXCHANGES[:1]}, "exchange: must be named dispatch, combine, found: dispatch"),
        (
            {"exchanges": (EXCHANGES[0], Exchange(name="combine", elements=4, fan_out=9))},
            "exchange: dispatch and combine have fan_out 2, 9",
        ),
        (
            {"exchanges": [Exchange(name=n, elements=4, fan_out=9) for n in ("dispatch", "combine")]},
            "fan_out = 9: a token can choose from 8 groups",
        ),
    ],
)
def test_what_can_not_be_expected_is_one_line(changes, line):
    sizes = {"exchanges": EXCHANGES, "tokens": 1, "groups": 8, "ranks": 4, "activation": 2} | changes
    with pytest.raises(InputError) as told:
        Hierarchical(ranks_per_node=4).expected(sizes.pop("exchanges"), **sizes)
    assert len(told.value.lines) == 1
    assert told.value.lines[0].startswith(line)


def test_ledgers_are_compared_shown_and_cut():
    step = Step("dispatch", "forward", "ranks")
    one, two = Ledger(), Ledger()
    for ledger, bytes_ in ((one, 3), (two, 4)):
        ledger.called(step)
        ledger.add(step, "payload", "inter", bytes_, 1)
        ledger.add(step, "scales", "inter", 2, 0)
        ledger.add(step, "metadata", "self", 0, 0)
    assert one != two
    assert one != "a ledger"
    assert one.only("payload") != two.only("payload")
    assert one.only("scales") == two.only("scales")
    assert one.volume() == Volume(5, 1)
    assert one.rows() == [
        {
            "purpose": "dispatch",
            "direction": "forward",
            "hop": "ranks",
            "content": content,
            "link": "inter",
            "sent": sent,
            "received": received,
        }
        for content, sent, received in (("payload", 3, 1), ("scales", 2, 0))
    ]
    assert repr(one) == (
        "Ledger(dispatch forward ranks payload inter 3/1; dispatch forward ranks scales inter 2/0; "
        "calls [('dispatch forward ranks', 1)])"
    )
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
