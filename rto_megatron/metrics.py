"""Numbers on their way out: sums that can still be merged, their names, TensorBoard, the console."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from rich import box
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rto_megatron.errors import UserError, writing
from rto_megatron.metric_names import METRICS

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, which have no width of their own."""
PLAIN_LINES = 20
"""About how many progress lines a whole run writes where there is no terminal."""


@dataclass(frozen=True)
class Mean:
    """A mean not yet taken: adds over microbatches, then over ranks."""

    total: float
    count: float

    @classmethod
    def over(cls, x: "Tensor", mask: "Tensor | None" = None) -> Self:
        """Mean of `x` of any shape where `mask` (same shape, bool) is True; of all of it without one.

        Summed in float64: the order in which parts are merged does not show in the digits that are printed.
        """
        picked = x if mask is None else x[mask]
        return cls(picked.detach().double().sum().item(), picked.numel())

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN when nothing was counted."""
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True)
class Max:
    """A maximum that adds like a Mean."""

    value: float = float("-inf")

    @classmethod
    def over(cls, x: "Tensor", mask: "Tensor | None" = None) -> Self:
        """Largest of `x` where `mask` (same shape, bool) is True; -inf where there is nothing."""
        picked = x if mask is None else x[mask]
        return cls(picked.max().item()) if picked.numel() else cls()

    def __add__(self, other: "Max") -> "Max":
        return Max(max(self.value, other.value))


@dataclass(frozen=True)
class Latest:
    """A number of which only the newest counts, such as a learning rate."""

    value: float

    def __add__(self, other: "Latest") -> "Latest":
        return other


class Mergeable(Protocol):
    """What a Mean, a Max and a Latest have in common."""

    @property
    def value(self) -> float: ...

    def __add__(self, other: Any) -> Any: ...


def merge(parts: Sequence[Mapping[str, Mergeable]]) -> dict[str, Mergeable]:
    """Add up dicts name by name, in the order given; a name may be missing from some."""
    merged: dict[str, Mergeable] = {}
    for part in parts:
        for name, number in part.items():
            merged[name] = merged[name] + number if name in merged else number
    return merged


def take(merged: Mapping[str, Mergeable]) -> dict[str, float]:
    """The final number of each name: merge no further."""
    return {name: number.value for name, number in merged.items()}


def format_number(value: object) -> str:
    """Four digits of a float; everything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def in_units(num_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


class TensorBoardLog:
    """The numbers of a run on disk: TensorBoard's event file and, beside it, `metrics.jsonl`."""

    def __init__(self, folder: Path, enabled: bool, *, start: int = 0) -> None:
        """Open for a run that goes on at step `start`: what an earlier try wrote from there on is dropped.

        Only one rank may be `enabled`; the others check names, so that all ranks stop at a wrong one.
        """
        self._writer = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # costs a second, and only one rank needs it

        path = folder / "metrics.jsonl"
        with writing("run_dir", folder):
            folder.mkdir(parents=True, exist_ok=True)
            _keep_rows_before(path, start)
            self._rows = path.open("a")
            self._writer = SummaryWriter(str(folder), purge_step=start)
        self._folder = folder

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one row; `values` maps names of METRICS to numbers."""
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not in METRICS; give it a meaning and a unit in metric_names.py")
        if self._writer is None:
            return
        with writing("run_dir", self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._rows.write(json.dumps({"step": step, **values}) + "\n")
            # A run that is killed must leave what it has measured.
            self._rows.flush()
            self._writer.flush()

    def close(self) -> None:
        """Close both files; nothing may be written after."""
        if self._writer is not None:
            with writing("run_dir", self._folder):
                self._writer.close()
                self._rows.close()


def _keep_rows_before(path: Path, start: int) -> None:
    """Rewrite a JSONL file without the rows of step `start` and later, and without a half-written last line."""
    if not path.exists():
        return
    # Beside and renamed: a run that is killed here must not lose what earlier ones have measured.
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(rows_before(path, start))
    draft.replace(path)


def rows_before(path: Path, start: int) -> bytes:
    """The rows of a JSONL file below step `start`.

    Raises:
        UserError: a line is not a row of ours, and not a half-written last one.
    """
    lines = path.read_bytes().split(b"\n")  # the last one is empty, or half-written
    kept = []
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None and line.strip() and number < len(lines):
            raise UserError(
                f"{path}:{number}: must be a row of metrics, a JSON object with a whole number as 'step', got "
                f"{line[:60].decode(errors='replace')!r}; mend or remove the line, or set another run_dir"
            )
        if step is not None and step < start:
            kept.append(line + b"\n")
    return b"".join(kept)


def _step_of(line: bytes) -> int | None:
    """The step of a row; None for what is no row."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


class Console:
    """What a person watches: lines, tables, a progress bar; plain text where there is no terminal."""

    def __init__(self, enabled: bool = True, *, stream: IO[str] | None = None) -> None:
        """Write to `stream` (standard output if None), or nothing at all unless `enabled`: only one rank is."""
        self._enabled = enabled
        # Markup, emoji, colours in numbers are off: a response may well contain [brackets] or :words:.
        style: dict[str, Any] = {
            "file": stream,
            "quiet": not enabled,
            "markup": False,
            "emoji": False,
            "highlight": False,
        }
        screen = Terminal(**style)
        self._out = screen if screen.is_terminal else Terminal(**style, width=PLAIN_WIDTH)

    def say(self, text: str = "") -> None:
        """One line, or several."""
        self._out.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; floats get four digits and numbers are set to the right."""
        style = box.SIMPLE_HEAD if self._out.is_terminal else box.MARKDOWN
        table = Table(box=style, title=title, title_justify="left", title_style="bold")
        for place, column in enumerate(columns):
            numbers = all(isinstance(row[place], int | float) for row in rows)
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(format_number, row))
        self._out.print(table)

    @contextmanager
    def progress(self, name: str, *, total: int, start: int = 0) -> Iterator["Steps"]:
        """A bar over steps `start` to `total` - 1, on screen while the `with` block runs."""
        if not (self._enabled and self._out.is_terminal):
            yield Steps(self, name, total)
            return
        # Redrawn by `done` alone: rich's refresh thread would wake up in the middle of every kernel.
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        numbers = TextColumn("{task.fields[numbers]}")
        with Progress(*columns, numbers, console=self._out, auto_refresh=False) as bar:
            yield Steps(self, name, total, bar, bar.add_task(name, total=total, completed=start, numbers=""))


class Steps:
    """The steps of one progress bar, told as they end."""

    def __init__(self, console: Console, name: str, total: int, bar: Progress | None = None, task: Any = None) -> None:
        self._console, self._name, self._total = console, name, total
        self._bar, self._task = bar, task

    def done(self, step: int, numbers: Mapping[str, float] | None = None) -> None:
        """Step `step` (from 0) has ended; `numbers` are the few to show beside it."""
        shown = "  ".join(f"{name} {format_number(value)}" for name, value in (numbers or {}).items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, numbers=shown, refresh=True)
        elif step + 1 == self._total or (step + 1) % max(1, self._total // PLAIN_LINES) == 0:
            self._console.say(f"{self._name} {step + 1}/{self._total}  {shown}".rstrip())
