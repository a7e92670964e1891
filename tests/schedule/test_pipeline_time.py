"""Pipelines by running their orders: against published makespans, and sums that can be made by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rto_megatron.schedule.pipeline_time import Task, makespan, stream, stretch

FLEXFUSION = json.loads(Path(__file__).with_name("flexfusion.json").read_text())
"""Fused orders of two models, found by search: results/ of github.com/FlexFusion/FlexFusion (Apache-2.0), a string a
rank: A and a are forward and backward of the model over all ranks, B b and C c of the other one, on half of the ranks
each or on all. Backward takes twice as long as forward."""


def tasks_of(order, rank, first, second):
    """The letters of a rank as tasks; the second model runs through the ranks the other way round."""
    seen = Counter()
    for letter in order:
        model = "abc".index(letter.lower())
        at = second * max(1, model) - 1 - rank  # copy 1 on the first `second` ranks, copy 2 on the next
        yield Task(model, seen[letter], rank if model == 0 else at, letter.islower())
        seen[letter] += 1


@pytest.mark.parametrize("case", FLEXFUSION, ids=[f"{case['makespan']}-{i}" for i, case in enumerate(FLEXFUSION)])
def test_published_orders_take_the_published_time(case):
    (first, second), forward = case["stages"], case["forward"]
    plans = [list(tasks_of(order, rank, first, second)) for rank, order in enumerate(case["orders"])]
    found = makespan(
        plans,
        lambda task: forward[task.model > 0] * (2 if task.backward else 1),
        num_stages=lambda model: second if model else first,
    )
    assert found == case["makespan"]


def seconds_of(order, num_stages, forward):
    """Of one stream; `forward` are those of each model's microbatch on a stage, and backward takes twice as long."""
    return makespan(
        stream(order, num_stages),
        lambda task: forward[task.model] * (2 if task.backward else 1),
        num_stages=lambda model: num_stages,
    )


def in_a_row(*counts):
    return [(model, number) for model, count in enumerate(counts) for number in range(count)]


def test_two_equal_models_in_one_stream():
    # 4 stages, 3 microbatches each: alone (3 + 3) * 3 = 18 each; together (6 + 3) * 3
    assert 2 * seconds_of(in_a_row(3), 4, [1.0]) == 36
    assert seconds_of(in_a_row(3, 3), 4, [1.0, 1.0]) == 27


@pytest.mark.parametrize(
    ("stages", "forward", "alone", "together", "sandwich"),
    [(8, [5, 2], 315, 273, 253), (16, [2, 1], 279, 234, 218)],
)
def test_fill_and_drain_on_the_cheap_model_are_shorter(stages, forward, alone, together, sandwich):
    """The FlexFusion cases with as many microbatches as stages, which search fuses to 225 and 186."""
    order = in_a_row(stages, stages)
    cheap, large = order[stages:], order[:stages]
    between = [*cheap[: stages // 2], *large, *cheap[stages // 2 :]]
    each = [seconds_of([(model, i) for i in range(stages)], stages, forward) for model in (0, 1)]
    assert sum(each) == alone
    assert seconds_of(order, stages, forward) == together
    assert seconds_of(between, stages, forward) == sandwich


def test_the_stretch_of_equal_microbatches():
    assert stretch(3, 4) == 2.0  # 1 + (4 - 1) / 3
    assert stretch(6, 4) == 1.5
    assert stretch(5, 1) == 1.0
    assert stretch(3, 4, forwards=4) == 2.0


@pytest.mark.parametrize("num_chunks", [1, 2, 4])
def test_virtual_stages_divide_what_filling_and_draining_cost(num_chunks):
    """The bubble of https://arxiv.org/abs/2104.04473, section 2.2: (p - 1) / m, divided by the blocks of a rank."""
    assert stretch(8, 4, num_chunks=num_chunks) == pytest.approx(1 + 3 / 8 / num_chunks)


def test_messages_are_what_virtual_stages_cost():
    free, slow = ([stretch(8, 2, num_chunks=chunks, message=cost) for chunks in (1, 4)] for cost in (0.0, 0.2))
    assert free[1] < free[0]
    assert slow[0] < slow[1]


def test_orders_that_wait_for_each_other_are_refused():
    forward, backward = Task(0, 0, 0, False), Task(0, 0, 0, True)
    with pytest.raises(ValueError, match="these wait for what nobody can do before them: Task"):
        makespan([[backward, forward]], lambda task: 1.0, num_stages=lambda model: 1)
