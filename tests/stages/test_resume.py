"""Exact resume: a run that was killed or asked to stop ends with the bits of one that was not."""

import json
import os
import random
import signal
import threading
from pathlib import Path

import pytest

from rto_megatron.errors import StoppedToContinue
from tests.ranks import RanksFailed, run_ranks
from tests.stages.chain import run_stage

UNEQUAL = ("time/", "speed/", "checkpoint/", "memory/")
"""Metrics that measure the machine."""

LONGER = {
    "sft": ["--train.num_epochs=2", "--train.eval_every=2"],
    "dpo": ["--train.num_epochs=2", "--train.eval_every=2"],
    "reward": ["--train.num_epochs=2", "--train.eval_every=2"],
    "rto": ["--num_steps=4", "--eval_every=2", "--rto.kl_target=0.5", "--rto.kl_horizon=50"],
}
"""Four steps of each stage."""


def words(stage, run_dir, *more):
    return [f"--run_dir={run_dir}", *LONGER[stage], "--checkpoint.save_every=1", "--checkpoint.keep_best=true", *more]


def train(stage, chain, settings):
    """A whole run in this rank."""
    run_stage(stage, chain, settings)


def train_and_die(stage, chain, settings, seconds):
    """A run whose ranks are killed after so many seconds."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    run_stage(stage, chain, settings)


def train_and_die_at(stage, chain, settings, name, count):
    """A run whose main rank is killed when it calls `name` of distributed/save.py for the `count`-th time."""
    from rto_megatron.distributed import save

    called = []
    real = getattr(save, name)

    def deadly(*args, **kwargs):
        called.append(name)
        if len(called) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(save, name, deadly)
    run_stage(stage, chain, settings)


def train_until_asked(stage, chain, settings, steps):
    """A run that gets SIGTERM during step `steps`; what it says."""
    from rto_megatron.metrics import TensorBoardLog

    real, written = TensorBoardLog.write, []

    def write(self, step, values):
        written.append(step)
        if len(written) == steps and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, step, values)

    TensorBoardLog.write = write
    try:
        run_stage(stage, chain, settings)
    except StoppedToContinue as stopped:
        return str(stopped)


def result(run_dir: Path) -> tuple[dict, list]:
    """Hashes of all tensors of the last checkpoint, and the metrics that must not depend on the machine."""
    root = run_dir / "checkpoints"
    folder = root / (root / "latest.txt").read_text().strip()
    hashes = json.loads((folder / "integrity.json").read_text())["files"]
    rows = [json.loads(line) for line in (run_dir / "tensorboard" / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if not name.startswith(UNEQUAL)} for row in rows]
    return {name: digest for name, digest in hashes.items() if name.endswith((".distcp", ".pt"))}, rows


@pytest.fixture(scope="module")
def straight(chain, tmp_path_factory):
    """What uninterrupted runs of every stage end with, by (stage, ranks, layout)."""
    known = {}

    def get(stage, world=1, *layout):
        key = (stage, world, *layout)
        if key not in known:
            run_dir = tmp_path_factory.mktemp("straight") / stage
            run_ranks(train, world, stage, chain, words(stage, run_dir, *layout))
            known[key] = result(run_dir)
        return known[key]

    return get


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "rto"])
def test_a_stopped_run_goes_on_to_the_same_bits(stage, chain, straight, tmp_path):
    settings = words(stage, tmp_path / stage)
    said = run_ranks(train_until_asked, 1, stage, chain, settings, 2)[0]
    assert "asked to stop, saved after step 2 of 4; the same command goes on from there" in said
    run_ranks(train, 1, stage, chain, settings)
    assert result(tmp_path / stage) == straight(stage)
    hashes, rows = straight(stage)
    assert len(rows) == 5
    assert any("_optimizer/" in name for name in hashes)


def weights_and_optimizer_apart(mine, its):
    """Largest differences of the policy's weights and of its optimizer state in two runs."""
    from rto_megatron.distributed.checkpoint import largest_difference, open_checkpoint
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    folders = [open_checkpoint(run_dir).folder for run_dir in (mine, its)]
    return [largest_difference(*(folder / part for folder in folders)) for part in ("policy", "policy_optimizer")]


