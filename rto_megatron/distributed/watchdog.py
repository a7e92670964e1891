"""A hang is a report: when a rank is dead or stuck, all of them say what they are doing, and stop.

    watchdog = Watchdog(rank=rank(), world=world_size())     # right after start_runtime, inside listening_for_stop
    with watchdog.watching():
        watchdog.enter("train", "minibatch 3", seconds=2.5)
        ...
        watchdog.leave()

The main thread only sets attributes. A thread publishes them each beat to the store of the ranks, over a connection of
its own: a call that waits on a shared one would hold up all others. Two ranks of each node read what all have published
and `judge` it: two, because the one that should find out may be the one that died. The first verdict stands; every rank
sees it within a beat, says so, and ends with exit code 1; one a node prints the whole story. torchrun sends SIGTERM to
the others once one rank has ended: a rank that does not listen for it dies without a word.

A UserError is no hang. The rank that raises it makes it the verdict, unless all others raise one too: they end as it
does, with exit code 2, and one a node prints its message.

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
from typing import Any, NoReturn

import psutil
from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from rto_megatron.distributed.runtime import is_main_of_node
from rto_megatron.distributed.verdict import BEATS_OF_DOUBT, BETWEEN, Status, Verdict, judge, report, to_user, where
from rto_megatron.errors import USER_ERROR, StoppedToContinue, UserError

NUM_LAST_ITEMS = 12
STUCK_FACTOR = 5.0
"""An item is stuck after this many times its predicted seconds."""
LAST_ONE_SECONDS = 10.0
"""How long rank 0, which may hold the store, waits at a good end for the others to have ended as well."""
BEATS_FOR_THE_SAME = 2
"""How long a rank that raises a UserError waits for the others to raise theirs."""


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
        self._last: tuple[tuple[str, float], ...] = ()
        self._error: BaseException | None = None
        self._ended, self._wake = False, threading.Event()
        self._looked = time.monotonic()
        self._store: Store | None = None
        if world > 1:
            shared = PrefixStore(f"watchdog{next(_numbers)}", store or _get_default_store())
            self._store = shared.clone()  # type: ignore[reportAttributeAccessIssue]  # torch 2.8 and later
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        if world > 1:
            threading.Thread(target=self._look_after_itself, name="watchdog alone", daemon=True).start()

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
            words, took = f"{done.phase} {done.item}", time.monotonic() - done.since
            if self._last and self._last[-1][0] == words:  # a wait that was interrupted
                self._last = (*self._last[:-1], (words, self._last[-1][1] + took))
            else:
                self._last = (*self._last[1 - NUM_LAST_ITEMS :], (words, took))
            self._item = _Item(BETWEEN, f"after {done.phase} {done.item}", queues=done.queues)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stop the watchdog at the end; an error inside may be another rank's fault, see `fail`.

        What the user did wrong, and a stop on request, pass as they are: `__main__` has the words and the exit code.
        The ranks that wait for one with a UserError are told of it before.
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
        """Wait until the ranks agree whose fault it is, print the report, and exit with 1."""
        self._error = error
        self._wake.set()
        self._thread.join(2 * self._limits["dead_seconds"])  # which ends the process, unless no monitor is left
        self._tell("no verdict on the error above", is_culprit=True)
        os._exit(1)

    def stop(self, error: BaseException | None = None) -> None:
        """End the watch; with the error for which this rank leaves the others, if it does."""
        self._error = error
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
                self._tell(f"the store of the ranks is gone, with its process: {_in_a_line(error)}{self._known()}")
                os._exit(1)

    def _look_after_itself(self) -> None:
        """Where the store does not answer, as when its machine has lost power, a rank that is stuck ends by itself."""
        quiet, before, looked = 0.0, (0, self._item), time.monotonic()
        while not self._ended:
            time.sleep(self._limits["beat_seconds"])
            now, state = time.monotonic(), (self._me.beat, self._item)
            passed = min(now - looked, BEATS_OF_DOUBT * self._limits["beat_seconds"])
            quiet = quiet + passed if state == before and self._item.phase != "start" else 0.0
            before, looked = state, now
            limit = max(self._limits["dead_seconds"], self._item.deadline or self._limits["floor_seconds"])
            if quiet > limit:
                self._me = replace(self._me, seconds=self._me.seconds + quiet)  # since it was last published
                said = f"the store of the ranks does not answer, and nothing has changed for {quiet:.0f} s"
                self._tell(said + self._known(), is_culprit=True)
                os._exit(1)

    def _say_goodbye(self) -> None:
        if self._store and isinstance(self._error, UserError):
            self._share(self._error, self._store)
        elif self._store:
            self._store.add("ended", 1)
            if self._me.rank == 0 and not self._error:
                self._all_end(self._store, within=LAST_ONE_SECONDS)

    def _share(self, error: UserError, store: Store) -> None:
        """End the ranks that do not raise a UserError themselves, as all do whose config is wrong."""
        beat, rank = self._limits["beat_seconds"], self._me.rank
        # `__main__` prints the message of a node's first rank
        if is_main_of_node() and not self._is_first_to_tell(store):
            os._exit(USER_ERROR)
        store.add("ended", 1)
        if not self._all_end(store, within=BEATS_FOR_THE_SAME * beat):
            found = json.dumps(asdict(Verdict((rank,), str(error), is_for_user=True)))
            store.compare_set("verdict", "", found)
            self._all_end(store, within=2 * BEATS_OF_DOUBT * beat)
        if not is_main_of_node() and self._is_first_to_tell(store):  # the first rank had ended before
            self._write(to_user(str(error), rank=rank))

    def _end_with_user_error(self, verdict: dict[str, Any], store: Store) -> NoReturn:
        with suppress(DistError):  # the process that holds the store has ended by now
            if self._is_first_to_tell(store):
                self._write(to_user(verdict["reason"], rank=verdict["culprits"][0]))
            store.add("ended", 1)
            self._all_end(store, within=BEATS_OF_DOUBT * self._limits["beat_seconds"])
        time.sleep(self._limits["beat_seconds"])  # the rank with the error leaves first: it may have the words to print
        os._exit(USER_ERROR)

    def _is_first_to_tell(self, store: Store) -> bool:
        return store.add(f"told {self._me.place}", 1) == 1

    def _all_end(self, store: Store, *, within: float) -> bool:
        """Wait for it, at most so many seconds."""
        deadline = time.monotonic() + within
        while not (done := store.add("ended", 0) >= self._world) and time.monotonic() < deadline:
            time.sleep(self._limits["beat_seconds"] / 10)
        return done

    def _look(self) -> None:
        now, most = time.monotonic(), BEATS_OF_DOUBT * self._limits["beat_seconds"]
        passed = min(now - self._looked, most)  # if more, the job was suspended, or this machine is overloaded
        self._looked = now
        self._me = self._status(now, passed)
        if self._store:
            # in this order: who sees a status also finds the last items
            self._store.set(f"last{self._me.rank}", json.dumps(self._last_items()))
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
        me, item, error = self._me, self._item, _in_a_line(self._error) if self._error else ""
        at, in_collective = _position(self._error)
        seconds = me.seconds + passed if item is self._published else min(passed, max(0.0, now - item.since))
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
            at=at,
            in_collective=in_collective,
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
        if self._store and verdict["is_for_user"]:
            self._end_with_user_error(verdict, self._store)
        seen, culprits = [Status(**one) for one in verdict["seen"]], verdict["culprits"]
        silenced = [one for one in seen if one.gone or one.silent > self._limits["dead_seconds"]]
        here = [one.rank for one in seen if one.place == self._me.place and one not in silenced and not one.ended]
        text = f"the run cannot go on: {verdict['reason']}"
        if self._me.rank == min(here, default=self._me.rank):  # one a node has the whole story
            text += f"\n{report(seen, culprits, {one.rank: self._last_items_of(one) for one in seen})}"
        self._tell(text, is_culprit=self._me.rank in culprits)
        for one in silenced:
            process = _process(one) if one.place == self._me.place else None
            if process:  # it is stopped, or hangs where it cannot see the verdict
                with suppress(psutil.Error):
                    process.kill()
        os._exit(1)

    def _known(self) -> str:
        """What was known when the store last answered."""
        return f"\n{report(self._seen, (), {self._me.rank: self._last_items()})}" if self._is_monitor else ""

    def _last_items(self) -> list[str]:
        return [f"{words} {took:.2f}s" for words, took in self._last]

    def _last_items_of(self, one: Status) -> list[str]:
        return json.loads(self._store.get(f"last{one.rank}")) if self._store and one.beat else self._last_items()

    def _tell(self, text: str, *, is_culprit: bool = False) -> None:
        """Print the text and what this rank is at, and give the others the time to hear of it too."""
        me = f"rank {self._me.rank}"
        text = f"{me}: {text}\n{me} is in {where(self._me)} for {self._me.seconds:.0f} s, at {self._me.at}"
        if self._error:  # of another rank's end; or that rank's own
            stack = traceback.format_exception(self._error)
            text = f"{''.join(stack)}{text}" if is_culprit else f"{text}, with {_in_a_line(self._error)}"
        elif is_culprit:
            stack = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
            kept = [frame for frame in stack if _is_ours(frame.filename) or frame in stack[-3:]]
            text += "; its main thread:\n" + "".join(traceback.format_list(kept)).rstrip()
        self._write(text)
        time.sleep(BEATS_OF_DOUBT * self._limits["beat_seconds"])

    def _write(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")  # at once: the others write theirs
        sys.stderr.flush()
        # the main thread may hold the lock of stdout
        threading.Thread(target=sys.stdout.flush, daemon=True).start()


def _position(error: BaseException | None) -> tuple[str, bool]:
    """The lines of ours that the main thread executes, or that raised; and whether they are inside a collective."""
    if error:
        stack = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    else:
        top = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = [(frame.f_code, line) for frame, line in traceback.walk_stack(top)]
    ours = [(code, line) for code, line in stack if _is_ours(code.co_filename)][:2]
    in_collective = any(code.co_filename.endswith("/distributed_c10d.py") for code, _ in stack)
    lines = [f"{Path(code.co_filename).name}:{line} {code.co_name}" for code, line in ours or stack[:1]]
    return " > ".join(reversed(lines)), in_collective


def _is_ours(path: str) -> bool:
    package = str(Path(__file__).parents[1])
    return path.startswith(package) or not ("/site-packages/" in path or path.startswith(("<", sys.base_prefix)))


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
