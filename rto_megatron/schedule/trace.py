"""What ran when: rows of a trace, and what they add up to."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from rto_megatron.errors import DataError
from rto_megatron.schedule.work import KINDS, Item, Kind

LETTERS: dict[Kind, str] = {
    "prefill": "p",
    "decode": "D",
    "score": "S",
    "proximal": "x",
    "advantage": "a",
    "train": "T",
    "optimizer": "o",
    "refit": "r",
    "boundary": "|",
}
TOGETHER: tuple[Kind, ...] = ("proximal", "optimizer", "refit", "boundary")
"""Kinds whose items several groups do together; each does items of other kinds by itself."""
LONGEST = 1e9
"""Seconds; a run is over after 30 years, NaN and infinity are not below."""


class Load:
    """How much an item has to do, in the columns of a trace."""

    def __init__(self, contexts: Sequence[int] = (), *, tokens: int | None = None, num_bytes: int = 0) -> None:
        """One number a sample: its tokens."""
        self.samples = len(contexts)
        self.tokens = sum(contexts) if tokens is None else tokens
        self.squares = sum(length * length for length in contexts)
        self.num_steps = self.context = 0
        self.num_bytes = num_bytes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One item on one group. Measured and simulated traces have the same rows.

    Seconds count from where this start of the run opened its traces, or the simulation began: a run that was started
    again counts anew.
    """

    group: int
    rank: int = -1
    """Of a measured row: a group's ranks have one each. -1 in a simulated one, whose groups are one piece."""
    kind: Kind
    role: str
    step: int
    lane: int
    number: int
    start: float
    """When it began: for what groups do together, when the last of them had come."""
    end: float
    tokens: int = 0
    """That were read or written: prompts and responses, decode: one a sample and step."""
    samples: int = 0
    squares: int = 0
    """Sum over samples of their tokens squared: what attention pays."""
    num_steps: int = 0
    """Passes of the model in a row (decode)."""
    context: int = 0
    """Sum over decode steps and samples of the tokens that were attended to."""
    num_bytes: int = 0
    """That were received (refit); 0 on ranks that only send."""

    @classmethod
    def of(cls, item: Item, load: Load, *, group: int, start: float, end: float, rank: int = -1) -> "Row":
        """Of an item that a group, or one of its ranks, has run."""
        return cls(
            group=group,
            rank=rank,
            kind=item.kind,
            role=item.role,
            step=item.step,
            lane=item.lane,
            number=item.number,
            start=start,
            end=end,
            tokens=load.tokens,
            samples=load.samples,
            squares=load.squares,
            num_steps=load.num_steps,
            context=load.context,
            num_bytes=load.num_bytes,
        )

    @property
    def key(self) -> tuple:
        """Names item and group: once in a run."""
        return self.group, self.kind, self.step, self.lane, self.number, self.role

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


def meet(rows: Iterable[Row]) -> list[Row]:
    """Measured rows, of which each begins when the last rank of its item had come: waiting for it is idle time.

    A rank writes down when it came itself. All ranks of a group meet in each item, and all groups in what they do
    together.
    """
    rows = list(rows)
    begun: dict[tuple, float] = {}
    for row in rows:
        begun[_meeting(row)] = max(row.start, begun.get(_meeting(row), row.start))
    # not after its end: one that only sends need not wait for who receives
    return [replace(row, start=min(row.end, begun[_meeting(row)])) for row in rows]


def _meeting(row: Row) -> tuple:
    return row.key[1:] if row.kind in TOGETHER else row.key


def of_leaders(rows: Iterable[Row]) -> list[Row]:
    """One row an item and group, as a simulated trace has them: of each group's lowest rank."""
    rows = list(rows)
    leaders: dict[int, int] = {}
    for row in rows:
        leaders[row.group] = min(row.rank, leaders.get(row.group, row.rank))
    return [row for row in rows if row.rank == leaders[row.group]]


