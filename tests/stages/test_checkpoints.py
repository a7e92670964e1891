"""Checkpoints: any layout loads any layout, damage is named, and a failed save leaves the last good one."""

import json
import shutil

import pytest
import torch

from rto_megatron.errors import CheckpointError
from tests.ranks import RanksFailed, run_ranks


def open_it(path):
    from rto_megatron.distributed.checkpoint import open_checkpoint

    return open_checkpoint(path)


def load(path, kind, words, first=0):
    """All weights of a run as full tensors, loaded on this layout from rank `first` on."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.collectives import gather_objects
    from rto_megatron.distributed.mesh import role_mesh
    from rto_megatron.distributed.runtime import start_runtime, world_size
    from rto_megatron.distributed.shards import shards
    from rto_megatron.stages.roles import load_role

    parallel = ParallelConfig(**words)
    mesh = role_mesh(parallel, start_runtime(threads=1), ranks=range(first, world_size()))
    model, _ = load_role(path, kind, mesh, parallel=parallel, compute=ComputeConfig(), frozen=True, seed=5)
    assert (model is None) == (mesh is None)
    full, held = {}, () if model is None else shards(model)
    mine = [(s.name, s.full_shape, s.offset, s.data.clone()) for s in held if s.is_main]
    for name, shape, offset, data in (piece for pieces in gather_objects(mine) for piece in pieces):
        tensor = full.setdefault(name, torch.full(shape, torch.nan))
        tensor[tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))] = data
    return full


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_any_layout_loads_the_same_weights(kind, chain):
    run = chain / ("sft" if kind == "policy" else "reward")
    single = run_ranks(load, 1, run, kind, {})[0]
    for words in ({"tensor": 2}, {"pipeline": 2}):
        for loaded in run_ranks(load, 2, run, kind, words):
            assert loaded.keys() == single.keys()
            assert all(torch.equal(loaded[name], single[name]) for name in single)


def test_ranks_without_a_part_of_the_role_help_to_load_it(chain):
    single = run_ranks(load, 1, chain / "sft", "policy", {})[0]
    for loaded in run_ranks(load, 3, chain / "sft", "policy", {"tensor": 2}, 1):
        assert loaded.keys() == single.keys()
        assert all(torch.equal(loaded[name], single[name]) for name in single)


def test_a_value_model_from_a_policy_has_its_backbone_and_a_fresh_head(chain):
    policy, value = (run_ranks(load, 1, chain / "sft", kind, {})[0] for kind in ("policy", "value"))
    assert value.keys() - policy.keys() == {"value_head.weight", "value_head.bias"}
    assert all(torch.equal(value[name], policy[name]) for name in value.keys() & policy.keys())
    assert value["value_head.weight"].any()


def damaged(chain, tmp_path):
    shutil.copytree(chain / "sft", tmp_path / "sft")
    root = tmp_path / "sft" / "checkpoints"
    return tmp_path / "sft", root / (root / "latest.txt").read_text().strip()


def test_a_flipped_bit_is_found_and_named(chain, tmp_path):
    run, folder = damaged(chain, tmp_path)
    shard = sorted((folder / "policy").glob("*.distcp"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RanksFailed, match=rf"{shard.name}: changed since it was saved"):
        run_ranks(load, 1, run, "policy", {})


def test_a_missing_file_is_found_and_named(chain, tmp_path):
    run, folder = damaged(chain, tmp_path)
    (folder / "policy" / ".metadata").unlink()
    with pytest.raises(RanksFailed, match=r"policy/.metadata: is missing; the checkpoint is damaged"):
        run_ranks(load, 1, run, "policy", {})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run, folder: shutil.rmtree(run), "there is no such run folder; run the stage that writes it first"),
        (lambda run, folder: (folder.parent / "latest.txt").unlink(), "holds no finished checkpoint"),
        (lambda run, folder: (folder / "checkpoint.json").write_text("{"), "checkpoint.json: cannot be read"),
        (lambda run, folder: (folder / "integrity.json").unlink(), "is not complete, integrity.json is missing"),
        (lambda run, folder: (folder / "checkpoint.json").write_text("[]"), "checkpoint.json: format must be 3"),
        (
            lambda run, folder: (folder / "checkpoint.json").write_text('{"format": 3}'),
            "checkpoint.json: changed since it was saved; the checkpoint is damaged, restore it or train again",
        ),
        (
            lambda run, folder: (folder / "integrity.json").write_text('{"files": 3}'),
            "integrity.json: cannot be read; the checkpoint is damaged, restore it or train again",
        ),
        (
            lambda run, folder: (folder.parent / "latest.txt").write_bytes(b"\xff"),
            "sft: must be a run folder, but .*latest.txt cannot be read",
        ),
        (
            lambda run, folder: (shutil.rmtree(run), run.write_text("a file")),
            "sft: must be a run folder, but .*latest.txt cannot be read .*Not a directory",
        ),
    ],
)
def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(break_it, message, chain, tmp_path):
    run, folder = damaged(chain, tmp_path)
    break_it(run, folder)
    with pytest.raises(CheckpointError, match=message):
        open_it(run)


def test_a_hugging_face_folder_is_told_from_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"looks like a Hugging Face folder: bring it in with .* convert"):
        open_it(tmp_path)


def save_again(run):
    """Save the weights of a run over themselves."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.save import save_checkpoint
    from rto_megatron.stages.roles import load_role, tokenizer_of

    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    model, checkpoint = load_role(run, "policy", mesh, parallel=ParallelConfig(), compute=ComputeConfig(), frozen=True)
    return save_checkpoint(run, checkpoint.manifest, {"policy": model}, tokenizer_of(checkpoint).save)


def test_a_step_that_is_saved_again_takes_another_name_before_the_old_one_goes(chain, tmp_path):
    run, folder = damaged(chain, tmp_path)
    assert run_ranks(save_again, 1, run) == [folder.with_name(folder.name + ".1")]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["latest.txt", folder.name + ".1"]
    assert run_ranks(save_again, 1, run) == [folder]


def fail_to_save(chain, run):
    """Save over a run while one rank cannot write its tokenizer; what the user is told."""
    from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime
    from rto_megatron.distributed.save import save_checkpoint
    from rto_megatron.stages.roles import load_role

    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    model, checkpoint = load_role(run, "policy", mesh, parallel=ParallelConfig(), compute=ComputeConfig(), frozen=True)

    def full_disk(folder):
        raise RuntimeError(
            "ranks: {0}\nTraceback (most recent call last):\n  File\nOSError: No space left on device\n)"
        )

    try:
        save_checkpoint(run, checkpoint.manifest, {"policy": model}, full_disk)
    except CheckpointError as error:
        return str(error)


def test_a_failed_save_says_so_on_every_rank_and_loses_nothing(chain, tmp_path):
    run, folder = damaged(chain, tmp_path)
    before = json.loads((folder / "integrity.json").read_text())
    for message in run_ranks(fail_to_save, 2, chain, run):
        assert "could not be written, the one before is untouched" in message
        assert "(rank 0: RuntimeError: OSError: No space left on device; " in message
        assert "MiB are free for checkpoints" in message and "\n" not in message
    assert json.loads((folder / "integrity.json").read_text()) == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["latest.txt", folder.name]
    run_ranks(load, 1, run, "policy", {})
