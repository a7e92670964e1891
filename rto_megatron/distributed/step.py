"""Forward and backward passes over microbatches, on any pipeline layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.config.parallel import Cut
from rto_megatron.distributed.chunks import model_chunks
from rto_megatron.distributed.collectives import from_last_stage, sum_in_rank_order
from rto_megatron.distributed.context import column_multiple
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.microbatches import Batch, Microbatch, PackedRows, cut_rows, make_microbatches
from rto_megatron.distributed.offload import HostWeights
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.stream import Part, run_stream


@dataclass(frozen=True)
class Forward:
    """What a model is asked about a microbatch; called with both."""

    ask: Callable[[MegatronModule, Microbatch], Tensor]
    """Model and microbatch -> what the model says of its tokens, [B, T, *depth] or packed [1, N, *depth]; hidden states
    before the last pipeline stage."""
    depth: tuple[int, ...]
    """Shape of what is said about one token: the other stages must know it too."""

    def __call__(self, model: MegatronModule, micro: Microbatch) -> Tensor:
        return self.ask(model, micro)


Loss = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""Output [B, T, ...] and the rows of a microbatch -> its part of the loss, already divided by a count fixed beforehand,
and [k] sums to report. Runs on the last pipeline stage."""


token_log_probs = Forward(
    lambda model, micro: model(
        micro.tokens,
        micro.position_ids,
        None,
        loss_mask=micro.response_mask,
        packed_seq_params=micro.predicting,
    ),
    depth=(2,),
)
"""A policy's log-probs and entropies of the response tokens, [B, T, 2] nats."""


def log_probs_and_kl(reference: Any) -> Forward:
    """`token_log_probs` with a third number: KL of the reference's distribution and the policy's at each token.

    Both models lie on the same ranks, without pipeline; the reference gives its hidden states.
    """

    def ask(model: Any, micro: Microbatch) -> Tensor:
        with torch.no_grad():
            hidden = reference(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params)
        policy = getattr(model, "module", model)  # in training it is wrapped
        policy.beside = hidden, reference.output_weight().detach()
        try:
            return token_log_probs(model, micro)
        finally:
            policy.beside = None

    return Forward(ask, depth=(3,))


def _head(packed: Callable[[Microbatch], PackedRows | None]) -> Forward:
    """A scalar head asked about the tokens that `packed` of a microbatch says."""
    return Forward(
        lambda model, micro: model(micro.tokens, micro.position_ids, None, packed_seq_params=packed(micro)), depth=()
    )


head_outputs = _head(lambda micro: micro.packed_seq_params)
"""A scalar head's outputs, [B, T]; column t is read after token t."""
head_outputs_before_response = _head(lambda micro: micro.predicting)
"""`head_outputs` that response tokens follow on; the others may be 0."""
head_outputs_at_end = _head(lambda micro: micro.ending)
"""`head_outputs` of the last token of each row; the others may be 0."""


def score(model: MegatronModule, batch: Batch, forward: Forward, mesh: Mesh, *, cut: Cut) -> Tensor:
    """`forward` of all rows by one model: see `score_all`."""
    return score_all([(model, forward)], batch, mesh, cut=cut)[0]


@torch.no_grad()
def score_all(
    asks: Sequence[tuple[MegatronModule, Forward]],
    batch: Batch,
    mesh: Mesh,
    *,
    cut: Cut,
    host: HostWeights | None = None,
) -> list[Tensor]:
    """What each model says of all rows, without gradient, on every rank of the replica; one pass over the rows.

    Args:
        host: where the weights of some of the models live: the pass then goes model by model. The bits are the same.

    Returns:
        For each of `asks` [B, T, *forward.depth] float32, rows as in `batch`, 0 beyond each row's microbatch width.
    """
    cuts, micros = _cut_up(batch, cut, [model for model, _ in asks])
    parts = [Part(model_chunks(model), micros, _forward_step(forward, None)) for model, forward in asks]
    order = [(number, micro) for micro in range(len(micros)) for number in range(len(parts))]
    if host is not None:
        parts, order = host.visits(parts), sorted(order)
    modes = [model.training for model, _ in asks]
    for model, _ in asks:
        _set_mode(model, training=False)
    outputs = run_stream(parts, order, mesh, forward_only=True)
    for (model, _), mode in zip(asks, modes, strict=True):
        _set_mode(model, training=mode)
    shapes = [torch.Size((*batch.tokens.shape, *forward.depth)) for _, forward in asks]
    sizes, flat = [shape.numel() for shape in shapes], None
    if mesh.is_last_stage:
        flat = batch.tokens.new_zeros(sum(sizes), dtype=torch.float32)
        for whole, shape, answers in zip(flat.split(sizes), shapes, outputs, strict=True):
            _fill_rows(whole.view(shape), cuts, answers)
    # all answers at once: a broadcast has every stage wait for the last one
    shared = from_last_stage(flat, mesh, shape=(sum(sizes),), dtype=torch.float32)
    return [whole.view(shape) for whole, shape in zip(shared.split(sizes), shapes, strict=True)]


