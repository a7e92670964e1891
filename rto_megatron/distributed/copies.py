"""Weights that several ranks hold must be the same bits on all of them; nothing else would say when they drift apart.

    tensor ranks             norms and whatever else is not cut
    data and context ranks   everything
    first and last stage     the embedding, where it is also the output layer

A lost sum of gradients is what makes them drift: every rank goes on by itself, and a checkpoint keeps one of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.refit import multipliers
from rto_megatron.distributed.shards import Shard, is_adapter, is_own, shards
from rto_megatron.errors import CheckpointError

CHUNK = 1 << 18
"""Numbers of 8 bytes that are summed at once: they stay in a CPU's cache."""


@dataclass(frozen=True)
class _Axis:
    """Ranks that hold copies of some weights."""

    name: str
    group: dist.ProcessGroup
    weights: Sequence[Shard]
    """The same pieces in the same order on all of them."""


def check_copies(models: Mapping[str, MegatronModule | None]) -> None:
    """Compare what the ranks hold of weights that they hold several times; of an adapted model, of what is its own.

    One number a weight goes to the other holders. All ranks of the world call, with the same roles in the same order.

    Args:
        models: role -> model; None where a rank has no part of it.

    Raises:
        CheckpointError: some ranks hold different bits; raised by all.
    """
    found = [said for role, model in models.items() if model is not None for said in _differences(role, model)]
    told = list(dict.fromkeys(said for rank_said in gather_objects(found) for said in rank_said))
    if told:
        more = f" ({len(told) - 1} more like it)" if len(told) > 1 else ""
        raise CheckpointError(
            f"{told[0]}{more}: a bug or faulty hardware; nothing was saved, the newest checkpoint is from "
            "before. Start from it on other nodes, or report the layout"
        )


@torch.no_grad()
def checksum(data: Tensor) -> Tensor:
    """A number of all bits and their places, the same on every device; int64 scalar. One changed bit changes it.

    Every 8 bytes are an integer, times an odd number of its place in a chunk; chunks' sums likewise, modulo 2^64.
    """
    flat = data.reshape(-1).view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.cat((flat, flat.new_zeros(-flat.numel() % 8)))
    words = flat.view(torch.int64)
    odd = multipliers(0, min(CHUNK, len(words)), 0, data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part in words.split(CHUNK):
        total = total * 0x61C8864680B583EB + (part * odd[: len(part)]).sum()
    return total


def _differences(role: str, model: MegatronModule) -> Iterator[str]:
    """What this rank sees of each weight that differs within its groups."""
    axes = [axis for axis in _axes(model) if axis.group.size() > 1]
    sums = {id(shard): checksum(shard.data) for axis in axes for shard in axis.weights}
    for axis in axes:
        if not axis.weights:
            continue
        own = torch.stack([sums[id(shard)] for shard in axis.weights])
        gathered = [torch.empty_like(own) for _ in range(axis.group.size())]
        dist.all_gather(gathered, own, group=axis.group)
        every, ranks = torch.stack(gathered).T.tolist(), dist.get_process_group_ranks(axis.group)
        for shard, values in zip(axis.weights, every, strict=True):
            if len(set(values)) > 1:
                yield f"{role} {shard.name} differs between {axis.name} ranks, {_who(values, ranks)}"


def _axes(model: MegatronModule) -> Iterator[_Axis]:
    groups: Any = model.pg_collection  # Module would have it a tensor
    mine = list(shards(model))
    if any(is_adapter(shard.key) for shard in mine):
        mine = [shard for shard in mine if is_own(shard.key)]
    yield _Axis("data and context" if groups.cp.size() > 1 else "data", groups.dp_cp, mine)
    yield _Axis("tensor", groups.tp, [shard for shard in mine if tuple(shard.data.shape) == shard.full_shape])
    if groups.embd is not None and getattr(model, "share_embeddings_and_output_weights", False):
        tied = [shard for shard in mine if shard.key == "embedding.word_embeddings.weight"]
        yield _Axis("first and last pipeline", groups.embd, tied)


def _who(values: Sequence[int], ranks: Sequence[int]) -> str:
    """Which ranks agree with each other: "ranks 0 and 2 against rank 1"."""
    held: dict[int, list[int]] = {}
    for value, rank in zip(values, ranks, strict=True):
        held.setdefault(value, []).append(rank)
    camps = (f"rank{'s' * (len(camp) > 1)} {' and '.join(map(str, camp))}" for camp in held.values())
    return " against ".join(camps)
