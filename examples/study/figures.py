"""Two figures as SVG: lines with bands, named beside their ends, told apart by dashes as well as by colour."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 56, 190, 16, 44
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#7f7f7f"]
DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4", "6 2 1 2 1 2"]
"""Okabe and Ito's colours, which most colour-blind people tell apart."""


@dataclass(frozen=True)
class Line:
    """Points in the order of the samples."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def draw(
    lines: Sequence[Line], *, x_label: str, y_label: str, level: float | None = None, level_title: str = ""
) -> str:
    """An SVG of some lines, with a level drawn across."""
    xs, ys = [x for line in lines for x in line.x], [y for line in lines for y in (*line.y, *line.low, *line.high)]
    ys += [] if level is None else [level]
    x0, x1, y0, y1 = min(xs), max(xs), min(0, *ys), max(ys)

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    ]
    for x in ticks(x0, x1):
        parts.append(f'<text x="{px(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y0, y1):
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 4}" text-anchor="end">{y:g}</text>')
        parts.append(f'<path d="M{LEFT} {py(y)}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
    if level is not None:
        parts.append(f'<path d="M{LEFT} {py(level)}H{WIDTH - RIGHT}" stroke="#555555" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{LEFT + 4}" y="{py(level) - 4}" fill="#555555">{escape(level_title)}</text>')
    for i, line in enumerate(lines):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        if line.low:
            up = [f"{px(x)},{py(y)}" for x, y in zip(line.x, line.high, strict=True)]
            down = [f"{px(x)},{py(y)}" for x, y in zip(line.x, line.low, strict=True)]
            parts.append(f'<polygon points="{" ".join([*up, *reversed(down)])}" fill="{colour}" opacity="0.12"/>')
        points = " ".join(f"{px(x)},{py(y)}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{px(line.x[-1])}" cy="{py(line.y[-1])}" r="3" fill="{colour}"/>']
    for y, i in _apart([(py(line.y[-1]), i) for i, line in enumerate(lines)]):
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4}" fill="{COLOURS[i % len(COLOURS)]}">'
                     f'{escape(lines[i].title)}</text>')  # fmt: skip
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(14 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "\n".join([*parts, "</svg>\n"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, four to ten of them."""
    width = (high - low) / 4 or 1
    power = 10 ** math.floor(math.log10(width))
    step = power * max(m for m in (1, 2, 5) if m * power <= width)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _apart(places: list[tuple[float, int]], least: float = 15) -> list[tuple[float, int]]:
    """Places of names from top to bottom, pushed apart until they can be read."""
    placed: list[tuple[float, int]] = []
    for y, i in sorted(places):
        placed.append((max(y, placed[-1][0] + least) if placed else y, i))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [(y - over, i) for y, i in placed]
