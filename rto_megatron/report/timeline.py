"""The page: numbers and columns of a trace, computed here, put into `timeline.html`, which draws them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rto_megatron.pages.render import render, visible
from rto_megatron.schedule.trace import LETTERS, Row, Summary, summarise
from rto_megatron.schedule.work import KINDS, Kind
from rto_megatron.schedule.workload import seconds_per_step

COLOURS: dict[Kind, str] = {
    "prefill": "#56b4e9",
    "decode": "#0072b2",
    "score": "#009e73",
    "proximal": "#f0e442",
    "advantage": "#cc79a7",
    "train": "#d55e00",
    "optimizer": "#6b1a3d",
    "refit": "#5b3fbf",
    "boundary": "#636363",
}
"""Okabe and Ito's palette and three colours beside it; colour-blind readers can tell them apart, which is tested."""
CRITIC_TRAINS = "#e69f00"
HATCHED = ("critic", "scorer")
"""Roles whose items have stripes: the same kind of work, on the other model."""

Style = tuple[Kind, str]
"""(kind, role): what has one colour and pattern."""
Rows = dict[int, list[Row]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A trace, measured or simulated, with one line a rank, or a group where there are no ranks."""

    name: str
    line: str
    """What a line is: `rank` or `group`."""
    rows: Rows
    """Of each line, in the order in which they began."""
    summary: Summary
    """Over lines, as `summarise` over groups."""
    step_seconds: float | None
    """Seconds from one step to the next; None if there is one only."""

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> "Panel":
        """Sort rows into lines."""
        ranked = any(row.rank >= 0 for row in rows)
        lines: defaultdict[int, list[Row]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: (row.start, row.end)):
            lines[row.rank if ranked else row.group].append(row)
        stepped = len({row.step for row in rows if row.kind == "optimizer"}) > 1
        return cls(
            name=name,
            line="rank" if ranked else "group",
            rows=dict(sorted(lines.items())),
            # the ranks of a group do the same items, each in its own time: every rank counts as a group here
            summary=summarise([replace(row, group=row.rank) for row in rows] if ranked else rows),
            step_seconds=seconds_per_step(list(rows)) if stepped else None,
        )

    @property
    def begin(self) -> float:
        """Of its first row: time 0 of the page."""
        return min(rows[0].start for rows in self.rows.values())

    @property
    def num_lines(self) -> str:
        """In words: `1 rank`, `2 groups`."""
        return f"{len(self.rows)} {self.line}{'s' if len(self.rows) > 1 else ''}"

    @property
    def num_items(self) -> int:
        """Rows of all lines."""
        return sum(map(len, self.rows.values()))

    def seconds(self, style: Style) -> float:
        """Of all items of a style, a mean over lines."""
        return sum(sum(row.seconds for row in rows if _style(row) == style) for rows in self.rows.values()) / len(
            self.rows
        )

    def share(self, seconds: float) -> float:
        """Of the makespan."""
        return seconds / self.summary.makespan if self.summary.makespan else 0.0


def headline(panel: Panel) -> str:
    """The summary in a line of text."""
    found = panel.summary
    steps = "" if panel.step_seconds is None else f"{panel.step_seconds:.4g} seconds per step, "
    return (
        f"{panel.name}: {panel.num_lines}, {panel.num_items} items in {found.makespan:.4g} seconds, "
        f"{steps}{found.idle_frac:.1%} idle, {found.overlap:.1%} with two kinds of work at once"
    )


def page(name: str, panels: Sequence[Panel], notes: Iterable[str] = ()) -> str:
    """The whole HTML page; all text of the run is escaped by the template."""
    styles = styles_of(panels)
    data = {
        "styles": [shown(style) for style in styles],
        "panels": [columns(panel, styles) for panel in panels],
    }
    return render(
        Path(__file__).with_name("timeline.html"),
        name=visible(name),
        panels=panels,
        tiles=tiles(panels),
        legend=[(shown(style), [(panel, panel.seconds(style)) for panel in panels]) for style in styles],
        kinds=[kind for kind in KINDS if any(panel.summary.busy[kind] for panel in panels)],
        busy=busy,
        seconds=seconds,
        notes=list(map(visible, notes)),
        data=data,
    )


def styles_of(panels: Iterable[Panel]) -> list[Style]:
    """All that occur, in the order in which a sample meets them."""
    found = {_style(row) for panel in panels for rows in panel.rows.values() for row in rows}
    return sorted(found, key=lambda style: (KINDS.index(style[0]), style[1] == "critic", style[1]))


def shown(style: Style) -> dict[str, Any]:
    """How a style looks."""
    kind, role = style
    colour = CRITIC_TRAINS if style == ("train", "critic") else COLOURS[kind]
    return {
        "name": f"{kind} {role}".rstrip(),
        "letter": LETTERS[kind],
        "colour": colour,
        "ink": "#000" if _luminance(colour) > 0.22 else "#fff",
        "hatched": role in HATCHED,
    }


def _style(row: Row) -> Style:
    return row.kind, row.role


def _luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` by WCAG 2, from 0 to 1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def columns(panel: Panel, styles: Sequence[Style]) -> dict[str, Any]:
    """A trace as the page draws it: whole numbers in one list a column, line after line.

    Times are ticks; `gap` counts from the end of the line's item before, which keeps the numbers short.
    """
    tick = 1e-6 if panel.summary.makespan >= 10 else 1e-9
    begin, number_of = panel.begin, {style: number for number, style in enumerate(styles)}
    found: dict[str, list[int]] = {
        name: [] for name in ("gap", "length", "style", "step", "lane", "number", "tokens", "bytes")
    }
    ends: defaultdict[int, float] = defaultdict(float)
    for rows in panel.rows.values():
        before = 0
        for row in rows:
            start, end = round((row.start - begin) / tick), round((row.end - begin) / tick)
            values = (start - before, end - start, number_of[_style(row)], row.step, row.lane, row.number, row.tokens)
            for column, value in zip(found.values(), (*values, row.num_bytes), strict=True):
                column.append(value)
            ends[row.step] = max(ends[row.step], row.end - begin)
            before = end
    return {
        "name": panel.name,
        "line": panel.line,
        "tick": tick,
        "seconds": panel.summary.makespan,
        "lines": [
            {"id": line, "group": rows[0].group, "items": len(rows), "idle": panel.share(panel.summary.idle[line])}
            for line, rows in panel.rows.items()
        ],
        "ends": sorted((end, step) for step, end in ends.items()),
        "columns": found,
    }


def busy(panel: Panel, line: int) -> dict[Kind, float]:
    """Seconds of each kind on one line."""
    found: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    for row in panel.rows[line]:
        found[row.kind] += row.seconds
    return found


def tiles(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """The summary: name and meaning of a number, the number of each panel, and measured over simulated seconds."""
    found = [panel.summary for panel in panels]
    spans, steps = [summary.makespan for summary in found], [panel.step_seconds for panel in panels]
    idle, overlap = (f"{summary.idle_frac:.1%}" for summary in found), (f"{summary.overlap:.1%}" for summary in found)
    return [
        _tile("makespan", "from the first start to the last end", map(seconds, spans), _ratio(*spans)),
        _tile(
            "per step", "from the end of training in one step to that in the next", map(seconds, steps), _ratio(*steps)
        ),
        _tile("idle", "share of all lines' time in which nothing ran", idle),
        _tile("overlap", "share of time in which two kinds of work ran at once", overlap),
    ]


def _tile(name: str, meaning: str, values: Iterable[str], ratio: str = "") -> dict[str, Any]:
    return {"name": name, "meaning": meaning, "numbers": list(values), "ratio": ratio}


def _ratio(measured: float | None, simulated: float | None = None) -> str:
    return f"{measured / simulated:.2f}" if measured and simulated else ""


def seconds(value: float | None) -> str:
    """Three digits or more, in the unit that fits."""
    if value is None:
        return "-"
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f} s"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"
