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
from tests.schedule.test_maps import DELAYS, LANES, LOGICAL, PIPELINE, TENSOR, result, split, train, words
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
            said = score(policy, rows, token_log_probs, setup.mesh, cut=config.compute.score_cut)[..., 0]
            proximal[list(pack.samples), : said.shape[1]] = said
        experience, _ = make_experience(rollout, signals, config.rto, config.advantage, kl_coef=config.rto.kl_coef)
        experience = for_newer_policy(experience, proximal, cap=config.ppo.importance_cap)
        minibatches = [experience.rows(rows) for rows in minibatch_rows(len(rollout), config, step=step)]
        update(setup.actors, minibatches, config, setup.mesh, step=step)
        versions.append([w.detach().clone() for w in weights])
    return whole({"policy": policy, "critic": critic})


def whole(models: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by name, from the pieces that all ranks hold."""
    from rto_megatron.distributed.collectives import gather_objects
    from rto_megatron.distributed.shards import shards

    pieces = [(f"{r}/{s.name}", s.full_shape, s.slices, s.data.clone()) for r, m in models.items() for s in shards(m)]
    found: dict[str, torch.Tensor] = {}
    for name, shape, slices, data in (piece for part in gather_objects(pieces) for piece in part):
        found.setdefault(name, torch.full(shape, torch.nan))[slices] = data
    return found


def weights_at_the_end(folder: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """Of a run's last checkpoint, on one rank."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.checkpoint import load_weights, open_checkpoint
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.models.gpt import build_model

    mesh, checkpoint = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0), open_checkpoint(run_dir)
    models = {}
    for role, kind in (("policy", "policy"), ("critic", "value")):
        architecture = checkpoint.manifest.models[role]
        model: Any = build_model(architecture, mesh, kind=kind, parallel=ParallelConfig(), compute=ComputeConfig())
        load_weights(model, checkpoint, role)
        models[role] = model
    return whole(models)


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


@pytest.mark.parametrize(
    ("common", "ranks", "own"),
    [
        (TENSOR, 3, split(1, 0, "--schedule.rollout.tensor=1")),
        pytest.param(TENSOR, 4, split(2, 0, "--schedule.score=all"), marks=pytest.mark.slow),
        pytest.param(PIPELINE, 4, split(2), marks=pytest.mark.slow),
        pytest.param(LANES, 4, split(2), marks=pytest.mark.slow),
    ],
)
def test_staleness_1_is_the_lagged_loop_on_two_training_ranks(common, ranks, own, chain, tmp_path):
    run_ranks(train, ranks, chain, settings(tmp_path / "rto", common, *own, STALE, DELAYS), timeout=200)
    expected = run_ranks(lagged, 2, chain, settings(tmp_path / "unused", common), timeout=200)[0]
    [found] = run_ranks(weights_at_the_end, 1, chain, tmp_path / "rto")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def train_and_die_at(chain: Path, words_: list[str], rank: int, step: int, count: int) -> None:
    """A run one of whose ranks is killed when it begins its `count`-th item after the boundary before a step."""
    from rto_megatron.stages.interleaved import RTOWork

    real, begun = RTOWork.run, []

    def deadly(self: RTOWork, item: Any) -> Any:
        begun.extend([item] if begun else [])
        if len(begun) == 1 + count and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = real(self, item)
        begun.extend([item] if item.kind == "boundary" and item.step == step - 1 else [])
        return outcome

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
    same = [*own, "--checkpoint.save_every=1", "--checkpoint.background=false"]
    run_ranks(train, world, chain, settings(straight, *same), timeout=200)
    for step in (1, 2):  # there is a checkpoint before each of them
        with pytest.raises(RanksFailed):
            rank, count = rng.randrange(world), rng.randint(1, 6)
            run_ranks(train_and_die_at, world, chain, settings(killed, *same), rank, step, count, timeout=200)
        latest = killed / "checkpoints" / (killed / "checkpoints" / "latest.txt").read_text().strip()
        assert latest.name == f"step_{step:08d}"
        assert (latest / "samples.safetensors").exists() == (STALE in own)
    run_ranks(train, world, chain, settings(killed, *same), timeout=200)
    assert result(killed) == result(straight)


def complaint(chain: Path, words_: list[str]) -> str:
    """What a run that goes on refuses with."""
    from rto_megatron.errors import UserError

    with pytest.raises(UserError) as refused:
        train(chain, words_)
    return str(refused.value)


def test_what_cannot_go_on_says_why(one_step_off, chain, tmp_path):
    longer = settings(one_step_off, *split(1), STALE, f"--num_steps={STEPS + 1}", "--checkpoint.save_every=1")
    for told in run_ranks(complaint, 2, chain, longer, timeout=200):
        assert (
            "holds no samples.safetensors: a run with schedule.staleness 1 that has ended cannot be made longer" in told
        )
    another = [LOGICAL, "--checkpoint.save_every=1"]
    run_ranks(train, 2, chain, settings(tmp_path / "rto", *split(1), *another), timeout=200)
    longer = settings(tmp_path / "rto", *split(2), *another, f"--num_steps={STEPS + 1}")
    for told in run_ranks(complaint, 3, chain, longer, timeout=200):
        assert "schedule.lanes: a step has 2 on these ranks, but the run in" in told and "began with 1" in told
    fresh = settings(one_step_off, *split(1), "--checkpoint.save_every=1", f"--num_steps={STEPS + 1}")
    for told in run_ranks(complaint, 2, chain, fresh, timeout=200):
        assert "schedule.staleness is 0, but the run in" in told
