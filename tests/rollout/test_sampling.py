"""The sampler draws from the distribution it says, and from nothing but (seed, index, token id)."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rto_megatron.rollout.sampling import Rows, gumbel, request_seed, sample

ALONE = SimpleNamespace(size=lambda: 1)
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5, 0.5, -8.0])
NUM_DRAWS = 20_000
CHI2_7_DOF_1_IN_1000 = 24.3


def rows(seeds, indices=0, temperature=1.0, top_k=0, top_p=1.0):
    n = len(seeds)
    indices = torch.tensor(indices).expand(n) if isinstance(indices, int) else torch.as_tensor(indices)
    return Rows(
        seeds=torch.as_tensor(seeds),
        indices=indices,
        temperatures=(temperature,) * n,
        top_k=(top_k,) * n,
        top_p=(top_p,) * n,
    )


def draw(logits, how, banned=()):
    return sample(logits, how, first_id=0, banned=torch.tensor(banned, dtype=torch.long), group=ALONE)


def chi2(tokens, probs):
    expected = probs * len(tokens)
    return ((torch.bincount(tokens, minlength=len(probs)) - expected) ** 2 / expected)[probs > 0].sum().item()


def test_draws_follow_the_softmax_over_seeds_and_over_the_tokens_of_one_response():
    logits, probs = LOGITS.expand(NUM_DRAWS, -1), LOGITS.softmax(-1)
    over_seeds, _ = draw(logits, rows(range(NUM_DRAWS), 3))
    over_indices, _ = draw(logits, rows([9] * NUM_DRAWS, range(NUM_DRAWS)))
    assert chi2(over_seeds, probs) < CHI2_7_DOF_1_IN_1000
    assert chi2(over_indices, probs) < CHI2_7_DOF_1_IN_1000
    assert abs(torch.corrcoef(torch.stack((over_seeds, over_indices)).float())[0, 1]) < 0.03


def test_temperature_divides_the_logits_in_the_draw_and_in_the_log_prob():
    tokens, log_probs = draw(LOGITS.expand(NUM_DRAWS, -1), rows(range(NUM_DRAWS), temperature=0.5))
    tempered = (LOGITS / 0.5).log_softmax(-1)
    assert chi2(tokens, tempered.exp()) < CHI2_7_DOF_1_IN_1000
    torch.testing.assert_close(log_probs, tempered[tokens])


def test_top_k_draws_among_the_likeliest_and_renormalises():
    tokens, log_probs = draw(LOGITS.expand(NUM_DRAWS, -1), rows(range(NUM_DRAWS), top_k=2))
    kept = LOGITS[:2].log_softmax(-1)
    assert set(tokens.tolist()) == {0, 1}
    assert chi2(tokens, kept.exp()) < CHI2_7_DOF_1_IN_1000
    torch.testing.assert_close(log_probs, kept[tokens])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        # probabilities 0.5, 0.3, 0.15, 0.05: a token stays while those before it hold less than top_p
        (0.4, {0}),
        (0.5, {0}),
        (0.6, {0, 1}),
        (0.81, {0, 1, 2}),
        (0.96, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_holds_the_probability(top_p, kept):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    tokens, log_probs = draw(logits, rows(range(2000), top_p=top_p))
    assert set(tokens.tolist()) == kept
    renormalised = logits[0, : len(kept)].log_softmax(-1)
    torch.testing.assert_close(log_probs, renormalised[tokens])


def test_top_p_counts_probability_within_the_top_k():
    # Among the top 2, token 0 holds 0.625 of the probability: enough for 0.6 only there.
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    assert set(draw(logits, rows(range(2000), top_k=2, top_p=0.6))[0].tolist()) == {0}
    assert set(draw(logits, rows(range(2000), top_p=0.6))[0].tolist()) == {0, 1}


def test_greedy_takes_the_best_and_reports_its_log_prob_at_temperature_1():
    tokens, log_probs = draw(LOGITS.expand(5, -1), rows(range(5), temperature=0.0, top_k=3))
    assert tokens.tolist() == [0] * 5
    torch.testing.assert_close(log_probs, LOGITS.log_softmax(-1)[:1].expand(5))


def test_banned_ids_are_never_drawn_and_hold_no_probability():
    tokens, log_probs = draw(LOGITS.expand(NUM_DRAWS, -1), rows(range(NUM_DRAWS)), banned=(0, 5, 7))
    without = LOGITS.index_fill(0, torch.tensor([0, 5, 7]), -torch.inf).log_softmax(-1)
    assert chi2(tokens, without.exp()) < CHI2_7_DOF_1_IN_1000
    assert not {0, 5, 7} & set(tokens.tolist())
    torch.testing.assert_close(log_probs, without[tokens])
    greedy, _ = draw(LOGITS.expand(5, -1), rows(range(5), temperature=0.0), banned=(0, 1))
    assert set(greedy.tolist()) == {5}


def test_the_logits_are_left_alone():
    logits = LOGITS.repeat(4, 1)
    draw(logits, rows(range(4), top_k=2), banned=(1,))
    assert torch.equal(logits, LOGITS.repeat(4, 1))


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_draw_does_not_depend_on_its_batch_mates(order, size, seed):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed))
    how = [{"temperature": 1.0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}, {}]
    alone = [draw(logits[i : i + 1], rows([seed + i], i, **how[i])) for i in range(6)]
    picked = order[:size]
    kwargs = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how[i] for i in picked]
    together = draw(
        logits[picked],
        Rows(
            seeds=torch.tensor([seed + i for i in picked]),
            indices=torch.tensor(picked),
            temperatures=tuple(k["temperature"] for k in kwargs),
            top_k=tuple(k["top_k"] for k in kwargs),
            top_p=tuple(k["top_p"] for k in kwargs),
        ),
    )
    assert together[0].tolist() == [alone[i][0].item() for i in picked]
    torch.testing.assert_close(together[1], torch.cat([alone[i][1] for i in picked]), rtol=0, atol=1e-6)


def test_gumbel_noise_has_the_moments_and_the_tail_of_its_distribution():
    noise = gumbel(torch.arange(64) * 7919, torch.zeros(64, dtype=torch.long), first_id=0, num_ids=49152)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.005)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.01)
    # P(noise > 10) = 1 - exp(-exp(-10)) = 4.54e-5: 143 of 3.1 million, standard deviation 12
    assert (noise > 10).sum().item() == pytest.approx(143, abs=50)


def test_gumbel_noise_equals_the_same_arithmetic_on_python_integers():
    seeds, indices = [0, 5, 2**62 + 3], [0, 1, 1000]
    noise = gumbel(torch.tensor(seeds), torch.tensor(indices), first_id=60, num_ids=40)
    plain = [[plain_gumbel(s, i, v) for v in range(60, 100)] for s, i in zip(seeds, indices, strict=True)]
    torch.testing.assert_close(noise, torch.tensor(plain))


def plain_gumbel(seed, index, token):
    """Splitmix64 of (seed, index), then a 32-bit hash of its halves and the token id."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    low, high = x % 2**32, x >> 32
    y = (token * 0x9E3779B1 + low) % 2**32
    y = (y ^ y >> 16) * 0x7FEB352D % 2**32 ^ high
    y = (y ^ y >> 15) * 0x846CA68B % 2**32
    y ^= y >> 16
    return -math.log(-math.log1p(-((y >> 1) + 0.5) / 2**31))


def test_a_request_seed_is_frozen_and_tells_every_part_of_its_key_apart():
    assert request_seed(1, 2, 3, 4) == 0xA30DF9E88CC1328E >> 1  # sha256 of "1/2/3/4"
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 11, 1), (0, 0, 1, 11)]
    seeds = {request_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