FIELDS = {field.name: field.type for field in fields(Row)}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A trace in a few numbers."""

    makespan: float
    """Seconds from the first start to the last end."""
    busy: dict[Kind, float]
    """Seconds of each kind, a mean over groups."""
    idle: dict[int, float]
    """Of each group: seconds in which it ran nothing."""
    overlap: float
    """Share of the makespan in which different groups ran different kinds."""

    @property
    def idle_frac(self) -> float:
        """Share of all groups' time in which nothing ran."""
        return sum(self.idle.values()) / (self.makespan * len(self.idle)) if self.makespan else 0.0


def summarise(rows: Sequence[Row], groups: Iterable[int] | None = None) -> Summary:
    """Add up a trace; `groups` names those that count, if some may have run nothing."""
    every = sorted({row.group for row in rows} | set(groups or ()))
    first, last = min(row.start for row in rows), max(row.end for row in rows)
    busy: dict[Kind, float] = {
        kind: sum(row.seconds for row in rows if row.kind == kind) / len(every) for kind in KINDS
    }
    ran: defaultdict[int, float] = defaultdict(float)
    for row in rows:
        ran[row.group] += row.seconds
    return Summary(
        makespan=last - first,
        busy=busy,
        idle={group: last - first - ran[group] for group in every},
        overlap=_mixed_seconds(rows) / (last - first) if last > first else 0.0,
    )


def _mixed_seconds(rows: Sequence[Row]) -> float:
    """Seconds in which at least two kinds ran; writing responses, prefill and decode, counts as one."""
    events = sorted((at, change, row.kind) for row in rows for at, change in ((row.start, 1), (row.end, -1)))
    running: Counter[str] = Counter()
    mixed = since = 0.0
    for at, change, kind in events:
        if sum(count > 0 for count in running.values()) > 1:
            mixed += at - since
        running["decode" if kind == "prefill" else kind] += change
        since = at
    return mixed


def draw(rows: Sequence[Row], *, width: int = 100) -> str:
    """A line a group: the kind that ran longest in each of `width` equal parts of the makespan; a dot for none."""
    first, last = min(row.start for row in rows), max(row.end for row in rows)
    part = (last - first) / width or 1.0
    cells: dict[int, list[defaultdict[str, float]]] = {}
    for row in rows:
        line = cells.setdefault(row.group, [defaultdict(float) for _ in range(width)])
        for i in range(int((row.start - first) / part), min(width, int((row.end - first) / part) + 1)):
            inside = min(row.end, first + (i + 1) * part) - max(row.start, first + i * part)
            line[i][LETTERS[row.kind]] += inside
    lines = [f"{group:>4} {''.join(_longest(cell, part) for cell in line)}" for group, line in sorted(cells.items())]
    words = "  ".join(f"{letter} {kind}" for kind, letter in LETTERS.items())
    return "\n".join([*lines, f"     {words}  . idle; a column is {part:.3g} s"])


def _longest(cell: dict[str, float], part: float) -> str:
    cell["."] = part - sum(cell.values())
    return max(cell, key=lambda letter: cell[letter])


def write_trace(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line."""
    with path.open("w") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_trace(path: Path) -> list[Row]:
    """The rows of a file that `write_trace` wrote.

    Raises:
        DataError: the file cannot be read, a line of it is no row, or it is not whole.
    """
    rows, cut_off = read_rows(path)
    if cut_off:
        raise DataError(f"{path}: a trace must be whole; {cut_off[0]}")
    if not rows:
        raise DataError(f"{path}: a trace needs at least one row, found none")
    return rows


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of one file, and a note for each that was cut off: a run that is killed leaves half of its last line.

    Unlike `read_trace` it takes the file of a run that still goes on, or was killed.

    Raises:
        DataError: the file cannot be read, or a line of it is damaged.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: a trace must be a readable file of JSON lines, got: {error.strerror or error}; name the "
            "folder of a run, or a file that `simulate --trace=FILE` wrote"
        ) from None
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
            raise DataError(f"{path}:{number}: {name} must be seconds from the start of the run, got {value!r}")
    if row.kind not in KINDS or not isinstance(row.role, str):
        raise DataError(f"{path}:{number}: kind must be one of {', '.join(KINDS)} and role a text, got {shown}")
    if row.end < row.start:
        raise DataError(f"{path}:{number}: end must not be before start {row.start}, got {row.end}")
    return row
