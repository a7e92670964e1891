"""The trace of a run as one picture: all its starts on one clock."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rto_megatron.schedule.trace import Row, meet
from rto_megatron.schedule.trace_folder import first_step, read_starts


def read_run(run_dir: Path) -> tuple[list[Row], list[str]]:
    """Rows of all ranks of a run, and notes on what its files held beside them; an item begins when all have come.

    Raises:
        DataError: as `read_starts`.
    """
    starts, notes = read_starts(run_dir)
    if len(starts) > 1:
        notes.append(f"started {len(starts)} times; what was run again is shown once, and the time between is left out")
    return meet(join_starts(starts)), notes


def join_starts(starts: Sequence[Sequence[Row]]) -> list[Row]:
    """One run out of its starts: each step as it was run last, each start where the one before ended.

    A start that goes on at step s takes the place of all that earlier ones did from s on, also of steps that it has
    not come to yet: their weights are gone.
    """
    kept: list[Sequence[Row]] = list(starts)
    for place, rows in enumerate(starts[:-1]):
        replaced_from = min(map(first_step, starts[place + 1 :]))
        kept[place] = [row for row in rows if row.step < replaced_from]
    return _one_after_the_other(kept)


def _one_after_the_other(starts: Sequence[Sequence[Row]]) -> list[Row]:
    rows: list[Row] = []
    end: float | None = None
    for start in filter(None, starts):
        shift = 0.0 if end is None else end - min(row.start for row in start)
        rows += [replace(row, start=row.start + shift, end=row.end + shift) for row in start] if shift else start
        end = max(row.end for row in start) + shift
    return rows
