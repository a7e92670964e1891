"""DPO, the reward model, and SFT by hand."""

import math

import pytest
import torch

from rto_megatron.algorithms.dpo import dpo_loss, sequence_log_probs
from rto_megatron.algorithms.pairs import pair_metrics, pair_sums, split_pairs
from rto_megatron.algorithms.reward_model import pairwise_loss, sequence_scores, state_values
from rto_megatron.algorithms.sft import lm_loss

JUNK = float("nan")
PAIRS = {
    "policy_chosen": torch.tensor([-3.0, -5.0]),
    "policy_rejected": torch.tensor([-6.0, -4.0]),
    "ref_chosen": torch.tensor([-4.0, -5.0]),
    "ref_rejected": torch.tensor([-5.0, -5.0]),
}
"""Log-ratios 1 and -1, then 0 and 1: margins 2 and -1."""


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_loss_is_the_log_odds_of_the_margin():
    result = dpo_loss(**PAIRS, beta=0.5, num_pairs=2)
    expected = (-math.log(sigmoid(1.0)) - math.log(sigmoid(-0.5))) / 2
    assert result.loss.item() == pytest.approx(expected)
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(result.rejected_rewards, torch.tensor([-0.5, 0.5]))


def test_label_smoothing_mixes_in_the_opposite_label():
    result = dpo_loss(**PAIRS, beta=0.5, label_smoothing=0.25, num_pairs=1)
    plain = -math.log(sigmoid(1.0)) - math.log(sigmoid(-0.5))
    flipped = -math.log(sigmoid(-1.0)) - math.log(sigmoid(0.5))
    assert result.loss.item() == pytest.approx(0.75 * plain + 0.25 * flipped)


def test_ipo_pulls_the_margin_to_half_of_one_over_beta():
    # margins 2 and -1, target 1 / (2 * 0.25) = 2: squares 0 and 9
    assert dpo_loss(**PAIRS, beta=0.25, loss="ipo", num_pairs=2).loss.item() == 4.5


def test_dpo_at_the_reference_is_log_two():
    same = {**PAIRS, "policy_chosen": PAIRS["ref_chosen"], "policy_rejected": PAIRS["ref_rejected"]}
    assert dpo_loss(**same, beta=0.1, num_pairs=2).loss.item() == pytest.approx(math.log(2))


def test_sequence_log_probs_sum_the_response_only():
    log_probs = torch.tensor([[JUNK, -1.0, -2.0, JUNK], [JUNK, JUNK, -4.0, JUNK]])
    mask = torch.tensor([[False, True, True, False], [False, False, True, False]])
    torch.testing.assert_close(sequence_log_probs(log_probs, mask), torch.tensor([-3.0, -4.0]))


def test_pairs_lie_as_chosen_then_rejected():
    chosen, rejected = split_pairs(torch.tensor([1, 10, 2, 20]))
    assert chosen.tolist() == [1, 2]
    assert rejected.tolist() == [10, 20]


def test_sums_of_pairs_add_up_over_microbatches_and_a_tie_is_not_correct():
    chosen, rejected = torch.tensor([1.0, 1.0, 2.0, 4.0], requires_grad=True), torch.tensor([1.0, 0.0, 3.0, 0.0])
    sums = [
        pair_sums(chosen[rows].sum() / 4, chosen=chosen[rows], rejected=rejected[rows], num_pairs=4)
        for rows in ([0, 1, 2], [3])
    ]
    assert not any(part.requires_grad for part in sums)
    assert pair_metrics(sum(sums), side="score") == {
        "loss": 2.0,
        "accuracy": 0.5,
        "margin": 1.0,
        "chosen_score": 2.0,
        "rejected_score": 1.0,
    }


@pytest.mark.parametrize("loss", ["sigmoid", "logexp"])
def test_pairwise_loss_is_the_log_odds_of_the_lead(loss):
    result = pairwise_loss(chosen=torch.tensor([3.0, 0.0]), rejected=torch.tensor([1.0, 0.0]), loss=loss, num_pairs=2)
    assert result.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(2)) / 2)


@pytest.mark.parametrize("loss", ["sigmoid", "logexp"])
def test_pairwise_loss_of_a_hopeless_pair_stays_finite(loss):
    chosen = torch.tensor([-1000.0], requires_grad=True)
    result = pairwise_loss(chosen=chosen, rejected=torch.tensor([0.0]), loss=loss, num_pairs=1)
    assert result.item() == 1000.0
    assert torch.autograd.grad(result, chosen)[0].item() == -1.0


def test_a_margin_is_what_the_chosen_side_must_win_by():
    result = pairwise_loss(
        chosen=torch.tensor([3.0]), rejected=torch.tensor([1.0]), margin=torch.tensor([2.0]), num_pairs=1
    )
    assert result.item() == pytest.approx(math.log(2))


def test_a_value_belongs_to_the_token_after_the_one_it_has_seen():
    torch.testing.assert_close(state_values(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[0.0, 1.0, 2.0]]))


def test_a_score_is_read_on_the_last_token_before_the_padding():
    outputs = torch.tensor([[1.0, 2.0, JUNK], [3.0, 4.0, 5.0]])
    torch.testing.assert_close(sequence_scores(outputs, torch.tensor([2, 3])), torch.tensor([2.0, 5.0]))


def test_lm_loss_weighs_negative_log_probs():
    log_probs = torch.tensor([[JUNK, -1.0, -3.0, JUNK]], requires_grad=True)
    loss = lm_loss(log_probs, torch.tensor([[0, 0.5, 0.25, 0]]))
    assert loss.item() == 1.25
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs)[0], torch.tensor([[0, -0.5, -0.25, 0]]))
