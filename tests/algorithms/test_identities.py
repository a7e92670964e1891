"""What must hold for any rollout: the identities of RTO, and that layout in memory never matters."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_megatron.algorithms.advantages import gae, reinforce_pp
from rto_megatron.algorithms.masked import loss_count, masked_sum, token_weights
from rto_megatron.algorithms.ppo import policy_loss, value_loss
from rto_megatron.algorithms.rewards import place_rewards, shape_token_rewards
from rto_megatron.algorithms.whitening import masked_moments, whiten

JUNK = float("nan")
GAMMA, LAM, CLIP = 0.9, 0.8, 0.2
prop = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Random:
    """A random rollout and what the roles say about it, float64, junk outside the responses."""

    mask: torch.Tensor
    policy: torch.Tensor
    ref: torch.Tensor
    dpo: torch.Tensor
    values: torch.Tensor
    new: torch.Tensor
    new_values: torch.Tensor
    scores: torch.Tensor


@st.composite
def rollouts(draw):
    rows, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    width = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, width, (rows, 1), generator=generator)
    length = 1 + torch.randint(0, width, (rows, 1), generator=generator)
    column = torch.arange(width)
    mask = (column >= first) & (column < first + length)

    def tokens():
        return torch.where(mask, torch.randn(rows, width, generator=generator, dtype=torch.float64), JUNK)

    scores = torch.randn(rows, generator=generator, dtype=torch.float64)
    return Random(mask, tokens(), tokens(), tokens(), tokens(), tokens(), tokens(), scores)


def rewards_of(r, *, dpo_coef=0.3, dpo_clip=None, **more):
    return shape_token_rewards(
        policy_log_probs=r.policy,
        ref_log_probs=r.ref,
        dpo_log_probs=r.dpo,
        scores=r.scores,
        response_mask=r.mask,
        dpo_coef=dpo_coef,
        kl_coef=0.1,
        score_coef=1.0,
        dpo_clip=dpo_clip,
        **more,
    )


def advantages_of(r, rewards):
    return gae(rewards=rewards.total, values=r.values, response_mask=r.mask, gamma=GAMMA, lam=LAM)


def losses_of(r, advantages, returns, weights):
    """Policy and value loss, and the gradients that reach new log-probs and new values."""
    new, new_values = r.new.clone().requires_grad_(), r.new_values.clone().requires_grad_()
    policy = policy_loss(log_probs=new, old_log_probs=r.policy, advantages=advantages, weights=weights, clip=CLIP).loss
    value = value_loss(values=new_values, old_values=r.values, returns=returns, weights=weights, clip=CLIP).loss
    return torch.stack([policy, value]).detach(), torch.autograd.grad(policy + value, (new, new_values))


def everything(r, weights=None):
    """From signals to gradients: all that a step computes of `r`, one row a response."""
    advantages, returns = advantages_of(r, rewards_of(r, dpo_clip=0.2))
    if weights is None:
        weights = token_weights(r.mask, loss_mean="sequence", count=loss_count(r.mask, "sequence"), dtype=torch.float64)
    whitened = whiten(advantages, r.mask, masked_moments(advantages, r.mask))
    losses, gradients = losses_of(r, whitened, returns, weights)
    return losses, (advantages, returns, whitened, *gradients)


def map_tokens(r, change):
    """`r` with `change` applied to every [B, T] tensor."""
    return replace(r, **{f.name: change(getattr(r, f.name)) for f in fields(r) if f.name != "scores"})


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@prop
@given(rollouts(), st.floats(0.01, 2))
def test_token_rewards_sum_to_b1_times_the_log_ratio_of_the_response(r, coef):
    dense = rewards_of(r, dpo_coef=coef).dpo
    close(dense.sum(-1), coef * (masked_sum(r.dpo, r.mask, -1) - masked_sum(r.ref, r.mask, -1)))


@prop
@given(rollouts(), st.floats(0.01, 100))
def test_a_dpo_policy_equal_to_the_reference_is_ppo_bit_for_bit(r, coef):
    same = rewards_of(replace(r, dpo=r.ref), dpo_coef=coef, dpo_clip=0.05)
    assert torch.equal(same.total, rewards_of(r, dpo_coef=0.0).total)


@prop
@given(rollouts())
def test_a_dpo_coefficient_of_zero_is_ppo_bit_for_bit(r):
    rewards = rewards_of(r, dpo_coef=0.0, dpo_clip=0.05)
    assert not rewards.dpo.any()
    assert torch.equal(rewards.total, rewards.kl + rewards.score)


@prop
@given(rollouts())
def test_rto_differs_from_ppo_by_the_discounted_dpo_rewards_from_here_on(r):
    rto, ppo = rewards_of(r, dpo_clip=0.2), rewards_of(r, dpo_coef=0.0)
    difference = advantages_of(r, rto)[0] - advantages_of(r, ppo)[0]
    # GAE is linear in the rewards and the values cancel, which leaves
    # the sum over k >= 0 of (gamma * lambda)^k * dpo[t + k]: the token's own reward included.
    width = r.mask.shape[1]
    ahead = torch.arange(width) - torch.arange(width)[:, None]
    powers = torch.where(ahead >= 0, (GAMMA * LAM) ** ahead.double(), 0.0)
    close(difference, torch.where(r.mask, rto.dpo @ powers.T, 0.0))


@prop
@given(rollouts(), st.data())
def test_shapings_keep_the_total_except_shaping_only_which_makes_it_zero(r, data):
    dense = rewards_of(r).dpo
    ends = torch.tensor(data.draw(st.lists(st.booleans(), min_size=r.mask.numel(), max_size=r.mask.numel())))
    for shaping in ("token", "sentence", "terminal"):
        placed = place_rewards(dense, r.mask, shaping=shaping, segment_end=ends.reshape(r.mask.shape))
        close(placed.sum(-1), dense.sum(-1))
        assert not placed[~r.mask].any()
    close(place_rewards(dense, r.mask, shaping="shaping_only").sum(-1), torch.zeros(len(dense), dtype=torch.float64))


@prop
@given(rollouts())
def test_sentence_shaping_lies_between_token_and_terminal(r):
    dense = rewards_of(r).dpo
    every, none = torch.ones_like(r.mask), torch.zeros_like(r.mask)
    assert torch.equal(place_rewards(dense, r.mask, shaping="sentence", segment_end=every), dense)
    close(
        place_rewards(dense, r.mask, shaping="sentence", segment_end=none),
        place_rewards(dense, r.mask, shaping="terminal"),
    )


@prop
@given(rollouts())
def test_reinforce_pp_is_gae_with_a_critic_that_says_nothing(r):
    rewards = rewards_of(r).total
    nothing = torch.zeros_like(rewards)
    expected, _ = gae(rewards=rewards, values=nothing, response_mask=r.mask, gamma=GAMMA, lam=1.0)
    close(reinforce_pp(rewards=rewards, response_mask=r.mask, gamma=GAMMA), expected)


@prop
@given(rollouts(), st.sampled_from([0.0, -1e30, float("inf"), float("nan")]))
def test_what_stands_outside_the_mask_never_matters(r, junk):
    filled = map_tokens(r, lambda x: x if x.dtype == torch.bool else torch.where(r.mask, x, junk))
    losses, tensors = everything(r)
    again, tensors_again = everything(filled)
    assert torch.equal(losses, again)
    for ours, theirs in zip(tensors, tensors_again, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours[~r.mask].any()  # gradients included: neither NaN nor 0 * inf
        assert ours.isfinite().all()


@prop
@given(rollouts(), st.integers(0, 4), st.integers(0, 4))
def test_padding_on_either_side_changes_nothing(r, left, right):
    def pad(x):
        return torch.nn.functional.pad(x, (left, right), value=False if x.dtype == torch.bool else JUNK)

    losses, tensors = everything(r)
    padded_losses, padded = everything(map_tokens(r, pad))
    close(padded_losses, losses)
    for before, after in zip(tensors, padded, strict=True):
        close(after[:, left : left + before.shape[1]], before)


@prop
@given(rollouts())
def test_batch_mates_change_neither_rewards_nor_advantages(r):
    together = advantages_of(r, rewards_of(r, dpo_clip=0.2))
    for i in range(len(r.mask)):
        alone = replace(map_tokens(r, lambda x, i=i: x[i : i + 1]), scores=r.scores[i : i + 1])
        for whole, single in zip(together, advantages_of(alone, rewards_of(alone, dpo_clip=0.2)), strict=True):
            assert torch.equal(whole[i : i + 1], single)


@pytest.mark.parametrize("loss_mean", ["sequence", "token"])
@prop
@given(rollouts(), st.integers(1, 3))
def test_losses_and_gradients_do_not_depend_on_how_the_minibatch_is_cut(loss_mean, r, size):
    advantages, returns = advantages_of(r, rewards_of(r))
    count = loss_count(r.mask, loss_mean)

    def update(here):
        cut = replace(map_tokens(r, lambda x: x[here]), scores=r.scores[here])
        weights = token_weights(cut.mask, loss_mean=loss_mean, count=count, dtype=torch.float64)
        return losses_of(cut, advantages[here], returns[here], weights)

    whole, whole_gradients = update(slice(None))
    parts = [update(slice(i, i + size)) for i in range(0, len(r.mask), size)]
    close(sum(losses for losses, _ in parts), whole)
    for k, gradient in enumerate(whole_gradients):
        close(torch.cat([gradients[k] for _, gradients in parts]), gradient)


@prop
@given(rollouts())
def test_packing_responses_into_one_row_changes_neither_losses_nor_gradients(r):
    """Weights travel with their tokens, so the losses do not care which row a token lies in."""
    advantages, returns = advantages_of(r, rewards_of(r))
    weights = token_weights(r.mask, loss_mean="sequence", count=loss_count(r.mask, "sequence"), dtype=torch.float64)
    losses, gradients = losses_of(r, advantages, returns, weights)
    packed = map_tokens(r, lambda x: x[r.mask][None])
    again, packed_gradients = losses_of(packed, advantages[r.mask][None], returns[r.mask][None], weights[r.mask][None])
    close(again, losses)
    for gradient, packed_gradient in zip(gradients, packed_gradients, strict=True):
        close(packed_gradient[0], gradient[r.mask])


@pytest.mark.parametrize("loss_mean", ["sequence", "token"])
@prop
@given(rollouts())
def test_weights_of_a_minibatch_add_up_to_one(loss_mean, r):
    weights = token_weights(r.mask, loss_mean=loss_mean, count=loss_count(r.mask, loss_mean), dtype=torch.float64)
    close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))


@prop
@given(rollouts())
def test_the_first_minibatch_after_a_rollout_has_ratio_one(r):
    advantages, _ = advantages_of(r, rewards_of(r))
    weights = token_weights(r.mask, loss_mean="token", count=loss_count(r.mask, "token"), dtype=torch.float64)
    log_probs = r.policy.clone().requires_grad_()
    result = policy_loss(log_probs=log_probs, old_log_probs=r.policy, advantages=advantages, weights=weights, clip=CLIP)
    assert result.ratio_sum == result.num_tokens == r.mask.sum()
    assert result.num_clipped == 0
    assert result.kl_sum == 0
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    close(gradient, -weights * advantages)  # the plain policy gradient


@prop
@given(rollouts())
def test_whitened_advantages_have_mean_zero_and_variance_one(r):
    x = torch.where(r.mask, r.values, 0.0)
    moments = masked_moments(x, r.mask)
    again = masked_moments(whiten(x, r.mask, moments), r.mask)
    close(again[1], torch.zeros((), dtype=torch.float64))
    if r.mask.sum() > 1:
        close(again[2], again[0])
