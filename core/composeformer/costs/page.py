"""A report as one HTML page: every table, and plots of what they say. It loads nothing and runs no script."""

from collections.abc import Iterable, Iterator
from html import escape

from composeformer.costs import compute
from composeformer.costs.plots import Bar, Line, bars, lines
from composeformer.costs.printing import layers, money, roles, sensitivity, shown, told
from composeformer.costs.quantities import Section, scaled
from composeformer.costs.report import Report

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em;width:100%}td,th{padding:.25em .7em;text-align:left;"
    "border-bottom:1px solid #ddd;vertical-align:top}td.n{text-align:right;white-space:nowrap}td.d{color:#666}"
    "svg{max-width:100%;height:auto}h2{margin-top:2em}.note{color:#666}"
)
# Powers of two, up to the model's longest.
SHORTEST = 512
BATCHES = tuple(2**power for power in range(0, 13))


def page(report: Report) -> str:
    """The whole page."""
    name = escape(report.spec.name)
    body = [
        f"<h1>{name}: cost</h1>",
        f'<p class="note">Fingerprint <code>{report.spec.fingerprint}</code></p>',
    ]
    plots = _plots(report)
    for title, section in report.sections.items():
        body.append(f"<h2>{escape(title[:1].upper() + title[1:])}</h2>")
        body += plots.get(title, [])
        body.append(_table(section))
    body.append("<h2>Parameters by layer</h2>" + _pairs(layers(report)))
    body.append("<h2>Parameters by role</h2>" + _pairs(roles(report)))
    if report.is_priced:
        body += _ranges(report)
        body += _assumptions(report)
    return whole(f"{report.spec.name}: cost", body)


def whole(title: str, body: Iterable[str]) -> str:
    """A document that holds all it needs."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _plots(report: Report) -> dict[str, list[str]]:
    return {
        "parameters": [_parameters(report)],
        "operations of a token": [_components(report), *_contexts(report)],
        "decoding": [_intensity(report)],
    }


def _parameters(report: Report) -> str:
    counts = report.counts.by_slot
    total = report.counts.total
    return bars([Bar(name=n, low=0, high=c, told=f"{c / total:.1%}") for n, c in counts.items()])


def _components(report: Report) -> str:
    found = compute.forward(report.spec, context=report.context)
    rows = []
    for name, work in found.items():
        for part, value in (("maps", work.linear), ("between tokens", work.core)):
            if value:
                rows.append(Bar(name=f"{name}, {part}", low=0, high=value, told=scaled(value, "FLOP")))
    return bars(rows)


def _contexts(report: Report) -> Iterator[str]:
    longest = report.spec.model.max_position_embeddings
    lengths = [length for power in range(0, 20) if (length := SHORTEST * 2**power) <= longest] or [longest]
    if len(lengths) < 2:
        return
    drawn = []
    for name, causal in (("causal", True), ("full mask", False)):
        points = [
            (float(n), 3 * compute.total(compute.forward(report.spec, context=n, causal=causal)) / 1e9)
            for n in lengths
        ]
        drawn.append(Line(name=name, points=points))
    yield lines(
        drawn, x_label="tokens of a sequence", y_label="GFLOP of training, a token", log_x=True, log_y=True
    )


def _intensity(report: Report) -> str:
    points = [
        (float(b), compute.decode(report.spec, context=report.context, batch=b).intensity) for b in BATCHES
    ]
    level = None
    if report.is_priced:
        hardware = report.pricing.hardware
        level = (report.pricing.peak.value / hardware.bandwidth.value, f"{hardware.name}: peak / bandwidth")
    drawn = [Line(name="decoding", points=points)]
    return lines(drawn, x_label="sequences", y_label="FLOP a byte", log_x=True, log_y=True, level=level)


def _table(section: Section) -> str:
    rows = (
        f'<tr><td>{escape(name)}</td><td class="n">{escape(shown(each))}</td>'
        f'<td class="d">{escape(told(each))}</td></tr>'
        for name, each in section.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _pairs(found: Iterable[tuple[str, str]]) -> str:
    rows = (f'<tr><td>{escape(name)}</td><td class="n">{escape(value)}</td></tr>' for name, value in found)
    return f"<table>{''.join(rows)}</table>"


def _ranges(report: Report) -> Iterator[str]:
    yield '<h2>Ranges</h2><p class="note">5, 50 and 95%; scopes are never added together.</p>'
    rows = [
        Bar(
            name=name, low=q.p5, high=q.p95, mark=q.p50, told=f"{money(q.p5)}, {money(q.p50)}, {money(q.p95)}"
        )
        for name, q in report.ranges.items()
    ]
    yield bars(rows, log=True)
    yield '<h2>What development depends on</h2><p class="note">One assumption at a time, over its range.</p>'
    swings = [
        Bar(name=s.name, low=s.at_low, high=s.at_high, told=f"{money(s.at_low)} to {money(s.at_high)}",
            mark=report.pricing.development.total)
        for s in report.swings
        if s.size
    ]  # fmt: skip
    yield bars(swings, log=True)
    years = report.pricing.trend()
    yield '<h2>The same run in other years</h2><p class="note">Rent; both rates with their ranges in the band.</p>'
    drawn = [
        Line(name="hardware alone", points=[(float(y.year), y.hardware) for y in years]),
        Line(
            name="and algorithms",
            points=[(float(y.year), y.both) for y in years],
            band=[(float(y.year), y.low, y.high) for y in years],
        ),
    ]
    yield lines(drawn, x_label="year", y_label="USD", log_y=True)


def _assumptions(report: Report) -> Iterator[str]:
    heads = ("", "value", "90% lie in", "which makes", "what it is, and its source")
    head = f"<tr>{''.join(f'<th>{each}</th>' for each in heads)}</tr>"
    yield f"<h2>Assumptions</h2><table>{head}"
    for name, each in report.assumptions.items():
        held = "exact" if each.low is None or each.high is None else f"{each.low:g} to {each.high:g}"
        source = each.source if each.read else f"{each.source}; unconfirmed"
        cells = (f"{each.value:g} {each.unit}", held, sensitivity(report, name))
        yield f"<tr><td>{escape(name)}</td>" + "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        yield f'<td class="d">{escape(each.help)} {escape(source)}</td></tr>'
    yield "</table>"
