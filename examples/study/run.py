"""The study, one command: `python -m examples.study.run bigrams --out runs/study`. Started again it goes on.

Everything is a run folder of the ordinary stages, so the run goes on where it stopped, and each can be looked at alone:

    OUT/seed-S/{sft,answers.jsonl,pairs.jsonl,reward,dpo-0,...}   the start of a seed and what is learned from its pairs
                                                                  (of seed 0 alone, where all seeds have one start)
    OUT/seed-S/tune/METHOD-N                                      point N of a method's grid, on the validation prompts
    OUT/seed-S/METHOD                                             with the chosen point, on the test prompts
    OUT/records/seed-S/...                                        what came out of each, as small JSON (records.py)
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.study import records
from examples.study.methods import Method
from examples.study.records import Record, Records
from examples.study.sentiment import DATA
from examples.study.tasks import TASKS, Task, label_pairs
from rto_megatron.errors import USER_ERROR, ConfigError, UserError

TUNING_SEEDS = (1001, 1002, 1003)
"""Of the starts on which grids are tried; no result is of them."""
TEST, VALIDATION = "test.jsonl", "validation.jsonl"


def main(words: list[str]) -> int:
    """Start what is missing in as many processes as asked for, phase by phase, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of the study `sentiment`; see sentiment.py")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--methods", nargs="*", help="names in methods.py; all by default")
    help_point = "of every method's grid, instead of trying the grid; METHOD:POINT for one method"
    parser.add_argument("--point", nargs="*", default=[], help=help_point)
    parser.add_argument("--also", nargs="*", default=[], help="METHOD:POINT, a point that was not chosen, beside it")
    parser.add_argument("--known", type=Path, help="runs.jsonl of a study: its runs need not be done again")
    parser.add_argument("--phase", choices=["start", "tune", "test", "report"], help="only this one")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    try:
        return _run(options, words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


def _run(options: argparse.Namespace, words: list[str]) -> int:
    if options.data:
        os.environ[DATA] = str(options.data.absolute())
    study = _study(options)
    task, out = study.task, study.out
    phases: dict[str, Callable[[], list[Job]]] = {"start": study.starts, "tune": study.tuning, "test": study.tests}
    if options.worker is not None:
        from rto_megatron.distributed.children import end_with

        end_with(os.getppid())
        for job in phases[options.phase]()[options.worker :: options.workers]:
            if study.is_due(job):
                job.run()
        return 0
    for phase in phases if options.phase is None else [options.phase]:
        due = phase != "report" and any(map(study.is_due, phases[phase]()))
        if due and (code := task.get_base(out) or _in_parallel(words, phase, options.workers)):
            return code
    if options.phase in (None, "report"):
        from examples.study.report import write_report

        write_report(study)
    return 0


def _study(options: argparse.Namespace) -> "Study":
    """What was asked for.

    Raises:
        UserError: there is no such method or point, or a number, a folder or a file is not what it must be.
    """
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} must be 1 or more, got {getattr(options, name)}")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if tuned := [seed for seed in TUNING_SEEDS if seed in seeds]:
        raise ConfigError(f"--first-seed and --seeds must leave out {tuned[0]}, on which grids are tried; take others")
    there = next(path for path in (options.out, *options.out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(
            f"--out {options.out} must be a folder, or not there yet, but {there} is a file; name another"
        )
    task = TASKS[options.task]()
    by_name = {method.name: method for method in task.methods}
    chosen = [_named(name, by_name, "--methods") for name in options.methods or by_name]
    points = {}
    for words in options.point:
        if words.isdecimal():
            points |= {method.name: _checked(int(words), method, "--point") for method in chosen}
        else:
            method, point = _method_and_point(words, by_name, "--point")
            points[method.name] = point
    also = [_method_and_point(words, by_name, "--also") for words in dict.fromkeys(options.also)]
    pinned = [method.pinned(point) for method, point in also]
    study = Study(task, options.out, seeds, [*chosen, *pinned], known=options.known, points=points)
    _ = study.records  # now rather than after the first runs
    return study


def _named(name: str, by_name: dict[str, Method], option: str) -> Method:
    if name not in by_name:
        raise ConfigError(f"{option} must name methods of this study, {', '.join(by_name)}, got {name}")
    return by_name[name]


def _method_and_point(words: str, by_name: dict[str, Method], option: str) -> tuple[Method, int]:
    name, _, point = words.partition(":")
    method = _named(name, by_name, option)
    if not point.isdecimal():
        raise ConfigError(f"{option} must be METHOD:POINT, as {name}:0, got {words}")
    return method, _checked(int(point), method, option)


def _checked(point: int, method: Method, option: str) -> int:
    points = len(method.settings())
    if not 0 <= point < points:
        raise ConfigError(f"{option} must be a point of the grid of {method.name}, 0 to {points - 1}, got {point}")
    return point


def _in_parallel(words: list[str], phase: str, workers: int) -> int:
    """All jobs of a phase, each worker every so-manieth; 0 where all went well, else the exit code."""
    command = [sys.executable, "-m", "examples.study.run", *words, f"--phase={phase}", f"--workers={workers}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, f"--worker={number}"], env=environment) for number in range(workers)]
    codes = [process.wait() for process in started]
    return USER_ERROR if USER_ERROR in codes else int(any(codes))


class Study:
    """A task, its seeds and methods, and what is known of their runs."""

    def __init__(
        self,
        task: Task,
        out: Path,
        seeds: range,
        methods: list[Method],
        *,
        known: Path | None = None,
        points: Mapping[str, int] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            points: method -> point of its grid that is taken without trying the others.
        """
        self.task, self.out, self.seeds, self.methods = task, out, seeds, methods
        self._known, self._points = known, points or {}

    @property
    def records(self) -> Records:
        """As they are now."""
        return records.read(self.out / "records", self._known)

    # Jobs are dealt to workers by their places in these lists, so what is done already stays in them.

    def starts(self) -> list["Job"]:
        """Of all seeds."""
        tuning = TUNING_SEEDS if any(map(self.has_grid, self.methods)) else ()
        starts = dict.fromkeys(self.task.start_of(seed) for seed in (*tuning, *self.seeds))
        return [Job(self, "start", seed) for seed in starts]

    def tuning(self) -> list["Job"]:
        """All points of all grids: none where the point is given."""
        return [
            Job(self, f"tune/{method.name}-{point}", seed, method, point)
            for seed in TUNING_SEEDS
            for method in self.methods
            if self.has_grid(method)
            for point in range(len(method.settings()))
        ]

    def tests(self) -> list["Job"]:
        """Every method with its chosen point, on every seed."""
        points = {method.name: self.choose(method) for method in self.methods}
        return [Job(self, m.name, seed, m, points[m.name]) for seed in self.seeds for m in self.methods]

    def is_due(self, job: "Job") -> bool:
        """Whether it is still to be done; a start, where anything of its seed is."""
        have = self.records
        if job.method is not None or not job.is_known(have):
            return not job.is_known(have)
        results = ((seed, method.name) for seed in self.seeds for method in self.methods)
        needed = (*results, *((other.seed, other.name) for other in self.tuning()))
        return any(self.task.start_of(seed) == job.seed and (seed, run) not in have for seed, run in needed)

    def choose(self, method: Method) -> int:
        """The point with the highest mean gold over the tuning seeds, at the ends of the runs: a collapse counts."""
        if not method.grid:
            return 0
        if method.name in self._points:
            return self._points[method.name]
        means = [sum(grades) / len(grades) for grades in self.tried(method)]
        return max(range(len(means)), key=lambda point: means[point])

    def tried(self, method: Method) -> list[list[float]]:
        """[point][tuning seed] gold on the validation prompts."""
        have = self.records
        return [
            [self.known(have, seed, f"tune/{method.name}-{point}").final_gold for seed in TUNING_SEEDS]
            for point in range(len(method.settings()))
        ]

    def known(self, have: Records, seed: int, run: str) -> Record:
        """A record that must be there.

        Raises:
            ConfigError: it is not.
        """
        if (seed, run) not in have:
            raise ConfigError(
                f"{self.out}: has no record of seed {seed} of {run}, which this phase needs; leave --phase out, and "
                "what is missing is run first"
            )
        return have[seed, run]

    def has_grid(self, method: Method) -> bool:
        """Whether its grid is tried."""
        return bool(method.grid) and method.name not in self._points


@dataclass(frozen=True)
class Job:
    """Some runs that need each other, in one process: most of a small run's time would be its start."""

    study: Study
    name: str
    """As in its record."""
    seed: int
    method: Method | None = None
    point: int = 0

    @property
    def folder(self) -> Path:
        """Of the seed."""
        return self.study.out / f"seed-{self.seed}"

    @property
    def start(self) -> Path:
        """Of what it begins with: its seed's folder, or that of all seeds."""
        return self.study.out / f"seed-{self.study.task.start_of(self.seed)}"

    @property
    def settings(self) -> list[str]:
        """What tells it from other runs of its name."""
        return [] if self.method is None else [*self.method.words, *self.method.settings()[self.point]]

    def is_known(self, have: Records) -> bool:
        """Whether its record is there.

        Raises:
            ConfigError: there is one, of other settings.
        """
        found: Record | None = have.get((self.seed, self.name))
        if found is not None and found.settings != self.settings:
            raise ConfigError(
                f"{self.study.out}: seed {self.seed} of {self.name} was run with {' '.join(found.settings)}, now it is "
                f"{' '.join(self.settings)}; take another --out, or another --known"
            )
        return found is not None

    def run(self) -> None:
        """Do what is not there yet, and keep what came out."""
        if self.method is None:
            self._start()
            record = records.of_start(self.seed, self.settings, self.folder)
        else:
            record = self._method(self.method)
        if not self.is_known(self.study.records):  # a start is made again where other runs of its seed need its models
            records.write(self.study.out / "records", record)

    def _start(self) -> None:
        """SFT, pairs from its own answers, the reward model and the DPO policy of these."""
        task, folder = self.study.task, self.folder
        for seed in dict.fromkeys((self.seed, *TUNING_SEEDS, *self.study.seeds)):
            if task.start_of(seed) == self.seed:
                task.prepare(self.study.out / f"seed-{seed}", seed)
        if (folder / "dpo-0" / "done").exists():
            return
        sft = [f"--run_dir={folder}/sft", f"--data.train={folder}/sft.jsonl", f"--seed={self.seed}"]
        stage("sft", [*sft, *task.start(self.study.out, folder)], folder / "sft")
        if not (folder / "pairs_train.jsonl").exists():
            asks = [f"--checkpoint={folder}/sft", f"--prompts={folder}/to_answer.jsonl", f"--seed={self.seed}"]
            run_stage("generate", [*asks, f"--out={folder}/answers.jsonl", *task.answers])
            label_pairs(task, folder / "answers.jsonl", folder / "pairs.jsonl", self.seed)
            rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
            cut = len(rows) // 8
            (folder / "pairs_held_out.jsonl").write_text("".join(rows[:cut]))
            (folder / "pairs_train.new").write_text("".join(rows[cut:]))
            (folder / "pairs_train.new").rename(folder / "pairs_train.jsonl")
        stage("reward", [*self._from_pairs("reward"), *task.reward], folder / "reward")
        # what RTO reads: the first point of DPO's grid, whatever is chosen for DPO itself
        [dpo, *_] = [method for method in task.methods if method.name == "dpo"]
        stage("dpo", [*self._from_pairs("dpo-0"), *dpo.settings()[0]], folder / "dpo-0")

    def _from_pairs(self, name: str) -> list[str]:
        start = self.start
        data = [f"--data.train={start}/pairs_train.jsonl", f"--data.eval={start}/pairs_held_out.jsonl"]
        begins = [f"--run_dir={self.folder}/{name}", f"--start={start}/sft"]
        return [*begins, *data, f"--seed={self.seed}", *self.study.task.pairs]

    def _method(self, method: Method) -> Record:
        """A method with a point of its grid; tuning is on the validation prompts, results are on the test ones."""
        task, folder, run_dir = self.study.task, self.folder, self.folder / self.name
        prompts = folder / (VALIDATION if self.name.startswith("tune/") else TEST)
        if method.stage == "dpo":
            stage("dpo", [*self._from_pairs(self.name), *self.settings], run_dir)
            self._evaluate(run_dir, prompts)
            beside = run_dir / "evaluation" / "evaluation.json"
            return records.of_pairs(self.seed, self.name, self.settings, beside)
        roles = {"policy": "sft", "reference": "sft", "dpo": "dpo-0", "reward_model": "reward"}
        data = [f"--data.train={folder}/train.jsonl", f"--data.eval={prompts}", f"--grader={task.grader}"]
        small = ["--checkpoint.optimizer_at_end=false", "--credit.responses=0", f"--seed={self.seed}"]
        starts = [f"--{role}={self.start}/{name}" for role, name in roles.items()]
        samples = [*task.samples, *task.answers]
        words = [f"--run_dir={run_dir}", *starts, *data, *small, *samples, *self.settings]
        stage(method.stage, words, run_dir)
        return records.of_samples(self.seed, self.name, self.settings, run_dir)

    def _evaluate(self, run_dir: Path, prompts: Path) -> None:
        """What a policy that did not sample is worth: beside the start, on the same prompts."""
        if (run_dir / "evaluation" / "evaluation.json").exists():
            return
        start, task = self.start, self.study.task
        roles = [f"--reference={start}/sft", f"--reward_model={start}/reward", f"--dpo={start}/dpo-0"]
        words = ["--checkpoints", f"{start}/sft", str(run_dir), *roles, f"--prompts={prompts}", "--num_shown=0"]
        more = [f"--grader={task.grader}", f"--run_dir={run_dir}/evaluation", f"--seed={self.seed}"]
        run_stage("evaluate", [*words, *more, *task.answers])


def stage(name: str, words: list[str], run_dir: Path) -> None:
    """A stage, unless it is done; what a killed one has saved is taken up."""
    done, said = run_dir / "done", json.dumps([name, *words])
    if done.exists():
        if done.read_text() != said:
            raise ConfigError(f"{run_dir}: was run with other settings than now; remove it, or take another --out")
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
