"""Proof, for the user's own config, that a run which is killed goes on exactly: a few steps, run four ways.

    straight    never interrupted: what the others are compared with
    resumed     killed by SIGKILL half-way, and the same command again: must be equal to the last bit
    cold        weights of half-way with fresh optimizers: must differ, or the comparison sees nothing
    one rank    the other half on one rank: must agree within 1e-5 (where the run has several, in float32)

Each is a world of its own processes, as a cluster would start it. Nothing is written but below RUN_DIR/verify-resume.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.config.run import RTORun
from rto_megatron.distributed.checkpoint import (
    TRACKER,
    Checkpoint,
    largest_difference,
    open_checkpoint,
    relative_difference,
    step_of,
)
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.errors import NOT_PROVEN, ConfigError, UserError, writing
from rto_megatron.metrics import Console
from rto_megatron.schedule.cast import cast_of, least_ranks
from rto_megatron.stages.child_runs import read_words, run_world
from rto_megatron.stages.resume import TrainingRun
from rto_megatron.stages.rules import check_run

OTHER_LAYOUT = 1e-5
"""Largest difference of weights and optimizer state on another layout, as a share of 1 + its size (float32)."""

MEASURED = ("time/", "speed/", "checkpoint/", "memory/")
"""Metrics of the machine, not of the run."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What verify-resume takes beside the settings of the run."""

    ranks: int | None = None
    """Processes of a run; null takes the fewest that the config can run on."""
    steps: int = 4
    """Of the straight run."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"ranks must be 1 or more, got {self.ranks}")
        if self.steps < 2:
            raise ValueError(f"steps must be 2 or more, got {self.steps}: a run is killed half-way")


@dataclass(frozen=True)
class Difference:
    """Of one run's end to that of the straight one."""

    weights: float
    optimizers: float
    metrics: float

    @property
    def is_zero(self) -> bool:
        return not (self.weights or self.optimizers or self.metrics)


def main(path: Path | None, words: list[str]) -> int:
    """Run the four, print the table, write verify-resume.json; 0 if the proof holds, 3 if not.

    Raises:
        ConfigError: the config is not that of a training stage, or this is one of several ranks.
        UserError: what a run refuses before it loads a model, before anything is written.
    """
    options, start, config = read_words("verify-resume", Options, path, words)
    if not isinstance(config, TrainingRun):
        raise ConfigError(f"verify-resume takes the config of sft, dpo, reward, rto or ppo, got one of {start[0]}")
    ranks = options.ranks or (least_ranks(config) if isinstance(config, RTORun) else config.parallel.replica)
    # now, rather than in a world of its own: nothing is written yet
    check_run(config, _num_data(config, ranks))
    return Proof(start, config, ranks=ranks, steps=options.steps).run()


def _num_data(config: TrainingRun, ranks: int) -> int:
    return cast_of(config, ranks).policy.num_replicas if isinstance(config, RTORun) else config.parallel.data(ranks)


