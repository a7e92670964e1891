"""What a step of RTO reports, from all rows of the step; names as in docs/metrics.md."""

import torch
from torch import Tensor

from rto_megatron.algorithms.health import correlation, positive_share, repetition
from rto_megatron.algorithms.kl import kl_estimates
from rto_megatron.algorithms.ppo import importance_weights
from rto_megatron.algorithms.whitening import explained_variance, masked_moments, mean_and_variance
from rto_megatron.batch import Experience, Rollout, Signals
from rto_megatron.config.algorithm import RTOConfig
from rto_megatron.metrics import Max, Mean, take
from rto_megatron.rollout.experience import Credit
from rto_megatron.rollout.guard import difference_of

LEAST_SAMPLES = 16
"""Of a correlation: one of fewer is mostly chance."""


def step_metrics(
    rollout: Rollout, signals: Signals, experience: Experience, credit: Credit, config: RTOConfig
) -> dict[str, float]:
    """All that the rows of a step say."""
    return (
        rollout_metrics(rollout, signals)
        | signal_metrics(rollout, signals, config)
        | credit_metrics(rollout, experience, credit)
        | health_metrics(rollout, signals)
    )


def rollout_metrics(rollout: Rollout, signals: Signals) -> dict[str, float]:
    """Lengths, and how far the decoding forward is from the training forward."""
    responses = rollout.response_mask.sum(-1)
    prompts = rollout.num_tokens - responses
    difference = difference_of(rollout, signals)
    numbers = take(
        {
            "length/prompt_mean": Mean.over(prompts),
            "length/prompt_max": Max.over(prompts),
            "length/response_mean": Mean.over(responses),
            "length/response_max": Max.over(responses),
            "length/truncated_frac": Mean.over(rollout.truncated),
            "decode/log_prob_diff_mean": Mean.over(difference.values),
            "decode/log_prob_diff_max": Max.over(difference.values),
            "decode/checked_frac": Mean.over(signals.checked),
        }
    )
    return numbers | {"decode/effective_share": difference.effective_share}


def signal_metrics(rollout: Rollout, signals: Signals, config: RTOConfig) -> dict[str, float]:
    """Distance from the reference, and the reward model's raw scores."""
    mask = rollout.response_mask
    kl = kl_estimates(
        policy_log_probs=signals.policy_log_probs, ref_log_probs=signals.ref_log_probs, response_mask=mask
    )
    numbers = take(
        {
            "kl/k1": Mean.over(kl.k1, mask),
            "kl/k2": Mean.over(kl.k2, mask),
            "kl/k3": Mean.over(kl.k3, mask),
            "kl/sequence": Mean.over(kl.k1.sum(-1)),
            "reward/raw_score_mean": Mean.over(signals.raw_scores),
            "reward/score_clip_frac": Mean.over(signals.scores.abs() >= config.score_clip),
        }
    )
    numbers["reward/raw_score_std"] = signals.raw_scores.double().std(correction=0).item()
    return numbers


def staleness_metrics(rollout: Rollout, signals: Signals, proximal: Tensor, *, cap: float) -> dict[str, float]:
    """How far the policy has moved since it sampled; `proximal` [B, T] nats are its log-probs before the update."""
    mask = rollout.response_mask
    weights = importance_weights(
        proximal_log_probs=proximal, behaviour_log_probs=signals.policy_log_probs, response_mask=mask, cap=cap
    )
    return take(
        {
            "staleness/importance_mean": Mean.over(weights, mask),
            "staleness/truncated_frac": Mean.over(weights >= cap, mask),
            "staleness/log_prob_diff_mean": Mean.over((proximal - signals.policy_log_probs).abs(), mask),
        }
    )


def credit_metrics(rollout: Rollout, experience: Experience, credit: Credit) -> dict[str, float]:
    """Reward terms, their shares of the return, advantages and the critic's fit."""
    mask, rewards = rollout.response_mask, credit.rewards
    terms = {"dpo": rewards.dpo, "kl": rewards.kl, "score": rewards.score}
    numbers = {"reward/dpo_clip_frac": Mean(float(rewards.num_clipped), float(mask.sum()))}
    for name, term in {"total": rewards.total, **terms}.items():
        numbers[f"reward/{name}_sum"] = Mean.over(term.sum(-1))
        numbers[f"reward/{name}_mean"] = Mean.over(term, mask)
    sizes = {name: term.sum(-1).abs().double().mean().item() for name, term in terms.items()}
    whole = sum(sizes.values())
    shares = {f"reward/{name}_share": size / whole if whole else 0.0 for name, size in sizes.items()}
    numbers["critic/return_mean"] = Mean.over(experience.returns, mask)
    numbers["critic/value_mean"] = Mean.over(experience.old_values, mask)
    return (
        take(numbers)
        | shares
        | _spread("advantage/raw_", credit.raw_advantages, mask)
        | _spread("advantage/", experience.advantages, mask)
        | {"critic/explained_variance": _explained(experience)}
    )


def health_metrics(rollout: Rollout, signals: Signals) -> dict[str, float]:
    """What only alarms need; numbers that the samples do not tell are left out."""
    mask, few = rollout.response_mask, len(rollout) < LEAST_SAMPLES
    found = {
        "health/dpo_positive_frac": positive_share(signals.dpo_log_probs - signals.ref_log_probs, mask),
        "health/score_length_correlation": None if few else correlation(signals.scores, mask.sum(-1)),
        "health/repetition": repetition(rollout.tokens, mask).mean().item(),
    }
    return {name: number for name, number in found.items() if number is not None}


def speed_metrics(rollout: Rollout, seconds: dict[str, float]) -> dict[str, float]:
    """Tokens over seconds, all ranks together."""
    return {
        "speed/tokens_per_second": int(rollout.num_tokens.sum()) / seconds["time/step_seconds"],
        "speed/generated_tokens_per_second": int(rollout.response_mask.sum()) / seconds["time/generate_seconds"],
    }


def _spread(prefix: str, x: Tensor, mask: Tensor) -> dict[str, float]:
    mean, variance = mean_and_variance(masked_moments(x, mask))
    return {f"{prefix}mean": mean.item(), f"{prefix}std": torch.sqrt(variance).item()}


def _explained(experience: Experience) -> float:
    mask = experience.response_mask
    errors = masked_moments(experience.returns - experience.old_values, mask)
    return explained_variance(returns=masked_moments(experience.returns, mask), errors=errors)
