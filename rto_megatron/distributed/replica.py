"""What the ranks of one replica say to each other.

By process group rather than by Mesh: a model brings its own groups (`model.pg_collection`).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather_over_tensor(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` of every tensor rank, stacked in rank order on a new first axis."""
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=group)
    return parts


def sum_over_tensor(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `x` over the tensor ranks; `x` itself is overwritten with it."""
    dist.all_reduce(x, group=group)
    return x


def agree_over_context(x: Tensor, group: ProcessGroup) -> Tensor:
    """The first context rank's `x`, on all of them, which bring their own; `x` itself is overwritten.

    They compute the same from the same; but a device may add in another order the next time, and ranks with different
    tokens would go on without a word.
    """
    if group.size() > 1:
        dist.broadcast(x, group=group, group_src=0)
    return x


def send_to_next_stage(hidden: Tensor, group: ProcessGroup) -> None:
    """Hand hidden states to the next pipeline stage, which must be about to receive them; the last one's is the first.

    (That one has the next chunk of the layers.)
    """
    dist.send(hidden.contiguous(), group=group, group_dst=(group.rank() + 1) % group.size())


def receive_from_previous_stage(
    shape: tuple[int, ...], group: ProcessGroup, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The hidden states that the previous pipeline stage sends."""
    hidden = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(hidden, group=group, group_src=(group.rank() - 1) % group.size())
    return hidden


def share_from_last_stage(
    x: Tensor | None, group: ProcessGroup, *, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The last pipeline stage's `x`, on every stage; the others pass None."""
    if group.size() == 1:
        assert x is not None
        return x
    shared = torch.empty(shape, dtype=dtype, device=device) if x is None else x.contiguous()
    dist.broadcast(shared, group=group, group_src=group.size() - 1)
    return shared
