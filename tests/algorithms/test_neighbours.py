"""R-DPO, SimPO, TDPO, UNA and DRTO: by hand, and as what they become in the limit."""

import math

import pytest
import torch

from rto_megatron.algorithms.dpo import dpo_loss
from rto_megatron.algorithms.drto import robust_factors, span_losses, worst_weights
from rto_megatron.algorithms.preference_losses import rdpo_loss, simpo_loss, tdpo_loss, thumbs_loss
from rto_megatron.algorithms.una import implicit_rewards, una_loss

JUNK = float("nan")
POLICY = {"policy_chosen": torch.tensor([-3.0, -5.0]), "policy_rejected": torch.tensor([-6.0, -4.0])}
REF = {"ref_chosen": torch.tensor([-4.0, -5.0]), "ref_rejected": torch.tensor([-5.0, -5.0])}
"""Log-ratios 1 and -1, then 0 and 1: margins 2 and -1."""
TOKENS = {"chosen_tokens": torch.tensor([6, 2]), "rejected_tokens": torch.tensor([3, 4])}


def nll(lead):
    return math.log(1 + math.exp(-lead))


def test_rdpo_adds_what_the_lengths_explain_to_the_margin():
    result = rdpo_loss(**POLICY, **REF, **TOKENS, beta=0.5, length_coef=0.1, num_pairs=2)
    # 0.5 * 2 + 0.1 * 3 = 1.3;  0.5 * -1 + 0.1 * -2 = -0.7
    assert result.loss.item() == pytest.approx((nll(1.3) + nll(-0.7)) / 2)
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([0.5, 0.0]))


def test_rdpo_learns_less_from_a_pair_whose_chosen_side_is_merely_longer():
    policy = torch.tensor([0.0, 0.0], requires_grad=True)
    result = rdpo_loss(
        policy_chosen=policy,
        policy_rejected=torch.zeros(2),
        ref_chosen=torch.zeros(2),
        ref_rejected=torch.zeros(2),
        chosen_tokens=torch.tensor([9, 1]),
        rejected_tokens=torch.tensor([1, 9]),
        beta=1.0,
        length_coef=0.1,
        num_pairs=1,
    )
    longer, shorter = torch.autograd.grad(result.loss, policy)[0].abs().tolist()
    assert longer == pytest.approx(1 / (1 + math.exp(0.8)))
    assert shorter == pytest.approx(1 / (1 + math.exp(-0.8)))


@pytest.mark.parametrize("kind", ["rdpo", "tdpo2", "tdpo1_at_equal_drift"])
def test_without_its_own_term_each_neighbour_is_dpo(kind):
    pair = {**POLICY, **REF, "beta": 0.3, "num_pairs": 2}
    kl = {"chosen_kl": torch.tensor([1.0, 2.0]), "rejected_kl": torch.tensor([3.0, 7.0])}
    if kind == "rdpo":
        loss = rdpo_loss(**pair, **TOKENS, length_coef=0.0).loss
    elif kind == "tdpo2":
        loss = tdpo_loss(**pair, **kl, kl_coef=0.0).loss
    else:
        loss = tdpo_loss(**pair, **{**kl, "rejected_kl": kl["chosen_kl"]}, kl_coef=None).loss
    assert loss.item() == dpo_loss(**pair).loss.item()


def test_simpo_compares_log_probs_per_token_and_asks_for_a_margin():
    result = simpo_loss(**POLICY, **TOKENS, beta=2.0, margin=0.5, num_pairs=2)
    # per token -0.5 and -2, then -2.5 and -1: 2 * 1.5 - 0.5 = 2.5;  2 * -1.5 - 0.5 = -3.5
    assert result.loss.item() == pytest.approx((nll(2.5) + nll(-3.5)) / 2)
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([-1.0, -5.0]))
    torch.testing.assert_close(result.rejected_rewards, torch.tensor([-4.0, -2.0]))


