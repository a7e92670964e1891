"""From token rewards to advantages: GAE with a critic, REINFORCE++ without one."""

import torch
from torch import Tensor

from rto_megatron.algorithms.masked import widen


def gae(*, rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over response tokens (arXiv 1506.02438, equation 16).

        delta[t] = r[t] + gamma * V[t + 1] - V[t]          V is 0 after the last response token
        A[t]     = delta[t] + gamma * lam * A[t + 1]
        R[t]     = A[t] + V[t]                             the critic's target, from A before whitening

    Nothing is bootstrapped at the end, whether the response closed or filled its window.

    Args:
        rewards: [B, T] reward units.
        values: [B, T] reward units: column t is the value of the state before token t.
        response_mask: [B, T] bool. What stands outside it never matters.

    Returns:
        advantages and returns, [B, T] reward units, exactly 0 outside the response.
    """
    rewards = torch.where(response_mask, widen(rewards), 0.0)
    values = torch.where(response_mask, widen(values), 0.0)
    advantages = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later
        next_value = values[:, t]
        advantages[:, t] = later
    advantages = torch.where(response_mask, advantages, 0.0)
    return advantages, advantages + values


def reinforce_pp(*, rewards: Tensor, response_mask: Tensor, gamma: float) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262; with RTO's token rewards: 2404.18922, appendix E).

        A[t] = r[t] + gamma * A[t + 1]

    that is, the discounted sum of what is still to come, KL penalty included. It is meant to be
    whitened over the whole batch, which is its baseline.

    Args:
        rewards: [B, T] reward units.
        response_mask: [B, T] bool. What stands outside it never matters.

    Returns:
        [B, T] reward units, exactly 0 outside the response.
    """
    nothing = torch.zeros_like(rewards)
    return gae(rewards=rewards, values=nothing, response_mask=response_mask, gamma=gamma, lam=1.0)[0]
