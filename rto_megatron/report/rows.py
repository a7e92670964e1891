"""The trace of a run: the files of all its ranks, and of all its starts, as rows on one clock."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from rto_megatron.errors import DataError
from rto_megatron.schedule.trace import Row, meet
from rto_megatron.schedule.work import KINDS

FIELDS = {field.name: field.type for field in fields(Row)}
LONGEST = 1e9
"""Seconds; a run is over after 30 years, NaN and infinity are not below."""


def read_run(run_dir: Path) -> tuple[list[Row], list[str]]:
    """Rows of all ranks of a run, and notes on what its files held beside them; an item begins when all have come.

    Raises:
        DataError: there is no trace, or a line of it is damaged; a torn last line only makes a note.
    """
    files, notes, starts = _files(run_dir), [], {}
    for rank, path in files.items():
        rows, cut_off = read_rows(path)
        notes += cut_off
        for number, row in enumerate(rows, 1):
            if row.rank != rank:
                raise DataError(f"{path}:{number}: rank must be {rank} as in the name of the file, got {row.rank}")
        if rows:
            starts[rank] = split_starts(rows)
        else:
            notes.append(f"{path.name}: no rows yet")
    if missing := sorted(set(range(max(files))) - set(files)):
        notes.append(f"no file of rank {', '.join(map(str, missing))}")
    if not starts:
        raise DataError(
            f"{run_dir / 'trace'}: needs at least one row, found none; wait until the run's first items ended"
        )
    num_starts = max(map(len, starts.values()))
    if num_starts > 1:
        notes.append(f"started {num_starts} times; what was run again is shown once, and the time between is left out")
    return meet(join_starts(starts)), notes


def _files(run_dir: Path) -> dict[int, Path]:
    """Rank -> its file."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: there is no such run folder")
    found = {path: re.fullmatch(r"rank_(\d+)\.jsonl", path.name) for path in (run_dir / "trace").glob("rank_*.jsonl")}
    files = {int(match[1]): path for path, match in found.items() if match}
    if not files:
        raise DataError(
            f"{run_dir / 'trace'}: holds no rank_NUMBER.jsonl; traces are written by runs with a schedule.map other "
            "than sequential"
        )
    return dict(sorted(files.items()))


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of one file, and a note for each that was cut off: a run that is killed leaves half of its last line.

    Unlike `read_trace` it takes the file of a run that still goes on, or was killed, and checks the values too:
    they are drawn, and a wrong one would be a wrong picture.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: a trace must be a readable file of JSON lines, got: {error}") from None
    rows, notes = [], []
    for number, line in enumerate(lines, 1):
        # The next start goes on in the half line; rows are flat, so the last brace begins the whole one.
        whole = max(0, line.rfind(b'{"'))
        if whole:
            notes.append(_cut_off(path, number))
        rows.append(_row(path, number, line[whole:]))
    if last:
        notes.append(_cut_off(path, len(lines) + 1))
    return rows, notes


def _cut_off(path: Path, number: int) -> str:
    return f"{path.name}:{number}: a row was cut off in the middle of writing, and is left out"


def _row(path: Path, number: int, line: bytes) -> Row:
    shown = repr(line[:80].decode(errors="replace"))
    try:
        row = Row(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{path}:{number}: a row of a trace needs the fields {sorted(FIELDS)}, got {shown}") from None
    for name, kind in FIELDS.items():
        value = getattr(row, name)
        if kind is int and type(value) is not int:
            raise DataError(f"{path}:{number}: {name} must be a whole number, got {value!r}")
        if kind is float and not (type(value) in (int, float) and abs(value) < LONGEST):
            raise DataError(f"{path}:{number}: {name} must be seconds from the first item, got {value!r}")
    if row.kind not in KINDS or not isinstance(row.role, str):
        raise DataError(f"{path}:{number}: kind must be one of {', '.join(KINDS)} and role a text, got {shown}")
    if row.end < row.start:
        raise DataError(f"{path}:{number}: end must not be before start {row.start}, got {row.end}")
    return row


def split_starts(rows: Iterable[Row]) -> list[list[Row]]:
    """Cut one rank's rows where its run was started again: the clock goes back, or an item comes a second time."""
    starts: list[list[Row]] = [[]]
    seen: set[tuple] = set()
    for row in rows:
        if starts[-1] and (row.end < starts[-1][-1].start or row.key in seen):
            starts.append([])
            seen.clear()
        starts[-1].append(row)
        seen.add(row.key)
    return starts


def join_starts(starts: dict[int, list[list[Row]]]) -> list[Row]:
    """One run out of its starts, given by rank: each step as it was run last, each start where the one before ended.

    A start that goes on at step s takes the place of all that earlier ones did from s on, also of steps that it has
    not come to yet: their weights are gone.
    """
    longest = max(starts.values(), key=len)
    first_steps = [_first_step(rows) for rows in longest]
    joined: list[list[Row]] = [[] for _ in longest]
    for own in starts.values():
        for place, rows in zip(_places([_first_step(rows) for rows in own], first_steps), own, strict=True):
            joined[place] += rows
    for place, rows in enumerate(joined[:-1]):
        replaced_from = min(map(_first_step, joined[place + 1 :]))
        joined[place] = [row for row in rows if row.step < replaced_from]
    return _one_after_the_other(joined)


def _first_step(rows: Sequence[Row]) -> int:
    return min(row.step for row in rows)


def _places(own: Sequence[int], every: Sequence[int]) -> list[int]:
    """Which starts of the run are those of a rank that has fewer, by their first steps: the latest that fit.

    A rank that was killed before its first row has no rows of that start.
    """
    places: list[int] = []
    end = len(every)
    for i in reversed(range(len(own))):
        end = max((k for k in range(i, end) if every[k] <= own[i]), default=end - 1)
        places.append(end)
    return places[::-1]


def _one_after_the_other(starts: Sequence[Sequence[Row]]) -> list[Row]:
    rows: list[Row] = []
    end: float | None = None
    for start in filter(None, starts):
        shift = 0.0 if end is None else end - min(row.start for row in start)
        rows += [replace(row, start=row.start + shift, end=row.end + shift) for row in start] if shift else start
        end = max(row.end for row in start) + shift
    return rows
