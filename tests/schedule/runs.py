"""Random runs of a schedule: any map, any sizes that fit, any lengths, any durations."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from hypothesis import settings
from hypothesis import strategies as st

from rto_megatron.schedule.placement import RoleMap, colocated, fused, split
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.simulate import Responses, simulate
from rto_megatron.schedule.trace import Row
from rto_megatron.schedule.work import Item, Sizes, StepInput

many = settings(max_examples=120, deadline=None, derandomize=True, database=None)


@lru_cache(maxsize=64)
def numbers(key: str, count: int, draw: Callable[[random.Random], int]) -> list[int]:
    rng = random.Random(key)
    return [draw(rng) for _ in range(count)]


def a_length(rng: random.Random) -> int:
    """Mostly short, some very long."""
    return 1 + int(rng.paretovariate(1)) % 60


def a_prompt(rng: random.Random) -> int:
    return rng.randint(1, 9)


@dataclass(frozen=True)
class Case:
    """A run that has not been timed yet."""

    placement: RoleMap
    sizes: Sizes
    staleness: int
    early: bool
    epochs: int
    seed: int
    """Of prompts, lengths and minibatches."""

    def prompts(self, step: int) -> list[int]:
        return numbers(f"prompts/{self.seed}/{step}", self.sizes.samples, a_prompt)

    def lengths(self, step: int) -> list[int]:
        return numbers(f"lengths/{self.seed}/{step}", self.sizes.samples, a_length)

    def minibatches(self, step: int) -> list[list[int]]:
        found: list[list[int]] = []
        for epoch in range(self.epochs):
            order = list(range(self.sizes.samples))
            random.Random(f"order/{self.seed}/{step}/{epoch}").shuffle(order)
            size = self.sizes.minibatch
            found += [order[first : first + size] for first in range(0, len(order), size)]
        return found

    def schedule(self, kind: type[Schedule] = Schedule, **more) -> Schedule:
        return kind(
            self.placement,
            self.sizes,
            lambda step: StepInput(self.prompts(step), self.minibatches(step)),
            staleness=self.staleness,
            early=self.early,
            **more,
        )


@dataclass(frozen=True)
class Run:
    """What ran, and when."""

    case: Case
    ran: list[tuple[Row, Item]]

    @cached_property
    def by_kind(self) -> dict[str, list[tuple[Row, Item]]]:
        found: dict[str, list[tuple[Row, Item]]] = {}
        for row, item in self.ran:
            found.setdefault(item.kind, []).append((row, item))
        return found

    def of(self, kind: str, **wanted: object) -> list[tuple[Row, Item]]:
        return [
            (row, item)
            for row, item in self.by_kind.get(kind, ())
            if all(getattr(item, name) == value for name, value in wanted.items())
        ]

    def ends(self) -> dict[tuple[int, int], float]:
        """(step, sample) -> when its last token was written."""
        found: dict[tuple[int, int], float] = {}
        for row, item in self.of("prefill") + self.of("decode"):
            for sample in item.samples:
                found[item.step, sample] = max(row.end, found.get((item.step, sample), 0.0))
        return found


def run(case: Case, *, timing: int | None = 0, latency: float = 0.0, **more) -> Run:
    """Time a case with random durations, some of them a thousand times the others; without `timing`, 1 each.

    None is 0, so that what begins when another ends is known to come after it.
    """
    rng, items = random.Random(f"timing/{timing}"), {}

    def cost(item: Item, load: object, group: int) -> float:
        items[group, *item.key] = item
        return 1.0 if timing is None else rng.uniform(0.1, 1) * rng.choice([0.01, 0.1, 1.0, 10.0])

    rows = simulate(case.schedule(**more), Responses(case.prompts, case.lengths), cost, latency=latency)
    return Run(case, [(row, items[row.group, row.kind, row.step, row.lane, row.number, row.role]) for row in rows])


@st.composite
def cases(draw, **fixed) -> Case:
    name = draw(st.sampled_from(["colocated", "fused", "split", "split"]))
    critic = draw(st.sampled_from([True, True, False]))
    if name == "split":
        num_critic = draw(st.integers(0, 2)) if critic else 0
        score = draw(st.sampled_from(["train", "rollout", "all"]))
        placement = split(draw(st.integers(1, 3)), draw(st.integers(1, 3)), num_critic, critic=critic, score=score)
    else:
        placement = {"colocated": colocated, "fused": fused}[name](draw(st.integers(1, 4)), critic=critic)
    lanes = len(placement.engines) * draw(st.integers(1, 2))
    minibatch = draw(st.integers(4, 12))  # four groups train at most; shares need not be equal
    samples = minibatch * draw(st.integers(2, 4))
    sizes = Sizes(
        num_steps=draw(st.integers(1, 4)),
        samples=samples,
        minibatch=minibatch,
        lanes=lanes,
        slots=draw(st.integers(1, 12)),
        slice_steps=draw(st.integers(1, 20)),
        prefill_tokens=draw(st.integers(1, 60)),
        pack_tokens=draw(st.integers(1, 200)),
        pack_steps=draw(st.integers(1, 100)),
        waiting_packs=draw(st.integers(1, 3)),
    )
    settings = {
        "staleness": draw(st.integers(0, 1)) if name == "split" else 0,
        "early": draw(st.booleans()),
        "epochs": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 10**6)),
    }
    return Case(placement=placement, sizes=sizes, **(settings | fixed))
