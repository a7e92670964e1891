"""What a run keeps of itself: which checkpoints, on which layout they load, and what damage and full disks leave."""

import errno
import json
import os
import re
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import yaml

from rto_megatron.config.algorithm import DRTOConfig
from rto_megatron.config.load import load_run
from rto_megatron.distributed.checkpoint import digest_of, file_hash
from rto_megatron.errors import CheckpointError, ConfigError, UserError
from rto_megatron.stages.resume import find_own
from tests.ranks import run_ranks
from tests.stages.chain import run_stage, words_of
from tests.stages.test_resume import result, train, train_until_asked, words


def newest(run_dir):
    root = run_dir / "checkpoints"
    return root / (root / "latest.txt").read_text().strip()


@pytest.fixture(scope="module")
def stopped(chain, tmp_path_factory):
    """An RTO run that was asked to stop after two of its four steps; to be copied."""
    run_dir = tmp_path_factory.mktemp("stopped") / "rto"
    run_ranks(train_until_asked, 1, "rto", chain, words("rto", run_dir), 2)
    return run_dir


@pytest.fixture
def half(stopped, tmp_path):
    """A copy of that run."""
    return shutil.copytree(stopped, tmp_path / "rto")


def what_it_says(stage, chain, settings):
    """The message for the user with which a run ends."""
    try:
        run_stage(stage, chain, settings)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (["--checkpoint.keep_last=1", "--checkpoint.keep_best=false"], {4}),
        (["--checkpoint.keep_last=null"], {1, 2, 3, 4}),
        (["--checkpoint.keep_last=2", "--checkpoint.save_every=2"], {2, 4}),
        (["--checkpoint.save_every=0"], {4}),
    ],
)
def test_it_keeps_what_it_is_asked_to(keep, left, chain, tmp_path):
    run_ranks(train, 1, "sft", chain, words("sft", tmp_path / "sft", *keep))
    folders = {path.name for path in (tmp_path / "sft" / "checkpoints").glob("step_*")}
    assert folders == {f"step_{step:08d}" for step in left}


def test_the_best_stays_when_the_newest_are_worse(chain, tmp_path):
    # a learning rate that ruins what one step has learned
    ruinous = ["--optimizer.lr=3", "--optimizer.warmup_frac=1", "--optimizer.clip_grad=0", "--train.eval_every=1"]
    run_ranks(train, 1, "sft", chain, words("sft", tmp_path / "sft", *ruinous, "--checkpoint.keep_last=1"))
    _, rows = result(tmp_path / "sft")
    losses = [row["sft/eval_loss"] for row in rows[:4]]
    best = losses.index(min(losses)) + 1
    assert best < 4, losses
    root = tmp_path / "sft" / "checkpoints"
    assert (root / "best.txt").read_text() == f"step_{best:08d}\n"
    assert {path.name for path in root.glob("step_*")} == {f"step_{best:08d}", "step_00000004"}


@pytest.mark.parametrize("suffix", ["_mine", ".bak", ".tar"])
def test_what_a_user_put_aside_stays(suffix, chain, half):
    aside = shutil.copytree(newest(half), newest(half).with_name(f"step_00000001{suffix}"))
    run_ranks(train, 1, "rto", chain, words("rto", half, "--checkpoint.keep_last=1"))
    assert newest(half).name == "step_00000004"
    assert aside.exists()


def test_seconds_and_bytes_are_metrics(chain, half):
    run_ranks(train, 1, "rto", chain, words("rto", half))
    last = json.loads((half / "tensorboard" / "metrics.jsonl").read_text().splitlines()[-1])
    size = sum(path.stat().st_size for path in newest(half).rglob("*") if path.is_file())
    assert last["checkpoint/bytes"] == size
    assert last["time/save_seconds"] >= last["checkpoint/write_seconds"] > 0  # the last one is waited for


