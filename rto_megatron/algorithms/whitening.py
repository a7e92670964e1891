"""Mean and variance of something that is spread over ranks: sum locally, add up, finish."""

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Below this variance advantages are noise, and are not blown up to size 1; the released code's number."""


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Local sums: [count, sum, sum of squares] where `mask`, float64; add them over ranks.

    float64, because the variance is a difference of two sums that may be far larger than it.
    """
    picked = torch.where(mask, x.double(), 0.0)
    return torch.stack([mask.sum().double(), picked.sum(), picked.square().sum()])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Finish summed moments: mean and biased variance, float64 scalars; 0 and 0 over nothing."""
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0)


def whiten(x: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1: (x - mean) / sqrt(max(variance, 1e-8)).

    Args:
        x: [B, T]
        mask: [B, T] bool.
        moments: [3], `masked_moments` summed over everything that is whitened together.

    Returns:
        [B, T] in the dtype of `x`, exactly 0 outside the mask.
    """
    mean, variance = mean_and_variance(moments)
    scaled = (x.double() - mean) * variance.clamp(min=VARIANCE_FLOOR).rsqrt()
    return torch.where(mask, scaled, 0.0).to(x.dtype)


def explained_variance(*, returns: Tensor, errors: Tensor) -> float:
    """Share of the returns' variance that the critic explains: 1 - Var[returns - values] / Var[returns].

    1 is perfect, 0 no better than a constant, negative worse. NaN if the returns do not vary.

    Args:
        returns: [3], summed moments of the returns.
        errors: [3], summed moments of returns minus values.
    """
    spread = mean_and_variance(returns)[1].item()
    return 1 - mean_and_variance(errors)[1].item() / spread if spread > 0 else float("nan")
