"""A rank that is killed, stopped, asleep or in error ends all ranks, and every rank tells what it was doing."""

import re
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from rto_megatron.distributed.verdict import Status, Verdict, judge, report, table
from rto_megatron.distributed.watchdog import Watchdog

RANK = """
    import os, signal, sys, time
    import torch, torch.distributed as dist
    from rto_megatron import __main__
    from rto_megatron.distributed.watchdog import Watchdog
    from rto_megatron.errors import DataError

    culprit, deed = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGTERM, lambda *_: None)  # as stages do: save and stop at the end of the step

    def refuse():
        raise DataError("p.jsonl:2: is no object")

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    watchdog = Watchdog(rank=rank, world=world, floor_seconds=3, beat_seconds=0.2, dead_seconds=4)

    def work(*_):
        with watchdog.watching():
            for step in range(3):
                watchdog.enter("generate", f"answers {step}", seconds=0.1, queues=f"ready {rank}")
                if culprit in (rank, -1) and step == 2:
                    time.sleep(0.5)  # a beat, so that others know the item
                    print("is about to")
                    {
                        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
                        "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
                        "asleep": lambda: time.sleep(300),
                        "error": lambda: [][0],
                        "user error": refuse,
                        "user error of one that is gone": lambda: (dist.destroy_process_group(), refuse()),
                        "launcher killed": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(300)),
                        "launcher stopped": lambda: (
                            os.system(f"(sleep 20; kill -KILL {os.getppid()}) & kill -STOP {os.getppid()}"),
                            time.sleep(300),
                        ),
                        "nothing": lambda: time.sleep(1),
                    }[deed]()
                watchdog.leave()
                watchdog.enter("train", f"minibatch {step}")
                dist.all_reduce(torch.ones(3))
                watchdog.leave()
        dist.destroy_process_group()
        print("a good end")

    __main__._run = work
    sys.exit(__main__.main(["rto"]))
"""


def run_three(folder, culprit, deed, launcher="rto_megatron.launch"):
    """Exit code, output, and seconds from the deed to the end of the last rank."""
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    words = ["-u", "-m", launcher, "--standalone", "--nproc-per-node", "3", str(script), str(culprit), deed]
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        ranks, lines, since = [], [], 0.0
        try:
            for line in process.stdout:
                lines.append(line)
                if "is about to" in line:
                    since = time.monotonic()
                    ranks = psutil.Process(process.pid).children(recursive=True)
            process.wait(timeout=60)
            _, survivors = psutil.wait_procs(ranks, timeout=5)
            assert not survivors, "".join(lines)
        finally:
            for rank in ranks:
                if rank.is_running():
                    rank.kill()
    return process.returncode, "".join(lines), time.monotonic() - since


DEEDS = [
    (1, "killed", "rank 1 is dead: its process is gone, last seen in generate 'answers 2'"),
    (0, "stopped", "rank 0 is dead: no sign of life for"),
    (2, "asleep", "stuck in generate 'answers 2': rank 2 for"),
    (0, "error", "rank 0 failed in generate 'answers 2': IndexError: list index out of range"),
]


@pytest.mark.parametrize(
    ("culprit", "deed", "reason", "launcher"),
    [(*deed, "rto_megatron.launch") for deed in DEEDS] + [(*deed, "torch.distributed.run") for deed in DEEDS[:2]],
)
def test_all_ranks_tell_and_end(culprit, deed, reason, launcher, tmp_path):
    code, output, seconds = run_three(tmp_path, culprit, deed, launcher)
    assert code == 1
    assert seconds < 20, output
    witnesses = [rank for rank in range(3) if rank != culprit or deed in ("asleep", "error")]
    for rank in witnesses:
        assert f"rank {rank}: the run cannot go on: {reason}" in output
    rows = [line.lstrip("* ").split() for line in output.splitlines() if "answers 2" in line or "minibatch 2" in line]
    for rank in range(3):
        item = ["generate", "answers", "2"] if rank == culprit else ["train", "minibatch", "2"]
        assert any(row[0] == str(rank) and row[2:5] == item for row in rows), output
        assert f"  rank {rank}: generate answers 0 " in output
    assert output.count("last beat") == 1, "one rank a node prints the table"
    if deed == "asleep":
        assert "time.sleep(300)" in output


