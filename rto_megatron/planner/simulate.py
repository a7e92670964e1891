"""`python -m rto_megatron simulate RUN.yaml`: a config's steps on its own map, timed by a trace or by rooflines."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from rto_megatron.config.load import load_run, print_options, split_options
from rto_megatron.config.run import RTORun
from rto_megatron.data.shares import padded_tokens
from rto_megatron.distributed.checkpoint import Checkpoint, open_checkpoint
from rto_megatron.errors import CheckpointError, ConfigError, DataError, UserError, writing
from rto_megatron.metrics import Console
from rto_megatron.models.footprint import Model
from rto_megatron.planner.memory import Setting, by_phase, cache_bytes_of_a_token, ranks_of
from rto_megatron.planner.told import Memory, Timed, show_bounds, show_memory, show_phases, timed
from rto_megatron.schedule.cast import Cast, cast_of, least_ranks, sizes_of
from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.limits import longest_chain, resource_bound
from rto_megatron.schedule.rooflines import GPUS, Layout, Roles, Roofline
from rto_megatron.schedule.simulate import Cost
from rto_megatron.schedule.trace import Row, draw, read_trace, write_trace
from rto_megatron.schedule.trace_folder import read_last_start
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload
from rto_megatron.stages.roles import models_of
from rto_megatron.stages.rules import role_rules, roles_of, size_rules


@dataclass(frozen=True, kw_only=True)
class Options:
    """What simulate takes beside the settings of the run, whose `schedule` says the map."""

    ranks: int | None = None
    """Of the whole run; null takes the fewest that parallel and schedule need."""
    steps: int | None = None
    """Steps to simulate; null takes the fewest that a rate can be told from."""
    prompt_tokens: int | None = None
    """Of every prompt; null takes half of rollout.max_prompt_tokens."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Whose rooflines to take where there is no trace, and whose memory."""
    costs: Path | None = None
    """A run's folder, or a file of `trace`, whose items' seconds are fitted and taken instead of rooflines."""
    trace: Path | None = None
    """File for the simulated trace, a JSON line an item."""

    def __post_init__(self) -> None:
        for name in ("ranks", "prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more or null, got {value}")


