"""PPO's updates of policy and critic on the experience of one step."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rto_megatron.algorithms.drto import robust_factors
from rto_megatron.algorithms.learning_rate import cosine_with_min_lr
from rto_megatron.algorithms.masked import loss_count, token_weights
from rto_megatron.algorithms.ppo import entropy_bonus, policy_loss, value_loss
from rto_megatron.algorithms.reward_model import state_values
from rto_megatron.batch import Experience
from rto_megatron.config.algorithm import DRTOConfig, PPOConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.run import RTORun
from rto_megatron.data.sampler import random_order
from rto_megatron.data.shares import deal, imbalance
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.step import (
    Loss,
    StepResult,
    Task,
    accumulate,
    finish,
    head_outputs_before_response,
    token_log_probs,
)
from rto_megatron.metrics import Latest, Mean, Mergeable
from rto_megatron.stages.actors import Actors


@dataclass(frozen=True)
class Plan:
    """How the samples of a step become optimizer steps."""

    minibatches_per_step: int
    num_optimizer_steps: int
    """Over the whole run."""


def plan_updates(config: RTORun) -> Plan:
    """What follows from the three batch numbers."""
    samples = config.prompts_per_step * config.samples_per_prompt
    per_step = config.ppo.num_epochs * samples // config.samples_per_optimizer_step
    return Plan(minibatches_per_step=per_step, num_optimizer_steps=per_step * config.num_steps)


def minibatch_rows(num_rows: int, config: RTORun, *, step: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Rows of each minibatch of a step: a random order of all rows an epoch, the same on every rank.

    Args:
        order: of the first epoch instead, where minibatches are `logical`.
    """
    size, minibatches = config.samples_per_optimizer_step, []
    for epoch in range(config.ppo.num_epochs):
        drawn = random_order(num_rows, f"minibatches/{config.seed}/{step}/{epoch}")
        rows = list(order) if order is not None and epoch == 0 else drawn
        minibatches += [rows[start : start + size] for start in range(0, num_rows, size)]
    return minibatches


def update(
    actors: Actors, minibatches: Iterable[Experience], config: RTORun, mesh: Mesh, *, step: int
) -> list[dict[str, Mergeable]]:
    """An optimizer step of policy and critic on each minibatch.

    Returns:
        What each minibatch reports, in their order; names as in docs/metrics.md.
    """
    reports: list[dict[str, Mergeable]] = []
    for number, whole in enumerate(minibatches):
        tasks = tasks_of(actors.policy, actors.critic, whole, config, mesh)
        sums = accumulate(tasks, mesh, cut=config.compute.cut)
        report: dict[str, Mergeable] = {}
        for task, own in zip(tasks, sums, strict=True):
            report |= take_optimizer_step(task.trainable, own, whole, config, mesh, step=step, number=number)
        reports.append(report)
    return reports


def tasks_of(
    policy: Trainable | None, critic: Trainable | None, whole: Experience, config: RTORun, mesh: Mesh
) -> list[Task]:
    """What a minibatch asks of the roles that this rank trains, of this replica's share of its rows.

    Args:
        whole: all rows of the minibatch: the loss is a mean over these.
    """
    share = deal(whole.num_tokens.tolist(), mesh.data.size)[mesh.data.rank]
    count, tasks = int(loss_count(whole.response_mask, config.ppo.loss_mean)), []
    if policy:
        rows = for_the_worst(whole, config.drto).rows(share)
        tasks.append(Task(policy, rows, token_log_probs, make_policy_loss(config.ppo, count), num_sums=6))
    if critic:
        rows, loss = whole.rows(share), make_value_loss(config.ppo, count)
        tasks.append(Task(critic, rows, head_outputs_before_response, loss, num_sums=3))
    return tasks


def for_the_worst(whole: Experience, config: DRTOConfig) -> Experience:
    """A minibatch whose policy loss is that of its worst spans.

    A weight that is not negative passes through PPO's clip, so it can as well stand in the advantages. The losses of
    spans are those of the policy that sampled, minus the advantages: exact while ratios are 1, as in a step's first
    minibatch.
    """
    if config.radius == 0:
        return whole
    factors = robust_factors(
        -whole.advantages,
        whole.response_mask,
        span_tokens=config.span_tokens,
        divergence=config.divergence,
        radius=config.radius,
    )
    return replace(whole, advantages=whole.advantages * factors)