def test_simpo_does_not_care_how_long_a_response_of_equal_tokens_is():
    short = simpo_loss(**POLICY, **TOKENS, beta=2.0, margin=0.0, num_pairs=2).loss
    twice = {name: 2 * value for name, value in (POLICY | TOKENS).items()}
    assert simpo_loss(**twice, beta=2.0, margin=0.0, num_pairs=2).loss.item() == pytest.approx(short.item())


def test_tdpo_takes_the_drift_of_the_rejected_side_from_the_margin():
    kl = {"chosen_kl": torch.tensor([1.0, 2.0]), "rejected_kl": torch.tensor([3.0, 1.0])}
    pair = {**POLICY, **REF, "beta": 0.5, "num_pairs": 2}
    # TDPO1: 0.5 * (2 - 2) = 0;  0.5 * (-1 + 1) = 0
    assert tdpo_loss(**pair, **kl, kl_coef=None).loss.item() == pytest.approx(math.log(2))
    # TDPO2 with 0.5: 0.5 * (2 - 1) = 0.5;  0.5 * (-1 + 0.5) = -0.25
    result = tdpo_loss(**pair, **kl, kl_coef=0.5)
    assert result.loss.item() == pytest.approx((nll(0.5) + nll(-0.25)) / 2)
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([1.0, 1.0]))  # 0.5 * (1 + 1), 0.5 * (0 + 2)


def test_tdpo2_stops_the_gradient_of_the_chosen_sides_drift_and_tdpo1_does_not():
    chosen, rejected = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    zeros = dict.fromkeys((*POLICY, *REF), torch.zeros(1))
    for kl_coef, expected in ((None, (-0.25, 0.25)), (0.5, (None, 0.125))):
        loss = tdpo_loss(**zeros, chosen_kl=chosen, rejected_kl=rejected, beta=0.5, kl_coef=kl_coef, num_pairs=1).loss
        grads = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
        assert tuple(None if grad is None else grad.item() for grad in grads) == expected


def test_una_squares_the_distance_of_implicit_and_explicit_reward():
    policy, ref = torch.tensor([-3.0, -6.0], requires_grad=True), torch.tensor([-4.0, -5.0])
    loss = una_loss(
        policy_log_probs=policy, ref_log_probs=ref, feedback=torch.tensor([1.5, -0.5]), beta=0.5, num_responses=2
    )
    # implicit 0.5 and -0.5: squares 1 and 0
    assert loss.item() == pytest.approx(0.5)
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], torch.tensor([-0.5, 0.0]))


def test_una_of_a_thumb_is_a_cross_entropy():
    loss = una_loss(
        policy_log_probs=torch.tensor([2.0, 2.0]),
        ref_log_probs=torch.zeros(2),
        feedback=torch.tensor([1, 0]),
        beta=0.5,
        kind="binary",
        num_responses=1,
    )
    assert loss.item() == pytest.approx(nll(1.0) + nll(-1.0))


def test_una_takes_the_sides_of_a_pair_apart():
    result = thumbs_loss(**POLICY, **REF, beta=0.5, num_pairs=2)
    # log-ratios 1 and 0 with a thumb up, -1 and 1 with one down
    assert result.loss.item() == pytest.approx((nll(0.5) + nll(0.0) + nll(0.5) + nll(-0.5)) / 4)
    torch.testing.assert_close(result.chosen_rewards, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(result.rejected_rewards, torch.tensor([-0.5, 0.5]))


def test_una_is_zero_at_the_optimum_of_the_kl_regularised_reward():
    ref, reward, beta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, -2.0, 0.5]), 0.7
    weights = ref * (reward / beta).exp()
    best, f_of_x = weights / weights.sum(), beta * weights.sum().log()
    torch.testing.assert_close(implicit_rewards(best.log(), ref.log(), beta=beta), reward - f_of_x)
    loss = una_loss(
        policy_log_probs=best.log(), ref_log_probs=ref.log(), feedback=reward - f_of_x, beta=beta, num_responses=3
    )
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_the_difference_of_two_implicit_rewards_is_what_dpo_classifies():
    chosen = implicit_rewards(POLICY["policy_chosen"], REF["ref_chosen"], beta=0.5)
    rejected = implicit_rewards(POLICY["policy_rejected"], REF["ref_rejected"], beta=0.5)
    expected = sum(nll(lead) for lead in (chosen - rejected).tolist()) / 2
    assert dpo_loss(**POLICY, **REF, beta=0.5, num_pairs=2).loss.item() == pytest.approx(expected)


