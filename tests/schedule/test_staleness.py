"""One step off: the split map against a loop in one process that does the same one after the other."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rto_megatron.config.load import load_run
from tests.ranks import RanksFailed, run_ranks
from tests.schedule.test_maps import DELAYS, LOGICAL, result, split, train, words
from tests.stages.chain import words_of

STALE = "--schedule.staleness=1"
STEPS = 4


def lagged(folder: Path, settings: list[str]) -> dict[str, torch.Tensor]:
    """Step i learns from samples that version max(0, i - 1) has written and scored; the weights at the end."""
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.step import score, token_log_probs
    from rto_megatron.rollout.experience import for_newer_policy, make_experience
    from rto_megatron.schedule.lane import written_out
    from rto_megatron.stages.rto import judge, prepare, roll_out
    from rto_megatron.stages.samples import lengths_of
    from rto_megatron.stages.update import minibatch_rows, update

    config = load_run("rto", None, words_of("rto", folder) + settings)
    setup, _ = prepare(config, start_runtime(threads=1))
    policy, critic = setup.actors.policy.model, setup.actors.critic.model
    weights = [*policy.parameters(), *critic.parameters()]
    versions = [[w.detach().clone() for w in weights]]

    def become(version: int) -> None:
        for weight, stored in zip(weights, versions[version], strict=True):
            weight.data.copy_(stored)

    for step in range(config.num_steps):
        become(max(0, step - 1))
        rollout, signals = judge(setup, config, roll_out(setup, config, step=step), step=step)
        become(step)
        packs, _ = written_out(setup.sizes, *lengths_of(rollout), step=step, lanes=range(setup.sizes.lanes))
        proximal = torch.zeros(rollout.tokens.shape)
        for pack in packs:
            rows = rollout.rows(pack.samples)
            said = score(policy, rows, token_log_probs, setup.mesh, micro_batch_size=16)[..., 0]
            proximal[list(pack.samples), : said.shape[1]] = said
        experience, _ = make_experience(rollout, signals, config.rto, config.advantage, kl_coef=config.rto.kl_coef)
        experience = for_newer_policy(experience, proximal, cap=config.ppo.importance_cap)
        minibatches = [experience.rows(rows) for rows in minibatch_rows(len(rollout), config, step=step)]
        update(setup.actors, minibatches, config, setup.mesh, step=step)
        versions.append([w.detach().clone() for w in weights])
    named = {f"policy/{n}": w for n, w in policy.named_parameters()}
    named |= {f"critic/{n}": w for n, w in critic.named_parameters()}
    return {name: weight.detach().clone() for name, weight in named.items()}


def weights_at_the_end(folder: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """Of a run's last checkpoint, on one rank."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.checkpoint import load_weights, open_checkpoint
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.models.gpt import build_model

    mesh, checkpoint = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0), open_checkpoint(run_dir)
    named = {}
    for role, kind in (("policy", "policy"), ("critic", "value")):
        architecture = checkpoint.manifest.models[role]
        model: Any = build_model(architecture, mesh, kind=kind, parallel=ParallelConfig(), compute=ComputeConfig())
        load_weights(model, checkpoint, role)
        named |= {f"{role}/{name}": weight.detach().clone() for name, weight in model.named_parameters()}
    return named


def settings(run_dir: Path, *more: str) -> list[str]:
    """No KL controller and no evaluations: the loop above has none."""
    return [*words(run_dir), f"--num_steps={STEPS}", "--rto.kl_target=null", "--eval_every=0", *more]


@pytest.fixture(scope="module")
def one_step_off(chain, tmp_path_factory) -> Path:
    """A split run with staleness 1 that was never stopped."""
    run_dir = tmp_path_factory.mktemp("stale") / "rto"
    run_ranks(train, 2, chain, settings(run_dir, *split(1), STALE, "--checkpoint.save_every=1"), timeout=200)
    return run_dir


def test_staleness_1_is_the_lagged_loop_to_the_last_bit(one_step_off, chain, tmp_path):
    [expected] = run_ranks(lagged, 1, chain, settings(tmp_path / "unused"), timeout=200)
    [found] = run_ranks(weights_at_the_end, 1, chain, one_step_off)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_staleness_1_is_not_staleness_0(one_step_off, chain, tmp_path):
    run_ranks(train, 2, chain, settings(tmp_path / "rto", *split(1)), timeout=200)
    assert result(tmp_path / "rto")[0] != result(one_step_off)[0]
    rows = [json.loads(line) for line in (one_step_off / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    moved = [row["staleness/log_prob_diff_mean"] for row in rows if "staleness/log_prob_diff_mean" in row]
    assert moved[0] == 0 and all(move > 0 for move in moved[1:])  # step 0 was written by the weights that it trains


@pytest.mark.parametrize(
    "more", [split(1, 1), split(1, 0, "--schedule.score=rollout"), split(1, 0, "--schedule.score=all")]
)
def test_staleness_1_is_the_same_on_every_map_and_under_delays(more, one_step_off, chain, tmp_path):
    ranks = 3 if more == split(1, 1) else 2
    run_ranks(train, ranks, chain, settings(tmp_path / "rto", *more, STALE, DELAYS), timeout=200)
    assert result(tmp_path / "rto") == result(one_step_off)


def train_and_die_at(chain: Path, words_: list[str], rank: int, count: int) -> None:
    """A run one of whose ranks is killed when it begins its `count`-th item."""
    from rto_megatron.stages.interleaved import RTOWork

    real, begun = RTOWork.run, []

    def deadly(self: RTOWork, item: Any) -> Any:
        begun.append(item)
        if len(begun) == count and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, item)

    RTOWork.run = deadly  # type: ignore[method-assign]
    train(chain, words_)


RESUMED = {
    "fused 2": (2, ["--schedule.map=fused"]),
    "split 1 + 1, staleness 1": (2, [*split(1), STALE]),
    "split 1 + 1": (2, [*split(1)]),
    "split 1 + 1, early": (2, [*split(1), LOGICAL]),
    "split 1 + 1 + 1, staleness 1": (3, [*split(1, 1), STALE]),
}
IN_SHORT = list(RESUMED)[:2]


@pytest.mark.parametrize(
    "name", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_killed_at_random_items_it_ends_with_the_same_bits(name, chain, tmp_path):
    world, own = RESUMED[name]
    rng = random.Random(name)
    straight, killed = tmp_path / "straight" / "rto", tmp_path / "killed" / "rto"
    same = [*own, "--checkpoint.save_every=1"]
    run_ranks(train, world, chain, settings(straight, *same), timeout=200)
    for _ in range(2):
        with pytest.raises(RanksFailed):
            rank, count = rng.randrange(world), rng.randint(5, 30)
            run_ranks(train_and_die_at, world, chain, settings(killed, *same), rank, count, timeout=200)
    run_ranks(train, world, chain, settings(killed, *same), timeout=200)
    assert result(killed) == result(straight)
