"""`report timeline RUN_DIR`: one page that shows what ran when, on every rank."""

import re
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.errors import DataError
from rto_megatron.metrics import Console
from rto_megatron.report.rows import read_run
from rto_megatron.report.timeline import Panel, headline, page
from rto_megatron.report.words import one_run, read_words, write_page
from rto_megatron.schedule.trace import Row, read_trace

USAGE = "python -m rto_megatron report timeline RUN_DIR [--simulated=FILE] [--out=FILE] [--steps=FIRST:LAST]"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What report timeline takes beside the run folder."""

    simulated: Path | None = None
    """A trace that `simulate --trace=FILE` wrote, to be shown below the measured one."""
    out: Path | None = None
    """File for the page; null writes RUN_DIR/timeline.html."""
    steps: str | None = None
    """FIRST:LAST, the steps to show, both included; null shows all."""

    def __post_init__(self) -> None:
        if self.steps is not None:
            found = re.fullmatch(r"(\d+):(\d+)", self.steps)
            if not found or int(found[1]) > int(found[2]):
                raise ValueError(f"steps must be FIRST:LAST, two step numbers in order, got {self.steps!r}")

    @property
    def range(self) -> range | None:
        """The steps to show, None for all."""
        if self.steps is None:
            return None
        first, last = map(int, self.steps.split(":"))
        return range(first, last + 1)


def main(words: list[str]) -> None:
    """Draw the page, print where it is and its headline."""
    runs, options = read_words(Options, words, USAGE)
    run_dir = one_run(runs, USAGE)
    rows, notes = read_run(run_dir)
    panels = [Panel.of("measured", _picked(rows, options.range, run_dir))]
    if options.simulated is not None:
        simulated = _picked(read_trace(options.simulated), options.range, options.simulated)
        panels.append(Panel.of("simulated", simulated))
    write_page(options.out or run_dir / "timeline.html", page(run_dir.resolve().name, panels, notes))
    console = Console()
    for panel in panels:
        console.say(headline(panel))
    for note in notes:
        console.say(f"note: {note}")


def _picked(rows: list[Row], steps: range | None, source: Path) -> list[Row]:
    """Rows of the steps to show."""
    if steps is None:
        return rows
    if picked := [row for row in rows if row.step in steps]:
        return picked
    there = sorted({row.step for row in rows})
    raise DataError(f"{source}: has no rows of steps {steps[0]} to {steps[-1]}, only of {there[0]} to {there[-1]}")
