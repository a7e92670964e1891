"""The rows of a microbatch over the context ranks: who has which columns, and how they come together again.

A row is cut into 2 x ranks chunks; rank r has chunk r and chunk 2 x ranks - 1 - r, one from either end, so that under a
causal mask every rank has as many pairs of query and key. It is the order of Megatron's rotary embedding and of
Transformer Engine's attention.

By process group rather than by Mesh: a model brings its own groups (`model.pg_collection`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

FP8_TOKENS = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Recipe -> what Transformer Engine wants the number of tokens in a product to be a multiple of."""


def column_multiple(config: TransformerConfig) -> int:
    """What the width of a model's rows must be a multiple of, for all ranks to have equally many columns.

    A context rank has two chunks of each row, sequence parallelism cuts what it has over the tensor ranks, and products
    in 8 bits take tokens by so many.
    """
    num_chunks = 2 * config.context_parallel_size if config.context_parallel_size > 1 else 1
    together = FP8_TOKENS[str(config.fp8_recipe)] if config.fp8 else 1
    return num_chunks * together * (config.tensor_model_parallel_size if config.sequence_parallel else 1)


def chunks_of(rank: int, num_ranks: int) -> tuple[int, int]:
    """Which of a row's 2 x num_ranks chunks a context rank has."""
    return rank, 2 * num_ranks - 1 - rank


def own_columns(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """This context rank's two chunks of axis `dim`, which the number of chunks divides; all of it on a single rank."""
    return x if group.size() == 1 else _columns_of(x, group.rank(), group.size(), dim)


def whole_rows(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """All columns in order, from every context rank's own.

    For what every rank does the same with, a loss: backward, each rank takes the gradient of its own columns, once.
    """
    return x if group.size() == 1 else _Gather.apply(x, group, dim, False)


def keys_of_all(x: Tensor, group: ProcessGroup, *, dim: int) -> Tensor:
    """All columns in order, from every context rank's own.

    For what each rank does something else with, its own queries: backward, each rank takes the sum over all ranks of
    the gradients of its own columns, added from rank 0 up, so that it has the same bits in every run.
    """
    return x if group.size() == 1 else _Gather.apply(x, group, dim, True)


def _columns_of(x: Tensor, rank: int, num_ranks: int, dim: int) -> Tensor:
    chunks = x.chunk(2 * num_ranks, dim)
    assert len(chunks) == 2 * num_ranks, f"{x.shape[dim]} columns are no multiple of {2 * num_ranks}"
    return torch.cat([chunks[number] for number in chunks_of(rank, num_ranks)], dim)


def _in_order(parts: Sequence[Tensor], dim: int) -> Tensor:
    """What the ranks have, in rank order -> all columns."""
    early, late = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*early, *reversed(late)), dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, is_summed: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.is_summed = group, dim, is_summed
        own = x.contiguous()  # gloo gives wrong numbers for other strides
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own, group=group)
        return _in_order(parts, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        group, dim = ctx.group, ctx.dim
        if not ctx.is_summed:
            return _columns_of(grad, group.rank(), group.size(), dim), None, None, None
        sent = torch.stack([_columns_of(grad, rank, group.size(), dim) for rank in range(group.size())])
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=group)
        total = arrived[0]
        for part in arrived[1:]:
            total = total + part
        return total, None, None, None
