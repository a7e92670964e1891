"""Every number that a run writes: its name, what it means, its unit. docs/metrics.md is made from this."""


def _model_stage(group: str, rows: dict[str, str]) -> dict[str, str]:
    """The metrics of a stage that learns from a file: each on the training batch and on held-out rows."""
    training = {f"{group}/{name}": meaning for name, meaning in rows.items()}
    held_out = {f"{group}/eval_{name}": f"The same on the held-out rows: {meaning}" for name, meaning in rows.items()}
    return training | held_out


def _reward_term(term: str, what: str) -> dict[str, str]:
    """Size of one term of the token reward."""
    return {
        f"reward/{term}_sum": f"{what}, summed over a response; mean over responses (reward units)",
        f"reward/{term}_mean": f"{what}; mean over response tokens (reward units)",
    }


def _reward_share(term: str) -> dict[str, str]:
    """What part of the return one term makes up."""
    meaning = "absolute sum over a response, mean over responses, over the same of all three terms (share of 1)"
    return {f"reward/{term}_share": f"Part of the return that the {term} term makes up: {meaning}"}


def _alarms(*names: str) -> dict[str, str]:
    """Health alarms, in the words of the docs."""
    return {f"alarm/{name}": f"1 while the alarm {name} rings, else 0; see docs/health.md" for name in names}


def _memory() -> dict[str, str]:
    """Bytes of each role: measured, and foretold by its architecture."""
    roles = {
        "reference": "Reference",
        "dpo": "DPO policy",
        "reward_model": "Reward model",
        "policy": "Policy",
        "critic": "Critic",
        "policy_engine": "Copy of the policy that writes",
        "policy_snapshot": "Copy of the policy that scores",
        "critic_snapshot": "Copy of the critic that scores",
    }
    parts = {
        "parameters": "weights on the device that no role before it has",
        "host": "weights in host memory (compute.offload_frozen)",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "activations": "most that was kept for the backward pass in the first step of this start",
    }
    told = {}
    for role, name in roles.items():
        for part, what in parts.items():
            told[f"memory/{role}_{part}_bytes"] = f"{name}: {what}; of the rank that has most (bytes)"
            told[f"memory/{role}_predicted_{part}_bytes"] = f"{name}: the same, foretold (bytes)"
    return told


