"""Rooflines against numbers worked out beforehand for H100 and H200; no number here was measured."""

import pytest

from rto_megatron.schedule.limits import (
    decode_seconds,
    longest_chain,
    resident_tokens,
    resource_bound,
)
from rto_megatron.schedule.placement import colocated, split
from rto_megatron.schedule.rooflines import (
    GPUS,
    MODELS,
    Efficiency,
    Layout,
    Roles,
    Roofline,
    cache_bytes_per_token,
    matmul_parameters,
)
from rto_megatron.schedule.trace import Load, summarise
from rto_megatron.schedule.work import Item, Sizes
from rto_megatron.schedule.workload import Workload, padding, seconds_per_step, steady

LARGE = Workload(prompt_tokens=205, max_new_tokens=2048)
"""1024 tokens a sample: 1024 samples of it send 21 MB a step at 20 bytes a token."""
SIZES = {"num_steps": 3, "samples": 1024, "minibatch": 128, "slots": 1024, "slice_steps": 64, "prefill_tokens": 1 << 20}
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
    step = decode_seconds(MODELS[model], GPUS["h100"], batch=1, context=context, tensor=8)
    assert 2048 * step == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize(
    ("model", "pipeline", "gradients", "refit"),
    [("llama3-8b", 1, 0.10, 0.050), ("llama3-70b", 4, 0.22, 0.44)],
)
def test_gradients_and_new_weights_between_nodes(model, pipeline, gradients, refit):
    layout = Layout(engine_ranks=8, train_ranks=32, train_tensor=8, pipeline=pipeline)
    cost = Roofline(MODELS[model], GPUS["h100"], split(1, 2), layout)
    assert cost.gradient_seconds() == pytest.approx(gradients, rel=0.07)
    assert cost.refit_seconds() == pytest.approx(refit, rel=0.07)


@pytest.mark.parametrize(
    ("model", "tensor", "milliseconds"),
    [("llama3-8b", 2, (0.40, 2.78)), ("llama3-8b", 4, (0.60, 1.39)), ("llama3-8b", 8, (0.70, 0.69)),
     ("llama3-70b", 8, (1.39, 2.73))],
)  # fmt: skip
def test_all_reduces_beside_matrix_products_of_a_layer(model, tensor, milliseconds):
    cost = Roofline(MODELS[model], GPUS["h100"], colocated(1), Layout(engine_ranks=8, train_ranks=8))
    assert cost._tensor_ratio(tensor) == pytest.approx(milliseconds[0] / milliseconds[1], rel=0.1)


def test_eight_billion_parameters_train_slower_on_eight_tensor_ranks_than_on_two():
    def seconds(tensor):
        layout = Layout(engine_ranks=8, train_ranks=8, train_tensor=tensor)
        return Roofline(MODELS["llama3-8b"], GPUS["h100"], colocated(1), layout).train(Load([1024] * 64), num_models=1)

    assert seconds(8) > 1.2 * seconds(2)
    assert seconds(4) == seconds(2)


def test_nothing_leaves_a_node_where_there_is_one_and_one_copy_has_nothing_to_sum():
    def cost(groups, ranks, tensor):
        layout = Layout(engine_ranks=ranks, train_ranks=ranks, engine_tensor=tensor, train_tensor=tensor)
        return Roofline(MODELS["llama3-8b"], GPUS["h100"], colocated(groups), layout)

    assert cost(1, 8, 8).gradient_seconds() == 0
    # 4 * 7.5e9 bytes into one rank at 0.7 * 450e9
    assert cost(8, 1, 1).gradient_seconds() == pytest.approx(4 * 7.5e9 / (0.7 * 450e9), rel=0.01)
    assert cost(2, 8, 1).gradient_seconds() == pytest.approx(0.094, rel=0.01)


def test_three_microbatches_in_four_stages_double_the_time_and_one_stream_halves_the_bubble():
    layout = Layout(engine_ranks=8, train_ranks=32, train_tensor=8, pipeline=4, micro_tokens=4096, filled=1.0)
    load = Load([1024] * 12)  # three microbatches

    def seconds(num_models, **roles):
        cost = Roofline(MODELS["llama3-70b"], GPUS["h100"], split(1, 1), layout, roles=Roles(**roles))
        return cost.train(load, num_models=num_models), cost.score(load, 32) / 4

    alone, forward = seconds(1)
    # 1 + (4 - 1) / 3 and 1 + (4 - 1) / 6; hidden states are under way for less than a percent of it
    assert 2 * 3 * forward < alone == pytest.approx(2 * 3 * forward, rel=0.01)
    assert seconds(2)[0] == pytest.approx(1.5 * 6 * forward, rel=0.01)
    assert seconds(2, one_stream=False)[0] == pytest.approx(2 * alone)


def test_hidden_states_take_their_time_to_the_next_stage():
    load = Load([1024] * 32)  # eight microbatches

    def seconds(pipeline, virtual_stages=1):
        layout = Layout(
            engine_ranks=8,
            train_ranks=8 * pipeline,
            train_tensor=8,
            pipeline=pipeline,
            virtual_stages=virtual_stages,
            filled=1.0,
        )
        return Roofline(MODELS["llama3-70b"], GPUS["h100"], split(1, 1), layout).train(load, num_models=1)

    # 4096 tokens x 8192 x 2 bytes, an eighth a rank, between nodes; twice a microbatch and block, and in a stream of
    # eight microbatches over two stages nine times one after another
    one_message = 4096 * 8192 * 2 / 8 / (Efficiency().network * GPUS["h100"].network)
    bubble = 1 + 1 / 8
    assert seconds(2) == pytest.approx(seconds(1) / 2 * bubble + 18 * one_message)
    assert seconds(2) > seconds(2, virtual_stages=2)


