"""The run of RTO by a schedule: who is who, and the event loop of each rank."""

import random
import time
from functools import partial

from rto_megatron.config.run import RTORun
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.runtime import Runtime, rank, world_size
from rto_megatron.distributed.watchdog import Watchdog
from rto_megatron.schedule.cast import Cast, cast_of, sizes_of
from rto_megatron.schedule.links import connect
from rto_megatron.schedule.loop import Disturbance, Loop
from rto_megatron.schedule.pace import Pace
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.trace_folder import trace_file
from rto_megatron.stages.course import manifest_of, on_course, prompts_of, size_table
from rto_megatron.stages.held_out import HeldOut
from rto_megatron.stages.memory import MemoryReport, report_of
from rto_megatron.stages.players import Players, load_players
from rto_megatron.stages.resume import Progress, digests
from rto_megatron.stages.rto_items import RTOWork
from rto_megatron.stages.watched import watched_item, watched_phase


def memory_of(config: RTORun, players: Players, cast: Cast) -> MemoryReport:
    """Of the roles, and of the copies that write and score."""
    policy, critic, own = players.policy, players.critic, players.own_mesh
    trained = {
        "policy": (policy, players.policy_mesh, cast.policy.parallel),
        "critic": (critic, players.critic_mesh, cast.critic.parallel),
    }
    copies = {}
    if players.writer is not None and (policy is None or players.writer is not policy.model):
        copies["policy engine"] = (players.writer, own, cast.engine.parallel)
    if players.old_policy is not None and players.old_policy not in (players.writer, policy and policy.model):
        copies["policy snapshot"] = (players.old_policy, own, config.parallel)
    if players.old_critic is not None and (critic is None or players.old_critic is not critic.model):
        copies["critic snapshot"] = (players.old_critic, own, config.parallel)
    return report_of(config, players.parents, players.judges, trained, copies, own)


def interleave(config: RTORun, runtime: Runtime, own: Checkpoint | None, watchdog: Watchdog) -> None:
    """Run the steps of RTO by the schedule that the config asks for."""
    plan, cast = config.schedule, cast_of(config, world_size())
    sizes, early = sizes_of(config, cast), plan.minibatches == "logical"
    moves = cast.placement.moves(staleness=plan.staleness, early=early)
    players = load_players(config, cast, runtime, moves=moves)
    prompts, dropped, ends = prompts_of(config, players.tokenizer)
    held_out = HeldOut.of_run(config, players.tokenizer, ends)
    measure = partial(_measure, held_out, players, cast)
    trained = {"policy": players.policy} | ({"critic": players.critic} if "critic" in players.parents else {})
    manifest = manifest_of(config, players.parents, digests(prompts, held_out.prompts))
    table = [("schedule", cast.describe()), *size_table(config, len(prompts), cast.policy.num_replicas)]
    mesh = players.policy_mesh or players.own_mesh
    pace = Pace(config, manifest.models["policy"], device=mesh.device.type, num_held_out=len(held_out.prompts))
    with on_course(config, own, mesh, trained, manifest, players.tokenizer, measure, table, dropped) as course:
        course.clock.watch = partial(watched_phase, watchdog, pace, range(world_size()), course, held_out)
        for role in players.refits:  # an earlier start may have left newer weights than the roles began with
            players.refit(role)
        course.watch_memory(memory_of(config, players, cast))
        work = RTOWork(config, cast, sizes, players, prompts, ends, course)
        handed_over = work.take_over(own)
        course.begin_step(work.hand_over(course.at.step))
        links = connect(rank(), cast.groups, gather_objects)
        schedule = None
        if cast.groups[players.group][0] == rank():
            schedule = Schedule(
                cast.placement,
                sizes,
                lambda step: work.step(step).samples.known(),
                staleness=plan.staleness,
                early=early,
                first_step=course.at.step,
                handed_over=handed_over,
            )
        with trace_file(config.run_dir, rank(), gather_objects) as trace:
            Loop(
                cast.groups,
                links,
                work,
                write=trace.write,
                watch=partial(watched_item, watchdog, pace, cast),
                disturb=Disturbance(plan.delay_seconds, random.Random(f"{rank()}/{time.time_ns()}")),
                clock=trace.clock,
            ).run(schedule)
        links.close()


def _measure(held_out: HeldOut, players: Players, cast: Cast, at: Progress) -> dict[str, float]:
    """`eval/*` where they are due, found out by the ranks that answer held-out prompts and told to all."""
    if not held_out.is_due(at.step):
        return {}
    numbers: dict[str, float] = {}
    if rank() in cast.judges.ranks:
        policy = players.policy.model if players.policy else players.writer
        assert policy is not None and players.judges is not None
        critic = players.critic.model if players.critic else players.old_critic  # at a boundary both are the newest
        numbers = held_out.measure(
            at,
            policy,
            critic,
            players.judges,
            players.tokenizer,
            players.own_mesh,
            writes=rank() == cast.judges.ranks.start,
        )
    return gather_objects(numbers)[cast.judges.ranks.start]
