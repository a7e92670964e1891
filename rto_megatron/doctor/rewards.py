"""How much of the return each reward term can be."""

import math

from rto_megatron.config.run import EvaluateRun, RTORun
from rto_megatron.doctor.findings import Section

DRIFT = 0.1
"""Nats a token by which a policy is taken to have moved, to give the KL term, which has no bound, a size."""

NOTHING, ALL = 0.02, 0.95
"""Shares of the return below which a term cannot matter, and above which nothing else can."""


def check_rewards(found: Section, config: RTORun | EvaluateRun) -> None:
    """Bounds of the three terms over a response that fills the window, and what they say of the coefficients.

    dpo: dpo_clip a token; score: score_coef x score_clip at the end; kl: kl_coef x nats, without a bound.
    """
    rto, tokens = config.rto, config.rollout.max_new_tokens
    dpo = 0.0 if rto.dpo_coef == 0 or config.dpo is None else tokens * (rto.dpo_clip or math.inf)
    kl, score = rto.kl_coef * DRIFT * tokens, rto.score_coef * rto.score_clip
    total = dpo + kl + score
    rows = [
        ("dpo", f"{_shown(dpo / tokens)} a token", _shown(dpo), _share(dpo, total)),
        (f"kl at {DRIFT:g} nats a token", f"{_shown(kl / tokens)} a token", _shown(kl), _share(kl, total)),
        ("score", "at the last token", _shown(score), _share(score, total)),
    ]
    title = f"reward units, at most, in a response of {tokens} tokens"
    found.table(title, ("term", "where", "in a response", "largest share of the return"), rows)
    if isinstance(config, EvaluateRun):
        return
    _look_at_dpo(found, config, dpo)
    _look_at_kl(found, config)
    _look_at_score(found, config, dpo=dpo, kl=kl, score=score)


def _look_at_dpo(found: Section, config: RTORun, dpo: float) -> None:
    rto, tokens = config.rto, config.rollout.max_new_tokens
    if dpo == 0:
        found.note(
            "rto.dpo_coef is 0: there is no DPO term",
            why="this is PPO: every token but the last earns only its KL penalty",
            way_out="set rto.dpo_coef, which the paper has at 0.05",
        )
        return
    if rto.shaping == "shaping_only":
        found.note(
            "rto.shaping is shaping_only: the DPO term adds up to 0 over a response",
            why="it says which tokens earned the return and does not change it",
        )
    if rto.dpo_clip is None:
        found.warning(
            "rto.dpo_clip is null: the DPO term has no bound",
            why="a token that the reference all but rules out has a log-ratio of tens of nats, and outweighs all",
            way_out="set rto.dpo_clip; the paper's code clips at 0.05",
        )
        return
    against_score = dpo / (dpo + rto.score_coef)
    if against_score < NOTHING:
        found.warning(
            f"the DPO term is at most {dpo:.3g} in a response of {tokens} tokens, {against_score:.1%} of itself and a "
            "score of one standard deviation",
            why="it cannot matter: this is PPO at the price of RTO",
            way_out="raise rto.dpo_clip (and rto.dpo_coef), or lower rto.score_coef",
        )
    elif against_score > ALL and rto.score_coef > 0:
        found.warning(
            f"the DPO term may be {dpo:.3g} in a response of {tokens} tokens, {against_score:.1%} of itself and a "
            "score of one standard deviation",
            why="where it reaches its clip, the reward model cannot be heard",
            way_out="lower rto.dpo_clip, or raise rto.score_coef",
        )
    nats = rto.dpo_clip / rto.dpo_coef
    if nats < 0.1:
        found.warning(
            f"rto.dpo_clip {rto.dpo_clip:g} cuts log-ratios beyond {nats:.2g} nats",
            why="that is nearly all of them: the term only says which of the two policies likes a token more",
            way_out="raise rto.dpo_clip or lower rto.dpo_coef; in the paper's code they are equal, a cut at 1 nat",
        )


def _look_at_kl(found: Section, config: RTORun) -> None:
    rto = config.rto
    if rto.kl_coef == 0:
        found.warning(
            "rto.kl_coef is 0: nothing holds the policy near the reference",
            why="a policy finds what a reward model rates too high, and drifts there",
            way_out="set rto.kl_coef, which the paper has at 0.01",
        )
    elif rto.score_coef > 0:
        nats = rto.score_coef / rto.kl_coef
        found.note(
            f"{nats:.3g} nats of KL in a response cost as much as one standard deviation of the score is worth",
            why="a policy that drifts less than that has little reason to come back",
        )


def _look_at_score(found: Section, config: RTORun, *, dpo: float, kl: float, score: float) -> None:
    if score == 0:
        found.note(
            "rto.score_coef is 0: no reward model is asked",
            why="the policy learns what DPO has learned already, a token at a time",
        )
    elif math.isfinite(dpo) and score / (dpo + kl + score) > ALL and dpo > 0:
        found.warning(
            f"a score may be {score:.3g}, {score / (dpo + kl + score):.0%} of the largest return",
            why="one response with an extreme score outweighs what all tokens of a batch earn",
            way_out="lower rto.score_clip: scores are in standard deviations, and few lie beyond 3",
        )


def _shown(value: float) -> str:
    return "no bound" if math.isinf(value) else f"{value:.3g}"


def _share(value: float, total: float) -> str:
    if math.isinf(total):
        return "all of it" if math.isinf(value) else "any"
    return f"{value / total:.1%}" if total else "0%"
