"""Direct preference optimization."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.masked import masked_sum, widen


@dataclass(frozen=True, kw_only=True)
class DPOLoss:
    """DPO's loss on a microbatch, and the implicit rewards of its pairs."""

    loss: Tensor
    """Scalar with a gradient: this microbatch's share of the minibatch's loss."""
    chosen_rewards: Tensor
    """[P] beta * log-ratio of the chosen responses, detached."""
    rejected_rewards: Tensor
    """[P] the same of the rejected ones."""


def sequence_log_probs(log_probs: Tensor, response_mask: Tensor) -> Tensor:
    """Log-prob of each whole response: the sum over its tokens; [B, T] -> [B] nats."""
    return masked_sum(widen(log_probs), response_mask, -1)


def dpo_loss(
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    loss: Literal["sigmoid", "ipo"] = "sigmoid",
    num_pairs: int | Tensor,
) -> DPOLoss:
    """DPO on whole-response log-probs, summed over this microbatch and divided by the minibatch.

    With margin m = (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected) and smoothing e:

        sigmoid:  - (1 - e) log sigmoid(beta * m) - e log sigmoid(-beta * m)     arXiv 2305.18290, equation 7
        ipo:      (m - 1 / (2 beta))^2                                           arXiv 2310.12036, equation 17

    Args:
        policy_chosen, policy_rejected: [P] nats, under the model being trained; carry the gradient.
        ref_chosen, ref_rejected: [P] nats, under the frozen SFT model.
        beta: strength of the pull to the reference, per nat.
        label_smoothing: probability that a label is wrong; `ipo` does not use it.
        num_pairs: pairs of the whole minibatch, over all ranks.
    """
    chosen = widen(policy_chosen) - widen(ref_chosen)
    rejected = widen(policy_rejected) - widen(ref_rejected)
    margin = chosen - rejected
    if loss == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    else:
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return DPOLoss(
        loss=losses.sum() / num_pairs,
        chosen_rewards=beta * chosen.detach(),
        rejected_rewards=beta * rejected.detach(),
    )