@pytest.mark.parametrize(
    ("culprit", "deed", "launcher"),
    [
        (0, "user error", "torch.distributed.run"),
        (2, "user error", "rto_megatron.launch"),
        (2, "user error of one that is gone", "torch.distributed.run"),
    ],
)
def test_what_the_user_did_wrong_on_one_rank_ends_all_with_its_message(culprit, deed, launcher, tmp_path):
    code, output, seconds = run_three(tmp_path, culprit, deed, launcher)
    where = " on rank 2" if culprit else ""
    told = f"is about to\nerror{where}: p.jsonl:2: is no object\n"
    assert seconds < 10, output
    if launcher == "rto_megatron.launch":
        assert code == 2
        assert output == told
    else:
        assert len(re.findall(r"exitcode +: 2 ", output)) == 3, output
        assert output.startswith(told), output
        assert output.count("is no object") == 1, output
        assert "last beat" not in output and "DataError" not in output, output


def test_what_the_user_did_wrong_on_all_ranks_ends_them_without_a_wait(tmp_path):
    code, output, _ = run_three(tmp_path, -1, "user error")
    assert code == 2, output
    assert [line for line in output.split("\n") if line.startswith("error")] == ["error: p.jsonl:2: is no object"]
    assert "Traceback" not in output


def test_ranks_tell_when_the_store_is_gone_with_the_launcher(tmp_path):
    _, output, seconds = run_three(tmp_path, 1, "launcher killed", "torch.distributed.run")
    assert seconds < 20, output
    for rank in range(3):
        assert f"rank {rank}: the store of the ranks is gone" in output


@pytest.mark.slow
def test_ranks_that_are_stuck_end_without_the_store(tmp_path):
    _, output, _ = run_three(tmp_path, 1, "launcher stopped", "torch.distributed.run")
    for rank in range(3):
        assert f"rank {rank}: the store of the ranks does not answer, and nothing has changed for" in output


def test_a_good_end_is_quiet(tmp_path):
    code, output, _ = run_three(tmp_path, 1, "nothing")
    assert code == 0, output
    assert output.replace("\n", "") == "is about to" + 3 * "a good end"  # ends of lines come apart from lines


