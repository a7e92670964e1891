"""What stages compute, send and receive: every plan ends, whatever the stages' speeds, and few microbatches wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed.timetable import Beat, Instruction, beats, scoring_plan, source, timetable, training_plan
from rto_megatron.errors import ConfigError
from rto_megatron.models.footprint import activation_bytes

LAYOUTS = {"num": st.integers(0, 13), "num_stages": st.integers(1, 6), "num_chunks": st.integers(1, 4)}


def written(plan):
    return " ".join(f"{kind}{place}{'abcd'[chunk]}" for kind, place, chunk in plan)


def test_a_stage_fills_the_pipeline_then_alternates_then_empties_it():
    assert written(training_plan(4, 0, 3)) == "F0a F1a F2a B0a F3a B1a B2a B3a"
    assert written(training_plan(4, 1, 3)) == "F0a F1a B0a F2a B1a F3a B2a B3a"
    assert written(training_plan(4, 2, 3)) == "F0a B0a F1a B1a F2a B2a F3a B3a"
    assert written(training_plan(1, 0, 3)) == "F0a B0a"


def test_with_two_chunks_microbatches_pass_in_groups_as_many_as_stages_and_the_last_takes_what_is_left():
    assert written(scoring_plan(5, 2, 2)) == "F0a F1a F0b F1b F2a F3a F4a F2b F3b F4b"
    assert written(scoring_plan(1, 2, 2)) == "F0a F0b"
    assert written(training_plan(2, 0, 2, 2)) == "F0a F1a F0b F1b B0b B1b B0a B1a"
    assert written(training_plan(4, 1, 2, 2)) == "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a"


def test_what_a_beat_makes_sets_out_in_it_and_may_arrive_before_it_is_needed():
    f, b = (lambda place: Instruction("F", place)), (lambda place: Instruction("B", place))
    first, last = timetable(2, 2, 1, True)
    assert first == [
        Beat(f(0), 1, ()),
        Beat(f(1), 1, ()),
        Beat(None, None, ((b(0), 1),)),
        Beat(b(0), None, ()),
        Beat(None, None, ((b(1), 1),)),
        Beat(b(1), None, ()),
    ]
    assert last == [
        Beat(None, None, ((f(0), 0),)),
        Beat(f(0), None, ((f(1), 0),)),
        Beat(b(0), 0, ()),
        Beat(f(1), None, ()),
        Beat(b(1), 0, ()),
        Beat(None, None, ()),
    ]


@given(**LAYOUTS)
def test_every_microbatch_passes_every_chunk_forward_and_backward_once_and_few_are_in_flight(
    num, num_stages, num_chunks
):
    if num_stages == 1:
        num_chunks = 1
    for stage in range(num_stages):
        plan, in_flight = training_plan(num, stage, num_stages, num_chunks), set()
        most = num_stages - stage
        if num_chunks > 1:
            most = 2 * most - 1 + (num_chunks - 1) * (num_stages + num % num_stages)
        assert sorted(plan) == sorted((kind, m, c) for kind in "FB" for m in range(num) for c in range(num_chunks))
        for kind, place, chunk in plan:
            in_flight ^= {(place, chunk)}
            assert ((place, chunk) in in_flight) == (kind == "F")  # forward first
            assert len(in_flight) <= most
        for chunk in range(num_chunks):
            done = [place for kind, place, c in plan if kind == "B" and c == chunk]
            assert done == sorted(done)  # gradients are added up in the microbatches' order


def run_to_the_end(tables, num_chunks):
    """Walk all stages until none can go on. A message is over when both ends have posted it, as between GPUs.

    A stage posts what a beat moves and goes on; before it computes it waits for its input, and before it posts again
    for what it has sent. Returns the beats that each stage has left.
    """
    num_stages = len(tables)
    posted, at = [set() for _ in tables], [0] * num_stages

    def over(messages):
        return all(message in posted[message[0]] and message in posted[message[1]] for message in messages)

    def sent_by(stage, number):
        """(from, to, beat) of what a stage sends in a beat."""
        peer = tables[stage][number].send if number >= 0 else None
        return set() if peer is None else {(stage, peer, number)}

    moved = True
    while moved:
        moved = False
        for stage, table in enumerate(tables):
            if at[stage] == len(table):
                continue
            number, beat, needed = at[stage], table[at[stage]], set()
            if beat.compute is not None:
                needed = {
                    (peer, stage, earlier)
                    for earlier, done in enumerate(table[:number])
                    for what, peer in done.receive
                    if what == beat.compute
                }
                origin = source(beat.compute, stage, num_stages, num_chunks)
                from_others = origin is not None and origin[0] != stage
                assert len(needed) == from_others, f"{beat.compute} of stage {stage} never gets its input"
            if over(needed | sent_by(stage, number - 1)):
                posted[stage] |= sent_by(stage, number) | {(peer, stage, number) for _, peer in beat.receive}
                at[stage], moved = number + 1, True
    return [len(table) - position for position, table in zip(at, tables, strict=True)]


@given(**LAYOUTS, training=st.booleans())
def test_no_stage_waits_forever(num, num_stages, num_chunks, training):
    if num_stages == 1:
        num_chunks = 1
    assert run_to_the_end(timetable(num, num_stages, num_chunks, training), num_chunks) == [0] * num_stages


def test_the_walk_above_sees_a_message_that_only_one_end_knows():
    first, last = timetable(2, 2, 1, True)
    assert any(run_to_the_end([[beat._replace(receive=()) for beat in first[:2]], last], 1))


def test_plans_that_wait_for_each_other_are_told():
    with pytest.raises(ValueError, match="the plans wait for each other"):
        beats([training_plan(2, 0, 2), [Instruction("B", 0), Instruction("F", 0)]])


@given(num=st.integers(1, 12), num_stages=st.integers(2, 5))
def test_chunks_shorten_the_time_that_stages_wait(num, num_stages):
    """Beats in which a stage computes nothing, each as long as one chunk takes: fewer layers, so less time."""
    waits = [
        (len(timetable(num * num_stages, num_stages, chunks, True)[0]) - 2 * num * num_stages * chunks) / chunks
        for chunks in (1, 2, 4)
    ]
    assert waits == sorted(waits, reverse=True) and waits[0] > waits[-1]


def test_virtual_stages_need_a_pipeline_and_layers_for_all_of_them():
    with pytest.raises(
        ValueError, match=r"parallel\.virtual_stages 2 needs parallel\.pipeline > 1, got pipeline 1; set"
    ):
        ParallelConfig(virtual_stages=2)
    parallel = ParallelConfig(pipeline=2, virtual_stages=3)
    parallel.check_model(ModelConfig(num_layers=6, vocab_size=64))
    with pytest.raises(ConfigError, match=r"virtual_stages must divide model\.num_layers 4, got 2 x 3"):
        parallel.check_model(ModelConfig(num_layers=4, vocab_size=64))


@given(num_stages=st.integers(2, 5), num_chunks=st.integers(1, 4))
def test_memory_is_foretold_for_the_chunks_that_wait_on_the_first_stage(num_stages, num_chunks):
    plan, waiting, most = training_plan(8 * num_stages, 0, num_stages, num_chunks), 0, 0
    for kind, *_ in plan:
        waiting += 1 if kind == "F" else -1
        most = max(most, waiting)
    model = ModelConfig(num_layers=10 * num_stages * num_chunks, vocab_size=64)
    told = [
        activation_bytes(model, ParallelConfig(**layout), ComputeConfig(), tokens=tokens)
        for tokens in (100, 200)
        for layout in ({}, {"pipeline": num_stages, "virtual_stages": num_chunks})
    ]
    # what grows with the tokens, in shares of all layers: the rest is there once
    share = (told[3] - told[1]) / (told[2] - told[0])
    assert share == pytest.approx(most / (num_stages * num_chunks), rel=0.05)
