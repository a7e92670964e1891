"""What the event loop costs: one RTO run by the plain loop and by work items, on the same ranks, in turn.

    python -m benchmarks.event_loop [--repeat=2] [--steps=14]

Both compute the same bits, so what differs is the loop: deciding, messages between ranks, traces, the watchdog. It
trains its own small inputs (a minute), then runs `sequential` (A) and `colocated` (B) in the order A B B A, in the same
processes, with TP 1 x DP 2 and with TP 2. Results go to benchmarks/results/event_loop.json.
"""

import argparse
import json
import os
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.machine import launch, machine, save, spread

LAYOUTS = {"TP 1 x DP 2": ["--schedule.lanes=2"], "TP 2 x DP 1": ["--parallel.tensor=2"]}
MAPS = ("sequential", "colocated")
WARM_UP = 2
"""Steps of a run that are not counted."""
MODEL = {
    "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_attention_heads": 8, "num_query_groups": 4,
    "max_length": 128,
}  # fmt: skip
TEXT = "the cat sat on a mat and saw how two small birds sang in an old tree while it rained all day"


def main() -> None:
    """Run all layouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2, help="times A B B A for each layout")
    parser.add_argument("--steps", type=int, default=14, help=f"steps of a run, of which {WARM_UP} are not counted")
    parser.add_argument("--rank", nargs=2, metavar=("INPUTS", "LAYOUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        be_rank(Path(options.rank[0]), options.rank[1], options.repeat, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        found: dict[str, Any] = {"machine": machine(), "steps": options.steps, "warm_up": WARM_UP, "model": MODEL}
        for layout in LAYOUTS:
            words = ["--rank", folder, layout, f"--repeat={options.repeat}", f"--steps={options.steps}"]
            launch(2, "-m", "benchmarks.event_loop", *words)
            ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank_*.json"))]
            found[layout] = summary(ranks, options.steps)
            show(layout, found[layout])
    found["load_average_after"] = os.getloadavg()
    save("event_loop", found)


def make_inputs(folder: Path) -> None:
    """A tokenizer, pairs, and runs `sft`, `dpo` and `reward` of two steps: weights that need not be good."""
    write_rows(folder)
    train_words = [
        f"--data.train={folder}/rows.jsonl",
        "--train.max_steps=2",
        "--train.batch_size=8",
        "--data.max_length=128",
    ]
    model = [f"--model.{name}={value}" for name, value in MODEL.items()]
    start = {"sft": [f"--tokenizer.path={folder}/tokenizer.model", *model]}
    for stage in ("sft", "dpo", "reward"):
        own = start.get(stage, [f"--start={folder}/sft"])
        launch(1, "-m", "rto_megatron", stage, f"--run_dir={folder}/{stage}", *own, *train_words)


def write_rows(folder: Path, vocab_size: int = 384) -> None:
    """A tokenizer of so many ids, and rows that serve as prompts, answers and pairs."""
    from tools.train_tokenizer import train

    some = TEXT.split()
    texts = [" ".join(some[(i * k + i) % len(some)] for k in range(1, 4 + i % 9)) for i in range(64)]
    stream, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    made_up = ["".join(stream.choices(letters, k=8)) for _ in range(vocab_size - 384)]  # enough for as many pieces
    (folder / "tokenizer.model").write_bytes(train(iter([*texts * 4, *made_up]), vocab_size=vocab_size))
    rows = [{"prompt": t, "chosen": f"{t} {t}", "rejected": t[::-1], "response": t} for t in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(inputs: Path, run_dir: Path, layout: str, schedule_map: str, steps: int) -> list[str]:
    """The command line of a run."""
    roles = {"policy": "sft", "reference": "sft", "dpo": "dpo", "reward_model": "reward", "data.train": "rows.jsonl"}
    sizes = [f"--num_steps={steps}", "--prompts_per_step=16", "--samples_per_optimizer_step=8"]
    compute = ["--compute.micro_batch_size=4", "--compute.score_micro_batch_size=8"]
    answers = [
        "--rollout.max_prompt_tokens=64",
        "--rollout.max_new_tokens=32",
        "--rollout.max_slots=16",
        "--schedule.slice_steps=8",
    ]
    return [
        *(f"--{role}={inputs / name}" for role, name in roles.items()),
        f"--run_dir={run_dir}",
        f"--schedule.map={schedule_map}",
        *sizes, *compute, *answers, *LAYOUTS[layout],
    ]  # fmt: skip


CLOCKS = ("seconds", "cpu", "main", "items")
"""Read at the end of each step: the wall's, and CPU seconds of the process, of its main thread, and of items."""