class Proof:
    """The four runs and their comparison."""

    def __init__(self, start: list[str], config: TrainingRun, *, ranks: int, steps: int) -> None:
        """`start`: the words that start such a run, its stage first."""
        self.config, self.ranks, self.steps = config, ranks, steps
        self.half = steps // 2
        self.folder = config.run_dir / "verify-resume"
        length = f"--num_steps={steps}" if isinstance(config, RTORun) else f"--train.max_steps={steps}"
        self.start = [*start, length, "--checkpoint.save_every=1", "--checkpoint.keep_last=null"]
        self.start.append("--checkpoint.optimizer_at_end=true")  # it is compared
        self.console = Console()

    def run(self) -> int:
        """All of it; the exit code."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with writing("run_dir", self.folder):
            self.folder.mkdir(parents=True)
        self.console.say(f"{self.start[0]}, {self.steps} steps on {self.ranks} rank(s), logs and runs in {self.folder}")
        self._go("straight")
        self._go("resumed", kill_after=self.half)
        killed_after = open_checkpoint(self.folder / "resumed").manifest.step
        if killed_after == self.steps:
            raise UserError(f"{self.folder / 'resumed'}: all steps were done before it was killed; give more --steps")
        self._go("resumed")
        self._from_half("cold")
        self._go("cold", "--checkpoint.resume=weights")
        rows = [("resumed", f"killed after step {killed_after}", 0.0), ("cold", "fresh optimizers", None)]
        if self.ranks > 1 and self.config.compute.dtype == "float32":  # bfloat16 sums differ by more
            self._from_half("one-rank")
            alone = [f"--parallel.{axis}=1" for axis in ("tensor", "pipeline", "context", "virtual_stages")]
            alone.append("--parallel.sequence=false")
            self._go("one-rank", *alone, ranks=1)
            rows.append(("one-rank", f"from {self.ranks} ranks to 1", OTHER_LAYOUT))
        start_runtime(threads=1)
        return self._report(rows)

    def _go(self, name: str, *words: str, ranks: int = 0, kill_after: int | None = None) -> None:
        """Start a run and wait for its end, or kill it once the checkpoint of a step is named."""
        run_dir = self.folder / name
        self.console.say(f"{name}{' (to be killed)' if kill_after else ''} ...")
        due = None if kill_after is None else lambda: self._step(run_dir) >= kill_after
        log = self.folder / f"{name}.log"
        run_world([*self.start, f"--run_dir={run_dir}", *words], log, ranks=ranks or self.ranks, until=due)

    def _step(self, run_dir: Path) -> int:
        """Of the newest checkpoint that has a name; 0 where there is none."""
        try:
            return step_of(Path((run_dir / "checkpoints" / TRACKER).read_text().strip()))[0]
        except FileNotFoundError:
            return 0

    def _from_half(self, name: str) -> None:
        """A run folder that looks as if the straight run had been killed half-way."""
        root, source = self.folder / name / "checkpoints", self.folder / "straight" / "checkpoints"
        step = f"step_{self.half:08d}"
        shutil.copytree(source / step, root / step)
        (root / TRACKER).write_text(step + "\n")
        shutil.copytree(self.folder / "straight" / "tensorboard", self.folder / name / "tensorboard")

    def _report(self, rows: Sequence[tuple[str, str, float | None]]) -> int:
        straight, table, holds = open_checkpoint(self.folder / "straight"), [], True
        for name, how, tolerance in rows:
            found = self._difference(straight, open_checkpoint(self.folder / name))
            if tolerance is None:
                good, verdict = not found.is_zero, "differs, as it must" if not found.is_zero else "EQUAL: not a proof"
            elif tolerance == 0:
                good, verdict = found.is_zero, "equal to the last bit" if found.is_zero else "DIFFERS"
            else:
                good = max(found.weights, found.optimizers) <= tolerance
                verdict = f"within {tolerance:g}" if good else f"NOT within {tolerance:g}"
            holds &= good
            table.append((name, how, found.weights, found.optimizers, found.metrics, verdict))
        columns = ("run", "how", "weights", "optimizers", "metrics", "verdict")
        self.console.table("largest differences from the straight run, as shares of 1 + |value|", columns, table)
        text = json.dumps([dict(zip(columns, row, strict=True)) for row in table], indent=1)
        (self.folder / "verify-resume.json").write_text(text + "\n")
        if holds:
            for name in ("straight", *(row[0] for row in rows)):
                shutil.rmtree(self.folder / name)
        self.console.say("a run of this config goes on exactly" if holds else f"it does NOT: compare in {self.folder}")
        return 0 if holds else NOT_PROVEN

    def _difference(self, straight: Checkpoint, other: Checkpoint) -> Difference:
        if straight.manifest.step != other.manifest.step:
            raise UserError(f"{other.folder}: is not the last step of its run")
        weights, optimizers = 0.0, 0.0
        for role in straight.manifest.models:
            weights = max(weights, largest_difference(straight.folder / role, other.folder / role))
        for role in straight.manifest.optimizers:
            folders = (checkpoint.folder / f"{role}_optimizer" for checkpoint in (straight, other))
            optimizers = max(optimizers, largest_difference(*folders))
        mine, its = (_rows(self.folder / run / "tensorboard") for run in ("straight", other.folder.parents[1].name))
        metrics = float("inf") if [row.keys() for row in mine] != [row.keys() for row in its] else 0.0
        if not metrics:
            for row, same in zip(mine, its, strict=True):
                metrics = max(metrics, relative_difference(list(row.values()), [same[name] for name in row]))
        return Difference(weights, optimizers, metrics)


def _rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{n: v for n, v in json.loads(line).items() if not n.startswith(MEASURED)} for line in lines]
