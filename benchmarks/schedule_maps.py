"""Schedules of large runs in emulated time: each predicted by the simulator and measured on real processes.

    python -m benchmarks.schedule_maps

Costs are rooflines of 8 billion parameters on 64 H100 and of 70 billion on 512, divided so that a step takes a second.
Four groups, each one process that sleeps instead of computing: all do all, or two write and two score and train, on as
many GPUs as the simulator likes best. What is real are the decisions, processes, messages and meetings. Nothing here
was measured on a GPU. Results go to benchmarks/results/schedule_maps.json.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.machine import launch, machine, save
from rto_megatron.distributed.runtime import is_main, start_runtime
from rto_megatron.schedule.emulate import Play, rehearse
from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.placement import colocated, fused, split
from rto_megatron.schedule.rooflines import GPUS, MODELS, Layout, Roofline
from rto_megatron.schedule.simulate import Cost
from rto_megatron.schedule.trace import Load, Row, read_trace, summarise, write_trace
from rto_megatron.schedule.work import Item, Sizes
from rto_megatron.schedule.workload import Workload, seconds_per_step

GROUPS = 4
CASES = {
    # name: (model, GPUs, tensor ranks of training, its pipeline, GPUs that may write in a split, times faster)
    "8B on 64 H100": ("llama3-8b", 64, 2, 1, (16, 32, 48), 10.0),
    "70B on 512 H100": ("llama3-70b", 512, 8, 4, (64, 128, 192, 256, 320), 25.0),
}
MAPS = {
    # name: (placement, staleness, early)
    "sequential": (colocated(GROUPS), 0, False),
    "fused": (fused(GROUPS), 0, False),
    "split": (split(2, 2), 0, False),
    "split, early": (split(2, 2), 0, True),
    "split, staleness 1": (split(2, 2), 1, False),
    "split, staleness 1, early": (split(2, 2), 1, True),
}


@dataclass(frozen=True)
class Faster:
    """A cost of which a run takes a part of the seconds."""

    cost: Cost
    times: float

    def __call__(self, item: Item, load: Load, group: int) -> float:
        return self.cost(item, load, group) / self.times


def play(case: str, name: str, writing: int) -> Play:
    """A cell of the table, if so many GPUs write."""
    model, num_gpus, tensor, pipeline, _, times = CASES[case]
    placement, staleness, early = MAPS[name]
    layout = Layout(
        engine_ranks=writing // len(placement.engines),
        train_ranks=(num_gpus if placement.shares_weights else num_gpus - writing) // len(placement.policy),
        engine_tensor=8,
        train_tensor=tensor,
        pipeline=pipeline,
    )
    sizes = Sizes(
        num_steps=4, samples=1024, minibatch=128, lanes=GROUPS, slots=1024, slice_steps=128, prefill_tokens=1 << 20,
        pack_tokens=1 << 15,
    )  # fmt: skip
    return Play(
        placement=placement,
        sizes=sizes,
        workload=Workload(prompt_tokens=205, max_new_tokens=2048),
        cost=Faster(Roofline(MODELS[model], GPUS["h100"], placement, layout), times),
        staleness=staleness,
        early=early,
    )


def plays() -> dict[tuple[str, str], tuple[Play, int]]:
    """(case, map) -> its play, and how many GPUs write in it."""
    found: dict[tuple[str, str], tuple[Play, int]] = {}
    for case, (_, num_gpus, *_, pools, _) in CASES.items():
        for name, (placement, staleness, _) in MAPS.items():
            some = [(play(case, name, n), n) for n in ((num_gpus,) if placement.shares_weights else pools)]
            found[case, name] = min(some, key=lambda one: seconds_per_step(one[0].simulate(), staleness=staleness))
    return found


def main() -> None:
    """Measure all cells on one set of ranks, predict them, and print the table."""
    before, every = machine(), plays()
    with tempfile.TemporaryDirectory() as folder:
        launch(GROUPS, "-m", "benchmarks.schedule_maps", folder)
        measured = {cell: read_trace(Path(folder) / f"{number}.jsonl") for number, cell in enumerate(every)}
    # Of all cells together: it is the loop's and the host's, whatever the items cost.
    latency = Fitted([row for rows in measured.values() for row in rows]).latency
    cells = [compare(cell, *every[cell], rows, latency) for cell, rows in measured.items()]
    show(cells)
    print(f"from item to item {1e3 * latency:.2f} ms, measured; mean error {fmean(abs(c['error']) for c in cells):.2%}")
    save("schedule_maps", {"machine": before, "latency_seconds": latency, "cells": cells})


def be_rank(folder: Path) -> None:
    """Rehearse all cells, one after the other."""
    start_runtime(threads=1)
    for number, (each, _) in enumerate(plays().values()):
        rows = rehearse(each, [(member,) for member in range(GROUPS)])
        if is_main():
            write_trace(folder / f"{number}.jsonl", rows)


def compare(cell: tuple[str, str], each: Play, writing: int, measured: Sequence[Row], latency: float) -> dict[str, Any]:
    """Predicted and measured numbers of a cell."""
    case, name = cell
    predicted, times = each.simulate(latency=latency), CASES[case][-1]
    told, truth = summarise(predicted), summarise(measured)
    return {
        "case": case,
        "map": name,
        "gpus_that_write": writing,
        "predicted_makespan": told.makespan,
        "measured_makespan": truth.makespan,
        "error": told.makespan / truth.makespan - 1,
        "predicted_idle": told.idle_frac,
        "measured_idle": truth.idle_frac,
        "measured_overlap": truth.overlap,
        "modelled_seconds_per_step": times * seconds_per_step(each.simulate(), staleness=each.staleness),
    }


def show(cells: Sequence[dict[str, Any]]) -> None:
    """A line a cell."""
    print(f"{'':16}{'':28}{'GPUs that':>10}{'makespan, s':>23}{'':8}{'idle':>15}{'full size,':>16}")
    print(f"{'':44}{'write':>10}{'predicted':>12}{'measured':>11}{'error':>8}{'pred.':>8}{'meas.':>7}{'s a step':>16}")
    for c in cells:
        print(
            f"{c['case']:16}{c['map']:28}{c['gpus_that_write']:10}{c['predicted_makespan']:12.3f}{c['measured_makespan']:11.3f}{c['error']:8.1%}"
            f"{c['predicted_idle']:8.1%}{c['measured_idle']:7.1%}"
            f"{c['modelled_seconds_per_step']:16.2f}"
        )


if __name__ == "__main__":
    be_rank(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