METRICS: dict[str, str] = {
    # Token rewards
    **_reward_term("total", "Token reward, all terms"),
    **_reward_term("dpo", "DPO term, after scale and clip"),
    **_reward_term("kl", "KL term: -kl_coef times the log-ratio of policy and reference"),
    **_reward_term("score", "Score term, on the last token"),
    **_reward_share("dpo"),
    **_reward_share("kl"),
    **_reward_share("score"),
    "reward/dpo_clip_frac": "Response tokens whose DPO term was cut by rto.dpo_clip (share of 1)",
    "reward/score_clip_frac": "Responses whose normalised score was cut by rto.score_clip (share of 1)",
    "reward/raw_score_mean": "Reward model's score before it is normalised; mean over responses (its own units)",
    "reward/raw_score_std": "Its standard deviation over responses (its own units)",
    # Distance from the reference
    "kl/k1": "log pi_old - log pi_ref; mean over response tokens (nats, may be negative)",
    "kl/k2": "Half the square of k1; mean over response tokens (nats)",
    "kl/k3": "exp(-k1) - 1 + k1, unbiased and never negative; mean over response tokens (nats)",
    "kl/sequence": "k1 summed over a response; mean over responses (nats)",
    "kl/coef": "Weight of the KL term in this step (reward units per nat); moves only with rto.kl_target",
    # Advantages and critic
    "advantage/raw_mean": "Advantages before whitening; mean over response tokens (reward units)",
    "advantage/raw_std": "Advantages before whitening; standard deviation over response tokens (reward units)",
    "advantage/mean": "Advantages as PPO sees them; mean over response tokens (reward units)",
    "advantage/std": "Advantages as PPO sees them; standard deviation over response tokens (reward units)",
    "critic/return_mean": "The critic's target; mean over response tokens (reward units)",
    "critic/value_mean": "The critic's value before the update; mean over response tokens (reward units)",
    "critic/explained_variance": "1 - var(return - value) / var(return) before the update (at most 1; 0 is a constant)",
    "critic/loss": "Critic's loss, value_coef included; mean over minibatches (squared reward units)",
    "critic/clip_frac": "Response tokens on which ppo.value_clip decided the loss (share of 1)",
    # Policy update
    "ppo/loss": "Clipped surrogate less the entropy bonus, which the policy minimises; mean over minibatches",
    "ppo/ratio_mean": "pi_new / pi_old; mean over response tokens of all minibatches (1 before the first step)",
    "ppo/first_ratio_mean": "The same of the step's first minibatch, before any update: 1 up to rounding",
    "ppo/clip_frac": "Response tokens on which ppo.clip decided the loss (share of 1)",
    "ppo/approx_kl": "How far the update went: k3 of pi_old and pi_new; mean over response tokens (nats)",
    "ppo/entropy": "Entropy of the policy over the vocabulary; mean over response tokens (nats)",
    # Rollout
    "length/prompt_mean": "Length of a prompt, chat template included; mean (tokens)",
    "length/prompt_max": "Longest prompt of the step (tokens)",
    "length/response_mean": "Length of a response, EOS included; mean (tokens)",
    "length/response_max": "Longest response of the step (tokens)",
    "length/truncated_frac": "Responses that filled the window before an EOS (share of 1)",
    "staleness/importance_mean": "Truncated importance weight of a token; mean, 1 if the policy has not moved",
    "staleness/truncated_frac": "Tokens whose importance weight has reached ppo.importance_cap (share of 1)",
    "staleness/log_prob_diff_mean": "|log pi before the update - when it sampled|; mean over response tokens (nats)",
    "decode/log_prob_diff_mean": "|decoding - training forward| of a log-prob; mean over response tokens (nats)",
    "decode/log_prob_diff_max": "Largest of these differences; above 1e-3 in float32, decoding is wrong (nats)",
    "decode/effective_share": "Effective sample size of tokens weighted by training forward over decoding (share of 1)",
    "decode/checked_frac": "Responses on which both were compared; below 1 with rollout.reuse_log_probs (share of 1)",
    # Optimizer
    "optimizer/grad_norm": "Gradient norm of the model that a stage trains, before clipping",
    "optimizer/learning_rate": "Learning rate of the model that a stage trains",
    "optimizer/policy_grad_norm": "Gradient norm of the policy before clipping; mean over minibatches",
    "optimizer/critic_grad_norm": "Gradient norm of the critic before clipping; mean over minibatches",
    "optimizer/policy_learning_rate": "Learning rate of the policy at the last optimizer step",
    "optimizer/critic_learning_rate": "Learning rate of the critic at the last optimizer step",
    # Stages that learn from a file
    **_model_stage(
        "sft",
        {
            "loss": "negative log-likelihood; mean over response tokens (nats)",
            "entropy": "entropy of the policy over the vocabulary; mean over response tokens (nats)",
        },
    ),
    **_model_stage(
        "dpo",
        {
            "loss": "DPO loss; mean over pairs (nats for `sigmoid`)",
            "accuracy": "pairs whose chosen response has the higher implicit reward (share of 1)",
            "margin": "implicit reward of chosen minus rejected; mean over pairs (reward units)",
            "chosen_reward": "beta times the log-ratio of policy and reference, chosen responses; mean (reward units)",
            "rejected_reward": "the same of rejected responses; mean (reward units)",
        },
    ),
    **_model_stage(
        "reward_model",
        {
            "loss": "-log sigmoid(chosen - rejected); mean over pairs (nats)",
            "accuracy": "pairs whose chosen response scores higher (share of 1)",
            "margin": "score of chosen minus rejected; mean over pairs (score units)",
            "chosen_score": "score of chosen responses; mean (score units)",
            "rejected_score": "score of rejected responses; mean (score units)",
        },
    ),
    # Held-out prompts
    "eval/score": "Reward model's normalised score of responses to held-out prompts; mean",
    "eval/kl": "k1 summed over a response to a held-out prompt; mean over responses (nats)",
    "eval/win_rate": "Held-out prompts where the score is above that of the reference's response; ties half (share)",
    "eval/grade": "Mean grade of responses to held-out prompts by `grader`, a function of the user's (its own units)",
    "eval/grade_win_rate": "Held-out prompts where the grade is above that of the reference's; ties half (share)",
    "eval/response_length": "Length of a response to a held-out prompt, EOS included; mean (tokens)",
    "eval/truncated_frac": "Responses to held-out prompts that filled the window (share of 1)",
    # Health
    "health/dpo_positive_frac": "Response tokens that the DPO policy likes more than the reference does (share of 1)",
    "health/score_length_correlation": "Correlation of score and length over a step's responses, 16 or more (-1 to 1)",
    "health/repetition": "Trigrams of a response that it has had before; mean over responses (share of 1)",
    "health/dpo_accuracy": "Held-out pairs whose chosen side earns more DPO reward; once, at the start (share of 1)",
    **_alarms(
        "term_share",
        "kl_share",
        "dpo_clip",
        "score_clip",
        "ppo_clip",
        "sign_balance",
        "length_correlation",
        "repetition",
        "entropy",
        "dpo_accuracy",
        "explained_variance",
        "decode_mismatch",
    ),
    # Checkpoints
    "checkpoint/write_seconds": "From the start of a save to its name in the tracker; at the step after (seconds)",
    "checkpoint/bytes": "Size of that checkpoint (bytes)",
    # Memory: after the first step of a start, and after the last
    "memory/peak_bytes": "Most of a process: what torch gave out of its GPU, or on a CPU all that was resident (bytes)",
    **_memory(),
    # Speed
    "speed/tokens_per_second": "Prompt and response tokens of a step over its seconds, all ranks together",
    "speed/generated_tokens_per_second": "Response tokens over the seconds of `generate`, all ranks together",
    "speed/token_imbalance": "Tokens of the replica that trains on most, over the mean of all; mean over minibatches",
    "time/generate_seconds": "Sampling of the responses (seconds)",
    "time/score_seconds": "Forward passes of policy, reference, DPO policy, critic and reward model (seconds)",
    "time/advantage_seconds": "Token rewards, advantages, whitening (seconds)",
    "time/update_seconds": "Forward and backward passes and optimizer steps of what is trained (seconds)",
    "time/refit_seconds": "New weights to the ranks that write, and to those that score (seconds)",
    "time/evaluate_seconds": "Evaluation on held-out data (seconds)",
    "time/save_seconds": "What a save holds training up: the snapshot, or all of it if not in the background (seconds)",
    "time/step_seconds": "The whole step, evaluation included (seconds)",
}
"""Name, as TensorBoard groups it -> one line: meaning (unit)."""


PAGE = """# What a run measures

Written by `python tools/write_metrics_doc.py` from `rto_megatron/metric_names.py`. Every run writes them to TensorBoard
and, one line a step, to `metrics.jsonl` beside it; a stage writes the names that it has.

| name | meaning (unit) |
|---|---|
"""
PIPE = "\\|"
"""A bar inside a table cell."""


def metrics_page() -> str:
    """docs/metrics.md: METRICS as a Markdown table."""
    rows = "".join(f"| `{name}` | {meaning.replace('|', PIPE)} |\n" for name, meaning in METRICS.items())
    return PAGE + rows
