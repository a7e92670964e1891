"""Sums and means over response tokens, and the weight of each token in a loss."""

from typing import Literal

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if already float32 or float64: half precision is too coarse to sum in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask`; 0 over nothing. Picks before it adds, so that NaN outside stays outside."""
    picked = torch.where(mask, x, 0.0)
    return picked.sum() if dim is None else picked.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask`; 0 over nothing."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def last_response_token(response_mask: Tensor) -> Tensor:
    """[B, T] bool -> [B, T] bool, True only on the last True of each row."""
    num_true_from_here = response_mask.flip(-1).cumsum(-1).flip(-1)
    return response_mask & (num_true_from_here == 1)


def loss_count(response_mask: Tensor, loss_mean: Literal["sequence", "token"]) -> Tensor:
    """What a loss is divided by: rows with a response, or response tokens; an int64 scalar.

    It adds up over microbatches and ranks. `token_weights` wants the sum over the whole minibatch.
    """
    return response_mask.any(-1).sum() if loss_mean == "sequence" else response_mask.sum()


def token_weights(
    response_mask: Tensor,
    *,
    loss_mean: Literal["sequence", "token"],
    count: int | Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Share of each token in a loss; over the whole minibatch the weights add up to 1.

    With H response tokens in the row of token t:

        sequence:  w[t] = 1 / (H * count)     count = sequences of the minibatch, over all ranks
        token:     w[t] = 1 / count           count = response tokens of the minibatch, over all ranks

    The count is fixed before the minibatch is cut, so the sum of `w * x` over microbatches and
    ranks is the same however it was cut.

    Args:
        response_mask: [B, T] bool, of this microbatch.
        count: sum of `loss_count` over the minibatch.

    Returns:
        [B, T] positive on response tokens, exactly 0 elsewhere.
    """
    share = 1.0 / torch.as_tensor(count, device=response_mask.device, dtype=dtype).clamp(min=1)
    if loss_mean == "sequence":
        share = share / response_mask.sum(-1, keepdim=True).clamp(min=1).to(dtype)
    return torch.where(response_mask, share, 0.0)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Sum of `weights * x`; where the weight is 0, `x` may be anything, and gets no gradient."""
    return (weights * torch.where(weights > 0, x, 0.0)).sum()
