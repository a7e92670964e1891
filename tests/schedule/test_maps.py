"""Every map ends with the bits of the sequential run: weights, optimizer states and metrics, whatever time does."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.stages.chain import run_stage

MEASURED = ("time/", "speed/", "checkpoint/", "memory/")
SHORT_SLICES = ["--schedule.slice_steps=2", "--schedule.pack_tokens=90", "--schedule.pack_steps=6"]
"""Many small items, so that much can overlap in a tiny run."""


def words(run_dir, *more):
    steps = ["--num_steps=3", "--eval_every=2", "--rto.kl_target=0.5", "--rto.kl_horizon=50"]
    return [f"--run_dir={run_dir}", *steps, *SHORT_SLICES, *more]


def train(chain, settings):
    """A whole run in this rank."""
    run_stage("rto", chain, settings)


def fingerprint_of(run_dir):
    """Of the last checkpoint."""
    from rto_megatron.distributed.checkpoint import fingerprint, open_checkpoint
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    return fingerprint(open_checkpoint(run_dir))


def result(run_dir: Path) -> tuple[str, list[dict[str, float]], dict[str, str]]:
    """Weights and optimizers, metrics, and the token credit of each evaluation."""
    rows = [json.loads(line) for line in (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]
    credit = {path.name: path.read_text() for path in (run_dir / "credit").iterdir()}
    return run_ranks(fingerprint_of, 1, run_dir)[0], kept, credit


@pytest.fixture(scope="module")
def sequential(chain, tmp_path_factory):
    """The sequential run's result at a training layout."""
    known: dict[tuple, tuple] = {}

    def run(world: int, *layout: str) -> tuple:
        if (world, layout) not in known:
            run_dir = tmp_path_factory.mktemp("sequential") / "rto"
            run_ranks(train, world, chain, words(run_dir, *layout), timeout=200)
            known[world, layout] = result(run_dir)
        return known[world, layout]

    return run


TENSOR, PIPELINE, LANES = "--parallel.tensor=2", "--parallel.pipeline=2", "--schedule.lanes=2"
CONTEXT = "--parallel.context=2"
LOGICAL, SPLIT, DELAYS = "--schedule.minibatches=logical", "--schedule.map=split", "--schedule.delay_seconds=0.1"

REUSE = ["--rollout.reuse_log_probs=true", "--rollout.check_rows=2"]


def split(rollout: int, critic: int = 0, *more: str) -> list[str]:
    return [SPLIT, f"--schedule.rollout_ranks={rollout}", f"--schedule.critic_ranks={critic}", *more]


CASES = {
    # name: (ranks that train in the sequential run, what both runs are told, ranks of the map, what only it is told)
    "colocated": (2, [LANES], 2, ["--schedule.map=colocated"]),
    "fused": (2, [LANES], 2, ["--schedule.map=fused"]),
    "fused, in two epochs, log-probs reused": (1, ["--ppo.num_epochs=2", *REUSE], 1, ["--schedule.map=fused"]),
    "colocated, tensor 2": (2, [TENSOR], 2, ["--schedule.map=colocated"]),
    "fused, pipeline 2": (2, [PIPELINE], 2, ["--schedule.map=fused"]),
    "split 1 + 1": (1, [], 2, split(1)),
    "split 1 + 1, rollout ranks score": (1, [], 2, split(1, 0, "--schedule.score=rollout")),
    "split 2 + 2, all score": (2, [LANES], 4, split(2, 0, "--schedule.score=all")),
    "split 2 + 2, pipelines": (2, [PIPELINE], 4, split(2)),
    "split 2 + 1, context 2": (2, [CONTEXT], 3, split(1)),
    "split 2 + 2, context 2, all score": (2, [CONTEXT, LANES], 4, split(2, 0, "--schedule.score=all")),
    "split 1 + 1 + 1, critic alone": (1, [], 3, split(1, 1)),
    "split without a critic, log-probs reused": (1, ["--advantage.estimator=reinforce_pp", *REUSE], 2, split(1)),
    "fused, logical minibatches": (2, [LANES, LOGICAL], 2, ["--schedule.map=fused"]),
    "split 1 + 1, early minibatches": (1, [LOGICAL], 2, split(1)),
    "split 1 + 1 + 1, early minibatches, critic alone": (1, [LOGICAL], 3, split(1, 1)),
    "split 2 + 2, early, tensor 2, rollout ranks score": (
        2,
        [LOGICAL, TENSOR],
        4,
        split(2, 0, "--schedule.score=rollout"),
    ),
}


IN_LONG = [name for name, (_, _, ranks, _) in CASES.items() if ranks > 3][1:]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in IN_LONG else name for name in CASES]
)
def test_a_map_ends_with_the_bits_of_the_sequential_run(name, sequential, chain, tmp_path):
    world, common, ranks, own = CASES[name]
    run_ranks(train, ranks, chain, words(tmp_path / "rto", *common, *own, DELAYS), timeout=200)
    assert result(tmp_path / "rto") == sequential(world, *common)


def test_rollouts_in_a_layout_of_their_own_give_the_same_weights(sequential, chain, tmp_path):
    """Decoding rounds otherwise there, which moves no token here; what is trained on comes from the scorers."""
    own = split(1, 0, "--schedule.rollout.tensor=1")
    run_ranks(train, 3, chain, words(tmp_path / "rto", TENSOR, *own), timeout=200)
    assert result(tmp_path / "rto")[0] == sequential(2, TENSOR)[0]


def test_early_minibatches_are_another_algorithm(sequential):
    assert sequential(1, LOGICAL)[0] != sequential(1)[0]
