"""Seconds of pipelined training, from the order in which each stage works: no formula, the order is run.

    one stream   microbatches of all models behind one another: the pipeline fills and drains once
    each alone   a stream a model: it fills and drains for every model

A microbatch goes forward through the stages of its model and then backward; a stage does one thing at a time, in the
order of its plan, and waits where what it needs is not there yet.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple


class Task(NamedTuple):
    """What a rank of the pipeline computes."""

    model: int
    micro: int
    stage: int
    """Of the model."""
    backward: bool


def makespan(
    plans: Sequence[Sequence[Task]], seconds: Callable[[Task], float], *, num_stages: Callable[[int], int]
) -> float:
    """Seconds until all ranks have done what their plans say.

    Args:
        plans: of each rank; which stages of a model it holds follows from its tasks.
        num_stages: model -> its stages.

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
                before = _before(task, num_stages(task.model))
                if before is not None and before not in ends:
                    break
                free[rank] = max(free[rank], ends[before] if before else 0.0) + seconds(task)
                ends[task] = free[rank]
                position[rank] += 1
                moved = True
    if stuck := [plan[at] for plan, at in zip(plans, position, strict=True) if at < len(plan)]:
        raise ValueError(f"these wait for what nobody can do before them: {', '.join(map(str, stuck))}")
    return max(free)


def _before(task: Task, num_stages: int) -> Task | None:
    """What a task takes its input from; None for a batch that comes from outside."""
    if not task.backward:
        return task._replace(stage=task.stage - 1) if task.stage else None
    if task.stage == num_stages - 1:
        return task._replace(backward=False)
    return task._replace(stage=task.stage + 1)


def stream(order: Sequence[tuple[int, int]], num_stages: int) -> list[list[Task]]:
    """Plans of the stages for microbatches (model, number) in this order: forwards until it is full, then in turns."""
    plans: list[list[Task]] = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage - 1, len(order))
        plan = [Task(*place, stage, False) for place in order[:ahead]]
        for at, place in enumerate(order):
            plan += [Task(*ready, stage, False) for ready in order[ahead + at : ahead + at + 1]]
            plan.append(Task(*place, stage, True))
        plans.append(plan)
    return plans


def stream_seconds(
    order: Sequence[tuple[int, int]], num_stages: int, forward: Sequence[float], *, backward: float = 2.0
) -> float:
    """Of one stream.

    Args:
        forward: seconds of each model's microbatch on a stage.
        backward: of a backward pass, in forwards: 2, and 3 where all is computed again.
    """
    return makespan(
        stream(order, num_stages),
        lambda task: forward[task.model] * (backward if task.backward else 1.0),
        num_stages=lambda model: num_stages,
    )


@lru_cache(maxsize=4096)
def stretch(num_micros: int, num_stages: int, forwards: float = 3.0) -> float:
    """Seconds of a stream of equal microbatches, relative to those of its work alone: 1 without a pipeline.

    Args:
        forwards: of a microbatch, forward and backward: 3, and 4 where all is computed again.
    """
    if num_stages == 1:
        return 1.0
    order = [(0, number) for number in range(num_micros)]
    return stream_seconds(order, num_stages, [1.0], backward=forwards - 1) / (num_micros * forwards)
