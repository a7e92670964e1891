"""The trace of a run: the files that its ranks write, and all of them read, cut into the starts of the run."""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rto_megatron.errors import DataError, writing
from rto_megatron.schedule.trace import Row, meet, of_leaders, read_rows


def read_last_start(folder: Path) -> tuple[list[Row], list[str]]:
    """A row an item and group of a run since it was started last, as `Fitted` takes them, and notes as `read_starts`.

    Earlier starts are left out, for they may have had other maps and layouts.

    Raises:
        DataError: as `read_starts`.
    """
    starts, notes = read_starts(folder)
    if len(starts) > 1:
        notes.append(f"started {len(starts)} times; only what ran since the last start is taken")
    return of_leaders(meet(starts[-1])), notes


def read_starts(folder: Path) -> tuple[list[list[Row]], list[str]]:
    """Rows of all ranks by start of the run, each as its rank wrote it, and notes on what the files held beside them.

    Args:
        folder: of the run, or its trace folder.

    Raises:
        DataError: there is no trace, or a line of it is damaged; a torn last line only makes a note.
    """
    files, notes, starts = _files(folder), [], {}
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
        parent = next(iter(files.values())).parent
        raise DataError(f"{parent}: needs at least one row, found none; wait until the run's first items ended")
    return match_starts(starts), notes


def _files(folder: Path) -> dict[int, Path]:
    """Rank -> its file."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such run folder; name that of an rto or ppo run, relative to the working directory"
        )
    for parent in (folder / "trace", folder):
        found = {path: re.fullmatch(r"rank_(\d+)\.jsonl", path.name) for path in parent.glob("rank_*.jsonl")}
        if files := {int(match[1]): path for path, match in found.items() if match}:
            return dict(sorted(files.items()))
    raise DataError(
        f"{folder / 'trace'}: holds no rank_NUMBER.jsonl; traces are written by runs with a schedule.map other than "
        "sequential"
    )


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


def match_starts(starts: dict[int, list[list[Row]]]) -> list[list[Row]]:
    """Rows of all ranks by start of the run, from those by rank and start of that rank."""
    longest = max(starts.values(), key=len)
    first_steps = [first_step(rows) for rows in longest]
    matched: list[list[Row]] = [[] for _ in longest]
    for own in starts.values():
        for place, rows in zip(_places([first_step(rows) for rows in own], first_steps), own, strict=True):
            matched[place] += rows
    return matched


def first_step(rows: Sequence[Row]) -> int:
    """The first that has rows."""
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


class TraceFile:
    """Where a rank writes its rows as it runs, and the clock that they go by."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Open for appending: a run that goes on adds to what it has written."""
        self.clock, self._path = clock, path
        with writing("run_dir", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1)  # by line: a killed run leaves all but the last

    def write(self, row: Row) -> None:
        """Add a row.

        Raises:
            ConfigError: the file cannot be written.
        """
        with writing("run_dir", self._path):
            self._file.write(json.dumps(asdict(row)) + "\n")

    def close(self) -> None:
        """Nothing more comes."""
        self._file.close()


@contextmanager
def trace_file(run_dir: Path, rank: int, gather: Callable[[Any], list[Any]]) -> Iterator[TraceFile]:
    """RUN_DIR/trace/rank_R.jsonl of this rank. Every rank calls; all clocks show seconds since this start of the run.

    Ranks of different machines agree as well as these machines' clocks do.

    Args:
        gather: tells every rank's object to every rank.
    """
    folder = run_dir / "trace"
    start = gather(time.time())[0]
    base = time.perf_counter() - (time.time() - start)
    trace = TraceFile(folder / f"rank_{rank:05d}.jsonl", lambda: time.perf_counter() - base)
    try:
        yield trace
    finally:
        trace.close()
