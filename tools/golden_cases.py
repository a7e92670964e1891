"""How each golden file maps to the package's functions: one adapter a file.

An adapter takes a case's inputs and returns every field of its `out`. Most only rename: the functions
do not mind where in its row a response lies, so a response window is as good as a whole row.
"""

from collections.abc import Callable

import torch
from golden_pipeline import (
    SCORE_CLIP,
    pipeline,
    released_dpo_clip,
    released_dpo_coef,
    released_kl_coef,
    sequence_weights,
)
from golden_window import Fields, Inputs, pad_left, sequences

from rto_megatron.algorithms.advantages import gae
from rto_megatron.algorithms.dpo import dpo_loss, sequence_log_probs
from rto_megatron.algorithms.kl import adapt_kl_coef, kl_estimates
from rto_megatron.algorithms.learning_rate import cosine_with_min_lr
from rto_megatron.algorithms.log_probs import token_log_probs
from rto_megatron.algorithms.masked import loss_count, masked_mean, masked_sum, token_weights
from rto_megatron.algorithms.ppo import policy_loss, value_loss
from rto_megatron.algorithms.reward_model import pairwise_loss, sequence_scores, state_values
from rto_megatron.algorithms.rewards import dpo_token_rewards, normalise_scores, shape_token_rewards
from rto_megatron.algorithms.sft import lm_loss
from rto_megatron.algorithms.whitening import masked_moments, whiten

MIN_LR_FRAC = 0.1
"""The released script's; the files do not carry it."""


def action_logprobs(x: Inputs) -> Fields:
    log_probs = token_log_probs(x.floats("logits"), x.ints("sequences"))
    return {"action_log_probs": log_probs[:, -x["num_actions"] :], "full_log_probs": log_probs[:, 1:]}


def reward_and_value_heads(x: Inputs) -> Fields:
    outputs = x.floats("hidden") @ x.floats("head_weight")
    attended = x.mask("attention_mask")
    num_tokens = (attended * torch.arange(1, attended.shape[1] + 1)).amax(-1)
    scores = sequence_scores(outputs, num_tokens)
    values = state_values(outputs)[:, -x["num_actions"] :]
    # The released heads normalise: the score in eval mode only, values in both; ours leave that to the caller.
    mean, std = (x["mean"], x["std"]) if x["normalize_reward"] else (0.0, 1.0)
    return {
        "reward": normalise_scores(scores, mean=mean, std=std, clip=None),
        "reward_in_train_mode": scores,
        "values": normalise_scores(values, mean=mean, std=std, clip=None),
        "values_in_train_mode": normalise_scores(values, mean=mean, std=std, clip=None),
    }


def token_level_reward(x: Inputs) -> Fields:
    mask, log_probs, ref = x.mask("action_mask"), x.floats("logp"), x.floats("logp_ref")
    rewards = shape_token_rewards(
        policy_log_probs=log_probs,
        ref_log_probs=ref,
        # The DPO reward is given as it is: the log-ratio that a coefficient of 1 turns into it.
        dpo_log_probs=ref if x["token_reward"] is None else ref + x.floats("token_reward"),
        scores=normalise_scores(x.floats("rm_score"), mean=0.0, std=1.0, clip=SCORE_CLIP),
        response_mask=mask,
        dpo_coef=1.0,
        kl_coef=released_kl_coef(x["kl_coef"]),
        score_coef=1.0,
    )
    kl = kl_estimates(policy_log_probs=log_probs, ref_log_probs=ref, response_mask=mask).k1
    return {
        "reward": rewards.total,
        "kl": kl,
        "return_sum": masked_sum(rewards.total, mask, -1),
        "kl_mean": masked_mean(kl, mask, -1),
    }


def token_level_reward_packed(x: Inputs) -> Fields:
    lengths = x["num_actions"]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows: Fields = {"action_mask": mask.int().tolist(), "token_reward": None}
    rows |= {"kl_coef": x["kl_coef"], "rm_score": x["rm_score"]}
    for name in ("logp", "logp_ref"):
        unpacked = torch.zeros(mask.shape, dtype=x.dtype)
        unpacked[mask] = x.floats(name)[0]
        rows[name] = unpacked.tolist()
    out = token_level_reward(Inputs(rows, str(x.dtype).removeprefix("torch.")))
    return {name: out[name][mask][None] for name in ("reward", "kl")}


def dpo_token_reward(x: Inputs, *, released: bool = True) -> Fields:
    """With `released`, a scale of 0 or less acts as 1; without, as what it says."""
    mask, scale = x.mask("action_mask"), x["dpo_reward_scale"]
    rewards, _ = dpo_token_rewards(
        dpo_log_probs=x.floats("logp_dpo"),
        ref_log_probs=x.floats("logp_ref"),
        response_mask=mask,
        dpo_coef=released_dpo_coef(scale) if released else scale,
        dpo_clip=released_dpo_clip(x["dpo_reward_clip"]),
    )
    return {"token_reward": rewards, "token_reward_sum": masked_sum(rewards, mask, -1)}


def gae_case(x: Inputs) -> Fields:
    advantages, returns = gae(
        rewards=x.floats("rewards"),
        values=x.floats("values"),
        response_mask=x.mask("action_mask"),
        gamma=x["gamma"],
        lam=x["lambd"],
    )
    return {"advantages": advantages, "returns": returns}


