"""Rehearsals: the schedule of a run on real ranks, whose items only take their time."""

from types import SimpleNamespace

import pytest

from rto_megatron.schedule import emulate
from rto_megatron.schedule.emulate import Actor, Play, rehearse
from rto_megatron.schedule.placement import split
from rto_megatron.schedule.trace import summarise
from rto_megatron.schedule.work import Item, Sizes
from rto_megatron.schedule.workload import Workload
from tests.ranks import run_ranks

SHORT = Workload(prompt_tokens=9, max_new_tokens=20)
SIZES = Sizes(num_steps=2, samples=12, minibatch=6, lanes=1, slots=4, slice_steps=5, pack_tokens=40)


def five_milliseconds(item, load, group):
    return 0.005


PLAY = Play(placement=split(1, 1), sizes=SIZES, workload=SHORT, cost=five_milliseconds)


def rehearse_on(groups):
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    return rehearse(PLAY, groups)


@pytest.fixture(scope="module")
def told():
    """Each rank's view of a play whose trainers are two ranks."""
    return run_ranks(rehearse_on, 3, [(0, 1), (2,)])


def test_a_rehearsal_runs_the_items_of_a_simulation(told):
    assert sorted(row.key for row in told[0]) == sorted(row.key for row in PLAY.simulate())


def test_every_rank_is_told_what_the_leaders_did(told):
    assert {row.rank for row in told[0]} == {0, 2}
    assert told[0] == told[1] == told[2]


def test_other_work_goes_on_while_responses_are_written(told):
    assert summarise(told[0]).overlap > 0


class Time:
    """A clock that stands still but for sleeping, which takes `late` longer than asked."""

    def __init__(self):
        self.now, self.late, self.slept = 100.0, 0.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(round(seconds, 6))
        self.now += seconds + self.late


@pytest.fixture
def time(monkeypatch):
    clock = Time()
    monkeypatch.setattr(emulate, "time", SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep))
    return clock


def item(*groups):
    return Item(kind="optimizer", step=0, groups=groups, number=0)


def test_an_item_takes_its_cost_from_when_the_last_rank_has_come(time):
    actor = Actor(PLAY, [(0,), (1,)], lambda ranks, came: came + 0.25)  # the other comes a quarter of a second later
    actor.run(item(0))
    actor.run(item(0, 1))
    assert time.slept == [0.005, 0.255]


def test_who_was_woken_late_makes_up_for_it_in_the_next_item(time):
    actor = Actor(PLAY, [(0,)], lambda ranks, came: came)
    time.late = 0.002
    actor.run(item(0))
    time.late = 0.0
    actor.run(item(0))
    actor.run(item(0))
    assert time.slept == [0.005, 0.003, 0.005]


def test_who_was_woken_late_and_then_waits_was_not_late(time):
    actor = Actor(PLAY, [(0,)], lambda ranks, came: came)
    time.late = 0.002
    actor.run(item(0))
    time.late = 0.0
    time.now += 1.0
    actor.run(item(0))
    assert time.slept == [0.005, 0.005]
