"""What the simulator says beside what was measured: replayed traces, fitted costs, and costs that are known.

The emulated runs are real processes and messages whose items only take their time (`schedule/emulate.py`).
"""

from dataclasses import replace
from itertools import combinations
from statistics import mean

import pytest

from rto_megatron.report.rows import read_run
from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.placement import colocated, fused, split
from rto_megatron.schedule.simulate import replay, scorers_of
from rto_megatron.schedule.trace import of_leaders, summarise
from rto_megatron.schedule.workload import Workload
from tests.ranks import run_ranks
from tests.schedule.plays import WORLD, Setting, rehearse_all, train_with_notes

SEEN = {
    "colocated": Setting(colocated(4)),
    "split, stale": Setting(split(2, 2), staleness=1),
    "split, early": Setting(split(1, 3), early=True),
    "split, critic alone": Setting(split(1, 2, 1, score="all"), staleness=1),
}
OTHER = Workload(prompt_tokens=300, max_new_tokens=1500, seed=5)
MORE = {"samples": 96, "minibatch": 24}
HELD_OUT = {
    name: replace(setting, workload=OTHER, sizes=MORE)
    for name, setting in {
        "colocated": Setting(colocated(4)),
        "fused": Setting(fused(4)),
        "split": Setting(split(2, 2)),
        "split, stale": Setting(split(2, 2), staleness=1),
        "split, early": Setting(split(2, 2), early=True),
        "split 1 + 3": Setting(split(1, 3)),
        "split 3 + 1, stale": Setting(split(3, 1), staleness=1),
        "split, critic alone": Setting(split(2, 1, 1)),
        "split, critic alone, stale, early": Setting(split(1, 2, 1, score="all"), staleness=1, early=True),
    }.items()
}
SETTINGS = {f"{name}, seen": setting for name, setting in SEEN.items()} | HELD_OUT
pytestmark = pytest.mark.slow  # they compare measured times, which other work on the machine moves by more than the 2 %
every_setting = pytest.mark.parametrize("name", SETTINGS)


def makespan(rows):
    return summarise(rows).makespan


def same_run(again, measured, within):
    """Makespan, and seconds that each group ran nothing, to a share of the makespan."""
    told, truth = summarise(again), summarise(measured)
    near(told.makespan, truth.makespan, within=within)
    assert [told.idle[group] for group in truth.idle] == pytest.approx(
        list(truth.idle.values()), abs=within * truth.makespan
    )


@pytest.fixture(scope="module")
def rehearsed():
    """What was measured of each setting."""
    return dict(zip(SETTINGS, run_ranks(rehearse_all, WORLD, list(SETTINGS.values()), timeout=200)[0], strict=True))


@pytest.fixture(scope="module")
def fitted(rehearsed):
    return Fitted([row for name in SEEN for row in rehearsed[f"{name}, seen"]])


def patiently(claim, again):
    """Measure again if the claim does not hold, twice at most: a machine that others use stops now and then."""
    for _ in range(2):
        try:
            return claim()
        except AssertionError:
            again()
    return claim()


def holds(claim, rehearsed, name):
    """Of what was measured of a setting."""

    def again():
        (rehearsed[name],) = run_ranks(rehearse_all, WORLD, [SETTINGS[name]])[0]

    patiently(lambda: claim(rehearsed[name]), again)


@every_setting
def test_a_rehearsal_that_is_replayed_takes_as_long_and_leaves_each_group_idle_as_long(name, rehearsed):
    def claim(measured):
        latency = Fitted(measured).latency
        again = SETTINGS[name].play().simulate(replay(measured), latency=latency, scored_by=scorers_of(measured))
        same_run(again, measured, within=0.02)

    holds(claim, rehearsed, name)


REAL = {
    "fused": ["--schedule.map=fused"],
    "split": ["--schedule.map=split", "--schedule.rollout_ranks=1"],
}
TENS_OF_MILLISECONDS = [
    "--num_steps=3", "--prompts_per_step=16", "--samples_per_optimizer_step=8", "--compute.micro_batch_size=1",
    "--compute.score_micro_batch_size=1", "--rollout.max_slots=8", "--rollout.max_new_tokens=20",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_run_that_is_replayed_takes_as_long_and_leaves_each_group_idle_as_long(name, chain, tmp_path):
    """But for the last boundary: its checkpoint takes longer than the rest of so small a run."""
    runs = []

    def run():
        run_dir = tmp_path / str(len(runs))
        settings = [f"--run_dir={run_dir}", *TENS_OF_MILLISECONDS, *REAL[name]]
        notes = run_ranks(train_with_notes, 2, chain, settings, timeout=200)[0]
        runs.append((notes, of_leaders(read_run(run_dir)[0])))

    def claim():
        notes, measured = runs[-1]
        latency = Fitted(measured).latency
        again = notes.simulate(replay(measured), latency=latency, scored_by=scorers_of(measured))
        same_run(but_for_the_end(again), but_for_the_end(measured), within=0.02)

    run()
    patiently(claim, run)


def but_for_the_end(rows):
    last = max(row.step for row in rows)
    return [row for row in rows if (row.kind, row.step) != ("boundary", last)]


@every_setting
def test_a_rehearsal_takes_as_long_as_its_costs_say(name, rehearsed, fitted):
    told = makespan(SETTINGS[name].play().simulate(latency=fitted.latency))
    holds(lambda measured: near(told, makespan(measured), within=0.05), rehearsed, name)


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_fit_predicts_runs_with_other_lengths_batches_maps_and_staleness(name, rehearsed, fitted):
    told = makespan(HELD_OUT[name].play().simulate(fitted, latency=fitted.latency))
    holds(lambda measured: near(told, makespan(measured), within=0.1), rehearsed, name)


def test_a_fit_says_which_of_two_runs_is_faster(rehearsed, fitted):
    told = [makespan(play.simulate(fitted, latency=fitted.latency)) for play in (s.play() for s in HELD_OUT.values())]
    assert kendall_tau(list(zip(told, (makespan(rehearsed[name]) for name in HELD_OUT), strict=True))) >= 0.8


def near(told, measured, *, within):
    assert told == pytest.approx(measured, rel=within)


def kendall_tau(pairs):
    """Of pairs (told, measured) that lie 5 % apart: how many are told in the right order, less how many are not."""
    apart = [(a < b, x < y) for (a, x), (b, y) in combinations(pairs, 2) if abs(x - y) > 0.05 * max(x, y)]
    return mean(told == measured or -1 for told, measured in apart)


def test_kendall_tau_worked_by_hand():
    assert kendall_tau([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)  # 2 pairs in order, 1 not
