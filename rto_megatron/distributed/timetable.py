"""What each pipeline stage computes, sends and receives, and in which order: data, known to every stage beforehand.

A stage may hold several chunks of the layers (interleaved pipeline, https://arxiv.org/abs/2104.04473): of all blocks of
layers, numbered in the model's order, stage s of P holds number c * P + s as its chunk c.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple


class Instruction(NamedTuple):
    """One thing that a stage computes."""

    kind: Literal["F", "B"]
    """Forward or backward."""
    place: int
    """Of the microbatch in the stream."""
    chunk: int = 0
    """Which of the stage's blocks of layers."""


class Beat(NamedTuple):
    """What a stage does between two looks at the wire."""

    compute: Instruction | None
    send: int | None
    """The stage that the result goes to, at once."""
    receive: tuple[tuple[Instruction, int], ...]
    """(whose input sets out in this beat, from which stage); it may be needed only later."""


def training_plan(num_microbatches: int, stage: int, num_stages: int, num_chunks: int = 1) -> list[Instruction]:
    """What a stage computes, in order: forwards until the pipeline is full, then one backward a forward (1F1B).

    With several chunks, microbatches pass each chunk in groups, as in Megatron's interleaved schedule: see
    `scoring_plan`. At most `num_stages - stage` microbatches are between their forward and their backward where there
    is one chunk, and `2 * (num_stages - stage) - 1 + (num_chunks - 1) * largest group` pairs of microbatch and chunk
    where there are more.
    """
    forward = scoring_plan(num_microbatches, num_stages, num_chunks)
    backward = [Instruction("B", done.place, num_chunks - 1 - done.chunk) for done in forward]
    ahead = num_stages - stage - 1
    largest = max(_groups(num_microbatches, num_stages), default=0)
    warmup = min(ahead if num_chunks == 1 else 2 * ahead + (num_chunks - 1) * largest, len(forward))
    plan = forward[:warmup]
    for number, due in enumerate(backward):
        plan += [*forward[warmup + number : warmup + number + 1], due]
    return plan


def scoring_plan(num_microbatches: int, num_stages: int, num_chunks: int = 1) -> list[Instruction]:
    """What every stage computes where nothing is learned: a group of microbatches passes its chunks, then the next.

    A group has as many microbatches as there are stages, so that the first stage gets its next chunk's input when it
    has done its share of this one. What is left over joins the last group: as a smaller one of its own, stages would
    wait for each other's backward passes forever.
    """
    plan, first = [], 0
    for size in _groups(num_microbatches, num_stages):
        plan += [Instruction("F", first + i, chunk) for chunk in range(num_chunks) for i in range(size)]
        first += size
    return plan


def _groups(num_microbatches: int, num_stages: int) -> list[int]:
    """Sizes of the groups."""
    num_groups, left = divmod(num_microbatches, num_stages)
    return [num_stages] * (num_groups - 1) + [num_stages + left] if num_groups else [left]


def source(
    instruction: Instruction, stage: int, num_stages: int, num_chunks: int = 1
) -> tuple[int, Instruction] | None:
    """(stage, instruction) whose result this one waits for; None where it needs only the batch."""
    kind, place, chunk = instruction
    block = chunk * num_stages + stage + (-1 if kind == "F" else 1)
    if block < 0:
        return None
    if block == num_stages * num_chunks:
        return stage, Instruction("F", place, chunk)  # the loss is its own
    return block % num_stages, Instruction(kind, place, block // num_stages)


@cache
def timetable(num_microbatches: int, num_stages: int, num_chunks: int, training: bool) -> list[list[Beat]]:
    """The beats of every stage, so that no stage waits forever whatever their speeds: see `beats`."""
    if training:
        plans = [training_plan(num_microbatches, stage, num_stages, num_chunks) for stage in range(num_stages)]
    else:
        plans = [scoring_plan(num_microbatches, num_stages, num_chunks)] * num_stages
    return beats(plans, num_chunks)


def beats(plans: Sequence[Sequence[Instruction]], num_chunks: int = 1) -> list[list[Beat]]:
    """Set the stages' plans to one clock: an instruction computes one beat after what it waits for, or later.

    What beat t makes is sent and received in beat t, by both ends, before either goes on to beat t + 1. So whoever
    waits for a message of beat t waits for a stage that has come to no later beat, and in the end for one that
    waits for nothing. (Waiting for the next instruction's input alone is not enough: with two chunks two stages are
    each other's next and previous one.)

    Raises:
        ValueError: the plans wait for each other.
    """
    num_stages = len(plans)
    done: dict[tuple[int, Instruction], int] = {}
    at, beat = [0] * num_stages, 0
    while any(position < len(plan) for position, plan in zip(at, plans, strict=True)):
        due = [(stage, plan[at[stage]]) for stage, plan in enumerate(plans) if at[stage] < len(plan)]
        ready = [
            (s, what)
            for s, what in due
            if (origin := source(what, s, num_stages, num_chunks)) is None or origin in done
        ]
        if not ready:
            raise ValueError(f"the plans wait for each other: {due}")
        for stage, _ in ready:
            at[stage] += 1
        done |= dict.fromkeys(ready, beat)
        beat += 1
    tables = [[Beat(None, None, ()) for _ in range(beat)] for _ in plans]
    for (stage, what), when in done.items():
        tables[stage][when] = tables[stage][when]._replace(compute=what)
        origin = source(what, stage, num_stages, num_chunks)
        if origin is not None and origin[0] != stage:
            sender, left = tables[origin[0]], done[origin]
            sender[left] = sender[left]._replace(send=stage)
            mine = tables[stage]
            mine[left] = mine[left]._replace(receive=(*mine[left].receive, (what, origin[0])))
    return tables
