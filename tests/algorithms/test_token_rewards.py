"""Token rewards by hand: each term, its clip, and where each shaping puts it."""

import pytest
import torch

from rto_megatron.algorithms.rewards import (
    dpo_token_rewards,
    normalise_scores,
    place_rewards,
    shape_token_rewards,
)

JUNK = float("nan")
RESPONSE = torch.tensor([[False, False, True, True, False]])
SIGNALS = {
    "policy_log_probs": torch.tensor([[JUNK, 0, -1.0, -2.0, JUNK]]),
    "ref_log_probs": torch.tensor([[0, JUNK, -1.5, -1.0, JUNK]]),
    "dpo_log_probs": torch.tensor([[0, 0, -0.5, -3.0, 9.0]]),
    "scores": torch.tensor([4.0]),
    "response_mask": RESPONSE,
}


def test_reward_adds_dpo_kl_and_a_score_on_the_last_token():
    rewards = shape_token_rewards(**SIGNALS, dpo_coef=0.1, kl_coef=0.01, score_coef=0.5)
    # token 2: 0.1 * 1.0 - 0.01 * 0.5          =  0.095
    # token 3: 0.1 * -2.0 - 0.01 * -1.0 + 2.0  =  1.81
    torch.testing.assert_close(rewards.total, torch.tensor([[0, 0, 0.095, 1.81, 0]]))
    torch.testing.assert_close(rewards.dpo, torch.tensor([[0, 0, 0.1, -0.2, 0]]))
    torch.testing.assert_close(rewards.kl, torch.tensor([[0, 0, -0.005, 0.01, 0]]))
    torch.testing.assert_close(rewards.score, torch.tensor([[0, 0, 0, 2.0, 0]]))


def test_dpo_reward_is_scaled_before_it_is_clipped_and_the_cut_ones_are_counted():
    rewards, num_clipped = dpo_token_rewards(
        dpo_log_probs=SIGNALS["dpo_log_probs"],
        ref_log_probs=SIGNALS["ref_log_probs"],
        response_mask=RESPONSE,
        dpo_coef=0.1,
        dpo_clip=0.15,
    )
    # log-ratios 1 and -2; clipped first they would be 0.015 and -0.015
    torch.testing.assert_close(rewards, torch.tensor([[0, 0, 0.1, -0.15, 0]]))
    assert num_clipped == 1


def test_a_coefficient_of_zero_is_exactly_zero_whatever_the_log_probs_hold():
    infinite = torch.full((1, 5), -torch.inf)
    signals = {**SIGNALS, "dpo_log_probs": infinite, "policy_log_probs": infinite, "scores": torch.tensor([JUNK])}
    rewards = shape_token_rewards(**signals, dpo_coef=0.0, kl_coef=0.0, score_coef=0.0)
    assert not rewards.total.any()


def test_half_precision_log_probs_are_subtracted_in_float32():
    signals = {name: x.bfloat16() if x.is_floating_point() else x for name, x in SIGNALS.items()}
    rewards = shape_token_rewards(**signals, dpo_coef=0.1, kl_coef=0.01, score_coef=0.5)
    assert rewards.total.dtype == torch.float32
    torch.testing.assert_close(rewards.total, torch.tensor([[0, 0, 0.095, 1.81, 0]]))


def test_scores_are_normalised_and_then_clipped():
    scores = normalise_scores(torch.tensor([3.0, 1.0, 100.0, -100.0]), mean=1.0, std=2.0, clip=10.0)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, 10.0, -10.0]))


def test_no_score_clip_leaves_scores_alone():
    torch.testing.assert_close(
        normalise_scores(torch.tensor([101.0]), mean=1.0, std=2.0, clip=None), torch.tensor([50.0])
    )


DENSE = torch.tensor([[0, 1.0, 2.0, 4.0, 8.0, 16.0, 0]])
MASK = torch.tensor([[False, True, True, True, True, True, False]])
# Sentence ends on tokens 0 (in the prompt), 2 and 4; token 5 closes the response without one.
ENDS = torch.tensor([[True, False, True, False, True, False, True]])


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        ("token", [0, 1.0, 2.0, 4.0, 8.0, 16.0, 0]),
        ("sentence", [0, 0, 3.0, 0, 12.0, 16.0, 0]),
        ("terminal", [0, 0, 0, 0, 0, 31.0, 0]),
        ("shaping_only", [0, 1.0, 2.0, 4.0, 8.0, -15.0, 0]),
    ],
)
def test_each_shaping_puts_the_rewards_where_the_paper_does(shaping, expected):
    placed = place_rewards(DENSE, MASK, shaping=shaping, segment_end=ENDS)
    torch.testing.assert_close(placed, torch.tensor([expected]))


def test_sentence_shaping_without_sentence_ends_says_what_it_needs():
    with pytest.raises(ValueError, match=r"shaping 'sentence' needs segment_end, .* got None"):
        place_rewards(DENSE, MASK, shaping="sentence")


def test_an_unknown_shaping_lists_the_known_ones():
    with pytest.raises(ValueError, match="must be token, sentence, terminal or shaping_only, got 'word'"):
        place_rewards(DENSE, MASK, shaping="word")
