"""Two specs side by side as one HTML page: why one costs more, drawn, and every number of both."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from composeformer.costs.difference import Difference
from composeformer.costs.page import whole
from composeformer.costs.plots import Bar, bars
from composeformer.costs.printing import SAME, pair_row

# What is drawn, by what it is called there; all else is in the tables.
DRAWN = {
    "parameters": ("parameters", "total"),
    "active parameters": ("parameters", "active, without the input embedding"),
    "training operations": ("operations of a token", "training"),
    "cache of a token": ("parameters", "cache of a token"),
    "memory of a device": ("memory of a device", "all"),
    "device hours": ("run", "hours"),
    "rent": ("run", "rent"),
    "development": ("development", "all"),
}


def difference_page(found: Difference) -> str:
    """The whole page. It loads nothing and runs no script."""
    names = [each.spec.name for each in (found.first, found.second)]
    title = " and ".join(names)
    body = [f"<h1>{escape(title)}</h1>"]
    if found.hours is not None:
        body += _factors(found, names)
    body += _ratios(found, names)
    body.append("<h2>Structure</h2>")
    changes = [(each.what, each.where, each.first, each.second) for each in found.changes]
    body.append(_table(("", "", *names), changes) if changes else f"<p>{escape(SAME)}</p>")
    for section in dict.fromkeys(pair.section for pair in found.pairs):
        rows = [pair_row(pair) for pair in found.pairs if pair.section == section]
        body.append(f"<h2>{escape(section[:1].upper() + section[1:])}</h2>")
        body.append(_table(("", *names, "ratio"), rows))
    return whole(title, body)


def _factors(found: Difference, names: Sequence[str]) -> Iterator[str]:
    yield f"<h2>{escape(names[1])} takes {found.hours:.2f} times the device hours</h2>"
    yield bars([_from_one(each.name, each.value) for each in found.factors], log=True)
    rows = [(each.name, f"{each.value:.3f}", each.told) for each in found.factors]
    yield _table(("factor", "of device hours", "what it is"), rows)


def _ratios(found: Difference, names: Sequence[str]) -> Iterator[str]:
    ratios = {(pair.section, pair.name): pair.ratio for pair in found.pairs}
    drawn = [_from_one(name, ratio) for name, place in DRAWN.items() if (ratio := ratios.get(place))]
    yield f'<h2>Ratios</h2><p class="note">{escape(names[1])} over {escape(names[0])}.</p>{bars(drawn, log=True)}'


def _from_one(name: str, ratio: float) -> Bar:
    """A bar between one and a ratio."""
    return Bar(name=name, low=min(1.0, ratio), high=max(1.0, ratio), mark=1.0, told=f"{ratio:.3g}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(each)}</th>' for each in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
