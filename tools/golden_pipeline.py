"""The golden pipeline: from raw rows to both losses, through the same functions a run goes through."""

import torch
from golden_window import Fields, Inputs, close_window, pad_left, released_strip
from torch import Tensor

from rto_megatron.algorithms.advantages import gae
from rto_megatron.algorithms.kl import kl_estimates
from rto_megatron.algorithms.log_probs import token_log_probs
from rto_megatron.algorithms.masked import loss_count, masked_mean, masked_sum, token_weights
from rto_megatron.algorithms.ppo import policy_loss, value_loss
from rto_megatron.algorithms.rewards import TokenRewards, normalise_scores, shape_token_rewards
from rto_megatron.algorithms.whitening import masked_moments, whiten

SCORE_CLIP = 10.0


def sequence_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The released losses average over the tokens of a row, then over rows."""
    return token_weights(mask, loss_mean="sequence", count=loss_count(mask, "sequence"), dtype=dtype)


def released_dpo_coef(scale: float | None) -> float:
    """The released code ignores a scale of 0 or less: it acts as 1."""
    return scale if scale is not None and scale > 0 else 1.0


def released_dpo_clip(clip: float | None) -> float | None:
    """The released code turns the clip off by 0."""
    return clip if clip is not None and clip > 0 else None


def released_kl_coef(kl_coef: float) -> float:
    """The released code takes a coefficient below 0 for 0; here the config refuses it."""
    return max(kl_coef, 0.0)


def pipeline_rewards(x: Inputs, mask: Tensor, log_probs: dict[str, Tensor], *, released: bool) -> TokenRewards:
    """The token rewards of a pipeline case; without DPO logits, plain PPO."""
    scale = x["dpo_reward_scale"]
    coef = 0.0 if "dpo" not in log_probs else released_dpo_coef(scale) if released else scale
    return shape_token_rewards(
        policy_log_probs=log_probs["policy"],
        ref_log_probs=log_probs["ref"],
        dpo_log_probs=log_probs.get("dpo", log_probs["ref"]),
        scores=normalise_scores(x.floats("rm_score"), mean=0.0, std=1.0, clip=SCORE_CLIP),
        response_mask=mask,
        dpo_coef=coef,
        kl_coef=released_kl_coef(x["kl_coef"]),
        score_coef=1.0,
        dpo_clip=released_dpo_clip(x["dpo_reward_clip"]),
    )


def pipeline(x: Inputs, *, released: bool = True) -> Fields:
    window = close_window(x)
    mask, num_actions = window.action_mask, window.action_mask.shape[1]
    log_probs = {
        role: token_log_probs(x.floats(f"logits_{role}"), window.sequences)[:, -num_actions:]
        for role in ("policy", "ref", "dpo")
        if x[f"logits_{role}"] is not None
    }
    rewards = pipeline_rewards(x, mask, log_probs, released=released)
    values = x.floats("values")
    advantages, returns = gae(
        rewards=rewards.total, values=values, response_mask=mask, gamma=x["gamma"], lam=x["lambd"]
    )
    kl = kl_estimates(policy_log_probs=log_probs["policy"], ref_log_probs=log_probs["ref"], response_mask=mask).k1
    stripped = [released_strip(window, row) for row in range(len(mask))]
    out = {
        "sequences": window.sequences,
        "attention_mask": window.attention_mask,
        "action_mask": mask,
        "logp": log_probs["policy"],
        "logp_ref": log_probs["ref"],
        "token_reward": rewards.dpo if "dpo" in log_probs else None,
        "reward": rewards.total,
        "kl": kl,
        "advantages": advantages,
        "returns": returns,
        "info": {
            "kl": masked_mean(kl, mask, -1),
            "reward": x.floats("rm_score"),
            "return": masked_sum(rewards.total, mask, -1),
            "response_length": mask.sum(-1),
            "total_length": window.attention_mask.sum(-1),
        },
    }
    kept = [actions for _, actions, _ in stripped]
    cut = {"old_log_probs": log_probs["policy"], "advantages": advantages, "old_values": values, "returns": returns}
    rows = {name: [row[: len(k)] for row, k in zip(whole, kept, strict=True)] for name, whole in cut.items()}
    return out | pipeline_update(x, rows, kept)


def pipeline_update(x: Inputs, rows: dict[str, list[Tensor]], kept: list[Tensor]) -> Fields:
    """Whiten, lay out again padded on the left, and take both losses of a pipeline case."""
    mask = pad_left(kept)
    old = {name: pad_left(ragged, fill=float("nan")) for name, ragged in rows.items()}  # padding must not matter
    whitened = whiten(old["advantages"], mask, masked_moments(old["advantages"], mask))
    new_log_probs, new_values = (
        pad_left([torch.tensor(row, dtype=x.dtype) for row in x[name]]).requires_grad_()
        for name in ("new_logp", "new_values")
    )
    weights = sequence_weights(mask, x.dtype)
    policy = policy_loss(
        log_probs=new_log_probs,
        old_log_probs=old["old_log_probs"],
        advantages=whitened,
        weights=weights,
        clip=x["clip_eps"],
    ).loss
    critic = value_loss(
        values=new_values,
        old_values=old["old_values"],
        returns=old["returns"],
        weights=weights,
        clip=x["value_clip"],
    ).loss
    return {
        "normalized_advantages": [row[-len(k) :] for row, k in zip(whitened, kept, strict=True)],
        "collated_action_mask": mask,
        "policy_loss": policy,
        "value_loss": critic,
        "grad_new_logp_collated": torch.autograd.grad(policy, new_log_probs)[0],
        "grad_new_values_collated": torch.autograd.grad(critic, new_values)[0],
    }
