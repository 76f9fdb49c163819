"""Plots as SVG text: bars, lines with a band, ranges. They need nothing but a browser."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

import attrs

WIDTH, ROW = 720, 26
LEFT, RIGHT, TOP, BOTTOM = 200, 200, 8, 40
# The width of a letter in wide sans-serif fonts.
LETTER = 7.3
ABOVE = 28  # room for the name of the vertical axis
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#2e8b57", "#6f4a8e", "#888888")


@attrs.frozen(kw_only=True)
class Bar:
    """A bar from `low` to `high`; `mark` is a tick in it. `told` is written beside it."""

    name: str
    low: float
    high: float
    told: str
    mark: float | None = None


@attrs.frozen(kw_only=True)
class Line:
    """Points (x, y), joined; `band` are (x, low, high) shaded behind them."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def bars(rows: Sequence[Bar], *, log: bool = False) -> str:
    """Horizontal bars, one for each row, on one scale; logarithmic where `log` is set and all are above zero."""
    ends = [end for row in rows for end in (row.low, row.high, row.mark) if end is not None]
    log = log and min(ends, default=0.0) > 0
    low, high = (min(ends), max(ends)) if log else (min([0.0, *ends]), max([0.0, *ends]))
    span = (log10(high) - log10(low) if log else high - low) or 1.0
    left = max([LEFT, *(16 + LETTER * len(row.name) for row in rows)])
    left = min(left, WIDTH - RIGHT - LEFT)

    def at(value: float) -> float:
        share = (log10(value) - log10(low)) / span if log else (value - low) / span
        return left + share * (WIDTH - left - RIGHT)

    parts = []
    for index, row in enumerate(rows):
        y = TOP + index * ROW
        start, stop = sorted((at(row.low), at(row.high)))
        parts.append(_text(left - 8, y + 16, row.name, "end"))
        box = f'x="{start:.1f}" y="{y + 4}" width="{max(stop - start, 1):.1f}" height="{ROW - 8}"'
        parts.append(
            f'<rect {box} fill="{COLOURS[0]}"><title>{escape(f"{row.name}: {row.told}")}</title></rect>'
        )
        if row.mark is not None:
            parts.append(_stroke([(at(row.mark), y + 2), (at(row.mark), y + ROW - 2)], "#222", 2))
        parts.append(_text(stop + 6, y + 16, row.told))
    return _svg(parts, TOP * 2 + len(rows) * ROW)


def lines(
    drawn: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines on common axes, each in a colour of its own; `level` is a horizontal line with its name."""
    height = 320
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + [
        y for line in drawn for b in line.band for y in b[1:]
    ]
    ys += [level[0]] if level is not None else []
    x_axis, y_axis = _Axis(xs, log_x), _Axis(ys if log_y else [0.0, *ys], log_y)

    def place(x: float, y: float) -> tuple[float, float]:
        inner = WIDTH - 80 - RIGHT
        return 80 + x_axis.share(x) * inner, ABOVE + (1 - y_axis.share(y)) * (height - ABOVE - BOTTOM)

    parts = []
    for tick in y_axis.ticks():
        _, y = place(xs[0], tick)
        parts += [_stroke([(80, y), (WIDTH - RIGHT, y)], "#ddd", 1), _text(74, y + 4, short(tick), "end")]
    for tick in x_axis.ticks():
        x, _ = place(tick, y_axis.low)
        parts.append(_text(x, height - BOTTOM + 16, short(tick), "middle"))
    for index, line in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        if line.band:
            above, below = ([place(x, y) for x, *ends in line.band for y in (ends[side],)] for side in (1, 0))
            around = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*above, *reversed(below)))
            parts.append(f'<polygon points="{around}" fill="{colour}" opacity="0.15"/>')
        points = [place(x, y) for x, y in line.points]
        parts.append(_stroke(points, colour, 2))
        parts.append(_text(points[-1][0] + 6, points[-1][1] + 4, line.name, colour=colour))
    if level is not None:
        value, name = level
        ends = [place(min(xs), value), place(max(xs), value)]
        parts += [_stroke(ends, "#222", 1, dashed=True), _text(ends[0][0] + 6, ends[0][1] + 14, name)]
    parts.append(_text((80 + WIDTH - RIGHT) / 2, height - 4, x_label, "middle"))
    parts.append(_text(4, 14, y_label))
    return _svg(parts, height)


class _Axis:
    """Where a value stands between the ends of an axis, from 0 to 1."""

    def __init__(self, values: Sequence[float], log: bool) -> None:
        self.log = log
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.high = self.low + 1.0 if not log else self.low * 10

    def share(self, value: float) -> float:
        if self.log:
            return (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = ceil(log10(self.low) - 1e-9), floor(log10(self.high) + 1e-9)
            step = max(1, (last - first) // 5)
            if last - first > 2:
                return [10.0**power for power in range(first, last + 1, step)]
            finer = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
            return [tick for tick in finer if self.low <= tick <= self.high] or [self.low, self.high]
        unit = 10 ** floor(log10((self.high - self.low) / 4))
        step = next(unit * m for m in (1, 2, 5, 10) if (self.high - self.low) / (unit * m) <= 6)
        return [step * n for n in range(ceil(self.low / step), floor(self.high / step) + 1)]


def short(value: float) -> str:
    """A tick's number: 4096, 1.2M."""
    for bound, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= bound:
            return f"{value / (1e3 if letter == 'K' else bound):g}{letter}"
    return f"{value:g}"


def _stroke(points: Sequence[tuple[float, float]], colour: str, width: int, dashed: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: int) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img"'
    return f'{head} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
