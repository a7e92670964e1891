"""How far the policy is from the reference, and the controller of its price."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.algorithms.masked import widen


@dataclass(frozen=True)
class KLEstimates:
    """Three estimates of KL(policy || reference) from the sampled tokens, [B, T] nats, 0 outside the response."""

    k1: Tensor
    """log p - log q: unbiased, may be negative. The one in the token reward."""
    k2: Tensor
    """Half the square of k1: biased, never negative."""
    k3: Tensor
    """q / p - 1 - log(q / p): unbiased, never negative, less noisy than k1."""


def kl_estimates(*, policy_log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor) -> KLEstimates:
    """k1, k2 and k3 of Schulman 2020, "Approximating KL Divergence", for tokens drawn from the policy.

    With d = log pi - log pi_ref of the sampled token:

        k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

    Args:
        policy_log_probs: [B, T] nats, under the policy that sampled.
        ref_log_probs: [B, T] nats, under the frozen SFT model.
        response_mask: [B, T] bool.
    """
    k1 = torch.where(response_mask, widen(policy_log_probs) - widen(ref_log_probs), 0.0)
    return KLEstimates(k1=k1, k2=k1.square() / 2, k3=torch.expm1(-k1) + k1)


def adapt_kl_coef(kl_coef: float, *, observed_kl: float, target: float | None, horizon: int, num_samples: int) -> float:
    """The KL coefficient after one rollout; Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

        error = clip(observed / target - 1, -0.2, 0.2)
        coef' = coef * (1 + error * num_samples / horizon)

    Args:
        observed_kl: nats per response, mean over the rollout.
        target: nats per response; None keeps the coefficient fixed.
        horizon: samples over which the controller moves.
        num_samples: responses of the rollout.
    """
    if target is None:
        return kl_coef
    error = min(max(observed_kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
