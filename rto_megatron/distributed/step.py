"""Forward and backward passes over microbatches, on any pipeline layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.algorithms.sequences import position_ids
from rto_megatron.distributed.collectives import from_last_stage, sum_in_rank_order
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.optimizer import Trainable


class Batch(Protocol):
    """Rows of tokens: any record of `rto_megatron.batch`."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def num_tokens(self) -> Tensor: ...

    @property
    def response_mask(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def rows(self, index: Any, *, multiple: int = 1) -> Any: ...


@dataclass(frozen=True)
class Forward:
    """What a model is asked about a microbatch; called with both."""

    ask: Callable[[MegatronModule, Any], Tensor]
    """Model and microbatch -> the model's output, [B, T, *depth]; hidden states before the last pipeline stage."""
    depth: tuple[int, ...]
    """Shape of what is said about one token: the other stages must know it too."""

    def __call__(self, model: MegatronModule, batch: Batch) -> Tensor:
        return self.ask(model, batch)


Loss = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""Output and microbatch -> the microbatch's part of the loss, already divided by a count fixed beforehand,
and [k] sums to report. Runs on the last pipeline stage."""


token_log_probs = Forward(
    lambda model, batch: model(batch.tokens, position_ids(batch.tokens), None, loss_mask=batch.response_mask),
    depth=(2,),
)
"""A policy's log-probs and entropies of the response tokens, [B, T, 2] nats."""

head_outputs = Forward(lambda model, batch: model(batch.tokens, position_ids(batch.tokens), None), depth=())
"""A scalar head's outputs, [B, T]; column t is read after token t."""


def cut_rows(batch: Batch, size: int, *, unit: int = 1) -> list[list[int]]:
    """Row numbers of each microbatch: up to `size` rows of like length, `unit` neighbours kept together.

    Sorted by length, so that little of a microbatch is padding.
    """
    lengths = batch.num_tokens.view(-1, unit).amax(1).tolist()
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    size = max(1, size // unit)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [[unit * i + j for i in group for j in range(unit)] for group in groups]


def _width_multiple(model: MegatronModule) -> int:
    """Sequence parallelism cuts each row over the tensor ranks."""
    return model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1


@torch.no_grad()
def score(model: MegatronModule, batch: Batch, forward: Forward, mesh: Mesh, *, micro_batch_size: int) -> Tensor:
    """`forward` of all rows, without gradient, on every rank of the replica.

    Returns:
        [B, T, *forward.depth] float32, rows as in `batch`, 0 beyond each row's microbatch width.
    """
    cuts = cut_rows(batch, micro_batch_size)
    micros = [batch.rows(rows, multiple=_width_multiple(model)) for rows in cuts]
    was_training = model.training
    model.eval()
    outputs = _run(model, micros, forward, None, mesh, forward_only=True)
    model.train(was_training)
    shape = (*batch.tokens.shape, *forward.depth)
    whole = None
    if mesh.is_last_stage:
        whole = torch.zeros(shape, device=batch.tokens.device)
        for rows, out in zip(cuts, outputs, strict=True):
            width = min(out.shape[1], whole.shape[1])
            whole[rows, :width] = out[:, :width].float()
    return from_last_stage(whole, mesh, shape=shape, dtype=torch.float32)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, the same on all ranks."""

    sums: Tensor
    """[k] float64: the loss's sums, over all microbatches and ranks."""
    grad_norm: float
    """Over all ranks, before clipping."""


def train_step(
    trainable: Trainable,
    batch: Batch,
    forward: Forward,
    loss: Loss,
    mesh: Mesh,
    *,
    micro_batch_size: int,
    lr: float,
    num_sums: int,
    unit: int = 1,
) -> StepResult:
    """One optimizer step on this replica's rows of the minibatch.

    Args:
        batch: this data-parallel rank's rows.
        loss: see `Loss`; parts are summed over microbatches and ranks.
        lr: learning rate of this step.
        num_sums: length of what `loss` reports.
        unit: neighbouring rows that must stay in one microbatch (2 for pairs).
    """
    trainable.zero_grad()
    trainable.ddp.train()
    multiple = _width_multiple(trainable.model)
    micros = [batch.rows(rows, multiple=multiple) for rows in cut_rows(batch, micro_batch_size, unit=unit)]
    reported = _run(trainable.ddp, micros, forward, loss, mesh, forward_only=False)
    local = torch.stack(reported).double().sum(0) if mesh.is_last_stage else None
    sums = from_last_stage(local, mesh, shape=(num_sums,), dtype=torch.float64)
    return StepResult(sums=sum_in_rank_order(sums, mesh), grad_norm=trainable.step(lr))


def _run(
    model: MegatronModule,
    micros: Sequence[Batch],
    forward: Forward,
    loss: Loss | None,
    mesh: Mesh,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Megatron's schedule over the microbatches; on the last stage a tensor for each, else nothing."""

    def forward_step(batches: Iterator[Batch], module: MegatronModule) -> tuple[Tensor, Callable]:
        micro = next(batches)

        def finish(output: Tensor, non_loss_data: bool = False) -> Any:
            if loss is None:
                return output
            value, sums = loss(output, micro)
            # three values and calculate_per_token_loss: Megatron divides by nothing
            return value, torch.zeros((), dtype=torch.int, device=output.device), sums.detach().clone()

        return forward(module, micro), finish

    arguments: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": iter(micros),
        "model": [model],
        "num_microbatches": len(micros),
        "seq_length": micros[0].tokens.shape[1],
        "micro_batch_size": len(micros[0]),
        "forward_only": forward_only,
        "collect_non_loss_data": loss is None,
        "pg_collection": mesh.groups,
    }
    if mesh.pipeline.size == 1:
        return forward_backward_no_pipelining(**arguments)
    communicator = P2PCommunicator(pp_group=mesh.groups.pp, config=getattr(model, "module", model).config)
    return forward_backward_pipelining_without_interleaving(**arguments, p2p_communicator=communicator)
