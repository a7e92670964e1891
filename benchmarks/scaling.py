"""What a step of ours costs as responses grow longer, models larger and ranks more: slopes in log-log, and a plot.

    python -m benchmarks.scaling [--inputs=FOLDER]

Whole RTO steps of 64 prompts at drawn lengths. Tokens: responses of 16, 32, 64 and 128 tokens on average, the 1M model,
two ranks. Size: 1M, 8M and 32M with responses of 16. Ranks: one and two, of one thread, with responses of 64. A slope
of 1 is a cost in proportion; perfect ranks have -1. Results go to benchmarks/results/scaling.json, .md and .svg.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import steps
from benchmarks.machine import RESULTS, machine, save, save_table
from benchmarks.shapes import drawn_lengths, model_config

MEANS = (16, 32, 64, 128)
MODELS = ("1M", "8M", "32M")


def main() -> None:
    """All three curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, help="a folder that keeps the models for another start")
    options = parser.parse_args()
    before, curves = machine(), {}
    with steps.inputs("1M", options.inputs) as folder:
        task = steps.make_task(folder, "1M", "rto", mean=64, parts=["drawn"])
        parts = {str(mean): drawn_lengths(len(task.prompts), mean=mean, seed=1) for mean in MEANS}
        prompt_tokens = sum(map(len, task.prompts))
        seconds = seconds_of(replace(task, parts=parts), 2)
        curves["tokens"] = curve(
            "tokens of prompts and responses", {prompt_tokens + sum(parts[p]): seconds[p] for p in parts}
        )
        each = {ranks: seconds_of(task, ranks, "--compute.threads=1")["drawn"] for ranks in (1, 2)}
        curves["ranks"] = curve("ranks of one thread", each)
    sizes = {}
    for model in MODELS:
        with steps.inputs(model, options.inputs) as folder:
            task = steps.make_task(folder, model, "rto", mean=16, parts=["drawn"], num_steps=2)
            sizes[num_weights(model)] = seconds_of(task, 2)["drawn"]
    curves["size"] = curve("parameters of a policy", sizes)
    save("scaling", {"machine": before, "curves": curves, "load_average_after": os.getloadavg()})
    rows = [
        f"| {told['of']} | {' '.join(f'{x:.3g}' for x in told['x'])} | {' '.join(f'{y:.3g}' for y in told['seconds'])} "
        f"| {told['slope']:.2f} |"
        for told in curves.values()
    ]
    print("\n".join(rows))
    header = ("| against | values | seconds of a step, median | slope |", "|---|---|---|---|")
    save_table("scaling", header, rows, before)
    (RESULTS / "scaling.svg").write_text(drawing(list(curves.values())))


def seconds_of(task: steps.Task, ranks: int, *more: str) -> dict[str, float]:
    """Median seconds of a step of each part."""
    told = steps.summary([steps.run_ours(task, ranks=ranks, more=more)])
    return {part: phases["step_seconds"]["median"] for part, phases in told["parts"].items()}


def num_weights(model: str) -> int:
    """Parameters of a policy."""
    from rto_megatron.models.counts import num_parameters

    return num_parameters(model_config(model), "policy")


def curve(of: str, seconds: dict[int, float]) -> dict[str, Any]:
    """Points, and the slope of the line through them in log-log."""
    x, y = ([math.log(value) for value in values] for values in (seconds.keys(), seconds.values()))
    mid_x, mid_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mid_x) * (b - mid_y) for a, b in zip(x, y, strict=True)) / sum((a - mid_x) ** 2 for a in x)
    return {"of": of, "x": list(seconds), "seconds": list(seconds.values()), "slope": slope}


def drawing(curves: Sequence[dict[str, Any]]) -> str:
    """The curves side by side, log-log, as SVG."""
    width, height, edge = 260, 200, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(curves)}" height="{height}" '
        'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, told in enumerate(curves):
        left = number * width
        x = scaled(told["x"], left + edge, left + width - 20)
        y = scaled(told["seconds"], height - edge, 30)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>')
        for a, b, size, seconds in zip(x, y, told["x"], told["seconds"], strict=True):
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="#1f77b4"/>')
            parts.append(f'<text x="{a:.1f}" y="{height - edge + 14}" text-anchor="middle">{size:.3g}</text>')
            parts.append(f'<text x="{a:.1f}" y="{b - 6:.1f}" text-anchor="middle">{seconds:.3g} s</text>')
        axes = f"M{left + edge},25V{height - edge}H{left + width - 10}"
        parts.append(f'<path d="{axes}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{left + width / 2}" y="{height - 8}" text-anchor="middle">{told["of"]}</text>')
        parts.append(f'<text x="{left + width / 2}" y="14" text-anchor="middle">slope {told["slope"]:.2f}</text>')
    return "".join([*parts, "</svg>\n"])


def scaled(values: Sequence[float], first: float, last: float) -> list[float]:
    """Logarithms, from the smallest at `first` to the largest at `last`."""
    logs = [math.log(value) for value in values]
    low, span = min(logs), max(max(logs) - min(logs), 1e-9)
    return [first + (last - first) * (value - low) / span for value in logs]


if __name__ == "__main__":
    main()
