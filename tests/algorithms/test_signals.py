"""Log-probs, entropy, KL, the KL controller, the learning rate, and rows, by hand."""

import math

import pytest
import torch

from rto_megatron.algorithms.kl import adapt_kl_coef, kl_estimates
from rto_megatron.algorithms.learning_rate import cosine_with_min_lr
from rto_megatron.algorithms.log_probs import token_entropy, token_log_probs
from rto_megatron.algorithms.masked import last_response_token
from rto_megatron.algorithms.sequences import join_rows, overwrite_eos, position_ids

JUNK = float("nan")


def test_a_token_is_scored_by_the_logits_before_it():
    odds = torch.tensor([[[3.0, 1.0], [1.0, 1.0], [JUNK, JUNK]]])  # the last column predicts nothing that is there
    log_probs = token_log_probs(odds.log(), torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(log_probs, torch.tensor([[0, math.log(0.25), math.log(0.5)]]))


def test_temperature_divides_the_logits():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 2, 3], [4, 0, 1]])
    torch.testing.assert_close(token_log_probs(logits, tokens, temperature=0.5), token_log_probs(2 * logits, tokens))


def test_half_precision_logits_give_float32_log_probs():
    assert token_log_probs(torch.zeros(1, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 2).long()).dtype == torch.float32


def test_entropy_is_that_of_the_distribution_before_the_token_and_a_banned_id_adds_nothing():
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [0.0, -torch.inf, -torch.inf], [0.0, 0.0, 0.0]]])
    logits.requires_grad_()
    entropy = token_entropy(logits)
    torch.testing.assert_close(entropy, torch.tensor([[0, math.log(2), 0]]))
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert not grad.any()  # both are at an extreme


def test_kl_estimates():
    estimates = kl_estimates(
        policy_log_probs=torch.tensor([[JUNK, math.log(0.5), math.log(0.2)]]),
        ref_log_probs=torch.tensor([[JUNK, math.log(0.25), math.log(0.4)]]),
        response_mask=torch.tensor([[False, True, True]]),
    )
    d = math.log(2)
    torch.testing.assert_close(estimates.k1, torch.tensor([[0, d, -d]]))
    torch.testing.assert_close(estimates.k2, torch.tensor([[0, d * d / 2, d * d / 2]]))
    torch.testing.assert_close(estimates.k3, torch.tensor([[0, 0.5 - 1 + d, 2 - 1 - d]]))


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(6.6, 0.01 * 1.01), (60.0, 0.01 * 1.02), (0.0, 0.01 * 0.98), (6.0, 0.01)],
)
def test_kl_coef_moves_by_at_most_a_fifth_of_the_samples_over_the_horizon(observed, expected):
    coef = adapt_kl_coef(0.01, observed_kl=observed, target=6.0, horizon=1000, num_samples=100)
    assert coef == pytest.approx(expected)


def test_kl_coef_without_a_target_is_fixed():
    assert adapt_kl_coef(0.01, observed_kl=99.0, target=None, horizon=10, num_samples=100) == 0.01


def test_learning_rate_climbs_then_falls_to_the_share_and_stays():
    settings = {"peak": 2.0, "min_lr_frac": 0.1, "warmup_steps": 4, "num_steps": 12}
    rates = [cosine_with_min_lr(step, **settings) for step in (0, 1, 4, 8, 12, 99)]
    assert rates == pytest.approx([0.0, 0.5, 2.0, 1.1, 0.2, 0.2])


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert cosine_with_min_lr(0, peak=2.0, min_lr_frac=0.1, warmup_steps=0, num_steps=5) == 2.0


def test_learning_rate_of_a_run_of_warmup_alone_is_defined():
    assert cosine_with_min_lr(3, peak=2.0, min_lr_frac=0.1, warmup_steps=3, num_steps=3) == 2.0


def test_the_last_response_token_is_the_last_true_of_each_row():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    assert last_response_token(mask).int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_rows_are_prompt_response_padding():
    tokens, num_tokens, response_mask = join_rows([[1, 2], [3]], [[4], [5, 6, 7]], pad_id=0)
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert num_tokens.tolist() == [3, 4]
    assert response_mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert position_ids(tokens).tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_no_rows_make_an_empty_batch():
    tokens, num_tokens, response_mask = join_rows([], [], pad_id=0)
    assert tokens.shape == response_mask.shape == (0, 0)
    assert num_tokens.shape == (0,)


def test_overwrite_eos_closes_truncated_responses_only():
    tokens, _, response_mask = join_rows([[1], [1]], [[4, 5], [6, 7, 8]], pad_id=0)
    closed = overwrite_eos(tokens, response_mask=response_mask, truncated=torch.tensor([False, True]), eos_id=9)
    assert closed.tolist() == [[1, 4, 5, 0], [1, 6, 7, 9]]
