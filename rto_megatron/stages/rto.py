"""Reinforced token optimization (arXiv 2404.18922, algorithm 1); with dpo_coef 0 it is PPO."""

from dataclasses import dataclass

from torch import Tensor

from rto_megatron.algorithms.kl import adapt_kl_coef
from rto_megatron.batch import Experience, Rollout, Signals
from rto_megatron.config.run import RTORun, stage_of
from rto_megatron.data.collate import prompt_batch
from rto_megatron.data.readers import Dropped, PromptRow, read_prompts
from rto_megatron.data.sampler import batch_rows, shard
from rto_megatron.distributed.checkpoint import Manifest
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.rows import gather_rows
from rto_megatron.distributed.runtime import Runtime
from rto_megatron.errors import DataError
from rto_megatron.metrics import Mergeable, merge, take
from rto_megatron.rollout.experience import Credit, make_experience, sentence_end_ids
from rto_megatron.rollout.responses import generate
from rto_megatron.stages.actors import Actors, load_actors, score_rollout
from rto_megatron.stages.held_out import HeldOut
from rto_megatron.stages.resume import (
    Checkpoints,
    Progress,
    check_unchanged,
    digests,
    is_finished,
    listening_for_stop,
    own_checkpoint,
)
from rto_megatron.stages.rto_metrics import speed_metrics, step_metrics
from rto_megatron.stages.run import Clock, open_run
from rto_megatron.stages.update import plan_updates, update

SHOWN = {
    "reward": "reward/total_sum",
    "score": "reward/score_sum",
    "kl": "kl/sequence",
    "length": "length/response_mean",
    "clipped": "ppo/clip_frac",
    "seconds": "time/step_seconds",
}
"""Beside the progress bar: label -> metric."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays the same from step to step."""

    mesh: Mesh
    actors: Actors
    prompts: list[PromptRow]
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
    setup, dropped = prepare(config, runtime)
    actors, held_out = setup.actors, HeldOut.of_run(config, setup.actors.tokenizer, setup.mesh)
    manifest = _manifest(config, setup, held_out)
    check_unchanged(own, manifest)
    sizes = size_table(config, len(setup.prompts), setup.mesh.data.size)
    with open_run(config, name, setup.mesh, sizes, own=own) as running:
        running.console.say(f"prompts: {dropped}")
        checkpoints = Checkpoints(
            config, _trained(actors), lambda: manifest, actors.tokenizer, config.num_steps, higher_is_better=True
        )
        at, clock = checkpoints.take_up(own, Progress(kl_coef=config.rto.kl_coef)), Clock()
        with running.console.progress(name, total=config.num_steps, start=at.step) as shown:
            while True:
                extra = held_out.measure(actors, step=at.step, clock=clock)
                with clock.phase("save"):
                    extra |= checkpoints.after(at, held_out=extra.get("eval/score"))
                if at.step == config.num_steps:
                    break
                done = take_step(setup, config, step=at.step, kl_coef=at.kl_coef, clock=clock)
                numbers = step_metrics(done.rollout, done.signals, done.experience, done.credit, config.rto)
                seconds = clock.take()
                numbers |= done.losses | speed_metrics(done.rollout, seconds) | seconds | {"kl/coef": at.kl_coef}
                running.log.write(at.step, extra | numbers)
                shown.done(at.step, {label: numbers[metric] for label, metric in SHOWN.items()})
                at.kl_coef = adapt_kl_coef(
                    at.kl_coef,
                    observed_kl=numbers["kl/sequence"],
                    target=config.rto.kl_target,
                    horizon=config.rto.kl_horizon,
                    num_samples=len(done.rollout),
                )
                at.step += 1
        running.log.write(config.num_steps, extra | clock.take())
        running.console.say(f"checkpoint: {checkpoints.last_folder}")


