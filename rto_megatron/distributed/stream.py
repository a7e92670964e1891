"""Microbatches of several models as one pipeline stream: one fill and one flush, however many models there are.

What a stage does, and what it sends and receives in between, is data (`timetable`); `run_stream` walks through it. The
arithmetic of a microbatch is that of Megatron's own schedules, `forward_step` and `backward_step`, and each model's
microbatches go backward in their order, so its gradients have the bits that it gets when it runs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import backward_step, forward_step
from megatron.core.utils import get_model_config, get_model_type
from torch import Tensor

from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.timetable import Beat, Instruction, timetable


@dataclass(frozen=True)
class Part:
    """One model's microbatches in a stream."""

    chunks: Sequence[Any]
    """This rank's blocks of its layers, or Megatron's DDP around each."""
    micros: Sequence[Any]
    """Records with `tokens` [B, T]; all of them are known to every stage, and so are the shapes on the wire."""
    forward_step: Callable[..., tuple[Tensor, Callable]]
    """As Megatron's schedules take it: iterator over microbatches and model -> output, function of the output."""

    def shape_on_the_wire(self, micro: int) -> tuple[int, int, int]:
        """[T, B, hidden] of a microbatch's hidden states, T of this rank's share."""
        config, (num_rows, width) = get_model_config(self.chunks[0]), self.micros[micro].tokens.shape
        num_tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return width // (num_tensor * config.context_parallel_size), num_rows, config.hidden_size


def run_stream(
    parts: Sequence[Part], order: Sequence[tuple[int, int]], mesh: Mesh, *, forward_only: bool
) -> list[list[Tensor]]:
    """Run this rank's chunks of every model over the stream; gradients are added up in place, on this replica only.

    Args:
        parts: models of any depth and width, each cut over the whole pipeline of `mesh`, equally many chunks a rank.
        order: (part, microbatch) of each place of the stream; a part's own microbatches in their order.
        forward_only: outputs are collected as they are; else what the loss reports.

    Returns:
        For each part, a tensor for each of its microbatches on the last stage; nothing on the others.
    """
    num_stages, (num_chunks,) = mesh.pipeline.size, {len(part.chunks) for part in parts} or {1}
    wire = _Wire(parts, order, mesh)
    reported: list[list[Tensor]] = [[] for _ in parts]
    kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    for beat in timetable(len(order), num_stages, num_chunks, not forward_only)[mesh.pipeline.rank]:
        result: Any = None  # a tensor or None; Megatron's functions also know lists
        if beat.compute is not None:
            number, micro = order[beat.compute.place]
            part, arrived = parts[number], wire.arrived(beat.compute)
            here = beat.compute.place, beat.compute.chunk
            if beat.compute.kind == "F":
                output = _forward(
                    part, micro, beat.compute.chunk, arrived, reported[number], mesh, forward_only=forward_only
                )
                if not forward_only:
                    kept[here] = arrived, output
                result = output.detach()
            else:
                entered, output = kept.pop(here)
                first = part.chunks[0]
                result = backward_step(entered, output, arrived, get_model_type(first), get_model_config(first))
        wire.exchange(beat, result)
    wire.close()
    return reported


def _forward(
    part: Part,
    micro: int,
    chunk: int,
    arrived: Tensor | None,
    reported: list[Tensor],
    mesh: Mesh,
    *,
    forward_only: bool,
) -> Tensor:
    """Hidden states of this chunk, or, of the model's last one, the loss or the output."""
    if arrived is not None and not forward_only:
        arrived.requires_grad_()  # the stage before asks for the gradient
    output: Any
    output, _ = forward_step(
        part.forward_step,
        iter(part.micros[micro : micro + 1]),
        part.chunks[chunk],
        len(part.micros),
        arrived,
        reported,
        get_model_config(part.chunks[0]),
        cp_group_size=mesh.groups.cp.size(),
        collect_non_loss_data=forward_only,
        is_first_microbatch=micro == 0,
        current_microbatch=micro,
        is_last_stage=mesh.is_last_stage and chunk == len(part.chunks) - 1,
    )
    return output


class _Wire:
    """What goes between this stage and others while a stream runs."""

    def __init__(self, parts: Sequence[Part], order: Sequence[tuple[int, int]], mesh: Mesh) -> None:
        self._parts, self._order, self._mesh = parts, order, mesh
        self._arriving: dict[Instruction, tuple[Tensor, list[Any]]] = {}
        self._leaving: list[Any] = []

    def arrived(self, instruction: Instruction) -> Tensor | None:
        """The input of an instruction, waited for; None where it needs none from another stage."""
        if instruction not in self._arriving:
            return None
        tensor, works = self._arriving.pop(instruction)
        for work in works:
            work.wait()
        return tensor

    def exchange(self, beat: Beat, result: Tensor | None) -> None:
        """Send and receive what the beat says, in one batch; nobody waits here but for what an earlier beat sent.

        So the next instruction runs while its neighbours' results travel.
        """
        operations, group = [], self._mesh.pipeline.group
        if beat.send is not None:
            assert beat.compute is not None and result is not None
            agreed = self._shape(beat.compute)
            assert tuple(result.shape) == agreed, f"{beat.compute}: {tuple(result.shape)}, agreed on {agreed}"
            # contiguous: gloo sends wrong numbers for other strides, and gradients may have any
            operations.append(dist.P2POp(dist.isend, result.contiguous(), group=group, group_peer=beat.send))
        coming: list[tuple[Instruction, Tensor]] = []
        for instruction, peer in beat.receive:
            number, _ = self._order[instruction.place]
            dtype = get_model_config(self._parts[number].chunks[0]).pipeline_dtype
            arriving = torch.empty(self._shape(instruction), dtype=dtype, device=self._mesh.device)
            operations.append(dist.P2POp(dist.irecv, arriving, group=group, group_peer=peer))
            coming.append((instruction, arriving))
        works = dist.batch_isend_irecv(operations) if operations else []
        self.close()
        # gloo has a handle for each operation, NCCL one for all of them
        each = [[work] for work in works] if len(works) == len(operations) else [works] * len(operations)
        self._leaving = [(each.pop(0), operations[0].tensor)] if beat.send is not None else []
        self._arriving |= {instruction: (tensor, own) for (instruction, tensor), own in zip(coming, each, strict=True)}

    def close(self) -> None:
        """Wait until what was sent has left, and let go of it."""
        for works, _ in self._leaving:
            for work in works:
                work.wait()
        self._leaving = []

    def _shape(self, instruction: Instruction) -> tuple[int, int, int]:
        number, micro = self._order[instruction.place]
        return self._parts[number].shape_on_the_wire(micro)
