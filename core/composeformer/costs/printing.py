"""Numbers in words and tables: how a quantity is written, and a report as Markdown and as plain data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from composeformer.costs.breakdown import alike
from composeformer.costs.economics import Quantiles
from composeformer.costs.quantities import Quantity, Section, scaled
from composeformer.costs.report import Report

if TYPE_CHECKING:
    from composeformer.costs.difference import Difference, Pair

SAME = "The two have the same parts with the same fields."
_MONEY = ((1e9, "B"), (1e6, "M"), (1e3, "K"))


def shown(quantity: Quantity) -> str:
    """A value with its unit: `671,026,404,352`, `249.8 GFLOP`, `$5.58M`, `38.94%`."""
    value, unit = quantity.value, quantity.unit
    if value is None:
        return "unknown"
    if unit == "USD":
        return money(value)
    if unit == "":
        return f"{value:.2%}"
    if unit == "FLOP":
        return scaled(value, "FLOP")
    if unit in ("parameters", "elements", "tensors"):
        return f"{value:,.0f}"
    if unit == "bytes":
        return f"{value:,.0f} B" if value < 1e4 else f"{value:,.0f} B ({scaled(value, 'B')})"
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{text} {unit}"


def money(value: float) -> str:
    for bound, letter in _MONEY:
        if abs(value) >= bound:
            return f"${value / bound:.2f}{letter}"
    return f"${value:.2f}"


def told(quantity: Quantity) -> str:
    """The definition, and the source where one is told; what was not confirmed says so."""
    parts = [quantity.definition, f"source: {quantity.source}" if quantity.source else ""]
    parts += [] if quantity.confirmed else ["unconfirmed"]
    return "; ".join(part for part in parts if part)


def markdown(report: Report) -> str:
    """The report as a Markdown document."""
    parts = [f"# {_plain(report.spec.name)}: cost", f"Fingerprint `{report.spec.fingerprint}`."]
    for title, section in report.sections.items():
        parts.append(f"## {title[:1].upper()}{title[1:]}\n\n{_section(section)}")
    parts.append("## Parameters by role\n\n" + _table(("role", "parameters"), roles(report)))
    parts.append("## Parameters by layer\n\n" + _table(("layers", "parameters of each"), layers(report)))
    if report.is_priced:
        parts.append("## Ranges\n\n" + _ranges(report.ranges))
        parts.append("## Assumptions\n\n" + _assumptions(report))
        parts.append("## The same run in other years\n\n" + _table(TREND, trend(report)))
    return "\n\n".join(parts) + "\n"


def document(report: Report) -> dict[str, Any]:
    """The report as plain data for `--json`: the counts as they have always been, and every section."""
    found: dict[str, Any] = {**report.counts.to_dict(), "checkpoint": report.folder.to_dict()}
    found["parameters"] |= {"by_role": dict(report.roles), "by_layer": report.layers}
    found["sections"] = {
        title: {name: each.to_dict() for name, each in section.items()}
        for title, section in report.sections.items()
    }
    if report.is_priced:
        found["assumptions"] = {name: attrs.asdict(each) for name, each in report.assumptions.items()}
        found["seed"] = report.seed
        found["ranges"] = {name: attrs.asdict(each) for name, each in report.ranges.items()}
        found["tornado"] = [attrs.asdict(swing) for swing in report.swings]
        found["sensitivity"] = {name: attrs.asdict(each) for name, each in report.sensitivities.items()}
        found["trend"] = [attrs.asdict(year) for year in report.pricing.trend()]
    return found


def roles(report: Report) -> list[tuple[str, str]]:
    """Every role and its parameters; `*` is the number of a layer."""
    return [(role, f"{number:,}") for role, number in report.roles.items()]


def layers(report: Report) -> list[tuple[str, str]]:
    """Layers that are alike in a row, and the parameters of each."""
    runs = alike(report.layers)
    return [(f"{a}" if a == b else f"{a} to {b}", f"{number:,}") for a, b, number in runs]


TREND = ("year", "cheaper hardware", "better algorithms too", "at the ends of both ranges")


def trend(report: Report) -> list[tuple[str, str, str, str]]:
    """The rent of the same run in other years."""
    return [
        (str(y.year), money(y.hardware), money(y.both), f"{money(y.low)} to {money(y.high)}")
        for y in report.pricing.trend()
    ]


def sensitivity(report: Report, name: str) -> str:
    """What an assumption's range alone makes of the result that depends on it; nothing where it has none."""
    found = report.sensitivities.get(name)
    return "" if found is None else f"{found.of}: {money(found.at_low)} to {money(found.at_high)}"


def _section(section: Section) -> str:
    return _table(
        ("", "value", "what it is"), ((name, shown(each), told(each)) for name, each in section.items())
    )


def _ranges(found: Mapping[str, Quantiles]) -> str:
    rows = ((name, money(each.p5), money(each.p50), money(each.p95)) for name, each in found.items())
    return _table(("scope", "5%", "50%", "95%"), rows)


def _assumptions(report: Report) -> str:
    rows = []
    for name, each in report.assumptions.items():
        held = "exact" if each.low is None or each.high is None else f"{each.low:g} to {each.high:g}"
        source = each.source if each.read else f"{each.source}; unconfirmed"
        value = f"{each.value:g} {each.unit}".strip()
        rows.append((name, value, held, sensitivity(report, name), each.help, source))
    return _table(("number", "value", "90% lie in", "which makes", "what it is", "source"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_plain, head))} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(_plain, row))} |" for row in rows)])


def _plain(text: str) -> str:
    """Text of one line that Markdown takes for no cell's end and no tag."""
    return " ".join(text.replace("|", "\\|").replace("<", "\\<").split())


def difference_markdown(found: "Difference") -> str:
    """Two specs side by side as a Markdown document."""
    names = found.first.spec.name, found.second.spec.name
    parts = [f"# {_plain(names[0])} and {_plain(names[1])}"]
    if found.hours is not None:
        rows = ((each.name, f"{each.value:.3f}", each.told) for each in found.factors)
        factors = _table(("factor", "of device hours", "what it is"), rows)
        product = " x ".join(f"{each.value:.3f}" for each in found.factors)
        told = f"{_plain(names[1])} takes {found.hours:.2f} times the device hours: {product}."
        parts.append(f"{told}\n\n{factors}")
    changes = [(each.what, each.where, each.first, each.second) for each in found.changes]
    parts.append("## Structure\n\n" + (_table(("", "", *names), changes) if changes else SAME))
    for title in dict.fromkeys(pair.section for pair in found.pairs):
        own = [pair for pair in found.pairs if pair.section == title]
        parts.append(
            f"## {title[:1].upper()}{title[1:]}\n\n" + _table(("", *names, "ratio"), map(pair_row, own))
        )
    return "\n\n".join(parts) + "\n"


def pair_row(pair: "Pair") -> list[str]:
    """A number of two specs: its name, both values, and their ratio."""
    values = ["" if each is None else shown(each) for each in (pair.first, pair.second)]
    return [pair.name, *values, "" if pair.ratio is None else f"{pair.ratio:.3g}"]
