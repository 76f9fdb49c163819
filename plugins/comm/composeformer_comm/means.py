"""The mean bytes of an exchange under random routing: what a price is made of before there are tokens.

A token chooses K of G groups, all sets as likely. A peer that stands for s of them is sent the token's one row with
probability 1 - C(G - s, K) / C(G, K), and K s / G rows per expert. Where a token's groups lie within m of n nodes,
the same holds within these, which are drawn with probability m / n.
"""

from collections.abc import Iterable
from math import comb
from typing import TYPE_CHECKING

import attrs

from composeformer.contracts import Exchange
from composeformer.costs.ledger import Ledger, Link, Rows
from composeformer.errors import InputError, one_of
from composeformer_comm.declared import count_bytes, counts_step, moves
from composeformer_comm.hops import Hop, owned

if TYPE_CHECKING:
    from composeformer_comm.config import Remote

NAMES = ("dispatch", "combine")


@attrs.frozen(kw_only=True)
class Sizes:
    """Tokens of one rank, groups of the model, ranks that share them, bytes of an element and of a weight."""

    tokens: int
    groups: int
    ranks: int
    activation: int
    weight: int


def ledger(
    config: "Remote",
    exchanges: Iterable[Exchange],
    sizes: Sizes,
    nodes: int | None,
    apart: bool,
    backward: bool,
) -> Ledger:
    """The mean of one rank's ledger; all ranks are alike, so it receives what it sends."""
    found = Ledger()
    if sizes.ranks == 1:
        return found
    named = _named(exchanges)
    each = owned(sizes.groups, sizes.ranks)
    for hop in config.hops(sizes.ranks):
        step, told = counts_step(hop), count_bytes(config, each)
        found.called(step)
        for peer in hop.peers(0):
            found.add(step, "metadata", hop.link(0, peer), told, told)
        width = {name: exchange.elements for name, exchange in named.items()}
        top_k = {exchange.fan_out for exchange in named.values()}
        if len(top_k) != 1:
            raise InputError(f"exchange: dispatch and combine have fan_out {one_of(map(str, sorted(top_k)))}")
        k = top_k.pop()
        links = _apart(hop, sizes, k) if apart else _links(config, hop, sizes, k, nodes)
        for name in NAMES:
            rows = Rows(width=width[name], activation=sizes.activation, weight=sizes.weight)
            for move in moves(config, hop, k, rows, backward):
                if move.step.purpose == name:
                    found.called(move.step)
                    for link, number in links.items():
                        for content, size in move.row.items():
                            found.add(move.step, content, link, number * size, number * size)
    return found


def _named(exchanges: Iterable[Exchange]) -> dict[str, Exchange]:
    named = {exchange.name: exchange for exchange in exchanges}
    if set(named) != set(NAMES):
        raise InputError(f"exchange: must be named {one_of(NAMES)}, found: {one_of(named)}")
    return named


def _links(config: "Remote", hop: Hop, sizes: Sizes, k: int, nodes: int | None) -> dict[Link, float]:
    """Mean rows that a rank sends along a hop, by class of link."""
    each = sizes.groups // sizes.ranks
    within, chance = sizes.groups, 1.0
    if nodes is not None:
        number = sizes.ranks // hop.size
        if not 1 <= nodes <= number:
            raise InputError(f"nodes = {nodes}: must be from 1 to the {number} nodes of {hop.size} ranks")
        within, chance = nodes * hop.size * each, nodes / number
    if k > within:
        raise InputError(f"fan_out = {k}: a token can choose from {within} groups")
    owns = hop.span * each
    to_peer = chance * (k * owns / within if config.per_expert else 1 - comb(within - owns, k) / comb(within, k))
    # Each rank holds, before the hop, the tokens of all ranks that earlier hops led to it.
    held = sizes.tokens * (sizes.ranks // (hop.number * hop.span))
    found: dict[Link, float] = {}
    for peer in hop.peers(0):
        link = hop.link(0, peer)
        found[link] = found.get(link, 0.0) + held * to_peer
    return found


def _apart(hop: Hop, sizes: Sizes, k: int) -> dict[Link, float]:
    """Every copy on another node, then on another rank of it."""
    link = hop.link(0, hop.peers(0)[-1])
    return {link: float(sizes.tokens * k)}
