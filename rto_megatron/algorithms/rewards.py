"""Token rewards: the DPO term, the KL penalty, and the score at the end."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rto_megatron.algorithms.kl import kl_estimates
from rto_megatron.algorithms.masked import last_response_token, widen

Shaping = Literal["token", "sentence", "terminal", "shaping_only"]


@dataclass(frozen=True, kw_only=True)
class TokenRewards:
    """Token rewards and the three terms they are the sum of; [B, T] reward units, exactly 0 outside the response."""

    total: Tensor
    """dpo + kl + score."""
    dpo: Tensor
    """Scaled, clipped, and placed by the shaping."""
    kl: Tensor
    """Minus the KL penalty."""
    score: Tensor
    """Only on the last response token."""
    num_clipped: Tensor
    """int64 scalar: tokens whose DPO reward the clip has cut."""


def normalise_scores(scores: Tensor, *, mean: float, std: float, clip: float | None) -> Tensor:
    """Reward-model scores on the scale that PPO sees: clip((score - mean) / std, -clip, clip); None does not clip.

    Mean and std are those that the reward run stored. The released code clips at 10.
    """
    normalised = (widen(scores) - mean) / std
    return normalised if clip is None else normalised.clamp(-clip, clip)


def dpo_token_rewards(
    *, dpo_log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor, dpo_coef: float, dpo_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The dense reward of RTO (arXiv 2404.18922, equation 4.7), scaled first and then clipped.

        r[t] = clip(b1 * (log pi_dpo - log pi_ref)[t], -dpo_clip, dpo_clip)

    The released code ignores a scale of 0 or less, that is, uses 1. Here a coefficient means what it
    says: 0 gives exactly 0 whatever the log-probs hold, so that b1 = 0 is PPO bit for bit.

    Args:
        dpo_log_probs: [B, T] nats, under the frozen DPO model.
        ref_log_probs: [B, T] nats, under the frozen SFT model.
        response_mask: [B, T] bool.
        dpo_coef: b1, reward units per nat. Not the beta that DPO was trained with.
        dpo_clip: largest size of one token's reward, reward units; None leaves it alone.

    Returns:
        [B, T] rewards, 0 outside the response; and how many of them the clip has cut.
    """
    if dpo_coef == 0:
        return torch.zeros_like(widen(ref_log_probs)), response_mask.new_zeros((), dtype=torch.int64)
    scaled = torch.where(response_mask, dpo_coef * (widen(dpo_log_probs) - widen(ref_log_probs)), 0.0)
    if dpo_clip is None:
        return scaled, response_mask.new_zeros((), dtype=torch.int64)
    return scaled.clamp(-dpo_clip, dpo_clip), (scaled.abs() > dpo_clip).sum()


def place_rewards(
    rewards: Tensor, response_mask: Tensor, *, shaping: Shaping, segment_end: Tensor | None = None
) -> Tensor:
    """Move token rewards within each response (arXiv 2404.18922, section 5.2); [B, T] -> [B, T].

        token         RTO: they stay where they are
        sentence      Semi-RTO: the sum over each sentence, on the token that ends it
        terminal      DDPO: the sum over the response, on its last token
        shaping_only  RS-PPO: they stay, and the last token also gets minus their sum

    The first three keep the total of a response. `shaping_only` makes it 0, so that the return is
    that of PPO and the token rewards only say where it was earned.

    Args:
        rewards: [B, T] reward units, 0 outside the response.
        segment_end: [B, T] bool, True on tokens that end a sentence; only `sentence` reads it.
            What follows the last of them goes to the last response token.
    """
    last = last_response_token(response_mask)
    match shaping:
        case "token":
            return rewards
        case "sentence":
            if segment_end is None:
                raise ValueError("shaping 'sentence' needs segment_end, the tokens that end a sentence; got None")
            return _sum_segments(rewards, (segment_end & response_mask) | last)
        case "terminal":
            return torch.where(last, rewards.sum(-1, keepdim=True), 0.0)
        case "shaping_only":
            return torch.where(last, rewards - rewards.sum(-1, keepdim=True), rewards)
    raise ValueError(f"shaping must be token, sentence, terminal or shaping_only, got {shaping!r}")


def _sum_segments(rewards: Tensor, ends: Tensor) -> Tensor:
    """Sum of `rewards` since the previous end, on each end; a scan, because scatter_add is random on a GPU."""
    placed = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1]):
        running = running + rewards[:, t]
        placed[:, t] = torch.where(ends[:, t], running, 0.0)
        running = torch.where(ends[:, t], 0.0, running)
    return placed


def shape_token_rewards(
    *,
    policy_log_probs: Tensor,
    ref_log_probs: Tensor,
    dpo_log_probs: Tensor,
    scores: Tensor,
    response_mask: Tensor,
    dpo_coef: float,
    kl_coef: float,
    score_coef: float,
    dpo_clip: float | None = None,
    shaping: Shaping = "token",
    segment_end: Tensor | None = None,
) -> TokenRewards:
    """Token rewards of RTO: a dense DPO term, a KL penalty, and the score at the end.

    For response token t, with coefficients b1 (dpo), b2 (kl), b3 (score):

        r[t] = clip(b1 * (log pi_dpo - log pi_ref)[t])     placed by `shaping`
             - b2 * (log pi_old - log pi_ref)[t]
             + b3 * score                                  only where t is the last response token

    arXiv 2404.18922, equation 4.7. A coefficient of 0 makes its term exactly 0: b1 = 0 is PPO.

    Args:
        policy_log_probs: [B, T] nats, under the policy that wrote the response.
        ref_log_probs: [B, T] nats, under the frozen SFT model.
        dpo_log_probs: [B, T] nats, under the frozen DPO model; the reference's where there is none.
        scores: [B] normalised reward-model units, one per response.
        response_mask: [B, T] bool, True on tokens the policy sampled.
        dpo_clip: largest size of one token's DPO reward, reward units; None leaves it alone.
        shaping: where the DPO rewards go; see `place_rewards`.
        segment_end: [B, T] bool, True on tokens that end a sentence; only `sentence` reads it.

    Returns:
        Rewards and terms, [B, T], exactly 0 outside the response.
    """
    dense, num_clipped = dpo_token_rewards(
        dpo_log_probs=dpo_log_probs,
        ref_log_probs=ref_log_probs,
        response_mask=response_mask,
        dpo_coef=dpo_coef,
        dpo_clip=dpo_clip,
    )
    dpo = place_rewards(dense, response_mask, shaping=shaping, segment_end=segment_end)
    kl = torch.zeros_like(dpo)
    if kl_coef != 0:
        estimates = kl_estimates(
            policy_log_probs=policy_log_probs, ref_log_probs=ref_log_probs, response_mask=response_mask
        )
        kl = -kl_coef * estimates.k1
    score = torch.zeros_like(dpo)
    if score_coef != 0:
        score = torch.where(last_response_token(response_mask), score_coef * widen(scores)[:, None], 0.0)
    return TokenRewards(total=dpo + kl + score, dpo=dpo, kl=kl, score=score, num_clipped=num_clipped)
