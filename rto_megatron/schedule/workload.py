"""Steps that have not been run: prompts, lengths of responses and minibatches drawn from a seed."""

import math
import random
from dataclasses import dataclass

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
    """Responses with lognormal lengths, cut at the window: 5 % fill it."""

    prompt_tokens: int
    """Of every prompt."""
    max_new_tokens: int
    epochs: int = 1
    seed: int = 0

    def lengths(self, step: int, num: int) -> list[int]:
        """Tokens of each response of a step."""
        rng, middle = random.Random(f"lengths/{self.seed}/{step}"), math.log(self.max_new_tokens / CAP) - SIGMA**2 / 2
        drawn = (round(rng.lognormvariate(middle, SIGMA)) for _ in range(num))
        return [min(max(1, length), self.max_new_tokens) for length in drawn]

    def known(self, step: int, sizes: Sizes) -> StepInput:
        """What the schedule may know beforehand."""
        minibatches: list[list[int]] = []
        for epoch in range(self.epochs):
            order = list(range(sizes.samples))
            random.Random(f"minibatches/{self.seed}/{step}/{epoch}").shuffle(order)
            minibatches += [order[i : i + sizes.minibatch] for i in range(0, sizes.samples, sizes.minibatch)]
        return StepInput([self.prompt_tokens] * sizes.samples, minibatches)

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
        """Simulate it on a role map; the arguments are those of `Schedule` and `simulate`."""
        known = [self.known(step, sizes) for step in range(sizes.num_steps)]
        lengths = [self.lengths(step, sizes.samples) for step in range(sizes.num_steps)]
        schedule = Schedule(placement, sizes, known.__getitem__, staleness=staleness, early=early)
        return simulate(
            schedule, Responses(lambda step: known[step].prompt_tokens, lengths.__getitem__), cost, latency=latency
        )


def seconds_per_step(rows: list[Row]) -> float:
    """From the end of the first step's training to that of the last: what a step takes once all is under way."""
    ends: dict[int, float] = {}
    for row in rows:
        if row.kind == "optimizer":
            ends[row.step] = max(row.end, ends.get(row.step, 0.0))
    if len(ends) < 2:
        raise ValueError(f"a rate needs two steps or more, got {len(ends)}")
    return (ends[max(ends)] - ends[min(ends)]) / (len(ends) - 1)
