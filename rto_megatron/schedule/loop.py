"""The event loop that runs a schedule: one a group, on its leader; the group's other ranks do what it says.

    leader                                                  member
        hear what other leaders have done                       wait for a command
        item = schedule.next(group)                             take what others found out
        tell the members, and what others found out             run the item
        run the item
        schedule.done(group, item), and tell the other leaders

All ranks of a group run the same items in the same order, and groups meet in shared items in one order, so collectives
cannot wait for each other. The trainer and a rehearsal (`emulate.py`) use this loop; only "run the item" differs.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rto_megatron.schedule.links import Links
from rto_megatron.schedule.order import Inbox
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.trace import Load, Row
from rto_megatron.schedule.work import Item

QUIET = ("advantage", "train", "proximal")
"""Kinds that nobody waits to hear of: what they are followed by is heard of."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an item."""

    lengths: Mapping[int, int] = field(default_factory=dict)
    """Tokens of each response that ended."""
    found: Any = None
    """What other groups need of it, for their `Work.take`; picklable."""
    load: Load = field(default_factory=Load)
    """How much it was."""


class Work(Protocol):
    """What a rank does with items."""

    def run(self, item: Item) -> Outcome:
        """Do this rank's part of it."""
        ...

    def take(self, found: Any) -> None:
        """Learn what another group has found."""
        ...

    def readers(self, item: Item) -> Iterable[int]:
        """The groups that need what is found in it."""
        ...


Watch = Callable[[Item | None, str], AbstractContextManager[None]]
"""(item or None for waiting, the queues in words) -> around what is done: so that a hang is noticed."""


@dataclass(frozen=True)
class Disturbance:
    """Random pauses: a schedule that depends on time would show it."""

    seconds: float
    rng: random.Random

    def __call__(self) -> None:
        if self.seconds:
            time.sleep(self.seconds * self.rng.random() ** 4)  # mostly short, a few long


@dataclass(frozen=True, kw_only=True)
class _Note:
    """In a letter: items that were done, and what was found in them for this reader."""

    done: tuple[tuple[Item, Mapping[int, int]], ...]
    found: tuple[Any, ...]


class Loop:
    """One rank's part in running a schedule."""

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        links: Links,
        work: Work,
        *,
        write: Callable[[Row], None],
        watch: Watch,
        disturb: Disturbance,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin.

        Args:
            groups: ranks of each group of the schedule's placement; the first leads.
            write: takes the trace row of each item that this rank ran.
            clock: seconds, on one scale for all ranks.
        """
        self._groups, self._links, self._work = groups, links, work
        self._write, self._watch, self._disturb, self._clock = write, watch, disturb, clock
        self._group = next(number for number, ranks in enumerate(groups) if links.rank in ranks)
        self._members = tuple(groups[self._group][1:])

    def run(self, schedule: Schedule | None) -> None:
        """To the end: the leader of a group brings its schedule, others None."""
        if schedule is None:
            self._follow()
        else:
            self._lead(schedule)

    # A leader.

    def _lead(self, schedule: Schedule) -> None:
        self._inbox = Inbox(self._group, len(self._groups))
        self._unsent: list[tuple[Item, Mapping[int, int]]] = []
        self._findings: dict[int, list[Any]] = {group: [] for group in range(len(self._groups))}
        for_members: list[Any] = []
        while True:
            for_members += self._hear(schedule, block=False)
            item = schedule.next(self._group)
            if item is None:
                self._tell()
                if schedule.finished:
                    break
                with self._watch(None, schedule.describe()):
                    for_members += self._hear(schedule, block=True)
                continue
            if item.kind == "give":  # a decision, and nothing to do
                schedule.done(self._group, item)
                self._unsent.append((item, {}))
                self._tell()
                continue
            for member in self._members:
                self._links.send(member, (item, tuple(for_members)))
            for_members.clear()
            outcome = self._run(item, schedule.describe)
            schedule.done(self._group, item, outcome.lengths)
            self._note(item, outcome)
            # who fills minibatches in the order of ending must know of every clock, else of what has ended
            if item.kind not in QUIET and (item.kind != "decode" or outcome.lengths or schedule.early):
                self._tell()
        for member in self._members:
            self._links.send(member, (None, ()))

    def _hear(self, schedule: Schedule, *, block: bool) -> list[Any]:
        """Read letters, at least one if it is to wait; what was found in the items that they tell of."""
        found: list[Any] = []
        while (message := self._links.receive(block=block)) is not None:
            block = False
            for letter in self._inbox.arrive(message[1]):
                for item, lengths in letter.content.done:
                    schedule.done(letter.sender, item, lengths)
                for finding in letter.content.found:
                    self._work.take(finding)
                    found.append(finding)
        return found

    def _note(self, item: Item, outcome: Outcome) -> None:
        """Remember to tell of an item."""
        self._unsent.append((item, outcome.lengths))
        if outcome.found is not None:
            for group in self._work.readers(item):
                self._findings[group].append(outcome.found)

    def _tell(self) -> None:
        """One letter to every other leader, of all that was done since the last."""
        if not self._unsent:
            return
        letter = self._inbox.letter(tuple(self._unsent))
        for group, ranks in enumerate(self._groups):
            if group != self._group:
                note = _Note(done=letter.content, found=tuple(self._findings[group]))
                self._disturb()
                self._links.send(ranks[0], replace(letter, content=note))
            self._findings[group].clear()
        self._unsent.clear()

    # A member.

    def _follow(self) -> None:
        while True:
            with self._watch(None, "for its leader"):
                message = self._links.receive(block=True)
            assert message is not None
            item, found = message[1]
            if item is None:
                return
            for finding in found:
                self._work.take(finding)
            self._run(item, lambda: "")

    # Both.

    def _run(self, item: Item, queues: Callable[[], str]) -> Outcome:
        self._disturb()
        with self._watch(item, queues()):
            start = self._clock()
            outcome = self._work.run(item)
            end = self._clock()
        self._write(Row.of(item, outcome.load, group=self._group, rank=self._links.rank, start=start, end=end))
        return outcome
