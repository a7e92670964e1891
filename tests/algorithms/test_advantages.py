"""Advantages and whitening by hand."""

import math

import pytest
import torch

from rto_megatron.algorithms.advantages import gae, reinforce_pp
from rto_megatron.algorithms.whitening import explained_variance, masked_moments, mean_and_variance, whiten

JUNK = float("nan")
MASK = torch.tensor([[False, True, True, True, False]])
REWARDS = torch.tensor([[JUNK, 1.0, 0.0, 2.0, JUNK]])
VALUES = torch.tensor([[JUNK, 3.0, 1.0, 4.0, JUNK]])


def test_gae_is_the_discounted_sum_of_errors_and_bootstraps_nothing_at_the_end():
    advantages, returns = gae(rewards=REWARDS, values=VALUES, response_mask=MASK, gamma=0.5, lam=0.5)
    # errors: 1 + 0.5 * 1 - 3 = -1.5;  0 + 0.5 * 4 - 1 = 1;  2 + 0 - 4 = -2
    # advantages, from the end: -2;  1 + 0.25 * -2 = 0.5;  -1.5 + 0.25 * 0.5 = -1.375
    torch.testing.assert_close(advantages, torch.tensor([[0, -1.375, 0.5, -2.0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0, 1.625, 1.5, 2.0, 0]]))


def test_lambda_zero_is_the_one_step_error():
    advantages, _ = gae(rewards=REWARDS, values=VALUES, response_mask=MASK, gamma=1.0, lam=0.0)
    torch.testing.assert_close(advantages, torch.tensor([[0, -1.0, 3.0, -2.0, 0]]))


def test_lambda_one_is_what_is_still_to_come_minus_the_value():
    advantages, returns = gae(rewards=REWARDS, values=VALUES, response_mask=MASK, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[0, 0.0, 1.0, -2.0, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[0, 3.0, 2.0, 2.0, 0]]))


def test_reinforce_pp_discounts_what_is_still_to_come():
    advantages = reinforce_pp(rewards=REWARDS, response_mask=MASK, gamma=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0, 1.5, 1.0, 2.0, 0]]))


def test_an_empty_response_has_no_advantage():
    advantages, returns = gae(rewards=REWARDS, values=VALUES, response_mask=torch.zeros_like(MASK), gamma=1.0, lam=0.95)
    assert not advantages.any()
    assert not returns.any()


def test_whitening_divides_by_the_biased_deviation():
    x = torch.tensor([[JUNK, 1.0, 2.0, 6.0, JUNK]])
    # mean 3, variance (4 + 1 + 9) / 3 = 14 / 3
    expected = torch.tensor([[0, -2.0, -1.0, 3.0, 0]]) / math.sqrt(14 / 3)
    torch.testing.assert_close(whiten(x, MASK, masked_moments(x, MASK)), expected)


def test_moments_add_over_ranks():
    x = torch.arange(12.0).reshape(4, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
    added = masked_moments(x[:1], mask[:1]) + masked_moments(x[1:], mask[1:])
    torch.testing.assert_close(added, masked_moments(x, mask), rtol=0, atol=0)


def test_variance_survives_a_mean_that_is_large_beside_it():
    x = torch.tensor([[1000.0, 1000.25]])
    mean, variance = mean_and_variance(masked_moments(x, torch.ones_like(x, dtype=torch.bool)))
    assert mean.item() == 1000.125
    assert variance.item() == pytest.approx(0.125**2)


def test_advantages_that_do_not_vary_become_zero():
    x = torch.full((1, 5), 0.1)
    assert not whiten(x, MASK, masked_moments(x, MASK)).any()


def test_explained_variance_is_one_less_the_share_of_the_error():
    ones = torch.ones(1, 4, dtype=torch.bool)
    returns = masked_moments(torch.tensor([[0.0, 2.0, 0.0, 2.0]]), ones)  # variance 1
    errors = masked_moments(torch.tensor([[5.0, 6.0, 5.0, 6.0]]), ones)  # variance 1/4: a constant error is not counted
    assert explained_variance(returns=returns, errors=errors) == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns=masked_moments(torch.ones(1, 4), ones), errors=errors))
