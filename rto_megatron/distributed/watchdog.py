"""A hang is a report: when a rank is dead or stuck, all of them say what they are doing, and stop.

    watchdog = Watchdog(rank=rank(), world=world_size())     # right after start_runtime, inside listening_for_stop
    with watchdog.watching():
        watchdog.enter("train", "minibatch 3", seconds=2.5)
        ...
        watchdog.leave()

The main thread only sets attributes. A thread publishes them each beat to the store of the ranks, over a connection of
its own: a call that waits on a shared one would hold up all others. Two ranks of each node read what all have published
and `judge` it: two, because the one that should find out may be the one that died. The first verdict stands; every rank
sees it within a beat, prints it, and ends with exit code 1. torchrun sends SIGTERM to the others once one rank has
ended: a rank that does not listen for it dies without a word.

A beat needs Python's GIL: who holds it in C code for `dead_seconds` is taken for dead. torch's operations release it.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import psutil
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from rto_megatron.errors import StoppedToContinue, UserError

NUM_LAST_ITEMS = 20
STUCK_FACTOR = 5.0
"""An item is stuck after this many times its predicted seconds."""
BEATS_OF_DOUBT = 3
"""Beats by which what one rank sees of another may be late."""
LAST_ONE_SECONDS = 10.0
"""How long rank 0, which may hold the store, waits at a good end for the others to have ended as well."""
BETWEEN = "between items"


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
        return _verdict(errors[:1], f"rank {errors[0].rank} failed in {_where(errors[0])}: {errors[0].error}")

    waiting = [one for one in alive if _waits(one, statuses)]
    for one in alive:
        group = [statuses[rank] for rank in sorted({one.rank, *one.with_ranks})]
        if one not in waiting and one.deadline and min(other.seconds for other in group) > one.deadline:
            ranks = " and ".join(f"rank {other.rank} for {other.seconds:.0f} s" for other in group)
            return _verdict(group, f"stuck in {_where(one)}: {ranks}, the limit is {one.deadline:.0f} s")

    if alive and waiting == alive and all(one.seconds > floor_seconds for one in alive):
        idle = [one for one in alive if one.phase == BETWEEN] or alive
        return _verdict(idle, f"deadlock: every rank waits, nothing has changed for {floor_seconds:.0f} s")
    return None


def _verdict(culprits: Sequence[Status], reason: str) -> Verdict:
    return Verdict(tuple(one.rank for one in culprits), reason)


def _where(one: Status) -> str:
    return f"{one.phase} {one.item!r}"


def _how_dead(one: Status) -> str:
    how = "its process is gone" if one.gone else f"no sign of life for {one.silent:.0f} s"
    return f"rank {one.rank} is dead: {how}, last seen in {_where(one)}"


def _waits(one: Status, statuses: Sequence[Status]) -> bool:
    """Whether it has nothing to do: it says so, or the others of its item are not there."""
    if one.phase == "start" or one.error:
        return False
    there = [(statuses[rank].phase, statuses[rank].item) for rank in one.with_ranks]
    return one.deadline is None or any(other != (one.phase, one.item) for other in there)


def table(statuses: Sequence[Status], culprits: Sequence[int]) -> str:
    """One line a rank; culprits have a star."""
    rows = [("", "rank", "host", "phase", "item", "in it", "limit", "last beat", "queues")]
    for one in statuses:
        limit = "waits" if one.deadline is None else f"{one.deadline:.0f} s"
        beat = "ended" if one.ended else "gone" if one.gone else f"{one.silent:.0f} s ago" if one.beat else "never"
        star = "*" if one.rank in culprits else ""
        notes = f"{one.queues}  {one.error}".strip()
        rows.append((star, str(one.rank), one.host, one.phase, one.item, f"{one.seconds:.0f} s", limit, beat, notes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@dataclass(frozen=True)
class _Item:
    phase: str
    item: str = ""
    deadline: float | None = None
    with_ranks: tuple[int, ...] = ()
    queues: str = ""
    since: float = field(default_factory=time.monotonic)


_numbers = itertools.count()
"""Every rank makes its watchdogs in the same order; each has keys of its own in the store."""


class Watchdog:
    """Watches the main thread of this rank and, with those of the other ranks, the whole run, until `stop`.

    Args:
        rank: of this process.
        world: number of ranks; each makes a watchdog. With one, only its own items are watched.
        store: of the ranks; the watchdog takes a copy of it with a connection of its own.
        floor_seconds: no item is stuck earlier, and no run in a deadlock.
        beat_seconds: between two signs of life.
        dead_seconds: who gives no sign of life for so long is dead. A process that is gone is found within a beat.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        store: Store | None = None,
        floor_seconds: float = 60.0,
        beat_seconds: float = 1.0,
        dead_seconds: float = 20.0,
    ) -> None:
        self._world = world
        self._limits = {"floor_seconds": floor_seconds, "dead_seconds": dead_seconds, "beat_seconds": beat_seconds}
        host, born = socket.gethostname(), psutil.Process().create_time()
        self._me = Status(rank=rank, host=host, place=_place(), pid=os.getpid(), born=born)
        self._seen = [self._me if other == rank else Status(rank=other) for other in range(world)]
        # with one rank a node, there must be a second somewhere
        self._is_monitor = min(rank, int(os.environ.get("LOCAL_RANK", rank))) < 2
        self._item = self._published = _Item("start")
        self._last: tuple[str, ...] = ()
        self._error, self._ended, self._told, self._wake = "", False, False, threading.Event()
        self._looked = time.monotonic()
        self._store: Store | None = None
        if world > 1:
            shared = PrefixStore(f"watchdog{next(_numbers)}", store or _get_default_store())
            self._store = shared.clone()  # type: ignore[reportAttributeAccessIssue]  # torch 2.8 and later
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def enter(
        self, phase: str, item: str, *, seconds: float | None = None, with_ranks: Sequence[int] = (), queues: str = ""
    ) -> None:
        """The main thread now does `item`; takes microseconds. An item that it was in is left.

        Args:
            phase: what kind of work, such as generate.
            item: which, for a reader; the same words on all of `with_ranks`.
            seconds: predicted; it is stuck after 5 times that, or after the floor. None: it waits for others, and if
                all ranks do so for longer than the floor, it is a deadlock.
            with_ranks: ranks that do it together. Its time runs once the last of them has entered.
            queues: what is ready and what is missing, for the report.
        """
        self.leave()
        deadline = None if seconds is None else max(self._limits["floor_seconds"], STUCK_FACTOR * seconds)
        self._item = _Item(phase, item, deadline, tuple(with_ranks), queues)

    def leave(self) -> None:
        """The item is done. Work outside any item counts as waiting for others, as an item without seconds does."""
        done = self._item
        if done.phase not in ("start", BETWEEN):
            words = f"{done.phase} {done.item} {time.monotonic() - done.since:.2f} s"
            self._last = (*self._last[1 - NUM_LAST_ITEMS :], words)
            self._item = _Item(BETWEEN, f"after {done.item}", queues=done.queues)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stop the watchdog at the end; an error inside may be another rank's fault, see `fail`.

        What the user did wrong, and a stop on request, pass as they are: `__main__` has the words and the exit code.
        """
        try:
            yield
        except StoppedToContinue:
            self.stop()
            raise
        except Exception as error:
            if self._world > 1 and not isinstance(error, UserError):
                self.fail(error)
            self.stop(error)
            raise
        except BaseException as error:
            self.stop(error)
            raise
        self.stop()

    def fail(self, error: BaseException) -> NoReturn:
        """Print the error, wait until the ranks agree whose fault it is, print the report, and exit with 1."""
        if not self._told:  # else it comes of the end of the others
            traceback.print_exception(error)
        self._error = _in_a_line(error)
        self._wake.set()
        self._thread.join(2 * self._limits["dead_seconds"])  # which ends the process, unless no monitor is left
        self._tell("no verdict on the error above")
        os._exit(1)

    def stop(self, error: BaseException | None = None) -> None:
        """End the watch; with the error for which this rank leaves the others, if it does."""
        self._error = _in_a_line(error) if error else ""
        self._ended = True
        self._wake.set()
        self._thread.join(LAST_ONE_SECONDS)

    def _run(self) -> None:
        try:
            while not self._ended:
                self._look()
                self._wake.wait(self._limits["beat_seconds"])
                self._wake.clear()
            self._look()
            self._say_goodbye()
        except DistError as error:
            if not self._ended:
                known = f"\n{table(self._seen, ())}" if self._is_monitor else ""
                self._tell(f"the store of the ranks is gone, with its process: {_in_a_line(error)}{known}")
                os._exit(1)

    def _say_goodbye(self) -> None:
        deadline = time.monotonic() + LAST_ONE_SECONDS
        ended = self._store.add("ended", 1) if self._store else self._world
        while self._me.rank == 0 and not self._error and ended < self._world and time.monotonic() < deadline:
            time.sleep(self._limits["beat_seconds"] / 10)
            ended = self._store.add("ended", 0)  # type: ignore[reportOptionalMemberAccess]

    def _look(self) -> None:
        now, most = time.monotonic(), BEATS_OF_DOUBT * self._limits["beat_seconds"]
        passed = min(now - self._looked, most)  # if more, the job was suspended, or this machine is overloaded
        self._looked = now
        self._me = self._status(now, passed)
        if self._store:
            # in this order: who sees a status also finds the last items
            self._store.set(f"last{self._me.rank}", json.dumps(self._last))
            self._store.set(f"status{self._me.rank}", json.dumps(asdict(self._me)))
        if self._ended:
            return
        if self._store and self._store.check(["verdict"]):
            self._obey(self._store.get("verdict"))
        looks = 1 + self._world // 64  # of every so many one is at the others: what all publish is much
        if not self._is_monitor or self._me.beat % looks:
            return
        self._seen = self._read(self._store, passed * looks) if self._store else [self._me]
        verdict = judge(self._seen, **self._limits)
        if verdict:
            found = json.dumps({**asdict(verdict), "seen": [asdict(one) for one in self._seen]})
            self._obey(self._store.compare_set("verdict", "", found) if self._store else found)

    def _status(self, now: float, passed: float) -> Status:
        me, item, error = self._me, self._item, self._error
        seconds = me.seconds + passed if item is self._published else max(0.0, now - item.since)
        self._published = item
        return replace(
            me,
            beat=me.beat + 1,
            phase=item.phase,
            item=item.item,
            seconds=seconds,
            deadline=item.deadline,
            with_ranks=item.with_ranks,
            queues=item.queues,
            ended=self._ended,
            error=error,
            error_order=me.error_order or (self._store.add("errors", 1) if error and self._store else 0),
            error_seconds=me.error_seconds + passed if me.error else 0.0,
        )

    def _read(self, store: Store, passed: float) -> list[Status]:
        # before reading: who ends well has published it before its process is gone
        gone = {one.rank for one in self._seen if one.place == self._me.place and _process(one) is None}
        present = [one.rank for one in self._seen if one.beat or store.check([f"status{one.rank}"])]
        published = store.multi_get([f"status{rank}" for rank in present])
        fresh = {rank: Status(**json.loads(words)) for rank, words in zip(present, published, strict=True)}
        seen = []
        for old in self._seen:
            new = fresh.get(old.rank, old)
            silent = 0.0 if new.beat > old.beat else old.silent + passed
            seen.append(replace(new, silent=silent, gone=old.rank in gone and not new.ended))
        return seen

    def _obey(self, found: str | bytes) -> NoReturn:
        verdict = json.loads(found)
        seen, culprits = [Status(**one) for one in verdict["seen"]], verdict["culprits"]
        silenced = [one for one in seen if one.gone or one.silent > self._limits["dead_seconds"]]
        here = [one.rank for one in seen if one.place == self._me.place and one not in silenced and not one.ended]
        text = f"the run cannot go on: {verdict['reason']}"
        if self._me.rank == min(here, default=self._me.rank):  # one a node has the whole story
            text += f"\n{table(seen, culprits)}\n" + "\n".join(self._last_items(seen))
        self._tell(text)
        for one in silenced:
            process = _process(one) if one.place == self._me.place else None
            if process:  # it is stopped, or hangs where it cannot see the verdict
                with suppress(psutil.Error):
                    process.kill()
        os._exit(1)

    def _last_items(self, seen: Sequence[Status]) -> Iterator[str]:
        for one in seen:
            last = json.loads(self._store.get(f"last{one.rank}")) if self._store and one.beat else self._last
            yield f"last items of rank {one.rank}: {'; '.join(last) or 'none'}"

    def _tell(self, text: str) -> None:
        """Print the text and what this rank is at, and give the others the time to hear of it too."""
        self._told = True
        me = f"rank {self._me.rank}"
        text = f"{me}: {text}\n{me} is in {_where(self._me)} for {self._me.seconds:.0f} s"
        if not self._error:  # which has been printed with its own stack
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            text += ", its main thread:\n" + "".join(traceback.format_stack(frame)).rstrip()
        print(text, file=sys.stderr, flush=True)
        # the main thread may hold the lock of stdout
        threading.Thread(target=sys.stdout.flush, daemon=True).start()
        time.sleep(BEATS_OF_DOUBT * self._limits["beat_seconds"])


def _place() -> str:
    # host names and process numbers repeat among containers; a kernel's boot and a process namespace do not
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return str(uuid.getnode())


def _process(one: Status) -> psutil.Process | None:
    """Its process, of this place; None if that has ended, even if nobody has collected it."""
    with suppress(psutil.Error):
        process = psutil.Process(one.pid)
        # another may have got the number; the clock may have been set since
        same = abs(process.create_time() - one.born) < 60
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