@pytest.mark.parametrize("kind", ["true", "false"])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["--parallel.tensor=2"], ["--parallel.pipeline=2"]),
        (["--parallel.pipeline=2", "--parallel.virtual_stages=2"], []),
    ],
)
def test_a_run_goes_on_in_another_layout(first, then, kind, chain, tmp_path):
    kinds = [f"--optimizer.distributed={kind}", f"--critic_optimizer.distributed={kind}"]
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run_ranks(train, 2, "rto", chain, words("rto", straight, *kinds, *first))
    run_ranks(train_until_asked, 2, "rto", chain, words("rto", moved, *kinds, *first), 2)
    run_ranks(train, 2, "rto", chain, words("rto", moved, *kinds, *then))
    for name in ("policy", "critic", "policy_optimizer", "critic_optimizer"):
        assert run_ranks(difference, 1, newest(straight) / name, newest(moved) / name)[0] < 1e-5
    (_, mine), (_, its) = result(straight), result(moved)
    for row, same in zip(mine, its, strict=True):
        assert same == pytest.approx(row, rel=1e-3, abs=1e-4)


def difference(first, second):
    """Of the tensors of two folders."""
    from megatron.core import dist_checkpointing

    from rto_megatron.distributed.checkpoint import leaves
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    mine, its = (dict(leaves(dist_checkpointing.load_plain_tensors(str(folder)))) for folder in (first, second))
    names = [name for name in mine if hasattr(mine[name], "double")]
    assert names and set(names) == {name for name in its if hasattr(its[name], "double")}
    return max((mine[name].double() - its[name].double()).abs().max().item() for name in names)


def test_every_file_that_is_cut_flipped_or_gone_is_named(chain, half):
    """Of the newest checkpoint, file by file: the run does not start, and says which file."""
    folder = newest(half)
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(names) > 15
    for name, said in run_ranks(damage_each, 1, chain, half, names, timeout=300)[0].items():
        for how, message in said.items():
            assert message, f"{name} {how}: nobody noticed"
            assert name.split("/")[-1] in message, f"{name} {how}: {message}"


def damage_each(chain, run_dir, names):
    """What `find_own` and loading say of each damage to each file."""
    from rto_megatron.distributed.checkpoint import open_checkpoint, verify
    from rto_megatron.distributed.runtime import start_runtime

    start_runtime(threads=1)
    folder, said = newest(run_dir), {}
    for name in names:
        path, said[name] = folder / name, {}
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for how, content in (("cut", whole[:-1]), ("emptied", b""), ("flipped", bytes(flipped)), ("gone", None)):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            try:
                own = open_checkpoint(run_dir)
                for part in ("policy", "policy_optimizer", "critic", "critic_optimizer"):
                    verify(own, part)
                said[name][how] = None
            except CheckpointError as error:
                said[name][how] = str(error)
            path.write_bytes(whole)
    return said


def test_the_one_before_loads_where_the_newest_is_damaged(chain, half, tmp_path):
    folder = newest(half)
    shard = next((folder / "policy_optimizer").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-9])
    said = run_ranks(what_it_says, 1, "rto", chain, words("rto", half))[0]
    assert f"policy_optimizer/{shard.name}: changed since it was saved; the checkpoint is damaged" in said
    tracker = folder.parent / "latest.txt"
    assert f"restore it, write step_00000001, which lies beside it, into {tracker} or train again" in said
    tracker.write_text("step_00000001\n")
    run_ranks(train, 1, "rto", chain, words("rto", half))
    assert newest(half).name.startswith("step_00000004")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--seed=5", "seed is 5, but the run in .* began with 0, and a run goes on as it began; set it back"),
        ("--optimizer.lr=0.5", "optimizer.lr is 0.5, but the run in .* began with 0.001"),
        ("--rto.kl_coef=0.2", "rto.kl_coef is 0.2, but the run"),
        ("--data.train={chain}/other.jsonl", "began with another data as data.train"),
        ("--policy={chain}/dpo", "began with another checkpoint as policy"),
        ("--num_steps=1", "has 2 steps, more than the 1 of this config; set another run_dir"),
        ("--rto.dpo_coef=0", "holds a run of the stage rto, this is ppo"),
    ],
)
def test_a_run_that_would_not_be_the_same_does_not_go_on(change, message, chain, half):
    lines = (chain / "pairs.jsonl").read_text().splitlines(keepends=True)
    (chain / "other.jsonl").write_text("".join(lines[::-1]))
    before = (half / "run.yaml").read_bytes(), (half / "tensorboard" / "metrics.jsonl").read_bytes()
    said = run_ranks(what_it_says, 1, "rto", chain, words("rto", half, change.format(chain=chain)))[0]
    assert re.search(message, said), said
    assert before == ((half / "run.yaml").read_bytes(), (half / "tensorboard" / "metrics.jsonl").read_bytes())


