"""Which rows an optimizer step takes, and which of them a rank owns; no state, so nothing to save.

Randomness belongs to what it is for, by name: the same on every machine and rank, and after a resume.
"""

import hashlib
from functools import lru_cache

import torch


def stream_seed(key: str) -> int:
    """The seed of the random stream of that name, 63 bits. (`hash` differs from process to process.)"""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def random_order(num_items: int, key: str) -> list[int]:
    """0 to num_items - 1, shuffled by the random stream of that name."""
    return torch.randperm(num_items, generator=torch.Generator().manual_seed(stream_seed(key))).tolist()


@lru_cache(maxsize=4)
def epoch_order(num_rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The rows of one epoch in random order."""
    return tuple(random_order(num_rows, f"epoch/{seed}/{epoch}"))


def batch_rows(num_rows: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step`, 0-based, over all ranks.

    Epochs follow each other without a gap: a batch may end one and begin the next, and none is partial.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [epoch_order(num_rows, seed=seed, epoch=p // num_rows)[p % num_rows] for p in positions]


def shard(num_items: int, *, rank: int, world: int) -> range:
    """The items that rank `rank` of `world` owns: disjoint, equally many, next to each other."""
    if num_items % world:
        raise ValueError(
            f"{num_items} rows do not divide by {world} data-parallel ranks; make the batch a multiple of {world}"
        )
    size = num_items // world
    return range(rank * size, (rank + 1) * size)
