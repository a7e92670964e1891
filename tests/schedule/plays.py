"""Runs to rehearse, four groups of a rank each and items that take tens of milliseconds; and notes of real runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rto_megatron.schedule.emulate import Play, rehearse
from rto_megatron.schedule.placement import RoleMap
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.rooflines import GPUS, MODELS, Efficiency, Layout, Roofline
from rto_megatron.schedule.simulate import Cost, Responses, simulate
from rto_megatron.schedule.trace import Row
from rto_megatron.schedule.work import Sizes, StepInput
from rto_megatron.schedule.workload import Workload
from tests.stages.chain import run_stage

WORLD = 4


@dataclass(frozen=True)
class Faster:
    """A cost of which a run takes a part of the seconds."""

    cost: Roofline
    times: float

    def __call__(self, item: Any, load: Any, group: int) -> float:
        return self.cost(item, load, group) / self.times


@dataclass(frozen=True)
class Setting:
    """What a play does differently from others."""

    placement: RoleMap
    staleness: int = 0
    early: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    workload: Workload = field(default_factory=lambda: Workload(prompt_tokens=205, max_new_tokens=2048))
    times: float = 6.0

    def play(self) -> Play:
        layout = Layout(engine_ranks=8, train_ranks=8, engine_tensor=8, train_tensor=8)
        # Nothing to swap: a trace of one map cannot tell what groups with other roles do at a boundary.
        efficiency = Efficiency(swap_seconds=0.0)
        cost = Roofline(MODELS["llama3-8b"], GPUS["h100"], self.placement, layout, efficiency=efficiency)
        usual = {
            "num_steps": 2,
            "samples": 64,
            "minibatch": 16,
            "slots": 64,
            "slice_steps": 256,
            "pack_tokens": 1 << 14,
        }
        lanes = len(self.placement.engines) * -(-len(self.placement.policy) // len(self.placement.engines))
        return Play(
            placement=self.placement,
            sizes=Sizes(**({"lanes": lanes, "prefill_tokens": 1 << 20} | usual | self.sizes)),
            workload=self.workload,
            cost=Faster(cost, self.times),
            staleness=self.staleness,
            early=self.early,
        )


def rehearse_all(settings: Sequence[Setting]) -> list[list[Row]]:
    """One after the other, in this rank of `WORLD`."""
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    return [rehearse(setting.play(), [(rank,) for rank in range(WORLD)]) for setting in settings]


@dataclass
class Notes:
    """What a run's schedule was made of, for another one like it."""

    placement: RoleMap
    sizes: Sizes
    more: dict[str, Any]
    known: dict[int, StepInput] = field(default_factory=dict)
    lengths: dict[int, dict[int, int]] = field(default_factory=dict)
    """Step -> tokens of each response."""

    def simulate(self, cost: Cost, *, latency: float, scored_by: dict) -> list[Row]:
        """The same schedule, simulated."""
        schedule = Schedule(self.placement, self.sizes, self.known.__getitem__, **self.more)
        responses = Responses(lambda step: self.known[step].prompt_tokens, self.lengths.__getitem__)
        return simulate(schedule, responses, cost, latency=latency, scored_by=scored_by)


def train_with_notes(chain, settings: list[str]) -> Notes:
    """A whole run of the stage rto in this rank, which leads a group."""
    from rto_megatron.stages import interleaved

    made: list[Notes] = []

    class Noted(Schedule):
        def __init__(self, placement, sizes, inputs, **more):
            self.notes = Notes(placement, sizes, more)
            made.append(self.notes)

            def noted(step):
                return self.notes.known.setdefault(step, inputs(step))

            super().__init__(placement, sizes, noted, **more)

        def done(self, group, item, lengths=None):
            self.notes.lengths.setdefault(item.step, {}).update(lengths or {})
            super().done(group, item, lengths)

    interleaved.Schedule = Noted
    run_stage("rto", chain, settings)
    return made[0]
