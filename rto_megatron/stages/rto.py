"""Reinforced token optimization (arXiv 2404.18922, algorithm 1); with dpo_coef 0 it is PPO."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rto_megatron.batch import Experience, Rollout, Signals
from rto_megatron.config.run import RTORun, stage_of
from rto_megatron.data.readers import Dropped, PromptRow
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.collectives import broadcast_object
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.rows import gather_rows
from rto_megatron.distributed.runtime import Runtime, is_main, rank, world_size
from rto_megatron.distributed.watchdog import Watchdog
from rto_megatron.metrics import Mergeable, merge, take
from rto_megatron.rollout.experience import Credit, make_experience
from rto_megatron.rollout.guard import check_decoding
from rto_megatron.rollout.responses import make_engine
from rto_megatron.schedule.cast import cast_of, sizes_of
from rto_megatron.schedule.lane import Lane, written_out
from rto_megatron.schedule.pace import Pace
from rto_megatron.schedule.work import Sizes, share
from rto_megatron.stages.actors import Actors, load_actors, score_rollout
from rto_megatron.stages.course import manifest_of, on_course, prompts_of, size_table
from rto_megatron.stages.held_out import HeldOut
from rto_megatron.stages.interleaved import interleave
from rto_megatron.stages.memory import report_of
from rto_megatron.stages.resume import Progress, digests, is_finished, listening_for_stop, own_checkpoint
from rto_megatron.stages.rto_metrics import speed_metrics, step_metrics
from rto_megatron.stages.run import Clock
from rto_megatron.stages.samples import Found, Said, Samples, checked_of, lengths_of, make_pass, said_of, signals_of
from rto_megatron.stages.update import minibatch_rows, update
from rto_megatron.stages.watched import watched_phase


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays the same from step to step."""

    mesh: Mesh
    actors: Actors
    prompts: list[PromptRow]
    sizes: Sizes
    """How the work of a step is cut."""
    sentence_ends: Tensor | None
    """[V] bool, ids that close a sentence; for `rto.shaping: sentence` only."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step produced: all replicas' rows, on every rank."""

    rollout: Rollout
    signals: Signals
    experience: Experience
    credit: Credit
    updates: list[dict[str, Mergeable]]
    """What each minibatch reports, in their order."""

    @property
    def losses(self) -> dict[str, float]:
        """What all minibatches report together."""
        return take(merge(self.updates))


@listening_for_stop()
def run(config: RTORun, runtime: Runtime) -> None:
    """Sample, give every token its reward, and update policy and critic, `num_steps` times."""
    name = stage_of(config)
    own = own_checkpoint(config, name)
    if is_finished(own, config.num_steps):
        return
    watchdog = Watchdog(rank=rank(), world=world_size(), floor_seconds=config.schedule.hang_seconds)
    with watchdog.watching():
        if config.schedule.map == "sequential":
            one_after_the_other(config, runtime, own, watchdog)
        else:
            interleave(config, runtime, own, watchdog)


def one_after_the_other(config: RTORun, runtime: Runtime, own: Checkpoint | None, watchdog: Watchdog) -> None:
    """The run as the paper writes it down: all ranks generate, then score, then update."""
    setup, dropped = prepare(config, runtime)
    actors, mesh = setup.actors, setup.mesh
    held_out = HeldOut.of_run(config, actors.tokenizer, setup.sentence_ends)

    def measure(at: Progress) -> dict[str, float]:
        if not held_out.is_due(at.step):
            return {}
        critic = actors.critic.model if actors.critic else None
        numbers = held_out.measure(
            at, actors.policy.model, critic, actors.judges, actors.tokenizer, mesh, writes=is_main()
        )
        return broadcast_object(numbers)  # the main rank has more: only there the grader was asked

    trained = {"policy": actors.policy, **({"critic": actors.critic} if actors.critic else {})}
    held = {role: (trainable, mesh, config.parallel) for role, trainable in trained.items()}
    manifest = manifest_of(config, actors.parents, digests(setup.prompts, held_out.prompts))
    sizes = size_table(config, len(setup.prompts), mesh.data.size)
    pace = Pace(config, manifest.models["policy"], device=mesh.device.type, num_held_out=len(held_out.prompts))
    with on_course(config, own, mesh, trained, manifest, actors.tokenizer, measure, sizes, dropped) as course:
        course.clock.watch = partial(watched_phase, watchdog, pace, range(world_size()), course, held_out)
        course.watch_memory(report_of(config, actors.parents, actors.judges, held, {}, mesh))
        course.begin_step()
        while not course.is_over:
            done = take_step(setup, config, step=course.at.step, kl_coef=course.kl_coef, clock=course.clock)
            numbers = step_metrics(done.rollout, done.signals, done.experience, done.credit, config.rto)
            seconds = course.clock.take()
            course.end_step(numbers | done.losses | speed_metrics(done.rollout, seconds) | seconds)
            course.begin_step()


