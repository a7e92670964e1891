"""Reinforced token optimization (arXiv 2404.18922, algorithm 1); with dpo_coef 0 it is PPO."""

from rto_megatron.algorithms.kl import adapt_kl_coef
from rto_megatron.config.run import RTORun
from rto_megatron.data.collate import prompt_batch
from rto_megatron.data.readers import PromptRow, read_prompts
from rto_megatron.data.sampler import batch_rows, shard
from rto_megatron.distributed.checkpoint import Manifest, save_checkpoint
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.rows import gather_rows
from rto_megatron.distributed.runtime import Runtime
from rto_megatron.errors import DataError
from rto_megatron.rollout.experience import make_experience, sentence_end_ids
from rto_megatron.rollout.responses import generate
from rto_megatron.stages.actors import Actors, load_actors, score_rollout
from rto_megatron.stages.held_out import HeldOut
from rto_megatron.stages.rto_metrics import credit_metrics, rollout_metrics, signal_metrics, speed_metrics
from rto_megatron.stages.run import Clock, check_divides, open_run
from rto_megatron.stages.update import plan_updates, update


def run(config: RTORun, runtime: Runtime) -> None:
    """Sample, give every token its reward, and update policy and critic, `num_steps` times."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    check_divides("prompts_per_step x samples_per_prompt", config.prompts_per_step * config.samples_per_prompt, mesh)
    check_divides("samples_per_optimizer_step", config.samples_per_optimizer_step, mesh)
    actors = load_actors(config, mesh)
    tokenizer = actors.tokenizer
    prompts, dropped = read_prompts(
        config.data.train,
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        too_long=config.data.too_long,
    )
    check_enough(prompts, config)
    held_out = HeldOut.of_run(config, tokenizer, mesh)
    ends = None
    if config.rto.shaping == "sentence":
        ends = sentence_end_ids([tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]).to(mesh.device)
    kl_coef, clock = config.rto.kl_coef, Clock()

    with open_run(config, "rto" if config.rto.dpo_coef else "ppo", mesh, size_table(config, len(prompts), mesh)) as running:
        running.console.say(f"prompts: {dropped}")
        with running.console.progress("rto", total=config.num_steps) as progress:
            for step in range(config.num_steps):
                before = held_out.measure(actors, step=step, clock=clock)
                picked = batch_rows(len(prompts), config.prompts_per_step, seed=config.seed, step=step)
                batch = prompt_batch([prompts[i] for i in picked], samples_per_prompt=config.samples_per_prompt)
                mine = batch.rows(shard(len(batch), rank=mesh.data.rank, world=mesh.data.size))
                with clock.phase("generate"):
                    local = generate(
                        actors.policy.model,
                        mine,
                        config.rollout,
                        eos_id=tokenizer.eos_id,
                        pad_id=tokenizer.pad_id,
                        seed=config.seed,
                        step=step,
                    )
                with clock.phase("score"):
                    said = score_rollout(
                        local,
                        policy=actors.policy.model,
                        critic=actors.critic.model if actors.critic else None,
                        judges=actors.judges,
                        config=config,
                        mesh=mesh,
                    )
                    rollout, signals = gather_rows(local, mesh), gather_rows(said, mesh)
                with clock.phase("advantage"):
                    experience, credit = make_experience(
                        rollout, signals, config.rto, config.advantage, kl_coef=kl_coef, sentence_ends=ends
                    )
                    numbers = rollout_metrics(rollout, signals) | signal_metrics(rollout, signals, config.rto)
                    numbers |= credit_metrics(rollout, experience, credit) | {"kl/coef": kl_coef}
                with clock.phase("update"):
                    losses = update(actors, experience, config, mesh, step=step)
                kl_coef = adapt_kl_coef(
                    kl_coef,
                    observed_kl=numbers["kl/sequence"],
                    target=config.rto.kl_target,
                    horizon=config.rto.kl_horizon,
                    num_samples=len(rollout),
                )
                seconds = clock.take()
                running.log.write(step, before | numbers | losses | speed_metrics(rollout, seconds) | seconds)
                progress.done(step, _shown(numbers, losses, seconds))
        after = held_out.measure(actors, step=config.num_steps, clock=clock)
        folder = save_checkpoint(config.run_dir, _manifest(config, actors), _models(actors), tokenizer.save)
        running.log.write(config.num_steps, after | clock.take())
        running.console.say(f"checkpoint: {folder}")


def check_enough(prompts: list[PromptRow], config: RTORun) -> None:
    """Raise DataError if one step would take a prompt twice."""
    if len(prompts) < config.prompts_per_step:
        raise DataError(
            f"data.train {config.data.train}: {len(prompts)} prompts are left, fewer than prompts_per_step "
            f"{config.prompts_per_step}; bring more prompts, or take more samples_per_prompt of fewer"
        )


def size_table(config: RTORun, num_prompts: int, mesh: Mesh) -> list[tuple[str, object]]:
    """The start table: what follows from the three batch numbers."""
    samples, plan = config.prompts_per_step * config.samples_per_prompt, plan_updates(config)
    return [
        ("prompts", num_prompts),
        ("prompts per step", config.prompts_per_step),
        ("samples per step", samples),
        ("of these per replica", samples // mesh.data.size),
        ("samples per optimizer step", config.samples_per_optimizer_step),
        ("optimizer steps per step", plan.minibatches_per_step),
        ("steps", config.num_steps),
        ("samples in all", samples * config.num_steps),
        ("passes over the prompts", round(config.num_steps * config.prompts_per_step / num_prompts, 2)),
    ]


def _shown(numbers: dict[str, float], losses: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    return {
        "reward": numbers["reward/total_sum"],
        "score": numbers["reward/score_sum"],
        "kl": numbers["kl/sequence"],
        "length": numbers["length/response_mean"],
        "clipped": losses["ppo/clip_frac"],
        "seconds": seconds["time/step_seconds"],
    }


def _models(actors: Actors) -> dict:
    models = {"policy": actors.policy.model}
    return models | {"critic": actors.critic.model} if actors.critic else models


def _manifest(config: RTORun, actors: Actors) -> Manifest:
    first = actors.parents["policy"].manifest
    return Manifest(
        stage="rto" if config.rto.dpo_coef else "ppo",
        step=config.num_steps,
        roles=tuple(_models(actors)),
        model=first.model,
        tokenizer=first.tokenizer,
        parents={role: parent.id for role, parent in actors.parents.items()},
    )