def main(path: Path | None, words: list[str]) -> int:
    """Print phases, idle time, memory, bounds and a timeline; 0."""
    if "-h" in words or "--help" in words:
        print_options(Options, "python -m rto_megatron simulate RUN.yaml [--section.field=value ...]")
    options, words = split_options(Options, words)
    config = load_run("rto", path, words)
    cast = cast_of(config, options.ranks or least_ranks(config))
    for rule in size_rules(config, cast.policy.num_replicas):
        rule.check()
    staleness = config.schedule.staleness
    fewest = 3 + 2 * staleness
    if options.steps is not None and options.steps < fewest - 1:
        raise ConfigError(
            f"steps must be {fewest - 1} or more or null, got {options.steps}: the rate leaves out what only begins"
        )
    for rule in role_rules(config, _opened(config, options)):
        rule.check()
    workload = _workload(config, options)
    measured, notes = _measured(options.costs) if options.costs else ([], [])
    fitted = Fitted(measured) if measured else None
    try:
        sizes = replace(sizes_of(config, cast), num_steps=options.steps or fewest)
        cost: Cost = fitted or _rooflines(config, options, cast, workload, sizes)
        latency = fitted.latency if fitted else 0.0
        early = config.schedule.minibatches == "logical"
        rows = workload.run(cost, sizes, cast.placement, staleness=staleness, early=early, latency=latency)
    except DataError as error:
        raise DataError(f"{options.costs}, for schedule.map {config.schedule.map}: {error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if options.trace is not None:
        with writing("trace", options.trace):
            write_trace(options.trace, rows)
    console, found = Console(), timed(rows, list(map(len, cast.groups)), staleness=staleness)
    source = f"fitted to {options.costs}" if options.costs else f"rooflines of {options.gpu}, nothing measured"
    console.say(f"costs: {source}")
    for note in notes:
        console.say(f"note: {note}")
    name = f"{cast.describe()}{', one step off' * staleness}{', early minibatches' * early}"
    console.say(f"{name}: {found.seconds:.4g} seconds per step\n")
    show_phases(console, found)
    _show_memory(console, config, options, cast, sizes)
    _show_bounds(console, config, options, cast, workload, sizes, cost, found)
    console.say("")
    console.say(draw(rows))
    return 0


def _workload(config: RTORun, options: Options) -> Workload:
    return Workload(
        prompt_tokens=options.prompt_tokens or max(1, config.rollout.max_prompt_tokens // 2),
        max_new_tokens=config.rollout.max_new_tokens,
        epochs=config.ppo.num_epochs,
        seed=config.seed,
    )


def _roles(config: RTORun, workload: Workload, sizes: Sizes) -> Roles:
    totals = [workload.prompt_tokens + length for length in workload.lengths(0, sizes.samples)][: sizes.minibatch]
    rollout, scored = config.rollout, float(len(roles_of(config)))
    if rollout.reuse_log_probs:
        scored -= 1 - min(1.0, rollout.check_rows / sizes.samples)
    adapters = [config.lora, config.critic_lora][: 2 if config.advantage.estimator == "gae" else 1]
    return Roles(
        scored=scored,
        forwards=fmean(3.0 - (lora is not None) for lora in adapters) + (config.compute.recompute == "full"),
        padding=padded_tokens(totals, config.compute.cut) / sum(totals),
        one_stream=config.schedule.map != "sequential",
    )


def _measured(costs: Path) -> tuple[list[Row], list[str]]:
    """Rows of a run's folder or of one file, and notes on what was left out."""
    return read_last_start(costs) if costs.is_dir() else (read_trace(costs), [])


def _rooflines(config: RTORun, options: Options, cast: Cast, workload: Workload, sizes: Sizes) -> Roofline:
    model = open_checkpoint(config.policy).manifest.architecture_for("policy")
    engine, policy, critic = cast.engine.parallel, cast.policy.parallel, cast.critic.parallel
    roles = _roles(config, workload, sizes)
    mean = workload.prompt_tokens + sum(workload.lengths(0, sizes.samples)) / sizes.samples
    layout = Layout(
        engine_ranks=engine.replica,
        train_ranks=policy.replica,
        engine_tensor=engine.tensor,
        engine_pipeline=engine.pipeline,
        engine_context=engine.context,
        train_tensor=policy.tensor,
        pipeline=policy.pipeline,
        context=policy.context,
        virtual_stages=policy.virtual_stages,
        critic=(critic.tensor, critic.pipeline, critic.context, critic.virtual_stages),
        micro_tokens=max(1, min(round(mean * sizes.minibatch), config.compute.cut.most_tokens(round(mean)))),
        filled=1.0,
    )
    return Roofline(model, GPUS[options.gpu], cast.placement, layout, roles=roles)


def _opened(config: RTORun, options: Options) -> dict[str, Checkpoint]:
    """What the roles start from; with a trace it may not be there."""
    opened = {}
    for role in roles_of(config):
        with contextlib.nullcontext() if options.costs is None else contextlib.suppress(CheckpointError):
            opened[role.name] = open_checkpoint(role.path)
    return opened


def _models(config: RTORun) -> list[Model]:
    roles = roles_of(config)
    return models_of(roles, {role.name: open_checkpoint(role.path) for role in roles})


def _show_memory(console: Console, config: RTORun, options: Options, cast: Cast, sizes: Sizes) -> None:
    try:
        models = _models(config)
    except UserError as error:
        if options.costs is None:
            raise
        console.say(f"memory is not told: it needs the checkpoints that the roles start from ({error})\n")
        return
    place, window = cast.placement, config.rollout.longest
    setting = Setting(
        models=models,
        placement=place,
        train=cast.policy.parallel,
        engine=cast.engine.parallel,
        critic=cast.critic.parallel,
        compute=config.compute,
        moves=place.moves(staleness=config.schedule.staleness, early=config.schedule.minibatches == "logical"),
        num_data=cast.policy.num_replicas,
        num_critic_data=cast.critic.num_replicas,
        micro_tokens=config.compute.cut.most_tokens(window),
        pack_tokens=max(window, sizes.pack_tokens),
    )
    lanes = sizes.lanes // len(place.engines)
    slots = min(sizes.slots, len(sizes.rows(0)))
    cache = lanes * config.rollout.most_cached(slots) * cache_bytes_of_a_token(setting)
    memory: Memory = {rank.name: by_phase(setting, rank, cache=cache) for rank in ranks_of(setting)}
    show_memory(console, memory, gpu=options.gpu)


def _show_bounds(
    console: Console,
    config: RTORun,
    options: Options,
    cast: Cast,
    workload: Workload,
    sizes: Sizes,
    cost: Cost,
    found: Timed,
) -> None:
    lengths = workload.lengths(0, sizes.samples)
    if isinstance(cost, Roofline):
        work = resource_bound(
            cost.model,
            cost.gpu,
            workload.known(0, sizes),
            lengths,
            num_gpus=sum(map(len, cast.groups)),
            num_learners=2 if cast.placement.critic else 1,
            roles=cost.roles,
        )
    else:
        work = found.seconds - found.idle - found.phases["boundary"]
    alone = longest_chain(
        cost,
        cast.placement,
        lengths,
        prompt_tokens=workload.prompt_tokens,
        minibatch=sizes.minibatch,
        staleness=config.schedule.staleness,
    )
    show_bounds(console, found, work=work, alone=alone)
