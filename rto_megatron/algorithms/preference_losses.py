"""The neighbours of DPO among losses on pairs: R-DPO, SimPO, TDPO and UNA; each is called and answers as `dpo_loss`.

DPO and IPO are in `algorithms/dpo.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.dpo import DPOLoss
from rto_megatron.algorithms.masked import widen
from rto_megatron.algorithms.una import implicit_rewards, una_loss


def rdpo_loss(
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
    length_coef: float,
    num_pairs: int | Tensor,
) -> DPOLoss:
    """R-DPO (arXiv 2403.19159): DPO for an objective that charges `length_coef` for every token.

    The optimum of E[r - a |y|] - beta KL has r = beta log(pi / pi_ref) + a |y| + c(x), hence

        - log sigmoid(beta * m + a * (|chosen| - |rejected|))

    with m the margin of log-ratios, as in `dpo_loss`. What length explains of a label need not be learned; a = 0
    is DPO.

    Args:
        policy_chosen, policy_rejected: [P] nats, whole responses under the model being trained; carry the gradient.
        ref_chosen, ref_rejected: [P] nats, under the frozen SFT model.
        chosen_tokens, rejected_tokens: [P] tokens of the responses.
        beta: strength of the pull to the reference, per nat.
        length_coef: a, reward units per token.
        num_pairs: pairs of the whole minibatch, over all ranks.
    """
    chosen = implicit_rewards(policy_chosen, ref_chosen, beta=beta)
    rejected = implicit_rewards(policy_rejected, ref_rejected, beta=beta)
    explained = length_coef * (chosen_tokens - rejected_tokens)
    return _result(chosen - rejected + explained, chosen, rejected, num_pairs)


def simpo_loss(
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    beta: float,
    margin: float,
    num_pairs: int | Tensor,
) -> DPOLoss:
    """SimPO (arXiv 2405.14734, equation 6): the log-prob per token is the reward, and no reference takes part.

        - log sigmoid(beta * (log pi(chosen) / |chosen| - log pi(rejected) / |rejected|) - margin)

    Args:
        policy_chosen, policy_rejected: [P] nats, whole responses under the model being trained; carry the gradient.
        chosen_tokens, rejected_tokens: [P] tokens of the responses, 1 or more.
        beta: reward units per nat per token; the paper takes 2 to 10.
        margin: by how much the chosen side is to win, reward units; the paper's gamma.
        num_pairs: pairs of the whole minibatch, over all ranks.
    """
    chosen = beta * widen(policy_chosen) / chosen_tokens
    rejected = beta * widen(policy_rejected) / rejected_tokens
    return _result(chosen - rejected - margin, chosen, rejected, num_pairs)


def tdpo_loss(
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float,
    kl_coef: float | None,
    num_pairs: int | Tensor,
) -> DPOLoss:
    """TDPO (arXiv 2404.11999): DPO whose margin also counts how far the policy has left the reference on the way.

    With m the margin of log-ratios and D the sum over a response's positions of KL(pi_ref || pi), over the vocabulary:

        TDPO1, kl_coef None:  - log sigmoid(beta * (m - (D(rejected) - D(chosen))))
        TDPO2, kl_coef a:     - log sigmoid(beta * (m - a * (D(rejected) - stop_gradient(D(chosen)))))

    TDPO2's stopped gradient only pulls the rejected side back. a = 0 is DPO.

    Args:
        policy_chosen, policy_rejected: [P] nats, whole responses under the model being trained; carry the gradient.
        ref_chosen, ref_rejected: [P] nats, under the frozen SFT model.
        chosen_kl, rejected_kl: [P] nats, D; carry the gradient.
        beta: strength of the pull to the reference, per nat.
        kl_coef: a; the paper takes 0.5.
        num_pairs: pairs of the whole minibatch, over all ranks.
    """
    chosen = implicit_rewards(policy_chosen, ref_chosen, beta=beta)
    rejected = implicit_rewards(policy_rejected, ref_rejected, beta=beta)
    drift = rejected_kl - chosen_kl if kl_coef is None else kl_coef * (rejected_kl - chosen_kl.detach())
    # its reward counts the drift too: r = beta * (log-ratio + D)
    return _result(
        chosen - rejected - beta * drift, chosen + beta * chosen_kl, rejected + beta * rejected_kl, num_pairs
    )


def thumbs_loss(
    *,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    num_pairs: int | Tensor,
) -> DPOLoss:
    """UNA (arXiv 2408.15339, equation 12): the sides of a pair taken apart, as a thumb up and one down.

        - (log sigmoid(implicit(chosen)) + log sigmoid(-implicit(rejected))) / 2

    Args:
        policy_chosen, policy_rejected: [P] nats, whole responses under the model being trained; carry the gradient.
        ref_chosen, ref_rejected: [P] nats, under the frozen SFT model.
        beta: reward units per nat.
        num_pairs: pairs of the whole minibatch, over all ranks.
    """
    policy, ref = torch.stack([policy_chosen, policy_rejected]), torch.stack([ref_chosen, ref_rejected])
    thumbs = torch.ones_like(policy)
    thumbs[1] = 0
    loss = una_loss(
        policy_log_probs=policy,
        ref_log_probs=ref,
        feedback=thumbs,
        beta=beta,
        kind="binary",
        num_responses=2 * num_pairs,
    )
    chosen, rejected = implicit_rewards(policy.detach(), ref, beta=beta)
    return DPOLoss(loss=loss, chosen_rewards=chosen, rejected_rewards=rejected)


def _result(lead: Tensor, chosen: Tensor, rejected: Tensor, num_pairs: int | Tensor) -> DPOLoss:
    """-log sigmoid of the lead [P], and the rewards of both sides [P]."""
    return DPOLoss(
        loss=-F.logsigmoid(lead).sum() / num_pairs,
        chosen_rewards=chosen.detach(),
        rejected_rewards=rejected.detach(),
    )
