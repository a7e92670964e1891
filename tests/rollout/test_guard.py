"""The guard compares what it says it compares, and its message tells the way out."""

import pytest
import torch

from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.errors import DecodeError
from rto_megatron.rollout.guard import check_decoding, difference_of, rows_to_check

TOKENS = torch.tensor([[7, 1, 2, 3], [7, 1, 2, 0], [7, 1, 2, 3]])
MASK = torch.tensor([[False, True, True, True], [False, True, True, False], [False, True, True, True]])


def record(forward, decode=None, *, checked=(True, True, True), truncated=(False, False, False)):
    num_tokens = torch.tensor([4, 3, 4])
    decode = torch.zeros(3, 4) if decode is None else torch.tensor(decode)
    rollout = Rollout(
        tokens=TOKENS,
        num_tokens=num_tokens,
        response_mask=MASK,
        decode_log_probs=decode,
        truncated=torch.tensor(truncated),
    )
    forward, zeros = torch.tensor(forward), torch.zeros(3, 4)
    signals = Signals(
        tokens=TOKENS,
        num_tokens=num_tokens,
        policy_log_probs=decode,
        forward_log_probs=forward,
        checked=torch.tensor(checked),
        ref_log_probs=zeros,
        dpo_log_probs=zeros,
        values=zeros,
        raw_scores=zeros[:, 0],
        scores=zeros[:, 0],
    )
    return rollout, signals


FORWARD = [[9.0, 0.1, 0.0, 0.0], [9.0, -0.2, 0.0, 9.0], [9.0, 0.0, 0.0, 0.5]]


def test_differences_are_of_drawn_response_tokens_of_checked_rows():
    assert difference_of(*record(FORWARD)).values.tolist() == pytest.approx([0.1, 0, 0, 0.2, 0, 0, 0, 0.5])
    unchecked = difference_of(*record(FORWARD, checked=(True, False, True)))
    assert unchecked.values.tolist() == pytest.approx([0.1, 0, 0, 0, 0, 0.5])
    cut = difference_of(*record(FORWARD, truncated=(False, False, True)))  # its last token may be an overwritten EOS
    assert cut.values.tolist() == pytest.approx([0.1, 0, 0, 0.2, 0, 0, 0])


def test_the_effective_share_is_that_of_importance_weights():
    log_2 = torch.tensor(2.0).log().item()
    forward = [[0.0, log_2, 0.0, 0.0], [0.0] * 4, [0.0] * 4]
    # weights 2, 1 x 7: 9^2 / (8 * 11)
    assert difference_of(*record(forward)).effective_share == pytest.approx(81 / 88)


def check(config, dtype="float32", forward=FORWARD, **how):
    check_decoding(*record(forward, **how), RolloutConfig(**config), dtype=dtype, step=4)


def test_a_step_that_differs_too_much_is_told_with_the_way_out():
    with pytest.raises(DecodeError, match=r"step 4: .* by 0\.1 nats on average over 8 tokens, and rollout\.max_mean"):
        check({})
    with pytest.raises(DecodeError, match=r"by 0\.5 nats at most .*max_difference allows 0\.3 .*reuse_log_probs"):
        check({"max_mean_difference": 1.0, "max_difference": 0.3, "reuse_log_probs": True})
    check({"max_mean_difference": 0.2, "max_difference": 0.6})
    check({}, dtype="bfloat16", checked=(True, True, False))
    check({}, forward=[[0.0, 1e-5, 0.0, 0.0], [0.0] * 4, [0.0] * 4])
    check({}, checked=(False, False, False))
    with pytest.raises(DecodeError, match="nan"):
        check({"max_mean_difference": 9.0}, forward=[[0.0, float("nan"), 0.0, 0.0], [0.0] * 4, [0.0] * 4])


def test_the_checked_rows_are_drawn_by_seed_and_step():
    config = RolloutConfig(reuse_log_probs=True, check_rows=3)
    drawn = [rows_to_check(50, config, seed=seed, step=step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert all(len(rows) == 3 and rows < set(range(50)) for rows in drawn)
    assert len(set(drawn)) == 3
    assert drawn[0] == rows_to_check(50, config, seed=0, step=0)
    assert rows_to_check(2, config, seed=0, step=0) == {0, 1}


def test_reuse_and_an_eos_that_was_never_drawn_exclude_each_other():
    with pytest.raises(ValueError, match=r"reuse_log_probs must be false with rollout\.truncation overwrite_eos"):
        RolloutConfig(reuse_log_probs=True, truncation="overwrite_eos")
    with pytest.raises(ValueError, match=r"rollout\.max_difference must be positive or null, got 0"):
        RolloutConfig(max_difference=0.0)
