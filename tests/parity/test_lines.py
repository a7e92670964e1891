"""How far a line of the parity certificate is off, by hand."""

import math

import pytest
import torch

from rto_megatron.batch import Rollout
from rto_megatron.distributed.shards import Shard
from rto_megatron.parity.lines import (
    NOTHING,
    Difference,
    Tolerance,
    difference,
    gradient_difference,
    shard_difference,
    step_difference,
    token_differences,
)


def piece(*rows, offset=(0, 0), full=(2, 2)):
    data = torch.tensor(rows)
    return Shard(key="w", layer=None, offset=offset, full_shape=full, data=data, is_main=True)


def test_relative_is_of_the_largest_in_one_process_and_used_of_what_is_allowed():
    own, one = torch.tensor([[1.0, -8.0], [0.0, 2.5]]), torch.tensor([[1.0, -8.0], [0.0, 2.0]])
    found = difference(own, one, Tolerance(absolute=0.2, relative=0.1), ("row", "token"))
    # allowed: 0.2 + 0.1 * 8 = 1
    assert found == Difference(max_abs=0.5, max_rel=0.0625, used=0.5, where="row 1, token 1")
    assert found.passed


def test_without_tolerance_equal_passes_and_anything_else_fails():
    one = torch.tensor([1.0, 2.0])
    assert difference(one, one, Tolerance(), ("minibatch",)) == NOTHING
    off = difference(one + torch.tensor([0.0, 1e-6]), one, Tolerance(), ("minibatch",))
    assert (off.used, off.where, off.passed) == (math.inf, "minibatch 1", False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_fails(value):
    one = torch.ones(2)
    assert not difference(torch.tensor([1.0, value]), one, Tolerance(absolute=1e9), ("row",)).passed
    shard = piece([1.0, value], full=(1, 2))
    start, gradient = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    for found in (
        gradient_difference(shard, one[None], Tolerance(relative=1e9)),
        step_difference(shard, start=start, one=one[None], gradient=gradient, allowed=Tolerance(relative=1e9)),
    ):
        assert not found.passed


def test_the_place_of_a_difference_is_that_in_the_whole_weight():
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = shard_difference(piece([3.0, 4.5], offset=(1, 0)), one, Tolerance(relative=1.0))
    assert (found.where, found.max_abs, found.used) == ("w[1, 1]", 0.5, 0.125)


def test_a_gradient_is_off_by_a_share_of_all_of_it():
    one = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = gradient_difference(piece([3.0, 4.5], offset=(1, 0)), one, Tolerance(relative=0.1))
    # 0.5 / (1 + 2 + 3 + 4)
    assert (found.max_rel, found.used) == pytest.approx((0.05, 0.5))


def test_a_step_counts_by_its_gradient_so_that_adam_may_toss_a_coin_for_what_has_none():
    start, one = torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    gradient = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    flipped = step_difference(
        piece([1.0, -1.0], [1.0, 1.0]), start=start, one=one, gradient=gradient, allowed=Tolerance(relative=0.1)
    )
    assert (flipped.max_abs, flipped.max_rel) == (2.0, 0.0)
    # the first row did not move: 2 * 1 + 0 * 1 of 2 + 0 + 1 + 1
    idle = step_difference(
        piece([0.0, 0.0], offset=(0, 0)), start=start, one=one, gradient=gradient, allowed=Tolerance(relative=0.1)
    )
    assert (idle.max_rel, idle.where, idle.passed) == (0.5, "w[0, 0]", False)


def rollout(*responses):
    """Responses to the prompt 7 that are decoded with log-prob -1, or -2 for the token 9."""
    width = 1 + max(map(len, responses))
    tokens = torch.tensor([[7, *r, *[0] * (width - 1 - len(r))] for r in responses])
    num_tokens = torch.tensor([1 + len(r) for r in responses])
    column = torch.arange(width)
    mask = (column >= 1) & (column < num_tokens[:, None])
    return Rollout(
        tokens=tokens,
        num_tokens=num_tokens,
        response_mask=mask,
        decode_log_probs=torch.where(mask, torch.where(tokens == 9, -2.0, -1.0), 0.0),
        truncated=torch.zeros(len(responses), dtype=torch.bool),
    )


def test_responses_are_compared_up_to_where_they_part():
    one = rollout([1, 2, 3, 4], [5, 6])
    found = token_differences(rollout([1, 9, 8], [5, 6]), one, "float32")
    # alike: the first token of row 0, both of row 1; one parted
    assert found["rollout/tokens"].max_abs == 1
    assert found["rollout/tokens"].max_rel == pytest.approx(1 / 4)
    assert found["rollout/tokens"].where == "row 0, token 2"
    assert not found["rollout/tokens"].passed
    assert found["rollout/decode_log_probs"] == NOTHING


def test_a_response_that_ends_early_has_parted():
    found = token_differences(rollout([1, 2], [5, 6]), rollout([1, 2, 3], [5, 6]), "float32")
    assert found["rollout/tokens"].where == "row 0, token 3"


def test_equal_responses_of_another_width_have_not_parted():
    one = rollout([1, 2], [5])
    found = token_differences(one, rollout([1, 2], [5]), "bfloat16")
    assert found["rollout/tokens"] == NOTHING