def advantage_whitening(x: Inputs) -> Fields:
    rows = [torch.tensor(row, dtype=x.dtype) for row in x["advantages"]]
    mask = pad_left([torch.ones_like(row, dtype=torch.bool) for row in rows])
    advantages = pad_left(rows, fill=float("nan"))  # padding must not matter
    whitened = whiten(advantages, mask, masked_moments(advantages, mask))
    return {"normalized": [row[kept] for row, kept in zip(whitened, mask, strict=True)]}


def policy_loss_case(x: Inputs) -> Fields:
    log_probs = x.leaf("logp")
    loss = policy_loss(
        log_probs=log_probs,
        old_log_probs=x.floats("old_logp"),
        advantages=x.floats("advantages"),
        weights=sequence_weights(x.mask("action_mask"), x.dtype),
        clip=x["clip_eps"],
    ).loss
    return {"loss": loss, "grad_logp": torch.autograd.grad(loss, log_probs)[0]}


def value_loss_case(x: Inputs) -> Fields:
    values = x.leaf("values")
    loss = value_loss(
        values=values,
        old_values=x.floats("old_values"),
        returns=x.floats("returns"),
        weights=sequence_weights(x.mask("action_mask"), x.dtype),
        clip=x["clip_eps"],
    ).loss
    return {"loss": loss, "grad_values": torch.autograd.grad(loss, values)[0]}


def dpo_loss_case(x: Inputs) -> Fields:
    chosen, rejected = x.leaf("policy_chosen"), x.leaf("policy_rejected")
    result = dpo_loss(
        policy_chosen=chosen,
        policy_rejected=rejected,
        ref_chosen=x.floats("ref_chosen"),
        ref_rejected=x.floats("ref_rejected"),
        beta=x["beta"],
        label_smoothing=x["label_smoothing"],
        loss="ipo" if x["ipo"] else "sigmoid",
        num_pairs=len(chosen),
    )
    grads = torch.autograd.grad(result.loss, (chosen, rejected))
    return {
        "loss": result.loss,
        "chosen_rewards": result.chosen_rewards,
        "rejected_rewards": result.rejected_rewards,
        "grad_policy_chosen": grads[0],
        "grad_policy_rejected": grads[1],
    }


def dpo_sequence_logps(x: Inputs) -> Fields:
    log_probs = token_log_probs(x.floats("logits"), x.ints("labels"))
    column = torch.arange(log_probs.shape[1])
    # Column 0 is never scored: where the prompt is empty, the first token of the response has no log-prob.
    mask = (column >= x.ints("prompt_lens").clamp(min=1)[:, None]) & (column < x.ints("lengths")[:, None])
    total, mean = sequence_log_probs(log_probs, mask), masked_mean(log_probs, mask, -1)
    return {"sum": total, "mean": mean, "packed_sum": total, "packed_mean": mean}


def pairwise_rm_loss(x: Inputs) -> Fields:
    chosen, rejected = x.leaf("chosen"), x.leaf("rejected")
    loss = pairwise_loss(
        chosen=chosen,
        rejected=rejected,
        margin=None if x["margin"] is None else x.floats("margin"),
        loss="logexp" if x["kind"].startswith("logexp") else "sigmoid",
        num_pairs=len(chosen),
    )
    grads = torch.autograd.grad(loss, (chosen, rejected))
    return {"loss": loss, "grad_chosen": grads[0], "grad_rejected": grads[1]}


def lm_ptx_loss(x: Inputs) -> Fields:
    labels = x.ints("labels")
    mask = labels != -100
    mask[:, 0] = False  # nothing predicts the first token
    log_probs = token_log_probs(x.floats("logits"), labels.clamp(min=0))
    weights = token_weights(mask, loss_mean="token", count=loss_count(mask, "token"), dtype=x.dtype)
    return {"loss": lm_loss(log_probs, weights)}


def kl_controller(x: Inputs) -> Fields:
    adaptive, fixed = [x["init"]], [x["init"]]
    for kl in x["kl"]:
        settings = {"observed_kl": kl, "horizon": x["horizon"], "num_samples": x["n_steps"]}
        adaptive.append(adapt_kl_coef(adaptive[-1], target=x["target"], **settings))
        fixed.append(adapt_kl_coef(fixed[-1], target=None, **settings))
    return {"adaptive": adaptive[1:], "fixed": fixed[1:]}


def lr_schedule(x: Inputs) -> Fields:
    settings = {"peak": x["lr"], "warmup_steps": x["warmup_steps"], "num_steps": x["max_steps"]}
    return {"lr_at_step": [cosine_with_min_lr(step, min_lr_frac=MIN_LR_FRAC, **settings) for step in x["step"]]}


ADAPTERS: dict[str, Callable[[Inputs], Fields]] = {
    "sequences": sequences,
    "action_logprobs": action_logprobs,
    "reward_and_value_heads": reward_and_value_heads,
    "token_level_reward": token_level_reward,
    "token_level_reward_packed": token_level_reward_packed,
    "dpo_token_reward": dpo_token_reward,
    "gae": gae_case,
    "advantage_whitening": advantage_whitening,
    "policy_loss": policy_loss_case,
    "value_loss": value_loss_case,
    "dpo_loss": dpo_loss_case,
    "dpo_sequence_logps": dpo_sequence_logps,
    "pairwise_rm_loss": pairwise_rm_loss,
    "lm_ptx_loss": lm_ptx_loss,
    "kl_controller": kl_controller,
    "lr_schedule": lr_schedule,
    "pipeline": pipeline,
}
"""Golden file stem -> the function that recomputes its `out`."""