def test_one_process_alone_watches_its_own_items(tmp_path):
    script = """
        import time
        from rto_megatron.distributed.watchdog import Watchdog
        watchdog = Watchdog(rank=0, world=1, floor_seconds=0.3, beat_seconds=0.1, dead_seconds=1)
        watchdog.enter("train", "minibatch 1", seconds=0.1)
        time.sleep(100)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "stuck in train 'minibatch 1': rank 0 for" in done.stderr


def test_entering_and_leaving_takes_microseconds():
    watchdog = Watchdog(rank=0, world=1)
    started = time.perf_counter()
    for _ in range(1000):
        watchdog.enter("train", "minibatch", seconds=1.0, with_ranks=(0, 1))
        watchdog.leave()
    seconds = (time.perf_counter() - started) / 1000
    watchdog.stop()
    assert seconds < 1e-3  # about 5e-6 on a machine that has nothing else to do


def status(rank, item="a", *, seconds=0.0, deadline=None, **fields):
    return Status(rank=rank, beat=5, phase="train", item=item, seconds=seconds, deadline=deadline, **fields)


def verdict(*statuses):
    return judge(statuses, floor_seconds=60, dead_seconds=20, beat_seconds=1)


def test_who_is_in_time_or_waits_for_somebody_at_work_is_left_alone():
    assert verdict(status(0, seconds=99, deadline=100), status(1, seconds=500), status(2, silent=19)) is None


def test_the_dead_come_before_the_errors_and_the_stuck_that_they_cause():
    error = status(0, error="RuntimeError: connection closed", error_order=1, error_seconds=30)
    assert verdict(error, status(1, silent=21), status(2, seconds=101, deadline=100)).culprits == (1,)
    assert verdict(error, status(1, gone=True)).reason == "rank 1 is dead: its process is gone, last seen in train 'a'"


def test_the_first_error_counts_once_all_others_are_known_to_be_alive():
    first = status(2, error="ValueError: x", error_order=1, error_seconds=6)
    second = status(0, error="RuntimeError: connection closed", error_order=2, error_seconds=5)
    assert verdict(second, status(1, silent=4), first) is None  # rank 1 may have died before
    assert verdict(second, status(1, silent=1), first) == Verdict((2,), "rank 2 failed in train 'a': ValueError: x")


def test_an_item_of_two_ranks_is_stuck_when_the_later_of_them_is_over_time():
    first = status(0, seconds=500, deadline=100, with_ranks=(0, 1))
    assert verdict(first, status(1, seconds=99, deadline=100, with_ranks=(0, 1))) is None
    assert verdict(first, status(1, seconds=101, deadline=100, with_ranks=(0, 1))).culprits == (0, 1)
    assert verdict(first, status(1, "b", seconds=99, deadline=100)) is None  # rank 0 waits until it has done b


def test_two_ranks_that_wait_for_each_other_at_different_items_are_a_deadlock():
    first = status(0, "a", seconds=170, deadline=100, with_ranks=(0, 1), in_collective=True)
    assert verdict(first, status(1, "b", seconds=99, deadline=100, with_ranks=(0, 1))) is None  # may still come
    found = verdict(first, status(1, "b", seconds=101, deadline=100, with_ranks=(0, 1)))
    assert "deadlock" in found.reason
    assert found.culprits == (1,)


def test_when_all_wait_it_is_a_deadlock_and_who_has_no_item_is_to_blame():
    assert verdict(status(0, seconds=61), status(1, seconds=59)) is None
    assert verdict(status(0, seconds=61), status(1, seconds=62)).culprits == (0, 1)
    idle = Status(rank=1, beat=5, phase="between items", seconds=62)
    assert verdict(status(0, seconds=61), idle).culprits == (1,)
    assert verdict(status(0, seconds=61), status(1, ended=True)).culprits == (0,)


def test_what_comes_before_the_first_item_is_not_judged():
    loading = Status(rank=1, beat=5, seconds=500)
    assert verdict(status(0, seconds=61), loading) is None
    assert verdict(status(0), Status(rank=1, silent=119)) is None  # has not made its watchdog
    assert verdict(status(0), Status(rank=1, silent=121)).culprits == (1,)


def test_the_stuck_rank_of_a_group_is_the_one_that_is_in_no_collective():
    first = status(0, seconds=500, deadline=100, with_ranks=(0, 1), in_collective=True)
    found = verdict(first, status(1, seconds=101, deadline=100, with_ranks=(0, 1), at="a.py:3 f"))
    assert found.culprits == (1,)
    assert found.reason.endswith("the limit is 100 s; rank 1 is at a.py:3 f")


def test_the_report_has_queues_errors_and_last_items():
    said = report([status(0, queues="ready 3"), status(1, error="OSError: x")], (1,), {0: ["a 1s", "b 2s"], 1: []})
    assert said.splitlines()[3:] == [
        "queues:",
        "  rank 0: ready 3",
        "errors:",
        "  rank 1: OSError: x",
        "last items, the newest at the end:",
        "  rank 0: a 1s; b 2s",
    ]


def test_the_table_has_a_line_for_each_rank_and_a_star_for_culprits():
    lines = table([status(0, seconds=7, deadline=60, at="a.py:3 f"), status(1, silent=21)], (1,)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["0", "train", "a", "7", "s", "60", "s", "0", "s", "ago", "a.py:3", "f"],
        ["*", "1", "train", "a", "0", "s", "waits", "21", "s", "ago"],
    ]
