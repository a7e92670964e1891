"""Fits: what traces of some runs say of others. The traces are synthetic, noisy, and of a cost that no fit can copy."""

import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from rto_megatron.schedule.fit import Fitted
from rto_megatron.schedule.placement import colocated, fused, split
from rto_megatron.schedule.trace import Load, Row, read_trace, summarise, write_trace
from rto_megatron.schedule.work import Item, Sizes
from rto_megatron.schedule.workload import Workload

LATENCY, REFIT_BYTES = 3e-4, 2_000_000


def cost(item, load, group):
    """Seconds on some machine: microbatches of 4 samples are padded, so they step where a fit is straight."""
    micros = math.ceil(load.samples / 4)
    if item.kind == "decode":
        return load.num_steps * 2e-3 + load.tokens * 4e-5 + load.context * 2e-8
    if item.kind == "refit":
        return 5e-3 + REFIT_BYTES * 4e-9
    fixed = {"optimizer": 1.5e-2, "advantage": 1e-3 + 1e-7 * load.tokens, "boundary": 2e-3}
    if item.kind in fixed:
        return fixed[item.kind]
    models = {"prefill": 1, "score": 5, "proximal": 1, "train": 6 if item.role == "both" else 3}
    return models[item.kind] * (1.5e-3 * micros + 8e-6 * load.tokens + 2e-9 * load.squares)


def measured(name, seed, workload, placement, *, noise=0.1, samples=64, minibatch=16, slots=8, **how):
    """A run, each item a tenth off in either direction."""
    rng = random.Random(f"{name}/{seed}")
    sizes = Sizes(
        num_steps=4,
        samples=samples,
        minibatch=minibatch,
        lanes=len(placement.engines) * -(-len(placement.policy) // len(placement.engines)),
        slots=slots,
        pack_tokens=2000,
    )

    def noisy(item, load, group):
        return cost(item, load, group) * rng.lognormvariate(0, noise)

    rows = workload.run(noisy, sizes, placement, latency=LATENCY, **how)
    moved = [replace(row, num_bytes=REFIT_BYTES) if row.kind == "refit" else row for row in rows]
    return moved, lambda fit: workload.run(fit, sizes, placement, latency=fit.latency, **how)


SHORT, LONG = Workload(prompt_tokens=40, max_new_tokens=160), Workload(prompt_tokens=90, max_new_tokens=300, seed=7)
SEEN = {
    "colocated": (SHORT, colocated(4), {}),
    "one step off": (LONG, split(1, 1), {"staleness": 1}),
    "critic alone": (SHORT, split(1, 2, 1, score="all"), {"staleness": 1}),
}
OTHERS = {
    "longer": (LONG, colocated(4), {}),
    "larger minibatches": (SHORT, colocated(2), {"samples": 96, "minibatch": 48, "slots": 24}),
    "fused": (LONG, fused(4), {"slots": 16}),
    "split": (SHORT, split(2, 2), {"samples": 48}),
    "early": (LONG, split(1, 3), {"early": True}),
    "engines score": (SHORT, split(2, 1, score="rollout"), {"samples": 128, "minibatch": 32}),
    "other minibatches, one step off": (SHORT, split(1, 1), {"staleness": 1, "minibatch": 32, "slots": 16}),
    "critic alone, early": (LONG, split(2, 1, 1), {"early": True}),
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Of the runs seen, from their file."""
    path = tmp_path_factory.mktemp("traces") / "seen.jsonl"
    write_trace(
        path, [row for name, (load, place, how) in SEEN.items() for row in measured(name, 1, load, place, **how)[0]]
    )
    return Fitted(read_trace(path))


@pytest.fixture(scope="module")
def pairs(fit):
    """Seconds told and measured of the runs that the fit has not seen."""
    found = {}
    for name, (load, place, how) in OTHERS.items():
        rows, told = measured(name, 2, load, place, **how)
        found[name] = summarise(told(fit)).makespan, summarise(rows).makespan
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_runs_with_other_lengths_sizes_and_maps_are_told_within_a_tenth(name, pairs):
    told, truth = pairs[name]
    assert told == pytest.approx(truth, rel=0.1)


def test_the_mean_error_is_smaller_and_the_order_of_the_runs_is_told(pairs):
    assert mean(abs(told / truth - 1) for told, truth in pairs.values()) < 0.05
    names = list(pairs)
    agree = [(pairs[a][0] < pairs[b][0]) == (pairs[a][1] < pairs[b][1]) for i, a in enumerate(names) for b in names[:i]]
    assert 2 * mean(agree) - 1 >= 0.8  # Kendall's tau


def test_the_time_between_items_is_told(fit):
    assert fit.latency == pytest.approx(LATENCY, rel=0.01)


def refit(number, num_bytes, seconds):
    return Row(
        group=0, kind="refit", role="engine", step=number, lane=-1, number=number, start=0, end=seconds,
        num_bytes=num_bytes,
    )  # fmt: skip


def test_a_refit_costs_a_start_and_its_bytes():
    rows = [refit(1, 1000, 3.0), refit(2, 2000, 5.0), refit(3, 4000, 9.0)]
    fitted = Fitted(rows)
    assert list(fitted.weights["refit", "engine"]) == pytest.approx([1.0, 0.002])
    item, load = Item(kind="refit", step=0, groups=(0, 1), number=1, role="engine"), Load()
    assert fitted(item, load, 0) == pytest.approx(5.0)  # the trace's median
    assert Fitted(rows, num_bytes={"engine": 10_000})(item, load, 0) == pytest.approx(21.0)


def test_microbatches_that_cost_whatever_is_in_them_are_told_from_tokens():
    def train(number, samples, tokens):
        seconds = 0.5 * samples + 0.001 * tokens
        return Row(
            group=0, kind="train", role="both", step=0, lane=-1, number=number, start=0, end=seconds,
            samples=samples, tokens=tokens, squares=tokens * 7,
        )  # fmt: skip

    rows = [train(0, 4, 900), train(1, 8, 1000), train(2, 4, 3000), train(3, 16, 1500), train(4, 2, 100)]
    fitted = Fitted(rows).weights["train", "both"]
    assert fitted[1] == pytest.approx(0.5)
    assert fitted[0] == pytest.approx(0, abs=1e-9)
