"""Steps that have not been run: prompts, lengths of responses and minibatches drawn from a seed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rto_megatron.schedule.placement import RoleMap
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.simulate import Cost, Responses, simulate
from rto_megatron.schedule.trace import Row
from rto_megatron.schedule.work import Sizes, StepInput

SIGMA = 0.7
"""Of the logarithm of lengths."""
CAP = 2.3
"""The window, in means of the lengths before they are cut at it; 2.5 means of those after."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Responses with lognormal lengths, cut at the window: 5 % fill it where no mean is given."""

    prompt_tokens: int
    """Of every prompt."""
    max_new_tokens: int
    """The window: longer responses are cut there."""
    mean_tokens: float | None = None
    """Of responses before they are cut; null makes it 1 / 2.3 of the window."""
    long_last: float = 0.0
    """Share of a step's responses, the longest, that come last, so that the last lanes write them."""
    epochs: int = 1
    seed: int = 0

    def lengths(self, step: int, num: int) -> list[int]:
        """Tokens of each response of a step."""
        mean = self.mean_tokens or self.max_new_tokens / CAP
        rng, middle = random.Random(f"lengths/{self.seed}/{step}"), math.log(mean) - SIGMA**2 / 2
        drawn = (round(rng.lognormvariate(middle, SIGMA)) for _ in range(num))
        lengths = [min(max(1, length), self.max_new_tokens) for length in drawn]
        longest = set(sorted(range(num), key=lambda row: lengths[row])[num - round(self.long_last * num) :])
        return [lengths[row] for row in sorted(range(num), key=lambda row: row in longest)]

    def known(self, step: int, sizes: Sizes) -> StepInput:
        """What the schedule may know beforehand."""
        minibatches: list[list[int]] = []
        for epoch in range(self.epochs):
            order = list(range(sizes.samples))
            random.Random(f"minibatches/{self.seed}/{step}/{epoch}").shuffle(order)
            minibatches += [order[i : i + sizes.minibatch] for i in range(0, sizes.samples, sizes.minibatch)]
        return StepInput([self.prompt_tokens] * sizes.samples, minibatches)

    def begin(
        self, sizes: Sizes, placement: RoleMap, *, staleness: int = 0, early: bool = False
    ) -> tuple[Schedule, Responses]:
        """A run of it on a role map, of which nothing has happened; the arguments are those of `Schedule`."""
        known = [self.known(step, sizes) for step in range(sizes.num_steps)]
        lengths = [self.lengths(step, sizes.samples) for step in range(sizes.num_steps)]
        schedule = Schedule(placement, sizes, known.__getitem__, staleness=staleness, early=early)
        return schedule, Responses(lambda step: known[step].prompt_tokens, lengths.__getitem__)

    def run(
        self,
        cost: Cost,
        sizes: Sizes,
        placement: RoleMap,
        *,
        staleness: int = 0,
        early: bool = False,
        latency: float = 0.0,
    ) -> list[Row]:
        """Simulate it; the arguments are those of `Schedule` and `simulate`."""
        schedule, responses = self.begin(sizes, placement, staleness=staleness, early=early)
        return simulate(schedule, responses, cost, latency=latency)


def padding(workload: Workload, num: int, *, rows: int) -> float:
    """Tokens that are computed for each one that counts, where microbatches of so many samples are padded."""
    totals = [workload.prompt_tokens + length for length in workload.lengths(0, num)]
    micros = [totals[at : at + rows] for at in range(0, num, rows)]
    return sum(len(micro) * max(micro) for micro in micros) / sum(totals)


def seconds_per_step(rows: Sequence[Row], *, staleness: int = 0) -> float:
    """From the end of one step's training to that of a later one: what a step takes once all is under way."""
    begin, end, num_steps = _under_way(rows, staleness)
    return (end - begin) / num_steps


def steady(rows: Sequence[Row], *, staleness: int = 0) -> tuple[list[Row], int]:
    """What ran in the time that `seconds_per_step` measures, cut at both of its ends, and its number of steps."""
    begin, end, num_steps = _under_way(rows, staleness)
    inside = [row for row in rows if row.start < end and row.end > begin]
    return [replace(row, start=max(begin, row.start), end=min(end, row.end)) for row in inside], num_steps


def _under_way(rows: Sequence[Row], staleness: int) -> tuple[float, float, int]:
    """Ends of the training of two steps. With staleness one more is left out at either end: there the responses of the
    next step are not yet being written, or no longer."""
    ends: dict[int, float] = {}
    for row in rows:
        if row.kind == "optimizer":
            ends[row.step] = max(row.end, ends.get(row.step, 0.0))
    if len(ends) < 2 + 2 * staleness:
        raise ValueError(f"a rate needs {2 + 2 * staleness} steps or more, got {len(ends)}")
    first, last = min(ends) + staleness, max(ends) - staleness
    return ends[first], ends[last], last - first