def test_a_run_goes_on_that_began_before_there_were_some_settings(chain, half):
    manifest = newest(half) / "checkpoint.json"
    begun = json.loads(manifest.read_text())
    settings = yaml.safe_load(begun["config"])
    del settings["drto"], settings["rollout"]["kv_block_tokens"], settings["rollout"]["kv_blocks"]
    manifest.write_text(json.dumps(begun | {"config": yaml.safe_dump(settings)}))
    integrity = manifest.with_name("integrity.json")
    written = json.loads(integrity.read_text())
    files = written["files"] | {manifest.name: file_hash(manifest)}
    integrity.write_text(json.dumps(written | {"files": files, "digest": digest_of(files)}))
    config = load_run("rto", None, [*words_of("rto", chain), *words("rto", half)])
    assert find_own(config, "rto").manifest.step == 2
    with pytest.raises(ConfigError, match=r"drto\.radius is 0\.1, but the run in .* began with 0\.0"):
        find_own(replace(config, drto=DRTOConfig(radius=0.1)), "rto")


def test_weights_alone_are_taken_up_only_when_asked_for(chain, half):
    short = ["--checkpoint.optimizer_at_end=false", "--num_steps=3"]
    run_ranks(train, 1, "rto", chain, words("rto", half, *short))
    assert not list(newest(half).glob("*_optimizer"))
    said = run_ranks(what_it_says, 1, "rto", chain, words("rto", half))[0]
    assert "holds no optimizer state of the policy" in said and "Set checkpoint.resume to weights" in said
    run_ranks(train, 1, "rto", chain, words("rto", half, "--checkpoint.resume=weights"))
    assert newest(half).name == "step_00000004"


def test_a_finished_run_says_so_and_stays(chain, half):
    run_ranks(train, 1, "rto", chain, words("rto", half))
    before = result(half)
    run_ranks(train, 1, "rto", chain, words("rto", half))
    assert result(half) == before


def save_with_little_room(chain, settings, reserve):
    """A run in which no file can grow beyond 60 kB after its first checkpoint; what the user is told."""
    from rto_megatron.distributed import save

    real = save.Saver.start

    def start(self, *args, **kwargs):
        if self.last is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
            save.RESERVE_BYTES = reserve
        real(self, *args, **kwargs)

    save.Saver.start = start
    return what_it_says("rto", chain, settings)


@pytest.mark.parametrize("reserve", [10, 1 << 20], ids=["shards", "reserve"])
@pytest.mark.parametrize("background", ["true", "false"])
def test_where_files_cannot_grow_the_last_good_one_stays(reserve, background, chain, tmp_path):
    settings = words("rto", tmp_path / "rto", f"--checkpoint.background={background}")
    said = run_ranks(save_with_little_room, 2, chain, settings, reserve)
    for message in said:
        assert "the checkpoint could not be written, the one before is untouched (rank" in message
        assert "MiB are free for checkpoints" in message
    assert newest(tmp_path / "rto").name in ("step_00000001", "step_00000002")
    assert not list((tmp_path / "rto" / "checkpoints").glob("*.tmp"))
    run_ranks(train, 2, "rto", chain, settings)
    assert newest(tmp_path / "rto").name == "step_00000004"


