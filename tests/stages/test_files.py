"""What a stage writes beside checkpoints: complete or not there, and one message where it cannot be."""

import errno
from pathlib import Path

import pytest

from rto_megatron.errors import ConfigError
from rto_megatron.stages.run import check_writable, write_text
from tests.ranks import RanksFailed, run_ranks
from tests.stages.chain import run_stage


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"out {tmp_path}: is a folder; name a file"):
        check_writable("out", tmp_path)
    with pytest.raises(
        ConfigError, match=r"run_dir .*file/x\.json: cannot be written \((File exists|Not a directory)\)"
    ):
        check_writable("run_dir", tmp_path / "file" / "x.json")
    with pytest.raises(ConfigError, match=r"out /proc/x\.jsonl: cannot be written \("):
        check_writable("out", Path("/proc/x.jsonl"))  # a folder that is there and takes nothing, even from root
    check_writable("out", tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, monkeypatch):
    def half(path, text):
        with path.open("w") as file:
            file.write(text[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    write_text("out", tmp_path / "x.jsonl", "old")
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ConfigError, match=r"out .*x\.jsonl: cannot be written \(No space left on device\)"):
        write_text("out", tmp_path / "x.jsonl", "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.jsonl", "old")]


def message_of_a_run_dir(chain, run_dir):
    with pytest.raises(ConfigError) as error:
        run_stage("sft", chain, [f"--run_dir={run_dir}", "--train.max_steps=1"])
    return str(error.value)


def test_a_run_folder_that_cannot_be_made_stops_every_rank_with_one_message(chain, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    first, second = run_ranks(message_of_a_run_dir, 2, chain, tmp_path / "file")
    assert (
        first
        == second
        == f"run_dir {tmp_path}/file: cannot be written (File exists); make room, or set another run_dir"
    )
    [message] = run_ranks(message_of_a_run_dir, 1, chain, tmp_path / "run")
    assert message.startswith(f"run_dir {tmp_path}/run/tensorboard: cannot be written (File exists); make room")


def test_evaluate_looks_for_all_runs_before_the_first_one_answers(chain, tmp_path):
    words = [f"--run_dir={tmp_path}", "--checkpoints", f"{chain}/sft", f"{chain}/absent"]
    with pytest.raises(RanksFailed, match="absent: there is no such run folder") as failed:
        run_ranks(run_stage, 1, "evaluate", chain, words)
    assert "answering" not in str(failed.value)
