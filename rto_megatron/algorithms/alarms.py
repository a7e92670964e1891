"""Health alarms: numbers of a step against limits, and what it means when one is broken.

Every alarm is a function of the step's metrics (names as in docs/metrics.md) and the config: None where it cannot
tell, an empty text where all is well, else what was found, what it means and what to do. Most hold one metric against
one limit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rto_megatron.config.run import RTORun

Numbers = Mapping[str, float]
Judge = Callable[[Numbers, RTORun], str | None]

FIRST_ENTROPY = "first_entropy"
"""Among the numbers: the entropy of the run's first step, which is no metric of its own."""


@dataclass(frozen=True)
class Limit:
    """An alarm that rings where a metric is beyond its limit."""

    metric: str
    field: str
    """Of `AlarmsConfig`: `max_...` is the largest number that is well, `min_...` the least."""
    found: str
    """What to say, with places for `value` and `limit`."""

    def __call__(self, numbers: Numbers, config: RTORun) -> str | None:
        value, limit = _known(numbers, self.metric), getattr(config.alarms, self.field)
        if value is None or limit is None:
            return None
        is_broken = value > limit if self.field.startswith("max_") else value < limit
        return self.found.format(value=value, limit=limit) if is_broken else ""


def term_share(numbers: Numbers, config: RTORun) -> str | None:
    """Whether the DPO term and the score term are parts of the return at all."""
    limit, terms = config.alarms.min_term_share, {"dpo": config.rto.dpo_coef, "score": config.rto.score_coef}
    shares = {name: _known(numbers, f"reward/{name}_share") for name, coef in terms.items() if coef > 0}
    if limit is None or len(shares) < 2 or None in shares.values():
        return None
    low = {name: share for name, share in shares.items() if share is not None and share < limit}
    if not low:
        return ""
    name, share = next(iter(low.items()))
    all_shares = {term: _known(numbers, f"reward/{term}_share") or 0.0 for term in ("dpo", "kl", "score")}
    largest = max(all_shares, key=lambda term: all_shares[term])
    return (
        f"the {name} term is {share:.2%} of the return (at least {limit:.2%}), so the run learns as if it were not "
        f"there; raise rto.{name}_coef{' or rto.dpo_clip' if name == 'dpo' else ''}, or lower rto.{largest}_coef, "
        f"whose term is {all_shares[largest]:.1%}"
    )


def sign_balance(numbers: Numbers, config: RTORun) -> str | None:
    """Whether the DPO reward tells tokens apart or pays each of them."""
    share = _known(numbers, "health/dpo_positive_frac")
    limit = config.alarms.max_sign_share
    if share is None or limit is None:
        return None
    if max(share, 1 - share) <= limit:
        return ""
    word, pays = ("above", "for length") if share > 0.5 else ("below", "for brevity")
    return (
        f"the DPO reward is {word} 0 on {max(share, 1 - share):.1%} of the tokens (at most {limit:.1%}), so it pays "
        f"{pays} rather than for content; check that `dpo` was trained from `reference`, train it for less or with "
        "a larger dpo.beta, or take rto.shaping shaping_only, which keeps the total out of the return"
    )


def length_correlation(numbers: Numbers, config: RTORun) -> str | None:
    """Whether the score is a matter of length."""
    value, limit = _known(numbers, "health/score_length_correlation"), config.alarms.max_length_correlation
    if value is None or limit is None:
        return None
    if abs(value) <= limit:
        return ""
    return (
        f"score and length of a step's responses correlate by {value:+.2f} (at most {limit:.2f} either way): the "
        f"policy earns by writing {'more' if value > 0 else 'less'}; read responses (report credit), and balance the "
        "lengths of the reward model's pairs, or stop at an earlier checkpoint (checkpoint.keep_best)"
    )


def entropy(numbers: Numbers, config: RTORun) -> str | None:
    """Whether the policy still has a choice."""
    now, first, least = (
        _known(numbers, "ppo/entropy"),
        _known(numbers, FIRST_ENTROPY),
        config.alarms.min_entropy_share,
    )
    if now is None or first is None or first <= 0 or least is None:
        return None
    if now >= least * first:
        return ""
    return (
        f"the policy's entropy is {now:.3g} nats, {now / first:.1%} of what it was in the first step (at least "
        f"{least:.1%}): it writes nearly the same each time and has stopped exploring; raise ppo.entropy_coef or "
        "rto.kl_coef, lower optimizer.lr, or go back to an earlier checkpoint"
    )


def explained_variance(numbers: Numbers, config: RTORun) -> str | None:
    """Whether the critic is of use, if there is one."""
    limit = Limit(
        "critic/explained_variance",
        "min_explained_variance",
        "the critic explains {value:.2f} of the returns' variance (at least {limit:.2f}), less than a constant would, "
        "so it adds noise to the advantages; raise critic_optimizer.lr or let ppo.value_clip be null if it lags, lower "
        "the rate if critic/loss grows; or take advantage.estimator reinforce_pp",
    )
    return limit(numbers, config) if config.advantage.estimator == "gae" else None


