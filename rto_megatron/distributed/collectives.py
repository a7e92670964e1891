"""What ranks tell each other, by meaning. Every function takes any strides and returns a new tensor on every rank.

All ranks of the group must make the same calls in the same order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.replica import share_from_last_stage
from rto_megatron.distributed.runtime import HOST_BACKEND


def sum_in_rank_order(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum over the data ranks, added from rank 0 up: the same bits on every rank and in every run.

    An all-reduce may add in another order from one library version, size or network to the next.
    """
    parts = _gather(x, mesh)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def gather_over_data(x: Tensor, mesh: Mesh) -> Tensor:
    """[B_local, ...] of each data rank -> [B_local * data ranks, ...] in rank order; all ranks bring the same shape."""
    return torch.cat(_gather(x, mesh))


def from_last_stage(x: Tensor | None, mesh: Mesh, *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What the last pipeline stage computed, on all stages of its pipeline.

    Args:
        x: [*shape] on the last stage; ignored on the others, which may bring None.
        shape: known to every stage beforehand.
        dtype: known likewise.
    """
    if mesh.is_last_stage:
        assert x is not None, "the last stage must bring its tensor"
        assert (tuple(x.shape), x.dtype) == (tuple(shape), dtype), f"got {x.shape} {x.dtype}, agreed {shape} {dtype}"
    own = _own_copy(x) if mesh.is_last_stage and x is not None else None
    return share_from_last_stage(own, mesh.pipeline.group, shape=tuple(shape), dtype=dtype, device=mesh.device)


def gather_objects(obj: Any) -> list[Any]:
    """One small picklable object of each rank of the world, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """The small picklable object of global rank `src`, on every rank of the world; others may bring anything."""
    holder = [obj]
    dist.broadcast_object_list(holder, src=src)
    return holder[0]


def bring_to_main(
    x: Tensor | None, *, owner: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The tensor of global rank `owner` on rank 0; None on all others, which need not call."""
    me = dist.get_rank()
    if me == owner:
        assert x is not None and tuple(x.shape) == tuple(shape), "the owner must bring the tensor"
        if me == 0:
            return _own_copy(x)
        dist.send(_own_copy(x), dst=0)
    elif me == 0:
        received = torch.empty(tuple(shape), dtype=dtype, device=device)
        dist.recv(received, src=owner)
        return received
    return None


def barrier() -> None:
    """Wait for all ranks of the world."""
    dist.barrier()


def meetings(sets: Iterable[tuple[int, ...]]) -> Callable[[tuple[int, ...], float], float]:
    """A way for each of some sets of ranks to meet by itself; every rank of the world calls, with the same sets.

    Returns:
        (ranks, a number) -> the largest number that one of them brought, once all of them have called.
    """
    # not by members alone (use_local_synchronization): torch then names a group by how many groups a rank is in, and
    # members that differ in that would wait for each other for ever
    groups = {ranks: dist.new_group(list(ranks), backend=HOST_BACKEND) for ranks in sorted(sets)}

    def largest(ranks: tuple[int, ...], number: float) -> float:
        known = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(known, dist.ReduceOp.MAX, group=groups[ranks])
        return known.item()

    return largest


def _own_copy(x: Tensor) -> Tensor:
    # Contiguous: gloo gives wrong numbers for other strides. A copy: the caller's tensor is not written to.
    return x.detach().clone(memory_format=torch.contiguous_format)


def _gather(x: Tensor, mesh: Mesh) -> list[Tensor]:
    own = _own_copy(x)
    parts = [torch.empty_like(own) for _ in range(mesh.data.size)]
    dist.all_gather(parts, own, group=mesh.data.group)
    return parts
