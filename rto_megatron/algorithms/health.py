"""Signs that a run goes wrong, read from the samples of a step."""

import torch
from torch import Tensor

LARGEST_ID = 1 << 21
"""Three ids below it fit into one int64."""


def repetition(tokens: Tensor, response_mask: Tensor) -> Tensor:
    """Share of a response's trigrams that it has had before, [B] from 0 to 1; 0 for fewer than two of them.

        1 - distinct trigrams / trigrams

    Args:
        tokens: [B, T] int64, below 2**21.
        response_mask: [B, T] bool, True on a run of neighbours in each row.
    """
    if tokens.shape[1] < 3:
        return torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    first, second, third = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    inside = response_mask[:, :-2] & response_mask[:, 2:]
    names = torch.where(inside, (first * LARGEST_ID + second) * LARGEST_ID + third, -1).sort(-1).values
    is_new = torch.ones_like(inside)
    is_new[:, 1:] = names[:, 1:] != names[:, :-1]
    count, distinct = inside.sum(-1), (is_new & (names >= 0)).sum(-1)
    return torch.where(count > 0, 1 - distinct / count.clamp(min=1).double(), 0.0)


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of [B] and [B], from -1 to 1; None where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / size if size > 0 else None


def positive_share(x: Tensor, mask: Tensor) -> float | None:
    """Share of numbers above 0 among those of [B, T] that are not 0, where `mask`; None where there are none."""
    picked = x[mask]
    count = int((picked != 0).sum())
    return int((picked > 0).sum()) / count if count else None