def _set_mode(model: MegatronModule, *, training: bool) -> None:
    """As `Module.train`, which walks all modules though nearly every call changes nothing."""
    if model.training != training:
        model.train(training)


def _fill_rows(whole: Tensor, cuts: Sequence[list[int]], answers: Sequence[Tensor]) -> None:
    """Put the answers of each microbatch into its rows of `whole`."""
    for rows, out in zip(cuts, answers, strict=True):
        width = min(out.shape[1], whole.shape[1])
        whole[rows, :width] = out[:, :width].float()


@dataclass(frozen=True)
class Task:
    """What one model is to learn from, this replica's share of it."""

    trainable: Trainable
    batch: Batch
    """This data-parallel rank's rows of the minibatch."""
    forward: Forward
    loss: Loss
    """Parts are summed over microbatches and ranks."""
    num_sums: int
    """Length of what `loss` reports."""
    unit: int = 1
    """Neighbouring rows that must stay in one microbatch (2 for pairs)."""


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
    cut: Cut,
    lr: float,
    num_sums: int,
    unit: int = 1,
) -> StepResult:
    """One optimizer step of one model on this replica's rows of the minibatch; arguments as in `Task`."""
    task = Task(trainable, batch, forward, loss, num_sums, unit)
    [sums] = accumulate([task], mesh, cut=cut)
    return finish(trainable, sums, mesh, lr=lr)


def accumulate(tasks: Sequence[Task], mesh: Mesh, *, cut: Cut) -> list[Tensor]:
    """Forward and backward of all tasks, in one pipeline stream; gradients stay on this replica until `finish`.

    Each model appears once. Its gradients have the same bits as when it is the only task.

    Returns:
        [num_sums] float64 for each task: the loss's sums over this replica's microbatches, on all of its stages.
    """
    parts = []
    for task in tasks:
        task.trainable.zero_grad()
        _set_mode(task.trainable.model, training=True)
        _, micros = _cut_up(task.batch, cut, [task.trainable.model], unit=task.unit)
        parts.append(Part(task.trainable.ddps, micros, _forward_step(task.forward, task.loss)))
    if mesh.pipeline.size == 1:
        reported = [_without_pipeline(part, mesh) for part in parts]
    else:
        order = [(number, micro) for number, part in enumerate(parts) for micro in range(len(part.micros))]
        reported = run_stream(parts, order, mesh, forward_only=False)
    sizes, flat = [task.num_sums for task in tasks], None
    if mesh.is_last_stage:
        flat = torch.cat([torch.stack(sums).double().sum(0) for sums in reported])
    return list(from_last_stage(flat, mesh, shape=(sum(sizes),), dtype=torch.float64).split(sizes))


def finish(trainable: Trainable, sums: Tensor, mesh: Mesh, *, lr: float) -> StepResult:
    """The optimizer step that `accumulate` has prepared.

    Args:
        sums: [k] float64, what `accumulate` returned for this model.
        lr: learning rate of this step.
    """
    total = sum_in_rank_order(sums, mesh)
    trainable.sum_gradients(mesh)
    return StepResult(sums=total, grad_norm=trainable.step(lr))


def _cut_up(
    batch: Batch, cut: Cut, models: Sequence[MegatronModule], *, unit: int = 1
) -> tuple[list[list[int]], list[Microbatch]]:
    """Rows of each microbatch, and these; as wide as models need that share a row's tokens over ranks."""
    if any(model.config.context_parallel_size > 1 for model in models):
        cut = replace(cut, packed=False)  # a context rank has two chunks of every row
    cuts = cut_rows(batch, cut, unit=unit)
    multiple = lcm(*(column_multiple(model.config) for model in models))
    return cuts, make_microbatches(batch, cuts, packed=cut.packed, multiple=multiple)


def _forward_step(forward: Forward, loss: Loss | None) -> Callable[..., tuple[Tensor, Callable]]:
    """What Megatron's schedules call for a microbatch; without a loss they collect the output itself."""

    def forward_step(micros: Iterator[Microbatch], module: MegatronModule) -> tuple[Tensor, Callable]:
        micro = next(micros)

        def report(output: Tensor, non_loss_data: bool = False) -> Any:
            output = micro.unpack(output)
            if loss is None:
                return output
            value, sums = loss(output, micro.record)
            # three values and calculate_per_token_loss: Megatron divides by nothing
            return value, torch.zeros((), dtype=torch.int, device=output.device), sums.detach().clone()

        return forward(module, micro), report

    return forward_step


def _without_pipeline(part: Part, mesh: Mesh) -> list[Tensor]:
    """Megatron's schedule of one model on one stage: what the loss reports for each microbatch."""
    return forward_backward_no_pipelining(
        forward_step_func=part.forward_step,
        data_iterator=iter(part.micros),
        model=list(part.chunks),
        num_microbatches=len(part.micros),
        seq_length=part.micros[0].tokens.shape[1],
        micro_batch_size=len(part.micros[0].tokens),
        pg_collection=mesh.groups,
    )
