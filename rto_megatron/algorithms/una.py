"""UNA (arXiv 2408.15339): the policy's log-ratio as an implicit reward that is fitted to explicit feedback.

Equations are numbered as in the PDF that its authors keep beside their code.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.masked import widen


def implicit_rewards(policy_log_probs: Tensor, ref_log_probs: Tensor, *, beta: float) -> Tensor:
    """The generalized implicit reward with f(x) = c = 0: beta * log(pi / pi_ref) of whole responses; [B] reward units.

    Equation 6. A policy for which it equals the explicit reward up to an f(x) is the optimum of
    E[reward] - beta KL(pi || pi_ref).

    Args:
        policy_log_probs, ref_log_probs: [B] nats, sums over a response.
        beta: reward units per nat.
    """
    return beta * (widen(policy_log_probs) - widen(ref_log_probs))


def una_loss(
    *,
    policy_log_probs: Tensor,
    ref_log_probs: Tensor,
    feedback: Tensor,
    beta: float,
    kind: Literal["score", "binary"] = "score",
    num_responses: int | Tensor,
) -> Tensor:
    """Distance of the implicit reward from feedback on single responses; a scalar with a gradient.

        score:   (implicit - feedback)^2                      equation 7 with a square for g; a reward model's score
        binary:  cross-entropy of sigmoid(implicit) and it    equation 12; feedback is the probability of a thumb up

    On scores in 0..1 the paper's own runs square the distance of sigmoid(implicit) instead (equation 13).
    Of pairs, the same on the difference of two implicit rewards is DPO: use `dpo_loss`.

    Args:
        policy_log_probs: [B] nats, whole responses under the model being trained; carries the gradient.
        ref_log_probs: [B] nats, under the frozen SFT model.
        feedback: [B] reward units, or in 0..1 for `binary`.
        num_responses: of the whole minibatch, over all ranks.
    """
    implicit = implicit_rewards(policy_log_probs, ref_log_probs, beta=beta)
    if kind == "score":
        losses = (implicit - feedback).square()
    else:
        losses = F.binary_cross_entropy_with_logits(implicit, feedback.to(implicit.dtype), reduction="none")
    return losses.sum() / num_responses
