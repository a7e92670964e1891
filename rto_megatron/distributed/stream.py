"""Microbatches of several models as one pipeline stream: one fill and one flush, however many models there are.

What a stage does, and what it sends and receives in between, is data (`one_f_one_b`, `exchanges`); `run_stream` walks
through it. The arithmetic of a microbatch is that of Megatron's own schedules, `forward_step` and `backward_step`, and
each model's microbatches go backward in their order, so its gradients have the bits that it gets when it runs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import backward_step, forward_step
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor

from rto_megatron.distributed.mesh import Mesh


class Instruction(NamedTuple):
    """One thing that a stage computes."""

    kind: Literal["F", "B"]
    """Forward or backward."""
    place: int
    """Of the microbatch in the stream."""


class Exchange(NamedTuple):
    """What a stage sends and receives at once, between two instructions."""

    send: Instruction | None
    """Whose result goes out: a forward's to the next stage, a backward's to the one before."""
    receive: Instruction | None
    """Whose input comes in: a forward's from the stage before, a backward's from the next."""


def one_f_one_b(num_microbatches: int, stage: int, num_stages: int) -> list[Instruction]:
    """What a stage computes, in order: forwards until the pipeline is full, then one backward a forward.

    At most `num_stages - stage` microbatches are between their forward and their backward.
    """
    warmup = min(num_stages - stage - 1, num_microbatches)
    plan = [Instruction("F", place) for place in range(warmup)]
    for place in range(num_microbatches):
        if warmup + place < num_microbatches:
            plan.append(Instruction("F", warmup + place))
        plan.append(Instruction("B", place))
    return plan


def forwards(num_microbatches: int) -> list[Instruction]:
    """What every stage computes where nothing is learned."""
    return [Instruction("F", place) for place in range(num_microbatches)]


def exchanges(plan: Sequence[Instruction], stage: int, num_stages: int) -> list[Exchange]:
    """What goes over the wire before each instruction of the plan, and after the last one.

    A result waits for the next receive and goes out together with it: where two neighbours have something for each
    other, both would wait forever if each sent first.
    """
    is_first, is_last = stage == 0, stage == num_stages - 1
    sends = [None if (is_last if done.kind == "F" else is_first) else done for done in plan]
    receives = [None if (is_first if due.kind == "F" else is_last) else due for due in plan]
    return [Exchange(*pair) for pair in zip([None, *sends], [*receives, None], strict=True)]


@dataclass(frozen=True)
class Part:
    """One model's microbatches in a stream."""

    model: MegatronModule
    """This rank's stage of it, or Megatron's DDP around that."""
    micros: Sequence[Any]
    """Records with `tokens` [B, T]; all of them are known to every stage, and so are the shapes on the wire."""
    forward_step: Callable[..., tuple[Tensor, Callable]]
    """As Megatron's schedules take it: iterator over microbatches and model -> output, function of the output."""

    def shape_on_the_wire(self, micro: int) -> tuple[int, int, int]:
        """[T, B, hidden] of a microbatch's hidden states, T of this rank's share."""
        config, (num_rows, width) = get_model_config(self.model), self.micros[micro].tokens.shape
        num_tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return width // (num_tensor * config.context_parallel_size), num_rows, config.hidden_size


def run_stream(
    parts: Sequence[Part], order: Sequence[tuple[int, int]], mesh: Mesh, *, forward_only: bool
) -> list[list[Tensor]]:
    """Run this rank's stage of every model over the stream; gradients are added up in place, on this replica only.

    Args:
        parts: models of any depth and width, each cut over the whole pipeline of `mesh`.
        order: (part, microbatch) of each place of the stream; a part's own microbatches in their order.
        forward_only: outputs are collected as they are; else what the loss reports.

    Returns:
        For each part, a tensor for each of its microbatches on the last stage; nothing on the others.
    """
    stage, num_stages = mesh.pipeline.rank, mesh.pipeline.size
    plan = forwards(len(order)) if forward_only else one_f_one_b(len(order), stage, num_stages)
    *before, after = exchanges(plan, stage, num_stages)
    reported: list[list[Tensor]] = [[] for _ in parts]
    kept: dict[int, tuple[Tensor | None, Tensor]] = {}
    result: Any = None  # a tensor or None; Megatron's functions also know lists
    for instruction, exchange in zip(plan, before, strict=True):
        arrived = _exchange(exchange, result, parts, order, mesh)
        number, micro = order[instruction.place]
        part = parts[number]
        if instruction.kind == "F":
            output = _forward(part, micro, arrived, reported[number], mesh, forward_only=forward_only)
            if not forward_only:
                kept[instruction.place] = arrived, output
            result = output.detach()
        else:
            entered, output = kept.pop(instruction.place)
            result = backward_step(entered, output, arrived, get_model_type(part.model), get_model_config(part.model))
    _exchange(after, result, parts, order, mesh)
    return reported


def _forward(
    part: Part, micro: int, arrived: Tensor | None, reported: list[Tensor], mesh: Mesh, *, forward_only: bool
) -> Tensor:
    """Hidden states of this stage, or, on the last one, the loss or the output."""
    if arrived is not None and not forward_only:
        arrived.requires_grad_()  # the stage before asks for the gradient
    output: Any
    output, _ = forward_step(
        part.forward_step,
        iter(part.micros[micro : micro + 1]),
        part.model,
        len(part.micros),
        arrived,
        reported,
        get_model_config(part.model),
        cp_group_size=mesh.groups.cp.size(),
        collect_non_loss_data=forward_only,
        is_first_microbatch=micro == 0,
        current_microbatch=micro,
        is_last_stage=mesh.is_last_stage,
    )
    return output


def _exchange(
    exchange: Exchange,
    result: Tensor | None,
    parts: Sequence[Part],
    order: Sequence[tuple[int, int]],
    mesh: Mesh,
) -> Tensor | None:
    """Send `result` and receive what the next instruction needs, in one batch; both are over on return."""
    group, stage, operations, arriving = mesh.pipeline.group, mesh.pipeline.rank, [], None
    if exchange.send is not None:
        number, micro = order[exchange.send.place]
        agreed = parts[number].shape_on_the_wire(micro)
        assert result is not None and tuple(result.shape) == agreed, f"{exchange.send}: agreed on {agreed}"
        # contiguous: gloo sends wrong numbers for other strides, and gradients may have any
        peer = stage + 1 if exchange.send.kind == "F" else stage - 1
        operations.append(dist.P2POp(dist.isend, result.contiguous(), group=group, group_peer=peer))
    if exchange.receive is not None:
        number, micro = order[exchange.receive.place]
        arriving = torch.empty(
            parts[number].shape_on_the_wire(micro),
            dtype=get_model_config(parts[number].model).pipeline_dtype,
            device=mesh.device,
        )
        peer = stage - 1 if exchange.receive.kind == "F" else stage + 1
        operations.append(dist.P2POp(dist.irecv, arriving, group=group, group_peer=peer))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return arriving
