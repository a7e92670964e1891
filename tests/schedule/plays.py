"""Runs to rehearse: four groups of a rank each, and items that take tens of milliseconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rto_megatron.schedule.emulate import Play, rehearse
from rto_megatron.schedule.placement import RoleMap
from rto_megatron.schedule.rooflines import GPUS, MODELS, Efficiency, Layout, Roofline
from rto_megatron.schedule.trace import Row
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload

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
