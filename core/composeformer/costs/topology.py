"""From bytes to seconds: a cluster's links, and how long what a ledger holds takes on them.

Ranks are numbered node by node. A link class has a bandwidth, bytes a second each way, which every rank has for
itself or all ranks of a node share, and a latency, seconds for a call. In one all-to-all the classes work side by
side, and the slowest says how long it takes; all-to-alls follow each other:

    sum over steps of  calls max_links latency  +  max_links max(sent, received) / bandwidth

with the rank, or the node where it shares, that has most. Nothing is overlapped with computation here, and no
switch is congested: a lower bound of what hardware does.

A profile is a TOML file in which every number names its source and says whether it was read there.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import attrs

from composeformer.config import Config, config, field
from composeformer.costs.figures import Amount, Count, Figure, Reader
from composeformer.costs.ledger import LINKS, Ledger, Link, Step
from composeformer.errors import InputError, SpecError, nearest, one_of
from composeformer.plugins import current
from composeformer.spec.document import Document, parse, read

Shared = Literal["rank", "node"]


@attrs.frozen(kw_only=True)
class Connection:
    """A class of links: bytes a second each way, seconds for a call, and who has the bandwidth for itself."""

    bandwidth: Figure
    latency: Figure
    shared: Shared = "rank"


class Seconds(NamedTuple):
    """A predicted time: what bandwidth makes of it, and what latency adds."""

    transfer: float
    latency: float

    @property
    def total(self) -> float:
        return self.transfer + self.latency


@attrs.frozen(kw_only=True)
class Topology:
    """A cluster: nodes of `ranks_per_node` consecutive ranks, `ranks` of them at most where that is known."""

    name: str
    ranks_per_node: int
    links: Mapping[Link, Connection]
    ranks: int | None = None
    description: str = ""

    def time(self, ledgers: "Ledger | Sequence[Ledger]") -> Seconds:
        """Seconds for the bytes of all ranks, in their order; one ledger stands for ranks that are all alike.

        Raises InputError for more ranks than there are, or for no whole nodes where a node shares a link.
        """
        alike = isinstance(ledgers, Ledger)
        listed: list[Ledger] = [ledgers] if isinstance(ledgers, Ledger) else list(ledgers)
        if self.ranks is not None and len(listed) > self.ranks:
            raise InputError(f"topology {self.name}: has {self.ranks} ranks, not {len(listed)}")
        calls: dict[Step, int] = {}
        for ledger in listed:
            for step, times in ledger.steps():
                calls[step] = max(calls.get(step, 0), times)
        transfer = latency = 0.0
        for step, times in calls.items():
            used = {link: self._load(listed, step, link, alike) for link in LINKS}
            used = {link: load for link, load in used.items() if load}
            if used:
                transfer += max(load / self.links[link].bandwidth.value for link, load in used.items())
                latency += times * max(self.links[link].latency.value for link in used)
        return Seconds(transfer, latency)

    def _load(self, ledgers: Sequence[Ledger], step: Step, link: Link, alike: bool) -> float:
        """The bytes that the busiest owner of a link sends or receives."""
        volumes = [ledger.volume(step=step, link=link) for ledger in ledgers]
        if self.links[link].shared == "rank":
            return max(max(volume) for volume in volumes)
        size = self.ranks_per_node
        if alike:
            return size * max(volumes[0])
        if len(volumes) % size:
            raise InputError(
                f"topology {self.name}: {len(volumes)} ranks are no whole nodes of {size}, which share {link} links"
            )
        nodes = [volumes[first : first + size] for first in range(0, len(volumes), size)]
        return max(max(sum(v.sent for v in node), sum(v.received for v in node)) for node in nodes)


@config
class _Head(Config):
    name: str = field()
    description: str = field(default="")


@config
class _Link(Config):
    shared: str = field(default="rank", choices=("rank", "node"))


def load(ref: "str | os.PathLike[str]") -> Topology:
    """A topology from the path of a `.toml` file or a shipped name. Raises ComposeError, a line for each problem."""
    name = os.fsdecode(ref)
    if not isinstance(ref, str) or name.endswith(".toml") or os.sep in name:
        return topology(read(Path(name), name))
    found = [file for file in current().topology_files if Path(file.name).stem == name]
    if len(found) > 1:
        raise InputError(f"topology {name}: several plugins ship one of this name: {one_of(map(str, found))}")
    if not found:
        near = nearest(name, shipped())
        hint = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"topology {name}: must be a path or one of {one_of(shipped())}{hint}")
    return topology(parse(found[0].read_text(encoding="utf-8"), found[0].name))


def shipped() -> list[str]:
    """The names of the topologies that plugins bring."""
    return sorted({Path(file.name).stem for file in current().topology_files})


def topology(document: Document) -> Topology:
    """What a document describes. Raises SpecError with every problem found."""
    reader = Reader(document)
    head = reader.table(_Head, (), ("ranks_per_node", "ranks", "links"))
    per_node = reader.figure(Count, ("ranks_per_node",))
    ranks = reader.figure(Count, ("ranks",)) if "ranks" in document.data else None
    links: dict[Link, Connection] = {}
    stated = reader.mapping(("links",), LINKS)
    for link in LINKS if stated is not None else ():
        place = ("links", link)
        if reader.mapping(place) is None:
            continue
        shared = reader.table(_Link, place, ("bandwidth", "latency"))
        bandwidth = reader.figure(Amount, (*place, "bandwidth"))
        latency = reader.figure(Amount, (*place, "latency"))
        if bandwidth is not None and bandwidth.value == 0:
            reader.problem((*place, "bandwidth", "value"), bandwidth.value, "must be > 0")
        if bandwidth is not None and latency is not None and shared is not None:
            links[link] = Connection(bandwidth=bandwidth, latency=latency, shared=shared["shared"])
    if ranks is not None and per_node is not None and ranks.value % per_node.value:
        told = f"must be whole nodes of ranks_per_node ({int(per_node.value)})"
        reader.problem(("ranks", "value"), int(ranks.value), told)
    if reader.problems or head is None or per_node is None:
        raise SpecError(reader.problems)
    return Topology(
        **head,
        ranks_per_node=int(per_node.value),
        ranks=None if ranks is None else int(ranks.value),
        links=links,
    )
