"""Scalar heads: what the reward model and the critic read from them, and the pairwise loss."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.masked import widen


def pairwise_loss(
    *,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    loss: Literal["sigmoid", "logexp"] = "sigmoid",
    num_pairs: int | Tensor,
) -> Tensor:
    """Bradley-Terry loss of a reward model (arXiv 2203.02155, equation 1), summed and divided by the minibatch.

        sigmoid:  - log sigmoid(chosen - rejected - margin)
        logexp:   log(1 + exp(rejected - chosen + margin))        the same number, written differently

    Args:
        chosen, rejected: [P] scores; carry the gradient.
        margin: [P] by how much the chosen side should win; None is 0.
        num_pairs: pairs of the whole minibatch, over all ranks.
    """
    lead = widen(chosen) - widen(rejected)
    if margin is not None:
        lead = lead - margin
    losses = -F.logsigmoid(lead) if loss == "sigmoid" else torch.logaddexp(torch.zeros_like(lead), -lead)
    return losses.sum() / num_pairs


def state_values(head_outputs: Tensor) -> Tensor:
    """The critic's head outputs, moved to the tokens they precede; [B, T] -> [B, T] reward units.

    The head output in column t has seen token t, so it is the value of the state before token
    t + 1. Column 0 is 0: nothing was known before it.
    """
    return F.pad(widen(head_outputs)[:, :-1], (1, 0))


def sequence_scores(head_outputs: Tensor, num_tokens: Tensor) -> Tensor:
    """The reward model's score: its head output on the last token before the padding; [B, T], [B] -> [B]."""
    return widen(head_outputs).gather(1, (num_tokens - 1)[:, None]).squeeze(1)
