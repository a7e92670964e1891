"""One RTO step of ours with one setting changed at a time: what each is worth, at drawn lengths.

    python -m benchmarks.ablation [--model 1M] [--inputs=FOLDER]

Each row is a run of its own on two ranks, with the settings in its first column; all rows in turn, then in the opposite
order. Results go to benchmarks/results/ablation.json and .md. What the event loop and its maps cost is measured by
`benchmarks.event_loop`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks import steps
from benchmarks.machine import machine, save, save_table
from benchmarks.trl_ppo import MEAN_TOKENS

VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "one slot: no batch in decode": ("--rollout.max_slots=1",),
    "8 slots": ("--rollout.max_slots=8",),
    "padded, not packed": ("--compute.packing=false",),
    "microbatches of 4 rows, padded": (
        "--compute.packing=false", "--compute.micro_batch_size=4", "--compute.score_micro_batch_size=4",
    ),
    "logits 32 tokens at a time": ("--compute.log_prob_chunk=32",),
    "activations computed again": ("--compute.recompute=full",),
}  # fmt: skip
PHASES = ("step", "generate", "score", "advantage", "update")


def main() -> None:
    """All variants there and back, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1M", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--inputs", type=Path, help="a folder that keeps the models for another start")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "model": options.model}
    with steps.inputs(options.model, options.inputs) as folder:
        task = steps.make_task(folder, options.model, "rto", mean=MEAN_TOKENS[options.model], parts=["drawn"])
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for name in [*VARIANTS, *reversed(VARIANTS)]:
            runs[name].append(steps.run_ours(task, more=VARIANTS[name]))
    cells = []
    for name, each in runs.items():
        told = steps.summary(each)
        cells.append({"variant": name, "words": VARIANTS[name], **told["parts"]["drawn"], "memory": told["memory"]})
    found |= {"cells": cells, "load_average_after": os.getloadavg()}
    rows = [row(cell, cells[0]) for cell in cells]
    print("\n".join(rows))
    save("ablation", found)
    save_table("ablation", HEADER, rows, found["machine"])


HEADER = (
    f"| what is changed | {' | '.join(f'{phase}, s' for phase in PHASES)} | times as long | peak MB above imports |",
    "|---|---|---|---|---|---|---|---|",
)


def row(cell: dict[str, Any], first: dict[str, Any]) -> str:
    """A line of the table."""
    words = [cell["variant"], *(f"{cell[f'{phase}_seconds']['median']:.3f}" for phase in PHASES)]
    words.append(f"{cell['step_seconds']['median'] / first['step_seconds']['median']:.2f}")
    words.append(f"{(cell['memory']['peak'] - cell['memory']['imported']) / 1e6:.0f}")
    return "| " + " | ".join(words) + " |"


if __name__ == "__main__":
    main()
