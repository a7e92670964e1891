"""Health alarms: a healthy batch that rings none, and for each alarm a policy that rings it."""

import re
from dataclasses import replace

import pytest
import torch

from rto_megatron.algorithms.alarms import ALARMS, FIRST_ENTROPY, hear, next_state
from rto_megatron.algorithms.health import correlation, positive_share, repetition
from rto_megatron.algorithms.masked import token_weights
from rto_megatron.algorithms.ppo import policy_loss
from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.load import load_run
from rto_megatron.config.run import RTORun
from rto_megatron.metric_names import METRICS
from rto_megatron.rollout.experience import make_experience
from rto_megatron.stages.rto_metrics import step_metrics

SAMPLES, TOKENS, PROMPT = 32, 24, 4


def config(*words: str) -> RTORun:
    roles = ["--run_dir=a", "--policy=b", "--reference=c", "--dpo=d", "--reward_model=e", "--data.train=f"]
    return load_run("rto", None, [*roles, *words])


def healthy() -> dict:
    """A batch that a run on its way may have: varied texts, small log-ratios, a critic that sees something."""
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(*shape, generator=random)

    shape = SAMPLES, PROMPT + TOKENS
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (SAMPLES,), generator=random)
    ref = -1 - noise(*shape).abs()
    scores = noise(SAMPLES)
    return {
        "tokens": torch.randint(5, 300, shape, generator=random),
        "num_tokens": PROMPT + lengths,
        "policy": ref + noise(*shape, size=0.2),
        "ref": ref,
        "dpo": ref + noise(*shape, size=0.3),
        "scores": scores,
        "values": 0.5 * scores[:, None] + noise(*shape, size=0.3),
        "difference": noise(*shape, size=1e-3),
        "moved": noise(*shape, size=0.05),
        "entropy": 1.4,
    }


def numbers_of(batch: dict, run: RTORun) -> dict[str, float]:
    """The metrics of a step that sampled this."""
    column = torch.arange(PROMPT + TOKENS)
    mask = (column >= PROMPT) & (column < batch["num_tokens"][:, None])
    shape = {"tokens": batch["tokens"], "num_tokens": batch["num_tokens"]}
    rollout = Rollout(
        **shape,
        response_mask=mask,
        decode_log_probs=batch["policy"] + batch["difference"],
        truncated=batch["num_tokens"] == PROMPT + TOKENS,
    )
    signals = Signals(
        **shape,
        policy_log_probs=batch["policy"],
        forward_log_probs=batch["policy"],
        checked=torch.ones(len(mask), dtype=torch.bool),
        ref_log_probs=batch["ref"],
        dpo_log_probs=batch["dpo"],
        values=batch["values"],
        raw_scores=batch["scores"],
        scores=batch["scores"].clamp(-run.rto.score_clip, run.rto.score_clip),
    )
    experience, credit = make_experience(rollout, signals, run.rto, run.advantage, kl_coef=run.rto.kl_coef)
    updated = policy_loss(
        log_probs=batch["policy"] + batch["moved"],
        old_log_probs=experience.old_log_probs,
        advantages=experience.advantages,
        weights=token_weights(mask, loss_mean="token", count=int(mask.sum())),
        clip=run.ppo.clip,
    )
    numbers = step_metrics(rollout, signals, experience, credit, run.rto)
    clipped = (updated.num_clipped / updated.num_tokens).item()
    return numbers | {"ppo/clip_frac": clipped, "ppo/entropy": batch["entropy"], FIRST_ENTROPY: 1.5}


def begins(numbers: dict[str, float], run: RTORun) -> dict[str, str]:
    """The alarms that these numbers ring at once, and what they say."""
    run = replace(run, alarms=replace(run.alarms, patience=1))
    heard = hear(numbers, run, {}, step=7)
    return dict(re.fullmatch(r"alarm (\w+) at step 7: (.+)", line).groups() for line in heard.lines)


def as_long_as_good(batch):
    batch["num_tokens"] = PROMPT + 13 + batch["scores"].mul(4).round().clamp(-12, 11).long()


def far_from_the_reference(batch):
    batch["policy"] = batch["ref"] + 30
    batch["scores"] = batch["scores"] / 100


SICK = {
    # alarm: (what the policy or a role does, words of the config, what the alarm says)
    "term_share": (lambda b: b.update(dpo=b["ref"] + 1e-5), [], "the dpo term is 0.00% of the return"),
    "kl_share": (far_from_the_reference, ["--rto.kl_coef=1"], "the KL term is 100.0%"),
    "dpo_clip": (lambda b: b.update(dpo=b["ref"] + 5 * (b["dpo"] - b["ref"])), [], "rto.dpo_clip cuts"),
    "score_clip": (lambda b: b.update(scores=20 * b["scores"]), [], "rto.score_clip cuts the score of"),
    "ppo_clip": (lambda b: b.update(moved=50 * b["moved"]), [], "ppo.clip decides on"),
    "sign_balance": (lambda b: b.update(dpo=b["ref"] + 0.3), [], "above 0 on 100.0% of the tokens"),
    "length_correlation": (as_long_as_good, [], "the policy earns by writing more"),
    "repetition": (lambda b: b.update(tokens=torch.full_like(b["tokens"], 7)), [], "the policy goes in circles"),
    "entropy": (lambda b: b.update(entropy=0.1), [], "0.1 nats, 6.7% of what it was in the first step"),
    "explained_variance": (lambda b: b.update(values=-3 * b["values"]), [], "less than a constant would"),
    "decode_mismatch": (lambda b: b.update(difference=100 * b["difference"]), [], "another policy than"),
}  # fmt: skip


