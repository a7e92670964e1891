"""Preference pairs: how they lie in a batch, and what is reported of them."""

import torch
from torch import Tensor


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows of a PreferenceBatch tensor: [2P, ...] -> [P, ...], [P, ...]."""
    return x[0::2], x[1::2]


def pair_sums(loss: Tensor, *, chosen: Tensor, rejected: Tensor, num_pairs: int) -> Tensor:
    """A microbatch's part of the minibatch's loss, accuracy, mean chosen and mean rejected reward.

    Args:
        loss: scalar, already divided by `num_pairs`.
        chosen: [P] rewards, or scores, of the better responses.
        rejected: [P] of the worse ones.
        num_pairs: pairs of the whole minibatch.

    Returns:
        [4] without gradient; adds up over microbatches and ranks.
    """
    correct = (chosen > rejected).sum()  # a tie is not correct
    return torch.stack((loss, correct / num_pairs, chosen.sum() / num_pairs, rejected.sum() / num_pairs)).detach()


def pair_metrics(sums: Tensor, *, side: str) -> dict[str, float]:
    """`pair_sums`, added up, by name; `side` is what the two sides have: a `reward` or a `score`."""
    loss, accuracy, chosen, rejected = sums.tolist()
    return {
        "loss": loss,
        "accuracy": accuracy,
        "margin": chosen - rejected,
        f"chosen_{side}": chosen,
        f"rejected_{side}": rejected,
    }