def prepare(config: RTORun, runtime: Runtime) -> tuple[Setup, Dropped]:
    """Roles and prompts, checked against each other and against the layout."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    actors = load_actors(config, mesh)
    prompts, dropped, ends = prompts_of(config, actors.tokenizer)
    sizes = sizes_of(config, cast_of(config, world_size()))
    return Setup(mesh=mesh, actors=actors, prompts=prompts, sizes=sizes, sentence_ends=ends), dropped


def take_step(setup: Setup, config: RTORun, *, step: int, kl_coef: float, clock: Clock) -> Step:
    """One round of the algorithm: prompts, rollout, signals, experience, update."""
    with clock.phase("generate"):
        mine = roll_out(setup, config, step=step)
    with clock.phase("score"):
        rollout, signals = judge(setup, config, mine, step=step)
    return learn(setup, config, rollout, signals, step=step, kl_coef=kl_coef, clock=clock)


def roll_out(setup: Setup, config: RTORun, *, step: int) -> Rollout:
    """The step's prompts answered by the policy: this replica's rows, lane by lane."""
    samples = Samples(config, setup.prompts, setup.actors.tokenizer, step=step)
    model = setup.actors.policy.model
    engine, requests = make_engine(model, config.rollout, eos_id=setup.actors.tokenizer.eos_id), samples.requests()
    prompt_tokens = [len(request.prompt) for request in requests]
    for number in _lanes(setup):
        lane = Lane(setup.sizes, prompt_tokens, step=step, number=number)
        batch = engine.batch([requests[row] for row in setup.sizes.rows(number)])
        while (now := lane.upcoming()) is not None:
            ended = make_pass(batch, now, requests)
            samples.take(Found(step=step, written=tuple(ended)))
            lane.advance({completion.uid: len(completion.tokens) for completion in ended})
    return samples.rollout(sorted(samples.written)).to(setup.mesh.device)


def judge(setup: Setup, config: RTORun, mine: Rollout, *, step: int) -> tuple[Rollout, Signals]:
    """What the roles say of this replica's rows, pack by pack, gathered: all replicas' rows on every rank."""
    actors, mesh = setup.actors, setup.mesh
    roles = {"policy": actors.policy.model, "critic": actors.critic.model if actors.critic else None}
    first = mesh.data.rank * len(mine)
    packs, _ = written_out(setup.sizes, *lengths_of(mine, first), step=step, lanes=_lanes(setup))
    said: dict[int, Said] = {}
    for pack in packs:
        rows = mine.rows([sample - first for sample in pack.samples])
        checked = checked_of(pack.samples, config, step=step)
        signals = score_rollout(rows, **roles, judges=actors.judges, config=config, mesh=mesh, checked=checked)
        said |= said_of(pack.samples, rows, signals)
    ours = signals_of(mine, [said[first + row] for row in range(len(mine))]).to(mesh.device)
    return gather_rows(mine, mesh), gather_rows(ours, mesh)


def learn(
    setup: Setup, config: RTORun, rollout: Rollout, signals: Signals, *, step: int, kl_coef: float, clock: Clock
) -> Step:
    """The rest of the round, from all replicas' rows: experience and update."""

    def experience_of(rows: Sequence[int] | None = None) -> tuple[Experience, Credit]:
        some = (rollout, signals) if rows is None else (rollout.rows(rows), signals.rows(rows))
        return make_experience(*some, config.rto, config.advantage, kl_coef=kl_coef, sentence_ends=setup.sentence_ends)

    with clock.phase("advantage"):
        check_decoding(rollout, signals, config.rollout, dtype=config.compute.dtype, step=step)
        experience, credit = experience_of()
        if config.schedule.minibatches == "logical":
            lanes = range(setup.sizes.lanes)
            _, order = written_out(setup.sizes, *lengths_of(rollout), step=step, lanes=lanes)
            in_order = minibatch_rows(len(rollout), config, step=step, order=order)
            minibatches = [experience_of(rows)[0] for rows in in_order]
        else:
            minibatches = [experience.rows(rows) for rows in minibatch_rows(len(rollout), config, step=step)]
    with clock.phase("update"):
        updates = update(setup.actors, minibatches, config, setup.mesh, step=step)
    return Step(rollout=rollout, signals=signals, experience=experience, credit=credit, updates=updates)


def _lanes(setup: Setup) -> range:
    """The lanes that this replica writes and scores."""
    return share(setup.sizes.lanes, setup.mesh.data.rank, setup.mesh.data.size)
