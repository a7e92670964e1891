"""Supervised fine-tuning."""

from torch import Tensor

from rto_megatron.algorithms.masked import weighted_sum, widen


def lm_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood of the response, in nats per token: - sum over t of w[t] * log p[t].

    Args:
        log_probs: [B, T] nats; carries the gradient.
        weights: [B, T] from `token_weights` with loss_mean "token", 0 outside the response.
    """
    return -weighted_sum(widen(log_probs), weights)