def prepare(config: RTORun, runtime: Runtime) -> tuple[Setup, Dropped]:
    """Roles and prompts, checked against each other and against the layout."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    actors = load_actors(config, mesh)
    limit = config.rollout.max_prompt_tokens
    prompts, dropped = read_prompts(
        config.data.train, actors.tokenizer, max_prompt_tokens=limit, too_long=config.data.too_long
    )
    check_enough(prompts, config)
    ends = None
    if config.rto.shaping == "sentence":
        pieces = [actors.tokenizer.decode([i]) for i in range(actors.tokenizer.vocab_size)]
        ends = sentence_end_ids(pieces).to(mesh.device)
    return Setup(mesh=mesh, actors=actors, prompts=prompts, sentence_ends=ends), dropped


def take_step(setup: Setup, config: RTORun, *, step: int, kl_coef: float, clock: Clock) -> Step:
    """One round of the algorithm: prompts, rollout, signals, experience, update."""
    with clock.phase("generate"):
        mine = roll_out(setup, config, step=step)
    with clock.phase("score"):
        rollout, signals = judge(setup, config, mine)
    return learn(setup, config, rollout, signals, step=step, kl_coef=kl_coef, clock=clock)


def roll_out(setup: Setup, config: RTORun, *, step: int) -> Rollout:
    """The step's prompts answered by the policy: this replica's rows."""
    mesh, tokenizer = setup.mesh, setup.actors.tokenizer
    picked = batch_rows(len(setup.prompts), config.prompts_per_step, seed=config.seed, step=step)
    prompts = prompt_batch([setup.prompts[i] for i in picked], samples_per_prompt=config.samples_per_prompt)
    return generate(
        setup.actors.policy.model,
        prompts.rows(shard(len(prompts), rank=mesh.data.rank, world=mesh.data.size)),
        config.rollout,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        seed=config.seed,
        step=step,
    )


def judge(setup: Setup, config: RTORun, mine: Rollout) -> tuple[Rollout, Signals]:
    """What the roles say of this replica's rows, gathered: all replicas' rows on every rank."""
    actors, mesh = setup.actors, setup.mesh
    critic = actors.critic.model if actors.critic else None
    said = score_rollout(
        mine, policy=actors.policy.model, critic=critic, judges=actors.judges, config=config, mesh=mesh
    )
    return gather_rows(mine, mesh), gather_rows(said, mesh)


def learn(
    setup: Setup, config: RTORun, rollout: Rollout, signals: Signals, *, step: int, kl_coef: float, clock: Clock
) -> Step:
    """The rest of the round, from all replicas' rows: experience and update."""
    with clock.phase("advantage"):
        experience, credit = make_experience(
            rollout, signals, config.rto, config.advantage, kl_coef=kl_coef, sentence_ends=setup.sentence_ends
        )
    with clock.phase("update"):
        updates = update(setup.actors, experience, config, setup.mesh, step=step)
    return Step(rollout=rollout, signals=signals, experience=experience, credit=credit, updates=updates)


def check_enough(prompts: list[PromptRow], config: RTORun) -> None:
    """Raise DataError if there are fewer prompts than a step takes."""
    if len(prompts) < config.prompts_per_step:
        raise DataError(
            f"data.train {config.data.train}: {len(prompts)} prompts are left, fewer than prompts_per_step "
            f"{config.prompts_per_step}; bring more prompts, or take more samples_per_prompt of fewer"
        )


def size_table(config: RTORun, num_prompts: int, num_data: int) -> list[tuple[str, object]]:
    """The start table: what follows from the three batch numbers."""
    samples, plan = config.prompts_per_step * config.samples_per_prompt, plan_updates(config)
    return [
        ("prompts", num_prompts),
        ("prompts per step", config.prompts_per_step),
        ("samples per step", samples),
        ("of these per replica", samples // num_data),
        ("samples per optimizer step", config.samples_per_optimizer_step),
        ("optimizer steps per step", plan.minibatches_per_step),
        ("steps", config.num_steps),
        ("samples in all", samples * config.num_steps),
        ("passes over the prompts", round(config.num_steps * config.prompts_per_step / num_prompts, 2)),
    ]


def _trained(actors: Actors) -> dict[str, Trainable]:
    trained: dict[str, Trainable] = {"policy": actors.policy}
    return trained | {"critic": actors.critic} if actors.critic else trained


def _manifest(config: RTORun, setup: Setup, held_out: HeldOut) -> Manifest:
    parents = setup.actors.parents
    models = {"policy": parents["policy"].manifest.architecture_for("policy")}
    if setup.actors.critic:
        models["critic"] = parents["critic"].manifest.architecture_for("value")
    return Manifest(
        stage=stage_of(config),
        step=config.num_steps,
        models=models,
        tokenizer=parents["policy"].manifest.tokenizer,
        parents={role: parent.id for role, parent in parents.items()},
        data=digests(setup.prompts, held_out.prompts),
    )