def take_optimizer_step(
    trainable: Trainable, sums: Tensor, whole: Experience, config: RTORun, mesh: Mesh, *, step: int, number: int
) -> dict[str, Mergeable]:
    """The optimizer step of minibatch `number` of a step, whose gradients are there; what it reports.

    Args:
        whole: all rows of the minibatch.
    """
    plan, is_policy = plan_updates(config), trainable.name == "policy"
    optimizer = config.optimizer if is_policy else config.critic_optimizer
    lr = learning_rate(optimizer, step * plan.minibatches_per_step + number, plan.num_optimizer_steps)
    result = finish(trainable, sums, mesh, lr=lr)
    if not is_policy:
        return _critic_report(result, lr)
    tokens = whole.num_tokens.tolist()
    report = _policy_report(result, lr)
    if number == 0:
        report["ppo/first_ratio_mean"] = report["ppo/ratio_mean"]
    return report | {"speed/token_imbalance": Mean(imbalance(tokens, deal(tokens, mesh.data.size)), 1)}


def learning_rate(config: OptimizerConfig, done: int, num_steps: int) -> float:
    """Of the optimizer step that follows `done` others, of so many in all."""
    return cosine_with_min_lr(
        done + 1,
        peak=config.lr,
        min_lr_frac=config.min_lr_frac,
        warmup_steps=math.ceil(config.warmup_frac * num_steps),
        num_steps=num_steps,
    )


def make_policy_loss(config: PPOConfig, count: int) -> Loss:
    """The clipped surrogate, less the entropy bonus; `count` is that of the whole minibatch."""

    def loss(output: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
        log_probs, entropies = output.unbind(-1)
        weights = token_weights(batch.response_mask, loss_mean=config.loss_mean, count=count)
        result = policy_loss(
            log_probs=log_probs,
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            weights=weights,
            clip=config.clip,
        )
        bonus = entropy_bonus(entropies, weights)
        # at 0 it must not touch the gradient's bits
        value = result.loss - config.entropy_coef * bonus if config.entropy_coef else result.loss
        entropy = entropies.detach().where(batch.response_mask, 0.0).sum()
        sums = (result.num_tokens, result.num_clipped, result.ratio_sum, result.kl_sum, entropy)
        return value, torch.stack([value.detach(), *(x.float() for x in sums)])

    return loss


def make_value_loss(config: PPOConfig, count: int) -> Loss:
    """The clipped squared error of the values; `count` is that of the whole minibatch."""

    def loss(output: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
        result = value_loss(
            values=state_values(output),
            old_values=batch.old_values,
            returns=batch.returns,
            weights=token_weights(batch.response_mask, loss_mean=config.loss_mean, count=count),
            clip=config.value_clip,
        )
        value = config.value_coef * result.loss
        return value, torch.stack([value.detach(), result.num_tokens.float(), result.num_clipped.float()])

    return loss


def _policy_report(result: StepResult, lr: float) -> dict[str, Mergeable]:
    loss, num_tokens, num_clipped, ratio, kl, entropy = result.sums.tolist()
    return {
        "ppo/loss": Mean(loss, 1),
        "ppo/ratio_mean": Mean(ratio, num_tokens),
        "ppo/clip_frac": Mean(num_clipped, num_tokens),
        "ppo/approx_kl": Mean(kl, num_tokens),
        "ppo/entropy": Mean(entropy, num_tokens),
        "optimizer/policy_grad_norm": Mean(result.grad_norm, 1),
        "optimizer/policy_learning_rate": Latest(lr),
    }


def _critic_report(result: StepResult, lr: float) -> dict[str, Mergeable]:
    loss, num_tokens, num_clipped = result.sums.tolist()
    return {
        "critic/loss": Mean(loss, 1),
        "critic/clip_frac": Mean(num_clipped, num_tokens),
        "optimizer/critic_grad_norm": Mean(result.grad_norm, 1),
        "optimizer/critic_learning_rate": Latest(lr),
    }
