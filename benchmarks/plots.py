"""Line plots as SVG text, with nothing but Python."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

COLOURS = ("#888888", "#1b6ca8", "#d1495b", "#edae49", "#2e8b57", "#6f4a8e")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 64, 150, 40, 48

Line = tuple[str, Sequence[tuple[float, float]]]


def lines_svg(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    band: float | None = None,
    clip: float | None = None,
) -> str:
    """Lines by name, those of one name in one colour; `band` shades plus and minus it, values beyond `clip` are cut."""
    points = [point for _, line in lines for point in line]
    quarter = max((x for x, _ in points), default=1.0) / 4
    unit = 10 ** floor(log10(quarter))
    longest = 4 * unit * ceil(quarter / unit)
    highest = max([abs(y) for _, y in points] + [band or 0.0, 1e-9]) * 1.05
    highest = min(highest, clip or highest)

    def place(x: float, y: float) -> str:
        y = max(-highest, min(highest, y))
        across = LEFT + x / longest * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{TOP + (highest - y) / (2 * highest) * (HEIGHT - TOP - BOTTOM):.1f}"

    names = list(dict.fromkeys(name for name, _ in lines))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        "<style>text { font-family: sans-serif }</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="14">{escape(title)}</text>',
    ]
    if band is not None:
        corners = " ".join((place(0, band), place(longest, band), place(longest, -band), place(0, -band)))
        parts.append(f'<polygon points="{corners}" fill="#dff0df"/>')
    for step in range(-4, 5):
        y = highest * step / 4
        start, end = place(0, y).split(","), place(longest, y).split(",")
        line = f'x1="{start[0]}" y1="{start[1]}" x2="{end[0]}" y2="{end[1]}"'
        parts.append(f'<line {line} stroke="{"#555" if step == 0 else "#ddd"}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(start[1]) + 4}" text-anchor="end">{y:.2f}</text>')
    for step in range(5):
        x, y = place(longest * step / 4, -highest).split(",")
        parts.append(
            f'<text x="{x}" y="{float(y) + 16}" text-anchor="middle">{longest * step / 4:.0f}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turned = f'transform="rotate(-90 14 {HEIGHT / 2})" text-anchor="middle"'
    parts.append(f'<text x="14" y="{HEIGHT / 2}" {turned}>{escape(y_label)}</text>')
    for name, line in lines:
        colour = COLOURS[names.index(name) % len(COLOURS)]
        drawn = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for index, name in enumerate(names):
        colour, y = COLOURS[index % len(COLOURS)], TOP + 12 + 18 * index
        parts.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{y - 9}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 32}" y="{y - 2}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
