"""A rehearsal: the processes, messages and meetings of a run, whose items only take their time.

So it shows what overlaps where ranks share too few cores to compute side by side, and it tests the simulator: both run
one schedule with one cost, and differ by what a simulation leaves out: messages, the loop, and other work of the host.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rto_megatron.distributed.collectives import barrier, gather_objects, meetings
from rto_megatron.distributed.runtime import rank
from rto_megatron.schedule.links import connect
from rto_megatron.schedule.loop import Disturbance, Loop, Outcome
from rto_megatron.schedule.placement import RoleMap
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.simulate import Cost, Responses, simulate
from rto_megatron.schedule.trace import Row, meet, of_leaders
from rto_megatron.schedule.work import Item, Sizes
from rto_megatron.schedule.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Play:
    """A run that can be rehearsed and simulated."""

    placement: RoleMap
    sizes: Sizes
    workload: Workload
    cost: Cost
    """Seconds of each item."""
    staleness: int = 0
    early: bool = False

    def begin(self) -> tuple[Schedule, Responses]:
        """Nothing of it has happened."""
        return self.workload.begin(self.sizes, self.placement, staleness=self.staleness, early=self.early)

    def simulate(
        self,
        cost: Cost | None = None,
        *,
        latency: float = 0.0,
        scored_by: Mapping[tuple[int, int, int], int] | None = None,
    ) -> list[Row]:
        """What the simulator says, if it thinks that the items have another cost."""
        return simulate(*self.begin(), cost or self.cost, latency=latency, scored_by=scored_by)


def rehearse(play: Play, groups: Sequence[Sequence[int]]) -> list[Row]:
    """Run it on the ranks of this world, whose clocks must be one machine's; a row an item and group, on every rank.

    Args:
        groups: ranks of each group of the play's placement; the first leads.
    """
    actor = Actor(play, groups, meetings(_who_meet(play, groups)))
    links, rows = connect(rank(), groups, gather_objects), []
    leads = any(ranks[0] == rank() for ranks in groups)
    loop = Loop(groups, links, actor, write=rows.append, watch=_unwatched, disturb=_no_delay)
    schedule, _ = play.begin()
    barrier()
    loop.run(schedule if leads else None)
    told = gather_objects(rows)
    links.close()
    return of_leaders(meet(row for own in told for row in own))


class Actor:
    """What a rank does with items: the `Work` of a rehearsal.

    A host that is busy, or stopped for a moment as virtual machines are, wakes it late. That is no part of the play:
    it takes as much less for its next item, unless it has to wait for it anyway.
    """

    def __init__(
        self, play: Play, groups: Sequence[Sequence[int]], meeting: Callable[[tuple[int, ...], float], float]
    ) -> None:
        """`meeting`: (ranks, when this one came) -> when the last of them came; all of them call."""
        self._cost, self._groups, self._meeting = play.cost, groups, meeting
        _, self._responses = play.begin()
        self._ended = self._late = 0.0

    def run(self, item: Item) -> Outcome:
        """Wait for whoever takes part, then for as long as it costs."""
        came, ranks = time.perf_counter(), _ranks(item, self._groups)
        begun = came - max(0.0, self._late - (came - self._ended))
        writes = item.kind in ("prefill", "decode")
        ended, load = self._responses.write(item) if writes else ({}, self._responses.load(item))
        seconds = max(self._cost(item, load, group) for group in item.groups)
        if len(ranks) > 1:
            begun = self._meeting(ranks, begun)
        time.sleep(max(0.0, begun + seconds - time.perf_counter()))
        self._ended = time.perf_counter()
        self._late = self._ended - (begun + seconds)
        return Outcome(lengths=ended, load=load)

    def take(self, found: Any) -> None:
        """Nothing is found."""

    def readers(self, item: Item) -> Iterable[int]:
        """Nobody."""
        return ()


def _ranks(item: Item, groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted(member for group in item.groups for member in groups[group]))


def _who_meet(play: Play, groups: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    """The sets of ranks that do an item together: those of one step, since all steps have the same."""
    found: set[tuple[int, ...]] = set()

    def note(item: Item, load: object, group: int) -> float:
        found.add(_ranks(item, groups))
        return 0.0

    replace(play, sizes=replace(play.sizes, num_steps=1)).simulate(note)
    return {ranks for ranks in found if len(ranks) > 1}


@contextmanager
def _unwatched(item: Item | None, queues: str) -> Iterator[None]:
    yield


_no_delay = Disturbance(0.0, random.Random(0))
