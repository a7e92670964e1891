"""The simulator: traces, replayed and fitted."""

import random
from dataclasses import replace

import pytest

from rto_megatron.errors import DataError
from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.placement import colocated, fused, split
from rto_megatron.schedule.rooflines import GPUS, MODELS, Layout, Roofline
from rto_megatron.schedule.simulate import replay
from rto_megatron.schedule.trace import Row, draw, meet, of_leaders, read_trace, summarise, write_trace
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload

MAPS = [(colocated(4), 0), (fused(4), 0), (split(2, 2), 0), (split(2, 2), 1), (split(1, 2, 1, score="all"), 1)]
SMALL = Workload(prompt_tokens=20, max_new_tokens=100)


def sizes(**changed):
    return Sizes(
        **({"num_steps": 3, "samples": 64, "minibatch": 16, "lanes": 4, "slots": 8, "pack_tokens": 300} | changed)
    )


def roofline(placement):
    return Roofline(MODELS["llama3-1b"], GPUS["h100"], placement, Layout(engine_ranks=1, train_ranks=1))


def noisy(cost, seed):
    rng = random.Random(seed)
    return lambda item, load, group: cost(item, load, group) * rng.lognormvariate(0, 0.3)


@pytest.mark.parametrize(("placement", "staleness"), MAPS)
def test_measured_durations_give_the_measured_makespan_and_idle_time(placement, staleness):
    """Synthetic: the durations are noisy, and messages take time that the replay knows nothing of."""
    measured = SMALL.run(noisy(roofline(placement), 1), sizes(), placement, staleness=staleness, latency=2e-5)
    again = SMALL.run(replay(measured), sizes(), placement, staleness=staleness)
    assert len(again) == len(measured)
    assert summarise(again).makespan == pytest.approx(summarise(measured).makespan, rel=0.02)
    for group, idle in summarise(measured).idle.items():
        assert summarise(again).idle[group] == pytest.approx(idle, abs=0.02 * summarise(measured).makespan)


@pytest.mark.parametrize(("placement", "staleness"), MAPS)
def test_a_fit_to_one_run_predicts_another_with_other_lengths_and_sizes(placement, staleness):
    seen = SMALL.run(noisy(roofline(placement), 1), sizes(), placement, staleness=staleness)
    other = Workload(prompt_tokens=30, max_new_tokens=140, seed=5)
    changed = sizes(samples=96, minibatch=24, slots=12, pack_tokens=400)
    truth = other.run(noisy(roofline(placement), 2), changed, placement, staleness=staleness)
    told = other.run(Fitted(seen), changed, placement, staleness=staleness)
    assert summarise(told).makespan == pytest.approx(summarise(truth).makespan, rel=0.1)


def test_a_fit_finds_the_line_that_made_the_trace_and_no_negative_cost():
    def decode(steps, tokens, context):
        seconds = 2.0 * steps + 0.5 * tokens
        return Row(
            group=0, kind="decode", role="", step=0, lane=0, number=0, start=0, end=seconds,
            num_steps=steps, tokens=tokens, context=context,
        )  # fmt: skip

    rows = [decode(1, 4, 90), decode(2, 8, 170), decode(2, 6, 300), decode(3, 3, 10)]
    assert list(Fitted(rows).weights["decode", ""]) == pytest.approx([2.0, 0.5, 0.0], abs=1e-9)


def test_what_the_trace_does_not_hold_cannot_be_told():
    seen = SMALL.run(roofline(colocated(2)), sizes(lanes=2), colocated(2))
    with pytest.raises(DataError, match="the trace holds no refit engine, which this schedule runs"):
        SMALL.run(Fitted(seen), sizes(lanes=2), split(1, 1))


def row(group, kind, start, end):
    return Row(group=group, kind=kind, role="", step=0, lane=0, number=0, start=start, end=end)


def test_a_summary_worked_by_hand():
    rows = [row(0, "prefill", 0, 1), row(0, "decode", 1, 4), row(1, "decode", 0, 2), row(1, "score", 3, 6)]
    found = summarise(rows)
    assert found.makespan == 6
    assert found.idle == {0: 2, 1: 1}
    assert found.idle_frac == 3 / 12
    assert found.overlap == pytest.approx(1 / 6)  # from 3 to 4; prefill and decode are both writing
    assert (found.busy["decode"], found.busy["score"]) == (2.5, 1.5)


def measured(group, rank, kind, start, end):
    return replace(row(group, kind, start, end), rank=rank)


def test_what_groups_do_together_begins_when_the_last_has_come_and_other_items_when_their_own_group_has():
    came = [measured(0, 0, "refit", 1, 9), measured(1, 1, "refit", 4, 8), measured(1, 2, "refit", 3, 8)]
    assert [(found.start, found.end) for found in meet(came)] == [(4, 9), (4, 8), (4, 8)]
    came = [measured(0, 0, "train", 1, 9), measured(1, 1, "train", 4, 8), measured(1, 2, "train", 3, 8)]
    assert [(found.start, found.end) for found in meet(came)] == [(1, 9), (4, 8), (4, 8)]


def test_who_has_sent_before_the_last_has_come_did_it_in_no_time():
    assert [found.seconds for found in meet([measured(0, 0, "refit", 1, 2), measured(1, 1, "refit", 4, 8)])] == [0, 4]


def test_the_lowest_rank_of_a_group_speaks_for_it():
    ran = [measured(1, 5, "decode", 0, 2), measured(1, 3, "decode", 0, 1), measured(0, 0, "decode", 0, 3)]
    assert [found.rank for found in of_leaders(ran)] == [3, 0]


def test_a_timeline_is_a_line_a_group():
    lines = draw([row(0, "decode", 0, 4), row(1, "score", 2, 6)], width=6).splitlines()
    assert lines[:2] == ["   0 DDDD..", "   1 ..SSSS"]


def test_a_trace_comes_back_from_its_file(tmp_path):
    rows = SMALL.run(roofline(fused(2)), sizes(lanes=2, num_steps=1), fused(2))
    write_trace(tmp_path / "trace.jsonl", rows)
    assert read_trace(tmp_path / "trace.jsonl") == rows


def test_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "trace.jsonl"
    write_trace(path, [row(0, "decode", 0, 4)])
    path.write_text(path.read_text() + '{"group": 1}\n')
    with pytest.raises(DataError, match=r"trace\.jsonl:2: a row of a trace needs the fields"):
        read_trace(path)