def kill_the_writer(chain, settings, below):
    """A run whose writer process, or what that one started, is killed in the second save; what the user is told."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from rto_megatron.distributed import save

    real = save._write

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*args):
        if not below:
            die()
        FileSystemWriterAsync.write_preloaded_data = staticmethod(die)  # what the processes below it run
        real(*args)

    start = save.Saver.start

    def second(self, *args, **kwargs):
        if self.last is not None:
            save._write = deadly
        start(self, *args, **kwargs)

    save.Saver.start = second
    return what_it_says("rto", chain, settings)


@pytest.mark.parametrize("below", [False, True])
def test_a_killed_writer_is_noticed(below, chain, tmp_path):
    settings = words("rto", tmp_path / "rto", "--checkpoint.background=false")
    said = run_ranks(kill_the_writer, 1, chain, settings, below)[0]
    code = 1 if below else -9
    assert f"OSError: the process that writes its files ended with exit code {code}" in said
    assert newest(tmp_path / "rto").name == "step_00000001"
    assert not list((tmp_path / "rto" / "checkpoints").glob("*.tmp"))


def save_without_temporary_files(chain, settings):
    """A run in which the folder of temporary files is full; what the user is told."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = full
    return what_it_says("sft", chain, settings)


def test_a_full_folder_of_temporary_files_is_told_by_its_name(chain, tmp_path):
    said = run_ranks(save_without_temporary_files, 1, chain, [f"--run_dir={tmp_path}/sft"])[0]
    assert "ended with exit code 1: no room for the report of a checkpoint's writer in the folder of temp" in said
    assert "or set TMPDIR to another one" in said
    assert not list((tmp_path / "sft" / "checkpoints").iterdir())


def draw_nothing(chain, settings):
    """Whether a step leaves torch's own random streams as they were."""
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from rto_megatron.stages import rto

    real = rto.take_step

    def take_step(*args, **kwargs):
        before = torch.get_rng_state(), {k: v.clone() for k, v in get_cuda_rng_tracker().get_states().items()}
        done = real(*args, **kwargs)
        after = torch.get_rng_state(), get_cuda_rng_tracker().get_states()
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
        return done

    rto.take_step = take_step
    run_stage("rto", chain, settings)


def test_nothing_draws_from_a_stream_that_a_checkpoint_would_have_to_hold(chain, tmp_path):
    run_ranks(draw_nothing, 1, chain, words("rto", tmp_path / "rto"))


def test_a_run_whose_tracker_is_lost_goes_on_and_loses_nothing(chain, half):
    (half / "checkpoints" / "latest.txt").unlink()
    run_ranks(train, 1, "rto", chain, words("rto", half, "--checkpoint.keep_last=null"))
    assert {path.name for path in (half / "checkpoints").glob("step_*")} == {f"step_{n:08d}" for n in (1, 2, 3, 4)}
    _, rows = result(half)
    assert len(rows) == 5


@pytest.mark.parametrize("text", ["", "../../other/checkpoints/step_00000001", "step_00000002\nstep_00000001"])
def test_a_tracker_that_names_no_step_is_refused(text, chain, half):
    (half / "checkpoints" / "latest.txt").write_text(text)
    said = run_ranks(what_it_says, 1, "rto", chain, words("rto", half))[0]
    assert "latest.txt: must hold the name of a step's folder, like step_00000020, got" in said


def test_what_the_user_put_beside_the_checkpoints_stays(chain, half):
    """Later steps that were gone back from, folders with names of one's own."""
    root = half / "checkpoints"
    for name in ("mine.tmp", "step_00000050", "step_00000001_mine", "step_00000002.123.tmp"):
        (root / name).mkdir()
    run_ranks(train, 1, "rto", chain, words("rto", half, "--checkpoint.keep_last=2", "--checkpoint.keep_best=false"))
    left = {path.name for path in root.iterdir()} - {"latest.txt", "best.txt"}
    wanted = {"mine.tmp", "step_00000050", "step_00000001_mine", "step_00000003", "step_00000004"}
    assert wanted <= left <= wanted | {"step_00000002", "step_00000001"}
    assert "step_00000002.123.tmp" not in left


def test_a_second_start_in_the_same_folder_is_refused(chain, half):
    import fcntl

    with (half / ".lock").open("a+") as lock:
        lock.truncate(0)
        lock.write("process 7 on a-host\n")
        lock.flush()
        fcntl.lockf(lock, fcntl.LOCK_EX)
        said = run_ranks(what_it_says, 2, "rto", chain, words("rto", half))
        assert all("is in use by process 7 on a-host; wait for that run or end it" in text for text in said)
    run_ranks(train, 1, "rto", chain, words("rto", half))
