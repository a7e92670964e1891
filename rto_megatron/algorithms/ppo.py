"""PPO's two losses and the entropy bonus: sums over tokens whose weights add up to 1 over the minibatch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.algorithms.masked import weighted_sum, widen


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The policy's loss on a microbatch, and sums to be added over microbatches and ranks."""

    loss: Tensor
    """Scalar with a gradient: this microbatch's share of the minibatch's loss."""
    num_tokens: Tensor
    """Response tokens."""
    num_clipped: Tensor
    """Tokens whose gradient the clip has removed."""
    ratio_sum: Tensor
    """Sum of new over old probability; over num_tokens it is 1 before the first step."""
    kl_sum: Tensor
    """Nats: sum of the k3 estimate of KL(old || new)."""


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """The critic's loss on a microbatch, and sums to be added over microbatches and ranks."""

    loss: Tensor
    """Scalar with a gradient: this microbatch's share of the minibatch's loss."""
    num_tokens: Tensor
    """Response tokens."""
    num_clipped: Tensor
    """Tokens where the clipped error is the larger one, which has no gradient."""


def policy_loss(
    *, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip: float
) -> PolicyLoss:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), summed over this microbatch.

        ratio[t] = exp(log pi - log pi_old)[t]
        loss = - sum over t of w[t] * min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)[t]

    Args:
        log_probs: [B, T] nats, under the policy being trained; carries the gradient.
        old_log_probs: [B, T] nats, under the policy that sampled.
        advantages: [B, T] whitened.
        weights: [B, T] from `token_weights`, 0 outside the response.
    """
    mask = weights > 0
    log_ratio = torch.where(
        mask, widen(log_probs) - widen(old_log_probs), 0.0
    )  # before exp: inf * 0 is NaN in backward
    advantages = torch.where(mask, widen(advantages), 0.0)
    ratio = log_ratio.exp()
    free = ratio * advantages
    held = ratio.clamp(1 - clip, 1 + clip) * advantages
    with torch.no_grad():
        sums = {
            "num_tokens": mask.sum(),
            "num_clipped": (held < free).sum(),
            "ratio_sum": torch.where(mask, ratio, 0.0).sum(),
            "kl_sum": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    return PolicyLoss(loss=-weighted_sum(torch.minimum(free, held), weights), **sums)


def importance_weights(
    *, proximal_log_probs: Tensor, behaviour_log_probs: Tensor, response_mask: Tensor, cap: float
) -> Tensor:
    """Truncated importance weights of decoupled PPO (arXiv 2110.00641, equation 5; truncation: arXiv 2505.24298).

        w[t] = min(exp(log pi_prox - log pi_behaviour)[t], cap)

    Samples of an older policy (behaviour) are weighted to stand for the one that is being updated (proximal), around
    which the ratio is clipped. As w >= 0 the loss is that of `policy_loss` with w * A for A, and pi_prox for pi_old.

    Args:
        proximal_log_probs: [B, T] nats, under the policy as it is before the update.
        behaviour_log_probs: [B, T] nats, under the policy that sampled.
        response_mask: [B, T] bool.
        cap: largest weight, 1 or more.

    Returns:
        [B, T] weights, 1 outside the response and where both policies are one.
    """
    log_ratio = torch.where(response_mask, widen(proximal_log_probs) - widen(behaviour_log_probs), 0.0)
    return log_ratio.exp().clamp(max=cap)


def value_loss(
    *, values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> ValueLoss:
    """Half the squared error of the critic, the worse of free and clipped (PPO's released code).

        held[t] = V_old + clip(V - V_old, -clip, clip)
        loss = 1/2 * sum over t of w[t] * max((V - R)^2, (held - R)^2)[t]

    Args:
        values: [B, T] reward units, from the critic being trained; carries the gradient.
        old_values: [B, T] reward units, from the critic before the update.
        returns: [B, T] reward units.
        weights: [B, T] from `token_weights`, 0 outside the response.
        clip: largest step of a value that counts, reward units; None leaves it alone.
    """
    mask = weights > 0
    values, old_values, returns = (torch.where(mask, widen(x), 0.0) for x in (values, old_values, returns))
    error = (values - returns).square()
    num_clipped = torch.zeros_like(mask.sum())
    if clip is not None:
        held = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
        num_clipped = (held > error).sum()
        error = torch.maximum(error, held)
    return ValueLoss(loss=weighted_sum(error, weights) / 2, num_tokens=mask.sum(), num_clipped=num_clipped)


def entropy_bonus(entropy: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean entropy, a scalar in nats; subtract it, times its coefficient, from the policy loss.

    Args:
        entropy: [B, T] nats, of the distribution each token was drawn from; carries the gradient.
        weights: [B, T] from `token_weights`, 0 outside the response.
    """
    return weighted_sum(widen(entropy), weights)
