"""The bytes of an exchange, exactly, from the routing of all ranks; the tensor plane counts the same.

Rows are followed from hop to hop. Per expert a token is as many rows as it has experts, and nothing travels with
one; per rank it is one row for each peer that stands for some of its experts, with its K indices and weights.
Ahead of a hop's rows each peer is told how many: of each of its experts, or rows and (row, expert) pairs.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from composeformer.costs.ledger import Content, Direction, Ledger, Purpose, Rows, Step
from composeformer_comm.hops import Hop, owned

if TYPE_CHECKING:
    from composeformer_comm.config import Remote

COUNT_BYTES = 8
INDEX_BYTES = 4
SCALE_BYTES = 4
TILE = 128

Bytes = dict[Content, int]
# Rows that rank r sends rank q in one hop.
Traffic = list[dict[int, int]]


class Move(NamedTuple):
    """One all-to-all of rows: its step, whether it runs against the dispatch, and the bytes of a row."""

    step: Step
    back: bool
    row: Bytes


def feature_bytes(format: str, width: int, computed: int) -> Bytes:
    """Bytes of one row's features in a wire format; `computed` are those of an element as computed."""
    if format == "fp8":
        return {"payload": width, "scales": SCALE_BYTES * -(-width // TILE)}
    return {"payload": width * (2 if format == "bf16" else computed)}


def moves(config: "Remote", hop: Hop, top_k: int, rows: Rows, backward: bool) -> list[Move]:
    """What travels along a hop: rows, results, and in the backward pass the gradient of each, the other way."""
    given = rows.given if config.per_expert else rows.activation
    indices, weights = (0, 0) if config.per_expert else (INDEX_BYTES * top_k, rows.weight * top_k)
    listed: list[tuple[Purpose, Direction, bool, str, int, int]] = [
        ("dispatch", "forward", False, config.dispatch_format, rows.activation, indices + weights),
        ("combine", "forward", True, config.combine_format, given, 0),
    ]
    if backward:
        listed += [
            ("combine", "backward", False, config.dispatch_format, given, 0),
            ("dispatch", "backward", True, config.combine_format, rows.activation, weights),
        ]
    return [
        Move(Step(purpose, direction, hop.name), back, feature_bytes(format, rows.width, each) | {"metadata": m})
        for purpose, direction, back, format, each, m in listed
    ]


def counts_step(hop: Hop) -> Step:
    """The all-to-all that tells each peer how much is to come."""
    return Step("dispatch", "forward", f"{hop.name} counts")


def count_bytes(config: "Remote", owned_groups: int) -> int:
    """What one peer is told ahead of a hop."""
    return COUNT_BYTES * (owned_groups if config.per_expert else 2)


def ledgers(
    config: "Remote",
    indices: Sequence[Any] | Callable[[int], Any],
    groups: int,
    ranks: int,
    rows: Rows,
    backward: bool,
) -> tuple[Ledger, ...]:
    """The ledger of each rank after one exchange."""
    found = tuple(Ledger() for _ in range(ranks))
    if ranks == 1:
        return found
    each = owned(groups, ranks)
    held = [_listed(indices(rank) if callable(indices) else indices[rank]) for rank in range(ranks)]
    top_k = max((len(token) for tokens in held for token in tokens), default=0)
    if config.per_expert:
        held = [[[index] for token in tokens for index in token] for tokens in held]
    for hop in config.hops(ranks):
        traffic, held = _follow(hop, held, each)
        step = counts_step(hop)
        for rank, ledger in enumerate(found):
            ledger.called(step)
            for peer in hop.peers(rank):
                told = count_bytes(config, each)
                ledger.add(step, "metadata", hop.link(rank, peer), told, told)
        for move in moves(config, hop, top_k, rows, backward):
            _record(found, hop, traffic, move)
    return found


def _follow(hop: Hop, held: list[list[list[int]]], each: int) -> tuple[Traffic, list[list[list[int]]]]:
    """The rows that each rank sends along a hop, and what each holds after it."""
    traffic: Traffic = [dict.fromkeys(hop.peers(rank), 0) for rank in range(len(held))]
    arrived: list[list[list[int]]] = [[] for _ in held]
    for rank, tokens in enumerate(held):
        peers, block = hop.peers(rank), hop.block(rank)
        for token in tokens:
            for place in {(index // each - block) // hop.span for index in token}:
                if 0 <= place < hop.number:
                    traffic[rank][peers[place]] += 1
                    arrived[peers[place]].append(token)
    return traffic, arrived


def _record(found: Sequence[Ledger], hop: Hop, traffic: Traffic, move: Move) -> None:
    for rank, ledger in enumerate(found):
        ledger.called(move.step)
        for peer in hop.peers(rank):
            out, into = traffic[rank][peer], traffic[peer][rank]
            if move.back:
                out, into = into, out
            for content, size in move.row.items():
                ledger.add(move.step, content, hop.link(rank, peer), out * size, into * size)


def _listed(indices: Any) -> list[list[int]]:
    nested: list[list[int]] = indices.tolist() if hasattr(indices, "tolist") else indices
    return nested
