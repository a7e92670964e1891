"""Rooflines against numbers worked out beforehand for H100 and H200; no number here was measured."""

import pytest

from rto_megatron.schedule.limits import (
    decode_seconds,
    latency_bound,
    resident_tokens,
    resource_bound,
)
from rto_megatron.schedule.placement import colocated, split
from rto_megatron.schedule.rooflines import (
    GPUS,
    MODELS,
    Layout,
    Roles,
    Roofline,
    cache_bytes_per_token,
    matmul_parameters,
)
from rto_megatron.schedule.trace import summarise
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload, seconds_per_step

LARGE = Workload(prompt_tokens=205, max_new_tokens=2048)
"""1024 tokens a sample: 1024 samples of it send 21 MB a step at 20 bytes a token."""
SIZES = {"num_steps": 3, "samples": 1024, "minibatch": 128, "slots": 1024, "slice_steps": 64, "prefill_tokens": 1 << 20}
B = {"engine_tensor": 8, "train_tensor": 2}
C = {"engine_tensor": 8, "train_tensor": 8, "pipeline": 4}


def test_parameters_and_cache_of_the_named_models():
    assert matmul_parameters(MODELS["llama3-8b"]) == pytest.approx(7.50e9, rel=0.001)
    assert matmul_parameters(MODELS["llama3-70b"]) == pytest.approx(69.5e9, rel=0.001)
    assert cache_bytes_per_token(MODELS["llama3-8b"]) == 128 * 1024
    assert cache_bytes_per_token(MODELS["llama3-70b"]) == 320 * 1024


@pytest.mark.parametrize(
    ("model", "tensor", "context", "milliseconds"),
    [
        ("llama3-8b", 1, 1000, (6.1, 6.8, 9.1, 18.5)),
        ("llama3-8b", 8, 1000, (1.7, 1.8, 2.3, 4.0)),
        ("llama3-70b", 8, 1500, (8.4, 8.9, 10.7, 17.9)),
    ],
)
def test_a_decode_step(model, tensor, context, milliseconds):
    for batch, expected in zip((1, 16, 64, 256), milliseconds, strict=True):
        seconds = decode_seconds(MODELS[model], GPUS["h100"], batch=batch, context=context, tensor=tensor)
        assert 1000 * seconds == pytest.approx(expected, abs=0.051)


@pytest.mark.parametrize(
    ("model", "tensor", "tokens"),
    [("llama3-8b", 1, 396e3), ("llama3-8b", 8, 4.0e6), ("llama3-70b", 4, 399e3), ("llama3-70b", 8, 1.23e6)],
)
def test_tokens_that_an_engine_can_hold(model, tensor, tokens):
    assert resident_tokens(MODELS[model], GPUS["h100"], tensor=tensor) == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize(("model", "context", "seconds"), [("llama3-8b", 1000, 3.5), ("llama3-70b", 1500, 17.1)])
def test_the_longest_response_alone(model, context, seconds):
    bound = latency_bound(MODELS[model], GPUS["h100"], max_new_tokens=2048, context=context, tensor=8)
    assert bound == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize(
    ("model", "pipeline", "gradients", "refit"),
    [("llama3-8b", 1, 0.10, 0.050), ("llama3-70b", 4, 0.22, 0.44)],
)
def test_gradients_and_new_weights_between_nodes(model, pipeline, gradients, refit):
    layout = Layout(engine_ranks=8, train_ranks=32, train_tensor=8, pipeline=pipeline)
    cost = Roofline(MODELS[model], GPUS["h100"], split(1, 1), layout)
    assert cost.gradient_seconds() == pytest.approx(gradients, rel=0.07)
    assert cost.refit_seconds() == pytest.approx(refit, rel=0.07)


def test_three_microbatches_in_four_stages_double_the_time():
    layout = Layout(engine_ranks=8, train_ranks=32, train_tensor=8, pipeline=4, micro_tokens=4096)
    cost = Roofline(MODELS["llama3-70b"], GPUS["h100"], split(1, 1), layout)
    assert cost.bubble(3 * 4096) == 1.0  # (4 - 1) / 3


@pytest.mark.parametrize(("model", "num_gpus", "seconds"), [("llama3-8b", 64, 7.6), ("llama3-70b", 512, 8.7)])
def test_what_any_schedule_needs(model, num_gpus, seconds):
    known = LARGE.known(0, Sizes(**SIZES, lanes=1))
    found = resource_bound(MODELS[model], GPUS["h100"], known, LARGE.lengths(0, 1024), num_gpus=num_gpus)
    assert found == pytest.approx(seconds, rel=0.25)


@pytest.mark.parametrize(
    ("model", "workload", "placement", "layout", "roles", "seconds"),
    [
        # 8 GPUs, half as many new tokens; the prompts' length is a guess, chosen by the bound of 28 s
        (
            "llama3-8b",
            Workload(prompt_tokens=64, max_new_tokens=1024),
            colocated(8),
            Layout(engine_ranks=1, train_ranks=1),
            Roles(),
            32.0,
        ),
        # 64 GPUs: full recompute; selective; old log-probs from decoding; then split
        (
            "llama3-8b",
            LARGE,
            colocated(8),
            Layout(engine_ranks=8, train_ranks=8, **B),
            Roles(scored=5, forwards=4),
            14.2,
        ),
        ("llama3-8b", LARGE, colocated(8), Layout(engine_ranks=8, train_ranks=8, **B), Roles(scored=5), 12.8),
        ("llama3-8b", LARGE, colocated(8), Layout(engine_ranks=8, train_ranks=8, **B), Roles(), 12.1),
        ("llama3-8b", LARGE, split(3, 5), Layout(engine_ranks=8, train_ranks=8, **B), Roles(), 14.8),
        # 512 GPUs: the same
        ("llama3-70b", LARGE, colocated(16), Layout(engine_ranks=32, train_ranks=32, **C), Roles(scored=5), 33.2),
        ("llama3-70b", LARGE, colocated(16), Layout(engine_ranks=32, train_ranks=32, **C), Roles(), 32.4),
    ],
    ids=["A-5", "B-3", "B-4", "B-5", "B-8a", "C-4", "C-5"],
)
def test_a_step_is_within_a_quarter_of_what_was_worked_out_by_hand(model, workload, placement, layout, roles, seconds):
    """The worked examples do not say their lengths: these follow from other numbers that they give."""
    cost = Roofline(MODELS[model], GPUS["h100"], placement, layout, roles=roles)
    rows = workload.run(cost, Sizes(**SIZES, lanes=len(placement.engines)), placement)
    assert seconds_per_step(rows) == pytest.approx(seconds, rel=0.25)


def test_one_step_off_is_faster_than_the_barrier_and_early_minibatches_too():
    layout, placement = Layout(engine_ranks=8, train_ranks=32, **C), split(24, 10)
    cost, sizes = Roofline(MODELS["llama3-70b"], GPUS["h100"], placement, layout), Sizes(**SIZES, lanes=24)
    plain, early, off = (LARGE.run(cost, sizes, placement, **how) for how in ({}, {"early": True}, {"staleness": 1}))
    assert seconds_per_step(early) < 0.9 * seconds_per_step(plain)
    assert seconds_per_step(off) < 0.9 * seconds_per_step(plain)
    assert summarise(off).idle_frac < summarise(plain).idle_frac