EVEN = "--optimizer.eps=1e-3"
"""Adam divides by the gradient's size: of one that is rounding noise it makes a whole step, which this one damps."""


@pytest.mark.parametrize(
    ("stage", "world", "layout"),
    [
        ("sft", 2, ["--parallel.context=2"]),
        pytest.param("dpo", 2, ["--parallel.context=2"], marks=pytest.mark.slow),
        pytest.param(
            "dpo",
            4,
            ["--parallel.context=2", "--parallel.tensor=2", "--parallel.sequence=true"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_context_ranks_began_goes_on_on_tensor_ranks(stage, world, layout, chain, tmp_path):
    run_ranks(train, 1, stage, chain, words(stage, tmp_path / "alone", EVEN))
    settings = words(stage, tmp_path / "moved", EVEN)
    said = run_ranks(train_until_asked, world, stage, chain, [*settings, *layout], 2)
    assert all("saved after step 2 of 4" in text for text in said)
    run_ranks(train, 2, stage, chain, [*settings, "--parallel.tensor=2"])
    apart = run_ranks(weights_and_optimizer_apart, 1, tmp_path / "moved", tmp_path / "alone")[0]
    assert max(apart) < 1e-6


@pytest.mark.parametrize(
    "layout",
    [
        ["--parallel.tensor=2", "--parallel.sequence=true"],
        ["--parallel.pipeline=2", "--parallel.virtual_stages=2"],
        ["--parallel.context=2"],
        ["--optimizer.distributed=false", "--critic_optimizer.distributed=false"],
        ["--compute.dtype=bfloat16"],
    ],
)
def test_so_it_does_on_two_ranks(layout, chain, straight, tmp_path):
    settings = words("rto", tmp_path / "rto", *layout)
    said = run_ranks(train_until_asked, 2, "rto", chain, settings, 3)
    assert all("saved after step 3 of 4" in text for text in said)
    run_ranks(train, 2, "rto", chain, settings)
    assert result(tmp_path / "rto") == straight("rto", 2, *layout)


@pytest.mark.parametrize("name", ["_plan", "_write", "_complete", "_free_name", "_replace", "_sync"])
def test_killed_inside_a_save_it_goes_on_to_the_same_bits(name, chain, straight, tmp_path):
    settings = words("rto", tmp_path / "rto")
    count = {"_plan": 6, "_write": 1, "_complete": 2, "_free_name": 2, "_replace": 3, "_sync": 40}[name]
    with pytest.raises(RanksFailed):
        run_ranks(train_and_die_at, 1, "rto", chain, settings, name, count)
    run_ranks(train, 1, "rto", chain, settings)
    assert result(tmp_path / "rto") == straight("rto")
    assert not list((tmp_path / "rto" / "checkpoints").glob("*.tmp"))


def kill_and_go_on(chain, run_dir, world, layout, random_seconds, kills):
    """Kill a run so many times at random moments, then let it end; how many kills it was alive for."""
    settings, died = words("rto", run_dir, *layout), 0
    for _ in range(kills):
        try:
            run_ranks(train_and_die, world, "rto", chain, settings, random_seconds())
        except RanksFailed:
            died += 1
    run_ranks(train, world, "rto", chain, settings)
    return died


def test_killed_at_random_moments_it_ends_with_the_same_bits(chain, straight, tmp_path):
    moments = random.Random(4)
    died = kill_and_go_on(chain, tmp_path / "rto", 1, [], lambda: moments.uniform(0.3, 2.0), kills=4)
    assert died
    assert result(tmp_path / "rto") == straight("rto")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(1, []), (2, ["--parallel.tensor=2"]), (2, ["--parallel.pipeline=2"])])
def test_thirty_kills(world, layout, chain, straight, tmp_path):
    moments, died = random.Random(7), 0
    for attempt in range(5):
        run_dir = tmp_path / str(attempt) / "rto"
        died += kill_and_go_on(chain, run_dir, world, layout, lambda: moments.uniform(0.3, 5.0), kills=6)
        assert result(run_dir) == straight("rto", world, *layout)
    assert died > 10
