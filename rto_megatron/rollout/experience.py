"""From a rollout and what the roles say of it to what PPO learns from."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rto_megatron.algorithms.advantages import gae, reinforce_pp
from rto_megatron.algorithms.ppo import importance_weights
from rto_megatron.algorithms.rewards import TokenRewards, shape_token_rewards
from rto_megatron.algorithms.whitening import masked_moments, whiten
from rto_megatron.batch import Experience, Rollout, Signals
from rto_megatron.config.algorithm import AdvantageConfig, RTOConfig
from rto_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Who earned what: token rewards by term, and advantages before whitening."""

    rewards: TokenRewards
    raw_advantages: Tensor
    """[B, T] reward units, 0 outside the response."""


def make_experience(
    rollout: Rollout,
    signals: Signals,
    rto: RTOConfig,
    advantage: AdvantageConfig,
    *,
    kl_coef: float,
    sentence_ends: Tensor | None = None,
) -> tuple[Experience, Credit]:
    """Token rewards, advantages and returns of all rows of a step.

    Every rank has all rows and comes to the same bits, so no reduction is needed.

    Args:
        rollout, signals: all replicas' rows.
        kl_coef: of this step; differs from `rto.kl_coef` where it adapts.
        sentence_ends: [V] bool, ids that close a sentence; for `rto.shaping: sentence` only.
    """
    mask = rollout.response_mask
    rewards = shape_token_rewards(
        policy_log_probs=signals.policy_log_probs,
        ref_log_probs=signals.ref_log_probs,
        dpo_log_probs=signals.dpo_log_probs,
        scores=signals.scores,
        response_mask=mask,
        dpo_coef=rto.dpo_coef,
        kl_coef=kl_coef,
        score_coef=rto.score_coef,
        dpo_clip=rto.dpo_clip,
        shaping=rto.shaping,
        segment_end=None if sentence_ends is None else sentence_ends.to(mask.device)[rollout.tokens] & mask,
    )
    if advantage.estimator == "gae":
        raw, returns = gae(
            rewards=rewards.total,
            values=signals.values,
            response_mask=mask,
            gamma=advantage.gamma,
            lam=advantage.lam,
        )
    else:
        raw = returns = reinforce_pp(rewards=rewards.total, response_mask=mask, gamma=advantage.gamma)
    advantages = whiten(raw, mask, masked_moments(raw, mask)) if advantage.whiten else raw
    experience = Experience(
        tokens=rollout.tokens,
        num_tokens=rollout.num_tokens,
        response_mask=mask,
        old_log_probs=signals.policy_log_probs,
        old_values=signals.values,
        advantages=advantages,
        returns=returns,
    )
    return experience, Credit(rewards=rewards, raw_advantages=raw)


def for_newer_policy(experience: Experience, proximal_log_probs: Tensor, *, cap: float) -> Experience:
    """Experience of an older policy, for the update of a newer one: decoupled PPO, see `importance_weights`.

    Args:
        proximal_log_probs: [B, T] nats, under the policy as it is before the update.
        cap: largest importance weight.
    """
    weights = importance_weights(
        proximal_log_probs=proximal_log_probs,
        behaviour_log_probs=experience.old_log_probs,
        response_mask=experience.response_mask,
        cap=cap,
    )
    return replace(experience, old_log_probs=proximal_log_probs, advantages=experience.advantages * weights)


def sentence_ends_of(rto: RTOConfig, tokenizer: Tokenizer) -> Tensor | None:
    """[V] bool: True for ids whose text closes a sentence; None where `rto.shaping` does not ask for them."""
    if rto.shaping != "sentence":
        return None
    pieces = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    return torch.tensor([piece.rstrip(" ").endswith((".", "!", "?", "\n")) for piece in pieces])
