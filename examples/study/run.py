"""The study, one command: `python -m examples.study.run bigrams --out runs/study`. Started again it goes on.

Everything is a run folder of the ordinary stages, so the run goes on where it stopped, and each can be looked at alone:

    OUT/seed-S/{sft,answers.jsonl,pairs.jsonl,reward,dpo,...}     the start of a seed and what is learned from its pairs
    OUT/tune/METHOD-N                                             point N of a method's grid, on the validation prompts
    OUT/chosen.json                                               the point of each method
    OUT/seed-S/METHOD                                             with that point, on the test prompts
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.study.methods import Method
from examples.study.sentiment import DATA
from examples.study.tasks import TASKS, Task, label_pairs

TUNING_SEED = 1000
"""Of the start on which grids are tried; no result is of it."""
TEST, VALIDATION = "test.jsonl", "validation.jsonl"


def main(words: list[str]) -> int:
    """Start what is missing in as many processes as asked for, phase by phase, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the study `sentiment`; see sentiment.py")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--methods", nargs="*", help="names in methods.py; all by default")
    parser.add_argument("--also", nargs="*", default=[], help="METHOD:POINT, a point that was not chosen, beside it")
    parser.add_argument("--phase", choices=["start", "tune", "test", "report"], help="only this one")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    task, out = TASKS[options.task](), options.out
    if options.data:
        os.environ[DATA] = str(options.data.absolute())
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    chosen = [method for method in task.methods if not options.methods or method.name in options.methods]
    by_name = {method.name: method for method in task.methods}
    pinned = [by_name[name].pinned(int(point)) for name, _, point in (spec.partition(":") for spec in options.also)]
    phases: dict[str, Callable[[], list[Job]]] = {
        "start": lambda: [Job(task, out, "start", seed) for seed in (TUNING_SEED, *seeds)],
        "tune": lambda: [
            Job(task, out, "tune", TUNING_SEED, method, point)
            for point in range(max(len(method.settings()) for method in chosen))
            for method in chosen
        ],
        "test": lambda: [
            Job(task, out, "test", seed, method, choose(task, out, method))
            for seed in seeds
            for method in [*chosen, *pinned]
        ],
    }
    if options.worker is not None:
        for job in phases[options.phase]()[options.worker :: options.workers]:
            job.run()
        return 0
    task.get_base(out)
    for phase in phases if options.phase is None else [options.phase]:
        if phase != "report" and not _in_parallel(words, phase, options.workers):
            return 1
    if options.phase in (None, "report"):
        from examples.study.report import write_report

        write_report(task, out, seeds, [*chosen, *pinned])
    return 0


