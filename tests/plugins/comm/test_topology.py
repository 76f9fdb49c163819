"""Topologies: the shipped ones with their sources, strict reading, and the published times of all-to-alls."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composeformer.contracts import Exchange
from composeformer.costs import topology
from composeformer.costs.ledger import LINKS, Ledger, Step, total
from composeformer.costs.topology import Connection, Figure, Topology
from composeformer.errors import ComposeError, InputError
from composeformer.plugins import PluginInfo, Plugins, current
from composeformer.spec.document import parse
from composeformer_comm.config import Collective

STEPS = [Step("dispatch", "forward", "ranks"), Step("combine", "forward", "ranks")]


def published(elements):
    """The decoding step of arXiv 2505.09343: 32 tokens a rank, each to eight routed experts and the shared one on
    nodes of their own, one byte a feature out and two back. Scales and metadata are left out, as there.
    """
    exchanges = [Exchange(name=name, elements=elements, fan_out=9) for name in ("dispatch", "combine")]
    config = Collective(dispatch_format="fp8", combine_format="bf16", ranks_per_node=1)
    ledger = config.expected(
        exchanges, tokens=32, groups=320, ranks=320, activation=2, apart=True, backward=False
    )
    return ledger.only("payload")


def test_all_to_all_of_h800_as_published():
    """120.96 us with 7000 features, 123.86 with the 7168 it has; 61 layers, two micro-batches: 67 tokens a second."""
    h800 = topology.load("h800")
    layer = h800.time(published(7000)).transfer
    assert layer * 1e6 == pytest.approx(120.96, rel=1e-9)
    token = 61 * 2 * layer
    assert token * 1e3 == pytest.approx(14.757, rel=1e-4)
    assert token * 1e3 == pytest.approx(14.76, rel=0.02e-2)
    assert 1 / token == pytest.approx(67.76, rel=1e-4)
    assert 1 / token == pytest.approx(67, rel=1.2e-2)
    whole = h800.time(published(7168)).transfer
    assert whole * 1e6 == pytest.approx(123.86, abs=0.01)
    assert 61 * 2 * whole * 1e3 == pytest.approx(15.11, abs=0.01)


def test_all_to_all_of_nvl72_as_published():
    """The same inside one rack: 6.72 us, 0.82 ms, 1200 tokens a second (1220)."""
    nvl72 = topology.load("nvl72")
    ledger = Ledger()
    for step, size in zip(STEPS, (1, 2)):
        ledger.called(step)
        bytes_ = 32 * 9 * 7000 * size
        ledger.add(step, "payload", "intra", bytes_, bytes_)
    layer = nvl72.time(ledger).transfer
    assert layer * 1e6 == pytest.approx(6.72, rel=1e-9)
    assert 61 * 2 * layer * 1e3 == pytest.approx(0.8198, rel=1e-4)
    assert 61 * 2 * layer * 1e3 == pytest.approx(0.82, rel=2e-2)
    assert 1 / (61 * 2 * layer) == pytest.approx(1220, rel=1e-3)
    assert 1 / (61 * 2 * layer) == pytest.approx(1200, rel=2e-2)


def test_latency_is_told_apart_and_added():
    h800 = topology.load("h800")
    found = h800.time(published(7000))
    assert found.latency == pytest.approx(2 * h800.links["inter"].latency.value)
    assert found.total == found.transfer + found.latency


def test_shipped_topologies_say_where_every_number_is_from():
    assert topology.shipped() == ["h100", "h200", "h800", "nvl72"]
    for name in topology.shipped():
        found = topology.load(name)
        assert found.name == name
        assert set(found.links) == set(LINKS)
        figures = [f for link in found.links.values() for f in (link.bandwidth, link.latency)]
        assert all(figure.source for figure in figures)
        bandwidths = [found.links[link].bandwidth.value for link in LINKS]
        assert bandwidths == sorted(bandwidths, reverse=True)
    assert topology.load("h800").links["inter"].bandwidth == Figure(
        value=50e9,
        source="DeepEP, README: a CX7 InfiniBand card of 400 Gb/s for each GPU, about 50 GB/s at most",
        read=True,
    )
    assert {topology.load(name).ranks_per_node for name in topology.shipped()} == {8, 72}
    assert topology.load("h800").ranks == 2048


def made(shared="rank", latency=0.0):
    figure = {"self": 1000.0, "intra": 100.0, "inter": 10.0}
    links = {
        link: Connection(
            bandwidth=Figure(value=value),
            latency=Figure(value=latency),
            shared=shared if link == "inter" else "rank",
        )
        for link, value in figure.items()
    }
    return Topology(name="toy", ranks_per_node=2, links=links, ranks=4)


def ledger(step=STEPS[0], **links):
    found = Ledger()
    found.called(step)
    for link, (sent, received) in links.items():
        found.add(step, "payload", link, sent, received)
    return found


def test_links_work_side_by_side_steps_follow_each_other_and_the_busiest_rank_decides():
    toy = made(latency=1.0)
    one, two = ledger(intra=(100, 0), inter=(20, 5)), ledger(intra=(0, 500), inter=(5, 30))
    assert toy.time([one, two]) == (5.0, 1.0)  # 500 / 100, more than 30 / 10
    later = ledger(STEPS[1], self=(1000, 1000))
    assert toy.time([total([one, later]), two]) == (6.0, 2.0)
    assert toy.time([Ledger()]) == (0.0, 0.0)


def test_a_shared_link_carries_all_ranks_of_a_node():
    toy = made("node")
    ranks = [
        ledger(inter=(10, 1)),
        ledger(inter=(30, 1)),
        ledger(inter=(1, 25)),
        ledger(inter=(1, 25)),
    ]
    assert toy.time(ranks).transfer == 5.0  # the second node receives 50
    assert toy.time(ranks[0]).transfer == 2.0  # one for all: two ranks that send 10 each
    with pytest.raises(InputError, match="3 ranks are no whole nodes of 2, which share inter links"):
        toy.time(ranks[:3])
    with pytest.raises(InputError, match="topology toy: has 4 ranks, not 5"):
        toy.time([*ranks, ranks[0]])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=2, max_size=4),
    factor=st.integers(2, 9),
)
def test_time_grows_with_bytes_and_never_shrinks_with_more_ranks(sizes, factor):
    toy = made()
    ranks = [ledger(inter=size) for size in sizes]
    more = [ledger(inter=(a * factor, b * factor)) for a, b in sizes]
    assert toy.time(more).transfer == pytest.approx(factor * toy.time(ranks).transfer)
    assert toy.time(ranks).transfer >= toy.time(ranks[:1] * len(ranks)).transfer


GOOD = """\
name = "mine"
ranks_per_node = { value = 2, source = "here", read = true }
ranks = { value = 4, source = "here", read = true }
[links.self]
bandwidth = { value = 3e9, source = "here", read = true }
latency = { value = 0.0, source = "here", read = true }
[links.intra]
bandwidth = { value = 2e9, source = "here", read = true }
latency = { value = 1e-6, source = "here", read = false }
[links.inter]
shared = "node"
bandwidth = { value = 1e9, source = "here", read = true }
latency = { value = 1e-5, source = "here", read = true }
"""


def test_a_file_of_ones_own_is_read_by_its_path(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    found = topology.load(str(path))
    assert found == topology.load(path)
    assert (found.name, found.ranks_per_node, found.ranks) == ("mine", 2, 4)
    assert found.links["inter"].shared == "node"
    assert found.links["intra"].latency == Figure(value=1e-6, source="here", read=False)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("value = 2e9", "value = -2.0", "mine:8: links.intra.bandwidth.value = -2.0: must be >= 0"),
        ("value = 2e9", "value = 0.0", "mine:8: links.intra.bandwidth.value = 0.0: must be > 0"),
        ("value = 2e9", 'value = "2e9"', 'mine:8: links.intra.bandwidth.value = "2e9": must be a number >= 0'),
        ("value = 2e9", "value = nan", "mine:8: links.intra.bandwidth.value = nan: must be a finite number"),
        ('shared = "node"', 'shared = "nodes"', "mine:11: links.inter.shared"),
        (
            "[links.intra]",
            "[links.infra]",
            "mine:7: links.infra: unknown key; allowed: self, intra, inter; did you mean 'intra'?",
        ),
        ("latency = { value = 1e-5", "delay = { value = 1e-5", "mine:13: links.inter.delay: unknown key"),
        ("value = 4,", "value = 3,", "mine:3: ranks.value = 3: must be whole nodes of ranks_per_node (2)"),
        (", read = false", "", "mine:9: links.intra.latency.read: is required"),
        ('name = "mine"\n', "", "mine: name: is required: a string"),
        ("ranks_per_node = ", "per_node = ", "mine:2: per_node: unknown key"),
        ("ranks_per_node = { value = 2", "ranks_per_node = { value = 0", "mine:2: ranks_per_node.value = 0"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(old, new, line):
    assert GOOD.count(old) == 1
    with pytest.raises(ComposeError) as told:
        topology.topology(parse(GOOD.replace(old, new), "mine"))
    assert any(found.startswith(line) for found in told.value.lines), told.value.lines
    assert all("\n" not in found for found in told.value.lines)


def test_an_unknown_name_tells_the_nearest_and_one_shipped_twice_both(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"topology h80: must be a path or one of .*; did you mean 'h800'"):
        topology.load("h80")
    with pytest.raises(ComposeError, match="no such file"):
        topology.load(tmp_path / "none.toml")
    path = tmp_path / "h800.toml"
    path.write_text(GOOD)
    mine = PluginInfo(
        name="mine", distribution="mine", version="1", origin="mine", status="loaded", topologies=(path,)
    )
    both = Plugins([*current().infos, mine])
    monkeypatch.setattr(topology, "current", lambda: both)
    with pytest.raises(InputError, match="topology h800: several plugins ship one of this name"):
        topology.load("h800")