def worst_mean(losses, **options):
    return (worst_weights(losses, **options) * losses).sum().item()


def test_a_span_ends_with_its_end_and_the_last_one_with_the_response():
    losses = torch.tensor([[JUNK, 1.0, 3.0, 8.0, JUNK], [JUNK, 5.0, 7.0, JUNK, JUNK]])
    mask = torch.tensor([[False, True, True, True, False], [False, True, True, False, False]])
    ends = torch.tensor([[True, False, True, False, True], [False] * 5])  # those outside the response do not count
    means, spans = span_losses(losses, mask, ends)
    torch.testing.assert_close(means, torch.tensor([2.0, 8.0, 6.0]))
    assert spans.tolist() == [[-1, 0, 0, 1, -1], [-1, 2, 2, -1, -1]]


def test_weights_times_the_factors_are_the_worst_mixture_of_spans():
    losses = torch.tensor([[JUNK, 1.0, 3.0, 8.0, 0.0], [JUNK, 5.0, 7.0, -4.0, -6.0]])
    mask = ~losses.isnan()
    options = {"divergence": "kl", "radius": 0.1}
    factors = robust_factors(losses, mask, span_tokens=2, **options)
    # spans of means 2, 4, 6, -5: all of one size, so equal weights of tokens are equal weights of spans
    means = torch.tensor([2.0, 4.0, 6.0, -5.0])
    mixed = (factors * losses)[mask].mean()
    assert mixed.item() == pytest.approx(worst_mean(means, **options), rel=1e-6)
    assert factors[mask].mean().item() == pytest.approx(1)
    assert (factors[~mask] == 1).all()
    assert (robust_factors(losses, mask, span_tokens=2, divergence="kl", radius=0) == 1).all()


def test_a_small_chi_square_radius_adds_a_standard_deviation():
    # mean 2, variance 1.25: 2 + sqrt(2 * 0.1 * 1.25) while no weight is 0
    losses = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
    worst = worst_mean(losses, divergence="chi_square", radius=0.1)
    assert worst == pytest.approx(2 + math.sqrt(0.25))


def test_a_kl_radius_tilts_exponentially_up_to_the_radius():
    losses = torch.tensor([0.0, 1.0, 3.0])
    weights = worst_weights(losses, divergence="kl", radius=0.2)
    tilts = weights.log().diff() / losses.double().diff()
    assert tilts[0].item() == pytest.approx(tilts[1].item())
    assert (weights * (3 * weights).log()).sum().item() == pytest.approx(0.2)


@pytest.mark.parametrize("divergence", ["kl", "chi_square"])
def test_the_radius_runs_from_the_mean_to_the_largest_loss(divergence):
    losses = torch.tensor([1.0, 5.0, 5.0, -3.0])
    at = [worst_mean(losses, divergence=divergence, radius=radius) for radius in (0, 0.05, 0.2, 0.5, 9)]
    assert at[0] == 2.0
    assert at == sorted(at)
    assert len(set(at)) >= 4
    assert at[-1] == 5.0
    assert worst_weights(losses, divergence=divergence, radius=9).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize("divergence", ["kl", "chi_square"])
def test_no_distribution_within_the_radius_is_worse(divergence):
    generator = torch.Generator().manual_seed(0)
    losses, radius = torch.tensor([0.3, -1.0, 2.0, 0.9], dtype=torch.float64), 0.15
    worst = worst_mean(losses, divergence=divergence, radius=radius)
    others = torch.distributions.Dirichlet(torch.full((4,), 2.0, dtype=torch.float64))
    torch.manual_seed(generator.initial_seed())
    for q in others.sample((2000,)):
        ratio = 4 * q
        distance = (q * ratio.log()).sum() if divergence == "kl" else (ratio - 1).square().mean() / 2
        if distance <= radius:
            assert (q * losses).sum().item() <= worst + 1e-9
