"""`python -m rto_megatron simulate RUN.yaml`: the steps of a config on a role map, timed by a trace or by rooflines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rto_megatron.config.load import load_run, print_options, split_options
from rto_megatron.config.run import RTORun
from rto_megatron.distributed.checkpoint import open_checkpoint
from rto_megatron.errors import ConfigError
from rto_megatron.metrics import Console
from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.placement import RoleMap, colocated, fused, split
from rto_megatron.schedule.rooflines import GPUS, Layout, Roles, Roofline
from rto_megatron.schedule.simulate import Cost
from rto_megatron.schedule.trace import Row, draw, read_trace, summarise, write_trace
from rto_megatron.schedule.work import KINDS, Sizes
from rto_megatron.schedule.workload import Workload, seconds_per_step


@dataclass(frozen=True, kw_only=True)
class Options:
    """What simulate takes beside the settings of the run."""

    groups: int = 1
    """Copies of the model, of parallel.tensor x parallel.pipeline ranks each."""
    map: Literal["colocated", "fused", "split"] = "colocated"
    """Who writes, scores and trains: see schedule/placement.py."""
    writing: int = 1
    """Groups that write; of the split map."""
    staleness: Literal[0, 1] = 0
    """1 writes the responses of a step with the weights of the step before; split map."""
    early: bool = False
    """Train each minibatch once its responses have ended and are scored; split map."""
    steps: int = 3
    """Steps to simulate; the rate leaves out the first."""
    prompt_tokens: int | None = None
    """Of every prompt; null takes half of rollout.max_prompt_tokens."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Whose rooflines to take, where there is no trace."""
    costs: Path | None = None
    """A trace whose items' seconds are fitted and taken instead of rooflines."""
    trace: Path | None = None
    """File for the simulated trace, a JSON line an item."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be 1 or more, got {self.groups}")
        if self.steps < 2:
            raise ValueError(f"steps must be 2 or more, got {self.steps}: the rate leaves out the first")
        if self.map == "split" and not 1 <= self.writing < self.groups:
            raise ValueError(f"writing must be at least 1 and below groups {self.groups}, got {self.writing}")
        if (self.staleness or self.early) and self.map != "split":
            raise ValueError(f"map must be split with staleness 1 or early, which need other ranks, got {self.map}")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise ValueError(f"prompt_tokens must be 1 or more, got {self.prompt_tokens}")

    def placement(self, *, critic: bool) -> RoleMap:
        """The role map that they describe."""
        if self.map == "split":
            return split(self.writing, self.groups - self.writing, critic=critic)
        return {"colocated": colocated, "fused": fused}[self.map](self.groups, critic=critic)


def main(path: Path | None, words: list[str]) -> int:
    """Print phases, idle time and a timeline; 0."""
    if "-h" in words or "--help" in words:
        print_options(Options, "python -m rto_megatron simulate RUN.yaml [--section.field=value ...]")
    options, words = split_options(Options, words)
    config = load_run("rto", path, words)
    placement = options.placement(critic=config.advantage.estimator == "gae")
    try:
        sizes = _sizes(config, options, placement)
        rows = _workload(config, options).run(
            _cost(config, options, placement),
            sizes,
            placement,
            staleness=options.staleness,
            early=options.early,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if options.trace is not None:
        write_trace(options.trace, rows)
    _show(Console(), options, rows)
    return 0


def _sizes(config: RTORun, options: Options, placement: RoleMap) -> Sizes:
    return Sizes(
        num_steps=options.steps,
        samples=config.prompts_per_step * config.samples_per_prompt,
        minibatch=config.samples_per_optimizer_step,
        lanes=len(placement.engines),
        slots=config.rollout.max_slots,
    )


def _workload(config: RTORun, options: Options) -> Workload:
    return Workload(
        prompt_tokens=options.prompt_tokens or max(1, config.rollout.max_prompt_tokens // 2),
        max_new_tokens=config.rollout.max_new_tokens,
        epochs=config.ppo.num_epochs,
        seed=config.seed,
    )


def _cost(config: RTORun, options: Options, placement: RoleMap) -> Cost:
    if options.costs is not None:
        return Fitted(read_trace(options.costs))
    model = open_checkpoint(config.policy).manifest.architecture_for("policy")
    ranks = config.parallel.tensor * config.parallel.pipeline
    layout = Layout(
        engine_ranks=ranks,
        train_ranks=ranks,
        engine_tensor=config.parallel.tensor,
        train_tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
    )
    scorers = 2 + (config.rto.dpo_coef > 0) + (config.rto.score_coef > 0) + bool(placement.critic)
    return Roofline(model, GPUS[options.gpu], placement, layout, roles=Roles(scored=scorers))


def _show(console: Console, options: Options, rows: list[Row]) -> None:
    found = summarise(rows)
    source = f"fitted to {options.costs}" if options.costs else f"rooflines of one {options.gpu}, nothing measured"
    console.say(f"costs: {source}")
    console.say(f"{options.map}, {options.groups} groups: {seconds_per_step(rows):.4g} seconds per step")
    console.table(
        "mean over groups, all steps",
        ["phase", "seconds", "share"],
        [(kind, found.busy[kind], found.busy[kind] / found.makespan) for kind in KINDS]
        + [("idle", found.idle_frac * found.makespan, found.idle_frac)],
    )
    console.say(f"two phases run at once in {found.overlap:.0%} of the time\n")
    console.say(draw(rows))
