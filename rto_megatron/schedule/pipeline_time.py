"""Seconds of pipelined training, from the order in which each stage works: no formula, the order is run.

    one stream   microbatches of all models behind one another: the pipeline fills and drains once
    each alone   a stream a model: it fills and drains for every model

A microbatch goes forward through the stages of its model and then backward; a stage does one thing at a time, in the
order of its plan, and waits where what it needs is not there yet. The plans of a stream are those that training runs.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from rto_megatron.distributed.timetable import Instruction, source, training_plan


class Task(NamedTuple):
    """What a rank of the pipeline computes."""

    model: int
    micro: int
    stage: int
    """Of the model."""
    backward: bool
    chunk: int = 0
    """Which of the stage's blocks of layers."""


def makespan(
    plans: Sequence[Sequence[Task]],
    seconds: Callable[[Task], float],
    *,
    num_stages: Callable[[int], int],
    num_chunks: int = 1,
) -> float:
    """Seconds until all ranks have done what their plans say.

    Args:
        plans: of each rank; which stages of a model it holds follows from its tasks.
        num_stages: model -> its stages.
        num_chunks: blocks of layers of each stage.

    Raises:
        ValueError: the plans wait for each other, or for what is in none of them.
    """
    ends: dict[Task, float] = {}
    position, free = [0] * len(plans), [0.0] * len(plans)
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while position[rank] < len(plan):
                task = plan[position[rank]]
                before = _before(task, num_stages(task.model), num_chunks)
                if before is not None and before not in ends:
                    break
                free[rank] = max(free[rank], ends[before] if before else 0.0) + seconds(task)
                ends[task] = free[rank]
                position[rank] += 1
                moved = True
    if stuck := [plan[at] for plan, at in zip(plans, position, strict=True) if at < len(plan)]:
        raise ValueError(f"these wait for what nobody can do before them: {', '.join(map(str, stuck))}")
    return max(free)


def _before(task: Task, num_stages: int, num_chunks: int) -> Task | None:
    """What a task takes its input from; None for a batch that comes from outside."""
    instruction = Instruction("B" if task.backward else "F", task.micro, task.chunk)
    origin = source(instruction, task.stage, num_stages, num_chunks)
    if origin is None:
        return None
    stage, (kind, _, chunk) = origin
    return task._replace(stage=stage, backward=kind == "B", chunk=chunk)


def stream(order: Sequence[tuple[int, int]], num_stages: int, num_chunks: int = 1) -> list[list[Task]]:
    """Plans of the stages for microbatches (model, number) in this order."""
    return [
        [Task(*order[place], stage, kind == "B", chunk) for kind, place, chunk in plan]
        for stage in range(num_stages)
        for plan in [training_plan(len(order), stage, num_stages, num_chunks)]
    ]


@lru_cache(maxsize=4096)
def stretch(
    num_micros: int, num_stages: int, forwards: float = 3.0, *, num_chunks: int = 1, message: float = 0.0
) -> float:
    """Seconds of a stream of equal microbatches, relative to those of its work alone: 1 without a pipeline.

    Args:
        forwards: of a microbatch, forward and backward: 3, and 4 where all is computed again.
        num_chunks: blocks of layers of each stage (interleaved pipeline).
        message: seconds that a result takes to the next block, in forwards of a microbatch on a stage.
    """
    if num_stages == 1:
        return 1.0
    each = {False: 1 / num_chunks + message, True: (forwards - 1) / num_chunks + message}
    plans = stream([(0, number) for number in range(num_micros)], num_stages, num_chunks)
    spent = makespan(
        plans, lambda task: each[task.backward], num_stages=lambda model: num_stages, num_chunks=num_chunks
    )
    return spent / (num_micros * forwards)
