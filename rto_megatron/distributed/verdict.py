"""Whose fault it is that a run cannot go on, from what all ranks say of themselves; and the report of it."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BEATS_OF_DOUBT = 3
"""Beats by which what one rank sees of another may be late."""
REPORT_WIDTH = 120
BETWEEN = "between items"
"""The phase of a rank that has no item."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a rank says of itself, and how long ago that was."""

    rank: int
    host: str = ""
    place: str = ""
    """Where its process number means something: ranks of one place can look at each other's processes."""
    pid: int = 0
    born: float = 0.0
    """Start of the process, in seconds since 1970."""
    beat: int = 0
    """Number of statuses published; 0 before the first."""
    phase: str = "start"
    item: str = ""
    seconds: float = 0.0
    """In this item, without the time for which the whole job was suspended."""
    deadline: float | None = None
    """Seconds after which the item is stuck; None where it waits for others."""
    with_ranks: Sequence[int] = ()
    """Do the same item together; until all of them have entered it, this rank waits."""
    queues: str = ""
    at: str = ""
    """Lines of ours that its main thread executes: caller and called."""
    in_collective: bool = False
    """Whether that line waits for other ranks, as far as Python knows."""
    error: str = ""
    error_order: int = 0
    """Of all ranks' errors this was the first, second, ..."""
    error_seconds: float = 0.0
    """Since the error, at the last beat."""
    ended: bool = False
    silent: float = 0.0
    """Seconds since a monitor last saw a new beat."""
    gone: bool = False
    """Whether its process has ended without saying so."""


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on."""

    culprits: tuple[int, ...]
    reason: str
    is_for_user: bool = False
    """Whether a UserError of the culprit is the reason, which then is its whole message: there is nothing to report."""


def judge(
    statuses: Sequence[Status], *, floor_seconds: float, dead_seconds: float, beat_seconds: float
) -> Verdict | None:
    """Who keeps the run from going on, or None: the dead before errors, errors before the stuck, then a deadlock.

    The former cause the latter: who loses a peer raises an error, or waits. What a rank does before its first item is
    not judged; between two items it counts as waiting.
    """
    alive = [one for one in statuses if not one.ended]
    # who has not published once may still be on the way to its watchdog
    dead = [one for one in alive if one.gone or one.silent > (dead_seconds if one.beat else 2 * floor_seconds)]
    if dead:
        return _verdict(dead, "; ".join(map(_how_dead, dead)))

    errors = sorted((one for one in statuses if one.error), key=lambda one: one.error_order)
    since = sum(one.error_seconds + one.silent for one in errors[:1]) - BEATS_OF_DOUBT * beat_seconds
    # an error may be the loss of a peer on another node: all must have shown a sign of life after it
    if errors and alive and all(one.silent < since for one in alive):
        return _verdict(errors[:1], f"rank {errors[0].rank} failed in {where(errors[0])}: {errors[0].error}")

    waiting = [one for one in alive if _waits(one, statuses)]
    for one in alive:
        group = [statuses[rank] for rank in sorted({one.rank, *one.with_ranks})]
        if one not in waiting and one.deadline and min(other.seconds for other in group) > one.deadline:
            ranks = " and ".join(f"rank {other.rank} for {other.seconds:.0f} s" for other in group)
            reason = f"stuck in {where(one)}: {ranks}, the limit is {one.deadline:.0f} s"
            # who waits inside the item waits for those of the group that do something else in it
            busy = [other for other in group if not other.in_collective]
            if len(busy) < len(group):
                reason += "".join(f"; rank {other.rank} is at {other.at}" for other in busy)
            return _verdict(busy or group, reason)

    if alive and waiting == alive and all(one.seconds > max(floor_seconds, one.deadline or 0.0) for one in alive):
        idle = [one for one in alive if one.phase == BETWEEN]
        busy = [one for one in alive if one.deadline and not one.in_collective]
        return _verdict(
            idle or busy or alive, f"deadlock: every rank waits, nothing has changed for {floor_seconds:.0f} s"
        )
    return None


def _verdict(culprits: Sequence[Status], reason: str) -> Verdict:
    return Verdict(tuple(one.rank for one in culprits), reason)


def to_user(message: str, *, rank: int) -> str:
    """What the user reads of a UserError of this rank."""
    # another node may lack a file that this one has
    return f"error{f' on rank {rank}' if rank else ''}: {message}"


def where(one: Status) -> str:
    """Its phase and item."""
    return f"{one.phase} {one.item!r}"


def _how_dead(one: Status) -> str:
    how = "its process is gone" if one.gone else f"no sign of life for {one.silent:.0f} s"
    return f"rank {one.rank} is dead: {how}, last seen in {where(one)}"


def _waits(one: Status, statuses: Sequence[Status]) -> bool:
    """Whether it has nothing to do: it says so, or the others of its item are not there."""
    if one.phase == "start" or one.error:
        return False
    there = [(statuses[rank].phase, statuses[rank].item) for rank in one.with_ranks]
    return one.deadline is None or any(other != (one.phase, one.item) for other in there)


def report(statuses: Sequence[Status], culprits: Sequence[int], last: Mapping[int, Sequence[str]]) -> str:
    """What every rank is at, its queues, its error, and its last items; culprits have a star."""
    queues = {one.rank: one.queues for one in statuses if one.queues}
    errors = {one.rank: one.error for one in statuses if one.error}
    items = {rank: "; ".join(words) for rank, words in last.items() if words}
    parts = (("queues", queues), ("errors", errors), ("last items, the newest at the end", items))
    lines = [line for title, said in parts if said for line in (f"{title}:", *_by_rank(said))]
    return "\n".join([table(statuses, culprits), *lines])


def table(statuses: Sequence[Status], culprits: Sequence[int]) -> str:
    """One line a rank; culprits have a star."""
    rows = [("", "rank", "host", "phase", "item", "in it", "limit", "last beat", "at")]
    for one in statuses:
        limit = "waits" if one.deadline is None else f"{one.deadline:.0f} s"
        beat = "ended" if one.ended else "gone" if one.gone else f"{one.silent:.0f} s ago" if one.beat else "never"
        star = "*" if one.rank in culprits else ""
        rows.append((star, str(one.rank), one.host, one.phase, one.item, f"{one.seconds:.0f} s", limit, beat, one.at))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _by_rank(said: Mapping[int, str]) -> list[str]:
    width = max(len(str(rank)) for rank in said)
    indent = " " * (width + 9)
    return [
        textwrap.fill(f"  rank {rank:{width}}: {words}", REPORT_WIDTH, subsequent_indent=indent)
        for rank, words in said.items()
    ]
