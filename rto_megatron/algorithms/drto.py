"""Distributionally robust token optimization (arXiv 2604.08577): the worst case over spans of a response.

The paper bounds the actor's loss over all distributions of spans within an f-divergence of the observed one. What is
here follows from that definition by the convex dual of such sets (arXiv 1610.03425).
"""

from typing import Literal

import torch
from torch import Tensor

from rto_megatron.algorithms.masked import last_response_token

Divergence = Literal["kl", "chi_square"]

BISECTIONS = 100
"""Enough for float64 to stop moving."""


def span_losses(token_losses: Tensor, response_mask: Tensor, span_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of each span: up to and with each end, and what is left at the end of a response.

    Args:
        token_losses: [B, T]; may be anything outside the response.
        response_mask: [B, T] bool.
        span_ends: [B, T] bool, True on tokens that close a span.

    Returns:
        [S] mean losses, row by row and left to right; and [B, T] int64, the span of each token, -1 outside.
    """
    ends = (span_ends & response_mask) | last_response_token(response_mask)
    flat = ends.flatten()
    number = (flat.cumsum(0) - flat.long()).view_as(ends)  # an end belongs to the span that it closes
    spans = torch.where(response_mask, number, -1)
    of, losses = spans[response_mask], token_losses[response_mask]
    sums = losses.new_zeros(int(ends.sum())).index_add(0, of, losses)
    return sums / of.bincount(minlength=len(sums)), spans


def robust_factors(
    token_losses: Tensor, response_mask: Tensor, *, span_tokens: int, divergence: Divergence, radius: float
) -> Tensor:
    """What each token's weight in a loss is multiplied by for the worst mixture of spans: S * q of its span.

    The factors of the spans average to 1, and at radius 0 each is 1. They are worked out on the CPU in float64, so that
    all ranks that hold these losses get the same ones.

    Args:
        token_losses: [B, T]; may be anything outside the response.
        response_mask: [B, T] bool.
        span_tokens: tokens of a span, from the first of a response on.

    Returns:
        [B, T], 1 outside the response.
    """
    mask = response_mask.cpu()
    ends = mask.long().cumsum(-1) % span_tokens == 0
    means, spans = span_losses(token_losses.detach().cpu().double(), mask, ends)
    factors = len(means) * worst_weights(means, divergence=divergence, radius=radius)
    found = torch.ones(mask.shape, dtype=torch.float64)
    found[mask] = factors[spans[mask]]
    return found.to(token_losses)


def worst_weights(losses: Tensor, *, divergence: Divergence, radius: float) -> Tensor:
    """The distribution q over losses that makes their mean largest, within `radius` of the uniform one.

        kl:          sum q log(S q) <= radius:             q ~ exp(loss / eta)
        chi_square:  mean((S q - 1)^2) / 2 <= radius:      q ~ max(0, loss - eta)

    eta is found by bisection. A radius of 0 is the plain mean; a large one puts all weight on the largest losses. The
    largest mean is the robust loss; its gradient is that of the mean under q, held fixed (Danskin).

    Args:
        losses: [S].
        radius: nats for `kl`, 0 or more.

    Returns:
        [S] float64 weights without gradient; they add up to 1.
    """
    x = losses.detach().double()
    size = len(x)
    uniform = torch.full_like(x, 1 / size)
    if radius == 0 or x.max() == x.min():
        return uniform
    top = (x == x.max()).double()
    top /= top.sum()
    if _distance(top, divergence) <= radius:
        return top
    spread = (x.max() - x.min()).item()

    def weights(level: float) -> Tensor:
        """The larger the level in 0..1, the closer to the uniform one."""
        if divergence == "kl":
            return (x / (spread * level / (1 - level))).softmax(0)
        raised = (x - (x.max() - spread * level / (1 - level))).clamp(min=0)
        return raised / raised.sum()

    low, high = 1e-9, 1 - 1e-9
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _distance(weights(middle), divergence) <= radius else (middle, high)
    return weights(high)


def _distance(weights: Tensor, divergence: Divergence) -> float:
    """Of a distribution [S] from the uniform one."""
    ratio = len(weights) * weights
    if divergence == "kl":
        return torch.xlogy(weights, ratio).sum().item()
    return ((ratio - 1).square().mean() / 2).item()