def _in_parallel(words: list[str], phase: str, workers: int) -> bool:
    """All jobs of a phase, each worker every so-manieth; whether all went well."""
    command = [sys.executable, "-m", "examples.study.run", *words, f"--phase={phase}", f"--workers={workers}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, f"--worker={number}"], env=environment) for number in range(workers)]
    codes = [process.wait() for process in started]
    return not any(codes)


class Job:
    """Some runs that need each other, in one process: most of a small run's time would be its start."""

    def __init__(
        self, task: Task, out: Path, phase: str, seed: int, method: Method | None = None, point: int = 0
    ) -> None:
        self.task, self.out, self.phase, self.seed, self.method, self.point = task, out, phase, seed, method, point
        self.folder = out / f"seed-{seed}"

    def run(self) -> None:
        """Do what is not there yet."""
        if self.method is None:
            self._start()
        else:
            self._method(self.method)

    def _start(self) -> None:
        """SFT from scratch, pairs from its own answers, the reward model and the DPO policy of these."""
        task, folder = self.task, self.folder
        if (folder / "dpo-0" / "done").exists():
            return
        task.prepare(folder, self.seed)
        sft = [f"--run_dir={folder}/sft", f"--data.train={folder}/sft.jsonl", f"--seed={self.seed}"]
        stage("sft", [*sft, *task.start(self.out, folder)], folder / "sft")
        if not (folder / "pairs.jsonl").exists():
            asks = [f"--checkpoint={folder}/sft", f"--prompts={folder}/to_answer.jsonl", f"--seed={self.seed}"]
            run_stage("generate", [*asks, f"--out={folder}/answers.jsonl", *task.answers])
            label_pairs(task, folder / "answers.jsonl", folder / "pairs.jsonl", self.seed)
            rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
            cut = len(rows) // 8
            (folder / "pairs_held_out.jsonl").write_text("".join(rows[:cut]))
            (folder / "pairs_train.jsonl").write_text("".join(rows[cut:]))
        stage("reward", [*self._from_pairs("reward"), *task.reward], folder / "reward")
        # what RTO reads: the first point of DPO's grid, whatever is chosen for DPO itself
        [dpo, *_] = [method for method in task.methods if method.name == "dpo"]
        stage("dpo", [*self._from_pairs("dpo-0"), *dpo.settings()[0]], folder / "dpo-0")

    def _from_pairs(self, name: str) -> list[str]:
        folder = self.folder
        data = [f"--data.train={folder}/pairs_train.jsonl", f"--data.eval={folder}/pairs_held_out.jsonl"]
        return [f"--run_dir={folder}/{name}", f"--start={folder}/sft", *data, f"--seed={self.seed}", *self.task.pairs]

    def _method(self, method: Method) -> None:
        """A method with a point of its grid; the tuning seed on the validation prompts, the others on the test ones."""
        task, folder = self.task, self.folder
        tuning = self.phase == "tune"
        run_dir = self.out / "tune" / f"{method.name}-{self.point}" if tuning else folder / method.name
        words = [*method.words, *method.settings()[self.point]]
        prompts = folder / (VALIDATION if tuning else TEST)
        if method.stage == "dpo":
            stage("dpo", [*self._from_pairs("x")[1:], f"--run_dir={run_dir}", *words], run_dir)
            self._evaluate(run_dir, prompts)
            return
        roles = {"policy": "sft", "reference": "sft", "dpo": "dpo-0", "reward_model": "reward"}
        data = [f"--data.train={folder}/train.jsonl", f"--data.eval={prompts}", f"--grader={task.grader}"]
        small = ["--checkpoint.optimizer_at_end=false", "--credit.responses=0", f"--seed={self.seed}"]
        starts = [f"--{role}={folder}/{name}" for role, name in roles.items()]
        samples = [*task.samples, *task.answers]
        stage(method.stage, [f"--run_dir={run_dir}", *starts, *data, *small, *samples, *words], run_dir)

    def _evaluate(self, run_dir: Path, prompts: Path) -> None:
        """What a policy that did not sample is worth: beside the start, on the same prompts."""
        if (run_dir / "evaluation" / "evaluation.json").exists():
            return
        folder = self.folder
        roles = [f"--reference={folder}/sft", f"--reward_model={folder}/reward", f"--dpo={folder}/dpo-0"]
        words = ["--checkpoints", f"{folder}/sft", str(run_dir), *roles, f"--prompts={prompts}", "--num_shown=0"]
        more = [f"--grader={self.task.grader}", f"--run_dir={run_dir}/evaluation", f"--seed={self.seed}"]
        run_stage("evaluate", [*words, *more, *self.task.answers])


def choose(task: Task, out: Path, method: Method) -> int:
    """The point of a method's grid with the highest gold on the validation prompts, at the end of its run."""
    if not method.grid:
        return 0
    grades = [final_gold(out / "tune" / f"{method.name}-{point}") for point in range(len(method.settings()))]
    return max(range(len(grades)), key=lambda point: grades[point])


def final_gold(run_dir: Path) -> float:
    """Gold of the last evaluation of a run, or of the evaluation beside it."""
    beside = run_dir / "evaluation" / "evaluation.json"
    if beside.exists():
        return json.loads(beside.read_text())["rows"][1]["grade"]
    return curve(run_dir)[-1]["eval/grade"]


def curve(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of a run's evaluations, in the order of its steps."""
    lines = (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "eval/grade" in row]


def stage(name: str, words: list[str], run_dir: Path) -> None:
    """A stage, unless it is done; what a killed one has saved is taken up."""
    done, said = run_dir / "done", json.dumps([name, *words])
    if done.exists():
        if done.read_text() != said:
            raise SystemExit(f"{run_dir}: was run with other settings than now; remove it, or take another --out")
        return
    run_stage(name, words)
    done.write_text(said)


def run_stage(name: str, words: list[str]) -> None:
    """A stage in this process, as the command line runs it."""
    from rto_megatron.config.load import load_run
    from rto_megatron.distributed.runtime import prepare_imports, start_runtime

    config = load_run(name, None, words)
    prepare_imports()
    module = importlib.import_module(f"rto_megatron.stages.{'rto' if name == 'ppo' else name}")
    module.run(config, start_runtime(threads=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
