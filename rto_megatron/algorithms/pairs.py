"""Preference pairs: how they lie in a batch, and who wins."""

from torch import Tensor


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows of a PreferenceBatch tensor: [2P, ...] -> [P, ...], [P, ...]."""
    return x[0::2], x[1::2]


def num_correct(*, chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many of P pairs have the higher reward on the chosen side; an int64 scalar. A tie is not correct."""
    return (chosen > rejected).sum()
