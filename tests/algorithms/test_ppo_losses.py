"""PPO's losses by hand, and how they divide."""

import math

import torch

from rto_megatron.algorithms.masked import loss_count, masked_mean, masked_sum, token_weights
from rto_megatron.algorithms.ppo import entropy_bonus, policy_loss, value_loss

JUNK = float("nan")
MASK = torch.tensor([[False, True, True, False], [False, True, False, False]])
SEQUENCE = torch.tensor([[0, 0.25, 0.25, 0], [0, 0.5, 0, 0]])


def test_sequence_weights_give_each_response_the_same_say():
    count = loss_count(MASK, "sequence")
    assert count == 2
    torch.testing.assert_close(token_weights(MASK, loss_mean="sequence", count=count), SEQUENCE)


def test_token_weights_give_each_token_the_same_say():
    count = loss_count(MASK, "token")
    assert count == 3
    torch.testing.assert_close(token_weights(MASK, loss_mean="token", count=count), MASK / 3)


def test_a_row_without_response_weighs_nothing_and_is_not_counted():
    mask = torch.tensor([[False, False], [True, True]])
    assert loss_count(mask, "sequence") == 1
    torch.testing.assert_close(token_weights(mask, loss_mean="sequence", count=1), torch.tensor([[0, 0], [0.5, 0.5]]))


def test_masked_sums_and_means_do_not_see_what_is_masked():
    x = torch.tensor([[JUNK, 1.0, 3.0, JUNK], [JUNK, 5.0, JUNK, JUNK]])
    assert masked_sum(x, MASK).item() == 9
    assert masked_mean(x, MASK).item() == 3
    torch.testing.assert_close(masked_mean(x, MASK, -1), torch.tensor([2.0, 5.0]))
    assert masked_mean(x, torch.zeros_like(MASK)).item() == 0


def test_policy_loss_clips_only_what_would_gain_from_going_further():
    log_probs = torch.tensor([[JUNK, math.log(1.5), math.log(1.5), JUNK], [JUNK, math.log(0.5), JUNK, JUNK]])
    log_probs.requires_grad_()
    result = policy_loss(
        log_probs=log_probs,
        old_log_probs=torch.tensor([[JUNK, 0.0, 0.0, JUNK], [JUNK, 0.0, JUNK, JUNK]]),
        advantages=torch.tensor([[JUNK, 2.0, -2.0, JUNK], [JUNK, 4.0, JUNK, JUNK]]),
        weights=SEQUENCE,
        clip=0.2,
    )
    # row 0: min(3, 2.4) = 2.4, held;  min(-3, -2.4) = -3, free.  row 1: min(2, 3.2) = 2, free.
    # loss = -(0.25 * 2.4 + 0.25 * -3 + 0.5 * 2) = -0.85
    torch.testing.assert_close(result.loss, torch.tensor(-0.85))
    assert result.num_tokens == 3
    assert result.num_clipped == 1
    torch.testing.assert_close(result.ratio_sum, torch.tensor(3.5))
    # k3, ratio - 1 - log ratio: 2 * (0.5 - log 1.5) and -0.5 + log 2
    torch.testing.assert_close(result.kl_sum, torch.tensor(0.5 - 2 * math.log(1.5) + math.log(2)))
    # d loss / d log pi = - w * ratio * A where free, 0 where held, 0 in the padding
    (grad,) = torch.autograd.grad(result.loss, log_probs)
    torch.testing.assert_close(grad, torch.tensor([[0, 0, 0.75, 0], [0, -1.0, 0, 0]]))


def test_value_loss_takes_the_worse_of_free_and_clipped():
    values = torch.tensor([[JUNK, 1.0, 1.0, JUNK], [JUNK, 0.1, JUNK, JUNK]], requires_grad=True)
    inputs = {
        "values": values,
        "old_values": torch.tensor([[JUNK, 0.0, 0.0, JUNK], [JUNK, 0.0, JUNK, JUNK]]),
        "returns": torch.tensor([[JUNK, 2.0, -1.0, JUNK], [JUNK, 1.1, JUNK, JUNK]]),
        "weights": SEQUENCE,
    }
    result = value_loss(**inputs, clip=0.5)
    # row 0: max(1, (0.5 - 2)^2) = 2.25, held;  max(4, 2.25) = 4, free.  row 1: 1, within the clip.
    # loss = (0.25 * 2.25 + 0.25 * 4 + 0.5 * 1) / 2 = 1.03125
    torch.testing.assert_close(result.loss, torch.tensor(1.03125))
    assert (result.num_tokens, result.num_clipped) == (3, 1)
    (grad,) = torch.autograd.grad(result.loss, values)
    torch.testing.assert_close(grad, torch.tensor([[0, 0, 0.5, 0], [0, -0.5, 0, 0]]))
    # without a clip: (0.25 * 1 + 0.25 * 4 + 0.5 * 1) / 2 = 0.875
    free = value_loss(**inputs, clip=None)
    torch.testing.assert_close(free.loss, torch.tensor(0.875))
    assert free.num_clipped == 0


def test_entropy_bonus_is_a_weighted_mean():
    entropy = torch.tensor([[JUNK, 1.0, 3.0, JUNK], [JUNK, 4.0, JUNK, JUNK]])
    torch.testing.assert_close(entropy_bonus(entropy, SEQUENCE), torch.tensor(3.0))
