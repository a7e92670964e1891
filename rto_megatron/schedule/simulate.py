"""Run a schedule without running its items: each takes the seconds that a cost says.

The schedule is the object that the trainer asks (`policy.py`); only "run the item" is replaced, so a simulated run
makes the decisions of a real one.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.trace import Load, Row
from rto_megatron.schedule.work import Item

Cost = Callable[[Item, Load, int], float]
"""(item, how much there is to do, group) -> seconds."""


class Responses:
    """The lengths that responses will turn out to have, and how far they are written."""

    def __init__(self, prompt_tokens: Callable[[int], Sequence[int]], lengths: Callable[[int], Sequence[int]]) -> None:
        """Both by step: tokens of each sample's prompt, and of its response."""
        self._prompt_tokens, self._lengths = prompt_tokens, lengths
        self._written: dict[tuple[int, int], int] = {}

    def write(self, item: Item) -> tuple[dict[int, int], Load]:
        """Do what a prefill or decode item says: lengths of the responses that ended, and the work that it was."""
        prompts, lengths, ended = self._prompt_tokens(item.step), self._lengths(item.step), {}
        load = Load([prompts[sample] for sample in item.samples]) if item.kind == "prefill" else Load()
        for sample in item.samples:
            before = self._written.get((item.step, sample), 0)
            taken = min(item.num_steps, lengths[sample] - before)
            self._written[item.step, sample] = before + taken
            if item.kind == "decode":
                load.tokens += taken
                load.num_steps = max(load.num_steps, taken)
                load.context += taken * (prompts[sample] + before) + taken * (taken + 1) // 2
            if before + taken == lengths[sample]:
                ended[sample] = lengths[sample]
                del self._written[item.step, sample]
        load.samples = len(item.samples)
        return ended, load

    def load(self, item: Item) -> Load:
        """The work of any other item."""
        prompts, lengths = self._prompt_tokens(item.step), self._lengths(item.step)
        # which packs are whose is known once they are closed; on average it is a share
        mine = item.samples[:: len(item.groups)] if item.kind == "proximal" else item.samples
        return Load([prompts[sample] + lengths[sample] for sample in mine])


def simulate(
    schedule: Schedule,
    responses: Responses,
    cost: Cost,
    *,
    latency: float = 0.0,
    scored_by: Mapping[tuple[int, int, int], int] | None = None,
) -> list[Row]:
    """Run it to its end.

    Args:
        latency: seconds from the end of an item until its group, or another, may act on it.
        scored_by: who scored each pack in a trace that is replayed (`scorers_of`); None leaves it to the schedule.

    Returns:
        A row an item and group, in the order in which they ended.
    """
    if scored_by is not None:
        schedule.follow(scored_by)
    rows: list[Row] = []
    events: list[tuple[float, int, Item, tuple[int, ...], dict[int, int]]] = []
    arrived: dict[tuple, set[int]] = {}
    idle, order, now = set(schedule.placement.groups), count(), 0.0
    while not schedule.finished:
        for group in sorted(idle):
            while (item := schedule.next(group)) is not None and item.kind == "give":
                schedule.done(group, item)
            if item is None:
                continue
            idle.remove(group)
            waiting = arrived.setdefault((item.key, item.groups), set())
            waiting.add(group)
            if len(waiting) < len(item.groups):
                continue  # the last to come starts it
            del arrived[item.key, item.groups]
            writes = item.kind in ("prefill", "decode")
            ended, load = responses.write(item) if writes else ({}, responses.load(item))
            seconds = [cost(item, load, member) for member in item.groups]
            end = now + max(seconds)
            rows += [Row.of(item, load, group=member, start=now, end=end) for member in item.groups]
            heapq.heappush(events, (end + latency, next(order), item, item.groups, ended))
        if not events:
            raise AssertionError(
                f"groups {sorted(idle)} have nothing to run and nothing is running: a bug of the schedule"
            )
        now, _, item, groups, ended = heapq.heappop(events)
        for group in groups:
            schedule.done(group, item, ended)
            idle.add(group)
    return sorted(rows, key=lambda row: (row.end, row.start, row.group))


def replay(rows: Sequence[Row]) -> Cost:
    """The cost that each item had in a trace; a pack has it whoever scores it here."""
    seconds = {row.key: row.seconds for row in rows}
    packs = {row.key[1:]: row.seconds for row in rows if row.kind == "score"}

    def cost(item: Item, load: Load, group: int) -> float:
        return packs[item.key] if item.kind == "score" else seconds[(group, *item.key)]

    return cost


def scorers_of(rows: Sequence[Row]) -> dict[tuple[int, int, int], int]:
    """Step, lane and number of each pack of a trace -> the group that scored it.

    Which of two groups came free first may hang on less time than a replay knows of: so that much is taken from the
    trace.
    """
    return {(row.step, row.lane, row.number): row.group for row in rows if row.kind == "score"}
