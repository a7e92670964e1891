"""Proof, for the user's own config, that a schedule moves work and not results: a few steps on several maps.

    sequential     all ranks generate, then score, then update: what the others are compared with
    each map       the run's own, and others at the same training layout, with random pauses everywhere
    another seed   must differ, or the comparison sees nothing

With staleness 1 there is no sequential run; then the run's own map is compared with itself under other pauses. Each is
a world of its own processes. Nothing is written but below RUN_DIR/verify-schedule.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rto_megatron.config.run import RTORun
from rto_megatron.distributed.checkpoint import fingerprint, largest_difference, open_checkpoint
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.errors import NOT_PROVEN, ConfigError, writing
from rto_megatron.metrics import Console
from rto_megatron.schedule.cast import Cast, cast_of, least_ranks
from rto_megatron.stages.child_runs import read_words, run_world
from rto_megatron.stages.course import prompts_of
from rto_megatron.stages.roles import tokenizer_of
from rto_megatron.stages.rules import check_run

OTHER_LAYOUT = 1e-5
"""Largest difference where the critic's own ranks have another layout than the policy's, as a share of 1 + its size."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What verify-schedule takes beside the settings of the run."""

    ranks: int | None = None
    """Processes of the run; null takes one replica that trains, and what `schedule` asks for beside it."""
    steps: int = 3
    """Of each run."""
    delay_seconds: float = 0.05
    """Longest random pause before each item and message."""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.ranks < 1:
            raise ValueError(f"ranks must be 1 or more, got {self.ranks}")
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")
        if self.delay_seconds < 0:
            raise ValueError(f"delay_seconds must be 0 or more, got {self.delay_seconds}")


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One of the runs."""

    name: str
    ranks: int
    words: tuple[str, ...]
    must_differ: bool = False
    tolerance: float = 0.0

    @property
    def folder(self) -> str:
        """Below that of the proof."""
        return self.name.replace(" ", "-")


def main(path: Path | None, words: list[str]) -> int:
    """Run them, print the table, write verify-schedule.json; 0 if the proof holds, 3 if not.

    Raises:
        ConfigError: the config is not that of rto or ppo, or this is one of several ranks.
        UserError: what a run refuses before it loads a model, before anything is written.
    """
    options, start, config = read_words("verify-schedule", Options, path, words)
    if not isinstance(config, RTORun):
        raise ConfigError(f"verify-schedule takes the config of rto or ppo, got one of {start[0]}")
    ranks = options.ranks or least_ranks(config)
    cast = cast_of(config, ranks)
    # now, rather than in a world of its own: nothing is written yet
    opened = check_run(config, cast.policy.num_replicas)
    prompts_of(config, tokenizer_of(opened["policy"]))
    folder, console = config.run_dir / "verify-schedule", Console()
    shutil.rmtree(folder, ignore_errors=True)
    with writing("run_dir", folder):
        folder.mkdir(parents=True)
    console.say(f"{start[0]}, {options.steps} steps, logs and runs in {folder}")
    start += [f"--num_steps={options.steps}", "--checkpoint.keep_last=null", "--checkpoint.optimizer_at_end=true"]
    legs, seconds = list(legs_of(config, cast, ranks, options)), {}
    for leg in legs:
        console.say(f"{leg.name} on {leg.ranks} rank(s) ...")
        began = time.perf_counter()
        run_dir = folder / leg.folder
        run_world([*start, f"--run_dir={run_dir}", *leg.words], folder / f"{run_dir.name}.log", ranks=leg.ranks)
        seconds[leg.name] = time.perf_counter() - began
    start_runtime(threads=1)
    return _report(console, folder, legs, seconds)


def legs_of(config: RTORun, cast: Cast, ranks: int, options: Options) -> Iterator[Leg]:
    """The runs of a proof, that which the others are compared with first."""
    plan, training = config.schedule, len(cast.policy.ranks)
    engine = config.parallel.tensor * config.parallel.pipeline  # without the context axis, as `cast_of` cuts it
    delays = f"--schedule.delay_seconds={options.delay_seconds}"
    other_seed = f"--seed={config.seed + 1}"
    if plan.staleness:
        yield Leg(name="without pauses", ranks=ranks, words=("--schedule.delay_seconds=0",))
        yield Leg(name="with pauses", ranks=ranks, words=(delays,))
        yield Leg(name="with other pauses", ranks=ranks, words=(delays,))
        yield Leg(name="another seed", ranks=ranks, words=(other_seed,), must_differ=True)
        return
    # the same decode batches on every map: a number of lanes that all who write can share
    lanes = math.lcm(cast.lanes, cast.policy.num_replicas)
    common = (f"--schedule.lanes={lanes}",)
    on_training_ranks = (
        *common,
        "--schedule.rollout_ranks=0",
        "--schedule.critic_ranks=0",
        "--schedule.rollout=null",
        "--schedule.critic=null",
        "--schedule.score=train",
    )
    yield Leg(name="sequential", ranks=training, words=(*on_training_ranks, "--schedule.map=sequential"))
    for name in ("colocated", "fused"):
        yield Leg(name=name, ranks=training, words=(*on_training_ranks, f"--schedule.map={name}", delays))
    if plan.map == "split":
        same = (cast.critic.parallel, cast.critic.num_replicas) == (cast.policy.parallel, cast.policy.num_replicas)
        tolerance = 0.0 if same else OTHER_LAYOUT
        yield Leg(name="split", ranks=ranks, words=(*common, delays), tolerance=tolerance)
    elif config.lora is None and config.critic_lora is None:  # else that map would be refused
        words = (*common, "--schedule.map=split", f"--schedule.rollout_ranks={engine}", delays)
        yield Leg(name="split", ranks=training + engine, words=words)
    words = (*on_training_ranks, "--schedule.map=sequential", other_seed)
    yield Leg(name="another seed", ranks=training, words=words, must_differ=True)


def _report(console: Console, folder: Path, legs: list[Leg], seconds: dict[str, float]) -> int:
    first, *others = legs
    found = {leg.name: open_checkpoint(folder / leg.folder) for leg in legs}
    prints = {name: fingerprint(checkpoint) for name, checkpoint in found.items()}
    table: list[tuple[object, ...]] = [(first.name, first.ranks, prints[first.name][:16], seconds[first.name], "")]
    holds = True
    for leg in others:
        equal = prints[leg.name] == prints[first.name]
        if leg.must_differ:
            good, verdict = not equal, "EQUAL: not a proof" if equal else "differs, as it must"
        elif leg.tolerance and not equal:
            parts = [*found[leg.name].manifest.models, *(f"{r}_optimizer" for r in found[leg.name].manifest.optimizers)]
            off = max(largest_difference(found[first.name].folder / p, found[leg.name].folder / p) for p in parts)
            good = off <= leg.tolerance
            verdict = f"within {leg.tolerance:g}, as the critic's layout differs" if good else f"off by {off:.2g}"
        else:
            good, verdict = equal, "equal to the last bit" if equal else "DIFFERS"
        holds &= good
        table.append((leg.name, leg.ranks, prints[leg.name][:16], seconds[leg.name], verdict))
    columns = ("run", "ranks", "weights and optimizers", "seconds", "verdict")
    console.table(f"sha256 of all parameters and optimizer states, against {first.name}", columns, table)
    text = json.dumps([dict(zip(columns, row, strict=True)) for row in table], indent=1)
    (folder / "verify-schedule.json").write_text(text + "\n")
    if holds:
        for leg in legs:
            shutil.rmtree(folder / leg.folder)
    console.say("time and place change nothing" if holds else f"they DO change it: compare in {folder}")
    return 0 if holds else NOT_PROVEN