def test_a_healthy_batch_rings_nothing_and_every_alarm_can_tell():
    run, numbers = config(), numbers_of(healthy(), config()) | {"health/dpo_accuracy": 0.6}
    assert begins(numbers, run) == {}
    assert {name: judge(numbers, run) for name, judge in ALARMS.items()} == dict.fromkeys(ALARMS, "")


def test_a_term_that_is_drowned_is_told_by_which():
    shares = {"reward/dpo_share": 0.9, "reward/kl_share": 0.0995, "reward/score_share": 0.0005}
    told = begins(shares, config())["term_share"]
    assert "the score term is 0.05%" in told and "or lower rto.dpo_coef, whose term is 90.0%" in told


def test_of_the_quickstart_only_its_dpo_policy_rings():
    """Its worst numbers on the way, as measured on CPU; its DPO run is no better than a coin on 47 pairs."""
    numbers = {
        "reward/dpo_share": 0.0309, "reward/kl_share": 0.0361, "reward/score_share": 0.9147,
        "reward/dpo_clip_frac": 0.0068, "reward/score_clip_frac": 0.0, "ppo/clip_frac": 0.0183,
        "ppo/entropy": 4.4773, FIRST_ENTROPY: 4.9426, "critic/explained_variance": -0.0094,
        "decode/log_prob_diff_mean": 1e-6,
    }  # fmt: skip
    assert begins(numbers, config()) == {}
    assert begins(numbers | {"health/dpo_accuracy": 0.468}, config()).keys() == {"dpo_accuracy"}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_rings_its_alarm(name):
    change, words, said = SICK[name]
    run, batch = config(*words), healthy()
    change(batch)
    found = begins(numbers_of(batch, run), run)
    assert said in found[name]
    limits = [limit for limit in vars(run.alarms) if limit != "patience"]
    off = config(*words, *(f"--alarms.{limit}=null" for limit in limits))
    assert begins(numbers_of(batch, off), off) == {}


def test_a_dpo_reward_that_prefers_what_people_reject_rings_at_once():
    heard = hear({"health/dpo_accuracy": 0.45}, config(), {}, step=0)
    assert "prefers the chosen side of 45.0% of the held-out pairs" in heard.lines[0]
    assert hear({}, config(), heard.states, step=1).metrics()["alarm/dpo_accuracy"] == 1, "it is measured once"


def test_a_number_that_is_unknown_changes_nothing():
    heard = hear({"critic/explained_variance": float("nan")}, config(), {"explained_variance": 2}, step=3)
    assert heard.states == {"explained_variance": 2} and heard.lines == []


def test_a_run_without_a_critic_has_no_alarm_for_it():
    run = config("--advantage.estimator=reinforce_pp")
    assert begins({"critic/explained_variance": -9.0}, run) == {}


def test_a_term_whose_coefficient_is_0_need_not_have_a_share():
    numbers = {"reward/dpo_share": 0.0, "reward/score_share": 1.0, "reward/kl_share": 0.0}
    assert begins(numbers, config("--rto.dpo_coef=0")) == {}


def test_an_alarm_begins_and_ends_after_patience_and_is_told_once_each():
    run, states, told, metrics = config("--alarms.patience=2"), {}, [], []
    for step, value in enumerate([0.5, 0.1, 0.5, 0.5, 0.5, 0.1, 0.5, 0.1, 0.1, 0.1]):
        heard = hear({"health/repetition": value}, run, states, step=step)
        states = heard.states
        told += [line.partition(":")[0] for line in heard.lines]
        metrics.append(heard.metrics()["alarm/repetition"])
    assert told == ["alarm repetition at step 3", "alarm repetition ends at step 8"]
    assert metrics == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert states == {}


def test_states_count_steps_in_a_row():
    assert [next_state(state, is_broken=True, patience=3) for state in (0, 1, 2, -1, -3)] == [1, 2, -1, -1, -1]
    assert [next_state(state, is_broken=False, patience=3) for state in (0, 1, 2, -1, -2, -3)] == [0, 0, 0, -2, -3, 0]


def test_every_alarm_is_a_metric():
    assert {name.partition("/")[2] for name in METRICS if name.startswith("alarm/")} == set(ALARMS)


@pytest.mark.parametrize(("word", "message"), [
    ("--alarms.patience=0", "alarms.patience must be 1 or more, got 0"),
    ("--alarms.max_repetition=2", "alarms.max_repetition must lie between 0 and 1, got 2"),
    ("--alarms.max_decode_difference=-1", "alarms.max_decode_difference must lie between 0 and inf, got -1"),
    ("--alarms.min_explained_variance=nan", "min_explained_variance"),
])  # fmt: skip
def test_limits_are_checked(word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(word)


def test_repetition_counts_trigrams_within_responses():
    tokens = torch.tensor(
        [[9, 9, 9, 1, 2, 3, 1, 2, 3, 0], [5, 5, 5, 5, 5, 5, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]]
    )
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 8 + [1, 1]]).bool()
    # 123 231 312 123: one of four again. 555 three times: two of three. Two tokens: none.
    torch.testing.assert_close(repetition(tokens, mask), torch.tensor([0.25, 2 / 3, 0.0], dtype=torch.float64))
    assert repetition(tokens[:, :2], mask[:, :2]).tolist() == [0, 0, 0]


def test_correlation_and_positive_share_are_worked_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert correlation(x, torch.tensor([2, 4, 6])) == pytest.approx(1)
    assert correlation(x, torch.tensor([1.0, 0.0, 1.0])) == pytest.approx(0)
    assert correlation(x, torch.ones(3)) is None
    mask = torch.tensor([True, True, True, True, False])
    assert positive_share(torch.tensor([1.0, -1.0, 2.0, 0.0, 9.0]), mask) == pytest.approx(2 / 3)
    assert positive_share(torch.zeros(5), mask) is None
