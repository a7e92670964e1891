"""Every map ends with the bits of the sequential run: weights, optimizer states and metrics, whatever time does."""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.stages.chain import run_stage

MEASURED = ("time/", "speed/", "checkpoint/")
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


def result(run_dir: Path) -> tuple[str, list[dict[str, float]]]:
    rows = [json.loads(line) for line in (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]
    return run_ranks(fingerprint_of, 1, run_dir)[0], kept


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


TENSOR, PIPELINE = "--parallel.tensor=2", "--parallel.pipeline=2"
LANES = "--schedule.lanes=2"
CASES = {
    # name: (training ranks, training layout, ranks of the map, words of the map)
    "colocated": (2, [LANES], 2, ["--schedule.map=colocated"]),
    "fused": (2, [LANES], 2, ["--schedule.map=fused"]),
    "colocated, tensor 2": (2, [TENSOR], 2, ["--schedule.map=colocated"]),
    "fused, pipeline 2": (2, [PIPELINE], 2, ["--schedule.map=fused"]),
    "split 1 + 1": (1, [], 2, ["--schedule.map=split", "--schedule.rollout_ranks=1"]),
    "split 1 + 1, rollout ranks score": (
        1, [], 2, ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.score=rollout"],
    ),
    "split 2 + 2": (2, [LANES], 4, ["--schedule.map=split", "--schedule.rollout_ranks=2", "--schedule.score=all"]),
    "split 1 + 1 + 1, critic alone": (
        1, [], 3, ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.critic_ranks=1"],
    ),
    "split 2 + 1, rollout in another layout": (
        2, [TENSOR], 3, ["--schedule.map=split", "--schedule.rollout_ranks=1", "--schedule.rollout.tensor=1"],
    ),
    "split 2 + 2, pipelines": (2, [PIPELINE], 4, ["--schedule.map=split", "--schedule.rollout_ranks=2"]),
}
