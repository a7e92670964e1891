"""Which rows an optimizer step takes, and which of them a rank owns; no state, so nothing to save."""

import hashlib
from functools import lru_cache

import torch


@lru_cache(maxsize=4)
def epoch_order(num_rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """The rows of one epoch in random order, the same on every machine and rank."""
    key = hashlib.sha256(f"epoch/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return tuple(torch.randperm(num_rows, generator=generator).tolist())


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
