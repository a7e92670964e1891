"""One RTO step from the same start on every layout: what one process does, every layout does."""

from typing import Any

import pytest
import torch

from rto_megatron.config.load import load_run
from tests.ranks import run_ranks
from tests.stages.chain import words_of

LAYOUTS = {
    "tensor 2": (2, ["--parallel.tensor=2"]),
    "tensor 2, sequence parallel": (2, ["--parallel.tensor=2", "--parallel.sequence=true"]),
    "pipeline 2": (2, ["--parallel.pipeline=2"]),
    "context 2": (2, ["--parallel.context=2"]),
    "context 2 x tensor 2, sequence parallel": (
        4,
        ["--parallel.context=2", "--parallel.tensor=2", "--parallel.sequence=true"],
    ),
    "context 2 x pipeline 2": (4, ["--parallel.context=2", "--parallel.pipeline=2"]),
    "data 2": (2, []),
    "tensor 2 x pipeline 2": (4, ["--parallel.tensor=2", "--parallel.pipeline=2"]),
    "tensor 2 x pipeline 2 x virtual 2": (
        4,
        ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.virtual_stages=2"],
    ),
    "tensor 2 x pipeline 2, sequence parallel": (
        4,
        ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.sequence=true"],
    ),
    "data 2 x tensor 2": (4, ["--parallel.tensor=2"]),
}


def one_step(folder: Any, words: list[str]) -> dict[str, Any]:
    """Rollout, rewards, advantages, gradient norms and updated weights of a step on this layout."""
    from rto_megatron.distributed.runtime import start_runtime

    runtime = start_runtime(threads=1)
    from rto_megatron.distributed.collectives import gather_objects
    from rto_megatron.distributed.shards import shards
    from rto_megatron.stages.rto import prepare, take_step
    from rto_megatron.stages.run import Clock

    config = load_run("rto", None, words_of("rto", folder) + words)
    setup, _ = prepare(config, runtime)
    step = take_step(setup, config, step=0, kl_coef=config.rto.kl_coef, clock=Clock())
    weights = {}
    for role in (setup.actors.policy, setup.actors.critic):
        mine = [(s.name, s.full_shape, s.offset, s.data.clone()) for s in shards(role.model) if s.is_main]
        for name, shape, offset, data in (piece for pieces in gather_objects(mine) for piece in pieces):
            full = weights.setdefault(f"{role.name}/{name}", torch.full(shape, torch.nan))
            full[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return {
        "tokens": step.rollout.tokens,
        "rewards": step.credit.rewards.total,
        "log_probs": step.signals.policy_log_probs,
        "values": step.signals.values,
        "advantages": step.experience.advantages,
        "returns": step.experience.returns,
        "norms": {name: value for name, value in step.losses.items() if name.endswith("grad_norm")},
        "weights": weights,
    }


@pytest.fixture(scope="module")
def single(chain):
    """The step on one rank."""
    return run_ranks(one_step, 1, chain, [])[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_step_equals_the_single_rank_step(name, single, chain):
    world, words = LAYOUTS[name]
    for result in run_ranks(one_step, world, chain, words, timeout=240):
        assert_same_step(result, single)


def assert_same_step(result, single):
    assert torch.equal(result["tokens"], single["tokens"])
    for key in ("rewards", "log_probs", "values", "returns"):
        torch.testing.assert_close(result[key], single[key], rtol=0, atol=1e-5)
    torch.testing.assert_close(result["advantages"], single["advantages"], rtol=0, atol=1e-4)
    assert result["norms"] == pytest.approx(single["norms"], rel=1e-4)
    assert set(result["weights"]) == set(single["weights"])
    for key, weight in single["weights"].items():
        # Adam's first step is lr * sign(g) where g is rounding noise, so such entries may differ by 2 lr
        close = (result["weights"][key] - weight).abs() <= 1e-5
        assert close.float().mean() > 0.999, f"{key}: {(~close).sum()} of {close.numel()} entries differ"


def test_a_smaller_reward_model_and_critic_give_the_same_step_on_every_layout(chain, small_reward):
    words = [f"--reward_model={small_reward}"]
    alone = run_ranks(one_step, 1, chain, words)[0]
    widths = [weight.shape[-1] for name, weight in alone["weights"].items() if "word_embeddings" in name]
    assert sorted(widths) == [16, 32]
    for result in run_ranks(one_step, 2, chain, [*words, "--parallel.pipeline=2"]):
        assert_same_step(result, alone)


def test_the_worst_mixture_of_spans_is_that_of_the_whole_minibatch_however_it_is_dealt(single, chain):
    words = ["--drto.radius=0.2", "--drto.span_tokens=3"]
    alone = run_ranks(one_step, 1, chain, words)[0]
    assert torch.equal(alone["advantages"], single["advantages"])
    assert alone["norms"] != pytest.approx(single["norms"], rel=1e-2)
    for result in run_ranks(one_step, 2, chain, words):
        assert_same_step(result, alone)


def test_ppo_is_rto_with_the_dpo_coefficient_0_bit_for_bit(single, chain):
    """With pi_dpo = pi_ref and with the coefficient at 0 the same numbers come out."""
    off = run_ranks(one_step, 1, chain, ["--rto.dpo_coef=0"])[0]
    same = run_ranks(one_step, 1, chain, [f"--dpo={chain}/sft", "--allow_other_reference=true"])[0]
    assert torch.equal(off["rewards"], same["rewards"])
    assert all(torch.equal(off["weights"][key], same["weights"][key]) for key in off["weights"])
    assert not torch.equal(off["rewards"], single["rewards"])
