"""The knobs of DPO, the reward model, token rewards, advantages and PPO."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (arXiv 2305.18290) and its neighbours."""

    beta: float = 0.1
    """Strength of the pull to the reference, per nat; of `simpo`, whose paper takes 2 to 10, per nat and token."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong; 0 is plain DPO. `sigmoid` only."""
    loss: Literal["sigmoid", "ipo", "rdpo", "simpo", "tdpo1", "tdpo2", "una"] = "sigmoid"
    """`sigmoid` is DPO; `ipo` the squared loss of arXiv 2310.12036; `rdpo` charges for length (arXiv 2403.19159);
    `simpo` compares log-probs per token, without a reference (arXiv 2405.14734); `tdpo1` and `tdpo2` count the KL
    to the reference along each response (arXiv 2404.11999), and hold the reference in memory; `una` takes each side
    alone, the chosen one as a thumb up and the rejected one as a thumb down (arXiv 2408.15339)."""
    length_coef: float = 0.0
    """Charge for a token, reward units; 0 is DPO. `rdpo` only; its paper calls it alpha."""
    margin: float = 0.0
    """By how much the chosen side is to win, reward units. `simpo` only; its paper calls it gamma."""
    drift_coef: float = 0.5
    """Weight of the KL along a response; 0 is DPO. `tdpo2` only; its paper calls it alpha."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"dpo.beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"dpo.label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        for name in ("length_coef", "margin", "drift_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"dpo.{name} must be 0 or more, got {getattr(self, name)}")
        for name, loss in (
            ("label_smoothing", "sigmoid"),
            ("length_coef", "rdpo"),
            ("margin", "simpo"),
            ("drift_coef", "tdpo2"),
        ):
            value, default = getattr(self, name), getattr(DPOConfig, name)
            if value != default and self.loss != loss:
                raise ValueError(
                    f"dpo.{name} must be {default:g} with dpo.loss {self.loss}, which does not use it, got {value:g}; "
                    f"delete it, or set dpo.loss to {loss}"
                )

    @property
    def reads_distributions(self) -> bool:
        """Whether the reference's whole distribution is needed at each token."""
        return self.loss in ("tdpo1", "tdpo2")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The sentence reward model, trained on pairs."""

    loss: Literal["sigmoid", "logexp"] = "sigmoid"
    """Both are -log sigmoid(chosen - rejected); `logexp` writes it as log(1 + exp)."""


@dataclass(frozen=True, kw_only=True)
class RTOConfig:
    """How three signals become token rewards."""

    dpo_coef: float = 0.05
    """Weight of the DPO log-ratio, per nat. 0 turns it off, which is plain PPO."""
    kl_coef: float = 0.01
    """Weight of the KL penalty to the reference, per nat. 0 turns it off."""
    score_coef: float = 1.0
    """Weight of the reward model's score on the last token. 0 turns it off."""
    dpo_clip: float | None = 0.05
    """Largest size of one token's DPO reward, after scaling, in reward units; null leaves it alone."""
    score_clip: float = 10.0
    """Largest size of the normalised score."""
    shaping: Literal["token", "sentence", "terminal", "shaping_only"] = "token"
    """Where the DPO total of a response goes: on its tokens (RTO), summed on the token that ends
    each sentence (Semi-RTO), on the last token (DDPO), or on its tokens with the sum taken off at the end (RS-PPO)."""
    kl_target: float | None = None
    """Nats per response: adapt kl_coef towards this KL; null keeps kl_coef fixed."""
    kl_horizon: int = 10000
    """Samples over which the adaptive controller moves."""

    def __post_init__(self) -> None:
        for name in ("dpo_coef", "kl_coef", "score_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"rto.{name} must be 0 or more, got {getattr(self, name)}; 0 turns the term off")
        if self.dpo_clip is not None and self.dpo_clip <= 0:
            raise ValueError(f"rto.dpo_clip must be positive or null, got {self.dpo_clip}; use null for no clipping")
        if self.score_clip <= 0:
            raise ValueError(f"rto.score_clip must be positive, got {self.score_clip}")
        if self.kl_target is not None and self.kl_target <= 0:
            raise ValueError(
                f"rto.kl_target must be positive or null, got {self.kl_target}; use null for a fixed kl_coef"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("rto.kl_coef must be positive with rto.kl_target, got 0, which no factor can move")
        if self.kl_horizon < 1:
            raise ValueError(f"rto.kl_horizon must be 1 or more, got {self.kl_horizon}")


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """From token rewards to advantages."""

    estimator: Literal["gae", "reinforce_pp"] = "gae"
    """`gae` with a critic; `reinforce_pp` is REINFORCE++ (arXiv 2501.03262), without one."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda; 1 is the Monte-Carlo return minus the value, 0 the one-step error."""
    whiten: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over all response tokens of the step."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"advantage.{name} must lie between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Clipped policy and value updates."""

    clip: float = 0.2
    """The ratio of new to old probability counts only within 1 +- this."""
    value_clip: float | None = 0.2
    """New values count only within old values +- this; null turns it off."""
    value_coef: float = 1.0
    """Scale of the critic's loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat; 0 turns it off."""
    num_epochs: int = 1
    """Passes over the samples of a step."""
    importance_cap: float = 2.0
    """Largest weight of a token by how much likelier it has become since it was sampled; schedule.staleness 1 only."""
    loss_mean: Literal["sequence", "token"] = "sequence"
    """Average over the tokens of each sequence, then over sequences; or over all tokens at once."""

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ValueError(f"ppo.clip must be positive, got {self.clip}")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(
                f"ppo.value_clip must be positive or null, got {self.value_clip}; use null for no clipping"
            )
        if self.importance_cap < 1:
            raise ValueError(f"ppo.importance_cap must be 1 or more, got {self.importance_cap}")
        for name in ("value_coef", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"ppo.{name} must be 0 or more, got {getattr(self, name)}")
        if self.num_epochs < 1:
            raise ValueError(f"ppo.num_epochs must be 1 or more, got {self.num_epochs}")


@dataclass(frozen=True, kw_only=True)
class DRTOConfig:
    """The policy's loss for the worst mixture of spans of a minibatch (DRTO, arXiv 2604.08577)."""

    radius: float = 0.0
    """How far from the spans as they are, nats for `kl`; 0 turns it off."""
    divergence: Literal["kl", "chi_square"] = "kl"
    """How the distance of two mixtures is measured."""
    span_tokens: int = 8
    """Tokens of a span; what is left at the end of a response is a shorter one."""

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"drto.radius must be 0 or more, got {self.radius}; 0 turns it off")
        if self.span_tokens < 1:
            raise ValueError(f"drto.span_tokens must be 1 or more, got {self.span_tokens}")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled."""

    max_prompt_tokens: int = 256
    """Longer prompts are dropped, or an error (see too_long)."""
    max_new_tokens: int = 64
    """Length of the window; a response that fills it is truncated."""
    temperature: float = 1.0
    """Divides the logits, in sampling and in every log-prob of the run; 0 is greedy (generate and evaluate only)."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this much probability; 1 among all."""
    truncation: Literal["keep", "overwrite_eos"] = "keep"
    """What becomes of the last token of a truncated response: stays, or is replaced by EOS as in the paper's code."""
    max_slots: int = 32
    """Sequences that decode together on one data-parallel replica."""
    prefill_chunk_tokens: int | None = None
    """Prompt tokens of one forward pass at most, which bounds the memory of its activations: a longer prompt is read in
    parts, several short ones share a pass; null reads all that begin together in one pass."""
    cuda_graphs: bool = False
    """Decode by steps of few sizes, each recorded once a batch and launched as one; needs parallel.pipeline 1 where
    responses are written. On a CPU the same steps run without a recording, and padded rows cost time."""
    kv_block_tokens: int = 0
    """Tokens of a block of the cache of keys and values: a sequence takes a block when its last one is full and gives
    all back when it ends, so that memory follows what is written. 0 keeps a slot of max_prompt_tokens + max_new_tokens
    for each, which is the faster on a CPU (blocks 0.87 to 0.99 times: benchmarks/results/decode_blocks.md)."""
    kv_blocks: int | None = None
    """Blocks of a decode batch, all made at its start; null makes them as they are needed. A sequence begins only when
    it and those before it can all come to their full length: with few blocks fewer than `max_slots` decode together."""
    reuse_log_probs: bool = False
    """Take decoding's log-probs as pi_old (training only): the policy then scores `check_rows` responses a step, not
    all. Decoding rounds otherwise than the training forward, so PPO's first ratio is 1 up to that rounding."""
    check_rows: int = 8
    """Responses of a step, drawn by seed and step, on which reused log-probs are held against the training forward."""
    max_mean_difference: float | None = None
    """Largest mean |decoding - training forward| of a log-prob, nats: a step above it ends the run (training only).
    null takes 1e-3 in float32 and 0.1 in bfloat16."""
    max_difference: float | None = None
    """The same of a single token; null takes 0.01 in float32, and no limit in bfloat16, whose tails are long."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens", "max_slots", "check_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be 1 or more, got {getattr(self, name)}")
        if self.prefill_chunk_tokens is not None and self.prefill_chunk_tokens < 1:
            raise ValueError(
                f"rollout.prefill_chunk_tokens must be 1 or more or null, got {self.prefill_chunk_tokens}; null sets "
                "no limit"
            )
        if self.kv_block_tokens < 0:
            raise ValueError(
                f"rollout.kv_block_tokens must be 0 or more, got {self.kv_block_tokens}; 0 gives each sequence a slot "
                "of its own"
            )
        if self.kv_block_tokens > max(self.longest, 256):  # which torch's kernel wants, however short sequences are
            raise ValueError(
                f"rollout.kv_block_tokens must be at most rollout.max_prompt_tokens + rollout.max_new_tokens, "
                f"{self.longest}, or 256, got {self.kv_block_tokens}: no sequence would fill a block; lower it, or 0 "
                "gives each sequence a slot of its own"
            )
        if self.kv_blocks is not None:
            self._check_blocks(self.kv_blocks)
        if self.temperature < 0:
            raise ValueError(f"rollout.temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"rollout.top_k must be 0 or more, got {self.top_k}; 0 samples among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p must lie above 0 and at most 1, got {self.top_p}")
        for name in ("max_mean_difference", "max_difference"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ValueError(f"rollout.{name} must be positive or null, got {limit:g}; null takes the dtype's")
        if self.reuse_log_probs and self.truncation == "overwrite_eos":
            raise ValueError(
                "rollout.reuse_log_probs must be false with rollout.truncation overwrite_eos, got true: decoding gives "
                "no log-prob of an EOS that it did not draw; set truncation to keep"
            )

    def _check_blocks(self, blocks: int) -> None:
        if not self.kv_block_tokens:
            raise ValueError(f"rollout.kv_blocks needs rollout.kv_block_tokens of 1 or more, got {blocks} blocks of 0")
        least = self._blocks_of_longest
        if blocks < least:
            raise ValueError(
                f"rollout.kv_blocks must hold a sequence of rollout.max_prompt_tokens + rollout.max_new_tokens, "
                f"{self.longest} tokens or {least} blocks of {self.kv_block_tokens}, got {blocks}; raise it, or null "
                "makes blocks as they are needed"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def _blocks_of_longest(self) -> int:
        return -(-self.longest // self.kv_block_tokens)

    @property
    def surely_together(self) -> int:
        """Sequences that decode together even if all are of the longest."""
        if self.kv_blocks is None:
            return self.max_slots
        return min(self.max_slots, self.kv_blocks // self._blocks_of_longest)

    def most_cached(self, num_sequences: int) -> int:
        """Tokens that the cache has room for when so many sequences are written together and all are of the longest."""
        if not self.kv_block_tokens:
            return num_sequences * self.longest
        blocks = num_sequences * self._blocks_of_longest
        return (1 + min(blocks, self.kv_blocks or blocks)) * self.kv_block_tokens  # one is nobody's: see `BlockTables`

    @property
    def log_prob_temperature(self) -> float:
        """The temperature of log-probs: greedy responses, which have none of their own, are judged at 1."""
        return self.temperature or 1.0