ALARMS: dict[str, Judge] = {
    "term_share": term_share,
    "kl_share": Limit(
        "reward/kl_share",
        "max_kl_share",
        "the KL term is {value:.1%} of the return (at most {limit:.1%}): the policy is paid for staying as it is, or "
        "has run far away from the reference; lower rto.kl_coef, or the learning rate if kl/sequence grows",
    ),
    "dpo_clip": Limit(
        "reward/dpo_clip_frac",
        "max_dpo_clip_frac",
        "rto.dpo_clip cuts the DPO reward of {value:.1%} of the tokens (at most {limit:.1%}), of which no more than "
        "the sign is left; raise rto.dpo_clip, or lower rto.dpo_coef",
    ),
    "score_clip": Limit(
        "reward/score_clip_frac",
        "max_score_clip_frac",
        "rto.score_clip cuts the score of {value:.1%} of the responses (at most {limit:.1%}), which then differ in "
        "nothing; the reward model is off its scale: look at responses, raise rto.score_clip, or train it on them",
    ),
    "ppo_clip": Limit(
        "ppo/clip_frac",
        "max_ppo_clip_frac",
        "ppo.clip decides on {value:.1%} of the tokens (at most {limit:.1%}): an update moves the policy further than "
        "its samples can tell; lower optimizer.lr or ppo.num_epochs, or raise samples_per_optimizer_step",
    ),
    "sign_balance": sign_balance,
    "length_correlation": length_correlation,
    "repetition": Limit(
        "health/repetition",
        "max_repetition",
        "{value:.1%} of a response's trigrams repeat earlier ones (at most {limit:.1%}): the policy goes in circles, "
        "and something rewards it; read responses (report credit), raise rto.kl_coef, lower optimizer.lr",
    ),
    "entropy": entropy,
    "dpo_accuracy": Limit(
        "health/dpo_accuracy",
        "min_dpo_accuracy",
        "the DPO reward prefers the chosen side of {value:.1%} of the held-out pairs (at least {limit:.1%}), no better "
        "than a coin: token rewards from it are noise; train DPO for longer or on cleaner pairs (dpo/eval_accuracy of "
        "its run), or set rto.dpo_coef to 0",
    ),
    "explained_variance": explained_variance,
    "decode_mismatch": Limit(
        "decode/log_prob_diff_mean",
        "max_decode_difference",
        "log-probs in decoding and in training differ by {value:.3g} nats a token (at most {limit:.3g}): responses "
        "come from another policy than the one that is updated; compare layouts with `parity`, or try float32",
    ),
}
"""Name -> alarm; `alarm/NAME` is the metric that is 1 while it rings."""

MEASURED_ONCE = {"dpo_accuracy"}
"""Alarms whose number does not come at every step: they ring at once."""


@dataclass(frozen=True)
class Heard:
    """What a step's numbers changed."""

    states: dict[str, float]
    """Of the alarms that are not simply quiet, as `next_state` counts."""
    lines: list[str]
    """For people: alarms that begin or end."""

    def metrics(self) -> dict[str, float]:
        """`alarm/*`: 1 while an alarm rings, else 0."""
        return {f"alarm/{name}": float(self.states.get(name, 0) < 0) for name in ALARMS}


def hear(numbers: Numbers, config: RTORun, states: Mapping[str, float], *, step: int) -> Heard:
    """Put a step's numbers to every alarm.

    Args:
        numbers: of the step, with FIRST_ENTROPY.
        states: of the step before.
    """
    now, lines = {}, []
    for name, judge in ALARMS.items():
        before, found = states.get(name, 0), judge(numbers, config)
        after = before
        if found is not None:
            patience = 1 if name in MEASURED_ONCE else config.alarms.patience
            after = next_state(before, is_broken=bool(found), patience=patience)
        if (before < 0) != (after < 0):
            lines.append(f"alarm {name} at step {step}: {found}" if found else f"alarm {name} ends at step {step}")
        if after:
            now[name] = after
    return Heard(now, lines)


def next_state(state: float, *, is_broken: bool, patience: int) -> float:
    """An alarm one step later.

    A state of 0 or more is quiet, and counts steps in a row in which the limit was broken; one below 0 rings, and is -1
    less the steps in a row in which it was kept.
    """
    if state >= 0:
        if not is_broken:
            return 0
        return -1 if state + 1 >= patience else state + 1
    if is_broken:
        return -1
    return 0 if -state >= patience else state - 1


def _known(numbers: Numbers, name: str) -> float | None:
    value = numbers.get(name)
    return None if value is None or math.isnan(value) else value