def test_items_that_cost_what_one_forward_costs_a_part_of_it_or_nothing():
    place, layout = split(1, 2), Layout(engine_ranks=8, train_ranks=8)
    cost = Roofline(MODELS["llama3-8b"], GPUS["h100"], place, layout, roles=Roles(scored_fp8=2))
    load, forward = (
        Load([1000] * 8),
        Roofline(MODELS["llama3-8b"], GPUS["h100"], place, layout).score(Load([1000] * 8), 8) / 4,
    )
    proximal = Item(kind="proximal", step=0, groups=(0, 1), number=0)
    assert cost(proximal, load, 0) == pytest.approx(forward)  # the load is a group's share
    assert cost.score(load, 8) == pytest.approx((2 + 2 / 1.7) * forward)
    boundary = Item(kind="boundary", step=0, groups=(0, 1, 2), number=0)
    assert cost(boundary, Load(), 0) == 0
    together = Roofline(MODELS["llama3-8b"], GPUS["h100"], colocated(2), layout)
    assert together(boundary, Load(), 0) == pytest.approx(0.3)  # one layout: no weights move


@pytest.mark.parametrize(("model", "num_gpus", "seconds"), [("llama3-8b", 64, 7.6), ("llama3-70b", 512, 8.7)])
def test_what_any_schedule_needs(model, num_gpus, seconds):
    known = LARGE.known(0, Sizes(**SIZES, lanes=1))
    found = resource_bound(MODELS[model], GPUS["h100"], known, LARGE.lengths(0, 1024), num_gpus=num_gpus)
    assert found == pytest.approx(seconds, rel=0.25)


def test_without_a_critic_one_model_less_learns():
    known, lengths = LARGE.known(0, Sizes(**SIZES, lanes=1)), LARGE.lengths(0, 1024)
    score, one, two = (
        resource_bound(MODELS["llama3-8b"], GPUS["h100"], known, lengths, num_gpus=64, num_learners=n) for n in range(3)
    )
    assert score < one < two and two - one == pytest.approx(one - score)


def test_one_step_off_is_faster_than_the_barrier_and_early_minibatches_too():
    layout, placement = Layout(engine_ranks=8, train_ranks=32, **C), split(24, 10)
    cost, sizes = Roofline(MODELS["llama3-70b"], GPUS["h100"], placement, layout), Sizes(**SIZES, lanes=24)
    plain, early, off = (LARGE.run(cost, sizes, placement, **how) for how in ({}, {"early": True}, {"staleness": 1}))
    assert seconds_per_step(early) < 0.9 * seconds_per_step(plain)
    assert seconds_per_step(off) < 0.9 * seconds_per_step(plain)
    assert summarise(off).idle_frac < summarise(plain).idle_frac


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_follows_one_another_is_never_longer_than_a_step(staleness):
    layout, placement = Layout(engine_ranks=8, train_ranks=32, **C), split(24, 10)
    cost, sizes = (
        Roofline(MODELS["llama3-70b"], GPUS["h100"], placement, layout),
        Sizes(**SIZES | {"num_steps": 5}, lanes=24),
    )
    rows = LARGE.run(cost, sizes, placement, staleness=staleness, early=True)
    lengths = LARGE.lengths(0, 1024)
    assert max(lengths) == 2048
    chain = longest_chain(cost, placement, lengths, prompt_tokens=205, minibatch=128, staleness=staleness)
    assert 17.1 < chain < seconds_per_step(rows, staleness=staleness)
    assert chain > 0.5 * seconds_per_step(rows, staleness=staleness)


def test_the_steady_part_of_a_run_has_all_of_a_step_and_no_more():
    cost = Roofline(MODELS["llama3-8b"], GPUS["h100"], colocated(8), Layout(engine_ranks=8, train_ranks=8))
    rows = LARGE.run(cost, Sizes(**SIZES, lanes=8), colocated(8))
    inside, num_steps = steady(rows)
    assert num_steps == 2
    found = summarise(inside, range(8))
    assert found.makespan == pytest.approx(2 * seconds_per_step(rows))
    assert sum(found.busy.values()) + found.idle_frac * found.makespan == pytest.approx(found.makespan)
    assert sum(row.samples for row in inside if row.kind == "score") == 2 * 1024


def test_padding_is_what_the_longest_of_each_microbatch_costs():
    short = Workload(prompt_tokens=10, max_new_tokens=100)
    a, b, c, d = (10 + length for length in short.lengths(0, 4))
    assert padding(short, 4, rows=2) == pytest.approx(2 * (max(a, b) + max(c, d)) / (a + b + c + d))
    assert padding(short, 4, rows=1) == 1


def test_the_longest_responses_may_come_last():
    lengths = Workload(prompt_tokens=10, max_new_tokens=100, long_last=0.25).lengths(0, 40)
    assert min(lengths[30:]) >= max(lengths[:30])
    assert sorted(lengths) == sorted(Workload(prompt_tokens=10, max_new_tokens=100).lengths(0, 40))