def be_rank(inputs: Path, layout: str, repeat: int, steps: int) -> None:
    """All runs of a layout in this rank; writes what its clocks showed at the end of each step."""
    from rto_megatron.config.load import load_run
    from rto_megatron.distributed.runtime import rank, start_runtime
    from rto_megatron.schedule.loop import Outcome
    from rto_megatron.schedule.work import Item
    from rto_megatron.stages import rto
    from rto_megatron.stages.course import Course
    from rto_megatron.stages.interleaved import RTOWork

    runtime = start_runtime(threads=1)
    marks: list[tuple[float, ...]] = []
    end_step, run_item, in_items = Course.end_step, RTOWork.run, [0.0]

    def marked(self: Course, numbers: dict[str, float]) -> None:
        now = time.thread_time()
        # The last item of a step, which calls this, has begun and not ended.
        marks.append((time.perf_counter(), time.process_time(), now, in_items[0] + now - began[0]))
        end_step(self, numbers)

    began = [0.0]

    def timed(self: RTOWork, item: Item) -> Outcome:
        began[0] = time.thread_time()
        outcome = run_item(self, item)
        in_items[0] += time.thread_time() - began[0]
        return outcome

    Course.end_step, RTOWork.run = marked, timed  # type: ignore[method-assign]
    runs: list[dict[str, Any]] = []
    for number, schedule_map in enumerate([*MAPS, *reversed(MAPS)] * repeat):
        marks.clear()
        run_dir = inputs / layout / f"{number}-{schedule_map}"
        rto.run(load_run("rto", None, words_of(inputs, run_dir, layout, schedule_map, steps)), runtime)
        runs.append({"map": schedule_map, "items": num_items(run_dir), "marks": list(marks)})
    (inputs / f"rank_{rank()}.json").write_text(json.dumps(runs))


def num_items(run_dir: Path) -> int:
    """Of rank 0, in all steps; 0 for a run without items."""
    trace = run_dir / "trace" / "rank_00000.jsonl"
    return len(trace.read_text().splitlines()) if trace.exists() else 0


def summary(ranks: list[list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """Of a layout: seconds and CPU seconds of a step by map, over both ranks, and their ratios."""
    found: dict[str, Any] = {}
    for schedule_map in MAPS:
        mine = [[run for run in runs if run["map"] == schedule_map] for runs in ranks]
        of_ranks = [[step for run in runs for step in steps_of(run["marks"])] for runs in mine]
        each = [[dict(zip(CLOCKS, step, strict=True)) for step in both] for both in zip(*of_ranks, strict=True)]
        found[schedule_map] = {
            "seconds": spread([both[0]["seconds"] for both in each]),
            "cpu_seconds": spread([sum(one["cpu"] for one in both) for both in each]),
            "of_other_threads": spread([sum(one["cpu"] - one["main"] for one in both) for both in each]),
        }
        if schedule_map == "colocated":
            loop = [sum(one["main"] - one["items"] for one in both) for both in each]
            found[schedule_map] |= {
                "of_main_threads_between_items": spread(loop),
                "items_per_step": mine[0][0]["items"] / steps,
            }
    for clock in ("seconds", "cpu_seconds"):
        plain, items = (found[schedule_map][clock] for schedule_map in MAPS)
        found[f"{clock}_ratio"] = {name: items[name] / plain[name] for name in ("median", "min")}
    # What the loop itself uses: between items, and in threads that read messages and watch.
    plain, items = (found[schedule_map] for schedule_map in MAPS)
    threads = items["of_other_threads"]["median"] - plain["of_other_threads"]["median"]
    loop = items["of_main_threads_between_items"]["median"]
    found["loop_share_of_cpu"] = (loop + threads) / plain["cpu_seconds"]["median"]
    return found


def steps_of(marks: list[list[float]]) -> list[list[float]]:
    """What each clock says of each step that counts."""
    return [[after - before for before, after in zip(*two, strict=True)] for two in pairwise(marks[WARM_UP - 1 :])]


def show(layout: str, found: dict[str, Any]) -> None:
    """A table of one layout."""
    print(f"{layout}\n  {'':12}{'seconds per step':>34}{'CPU seconds per step, 2 ranks':>36}")
    for name in MAPS:
        cells = [found[name][clock] for clock in ("seconds", "cpu_seconds")]
        print(f"  {name:12}" + "".join(f"{c['median']:>16.3f} ({c['min']:.3f} - {c['max']:.3f})" for c in cells))
    ratios = [found[f"{clock}_ratio"] for clock in ("seconds", "cpu_seconds")]
    print(f"  {'ratio':12}" + "".join(f"{r['median']:>16.3f} (of minima {r['min']:.3f})" for r in ratios))
    items = found["colocated"]
    each = 1e3 * items["of_main_threads_between_items"]["median"] / 2 / items["items_per_step"]
    print(
        f"  CPU of the loop itself: {found['loop_share_of_cpu']:.2%}; "
        f"{each:.2f} ms an item and rank between {items['items_per_step']:.0f} items a step",
        flush=True,
    )


if __name__ == "__main__":
    main()
