"""Our engine with a slot of the longest length for each sequence, and with blocks of a pool: tokens/s and bytes.

    python -m benchmarks.decode_blocks [--models 1M 32M] [--repeat=2] [--threads=1]

The task is "batch 32, drawn" of `benchmarks.decode`: 64 prompts, log-normal lengths, 32 rows together, float32. All
settings in turn, forwards and backwards, in one process; before that, all must write the same tokens and log-probs to
the last bit, else exit code 3. Bytes are those of keys and values when all is written: neither cache shrinks before.
Results go to benchmarks/results/decode_blocks.json and .md.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decode import CELLS, Ours, Task, make_task, timed
from benchmarks.machine import machine, save, save_table, spread
from benchmarks.shapes import hugging_face_folder
from rto_megatron.distributed.runtime import prepare_imports

SETTINGS = {"slots": 0, "blocks of 16": 16, "blocks of 64": 64}
"""Name -> tokens of a block."""
CELL = "batch 32, drawn"


def measure(ours: Ours, task: Task, repeat: int) -> dict[str, dict[str, Any]]:
    """Setting -> tokens a second and bytes; exit code 3 if they write otherwise than the first."""
    found, want = {}, None
    for setting, block_tokens in SETTINGS.items():
        done = ours.write(task, kv_block_tokens=block_tokens)
        want = want or done
        if done != want:
            print(f"{setting}: tokens or log-probs are not those of slots; nothing was timed")
            sys.exit(3)
        found[setting] = {"cache_bytes": ours.cache_bytes}
    rates: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for setting in [*SETTINGS, *reversed(SETTINGS)] * repeat:
        seconds = timed(lambda: ours.write(task, kv_block_tokens=SETTINGS[setting]))  # noqa: B023
        rates[setting].append(task.num_tokens / seconds)
    return {setting: numbers | {"rate": spread(rates[setting])} for setting, numbers in found.items()}


def main() -> None:
    """All models, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["1M", "32M"], help="shapes of benchmarks/shapes.py")
    parser.add_argument("--repeat", type=int, default=2, help="times forwards and backwards")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    prepare_imports()
    found: dict[str, Any] = {"machine": machine(), "threads": options.threads, "cells": []}
    (cell,) = (cell for cell in CELLS if cell[0] == CELL)
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            ours = Ours(name, hugging_face_folder(name, Path(folder) / "model"), options.threads)
        task = make_task(name, *cell[1:])
        numbers = measure(ours, task, options.repeat)
        found["cells"].append({"model": name, "cell": CELL, "tokens": task.num_tokens, "settings": numbers})
    found["load_average_after"] = os.getloadavg()
    save("decode_blocks", found)
    save_table("decode_blocks", HEADER, [line for cell in found["cells"] for line in rows(cell)], found["machine"])


HEADER = (
    "| model | cache | tokens/s (range) | of slots | keys and values, MiB | of slots |",
    "|---|---|---|---|---|---|",
)


def rows(cell: dict[str, Any]) -> list[str]:
    """Lines of the table."""
    first, lines = cell["settings"]["slots"], []
    for setting, numbers in cell["settings"].items():
        rate, size = numbers["rate"], numbers["cache_bytes"]
        lines.append(
            f"| {cell['model']} | {setting} | {rate['median']:.0f} ({rate['min']:.0f} - {rate['max']:.0f}) "
            f"| {rate['median'] / first['rate']['median']:.2f} | {size / 2**20:.2f} "
            f"| {size / first['cache_bytes']:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
