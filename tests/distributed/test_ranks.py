"""The harness itself: results, failures, stuck ranks, nothing left running."""

import os
import subprocess
import sys
import time

import pytest

from rto_megatron.distributed.runtime import rank, world_size
from tests.ranks import RanksFailed, run_ranks


def say_who_i_am(greeting):
    return f"{greeting} from {rank()} of {world_size()}"


def test_results_come_back_in_rank_order():
    assert run_ranks(say_who_i_am, 2, "hello") == ["hello from 0 of 2", "hello from 1 of 2"]


def fail_on_rank_1():
    print(f"rank {rank()} got this far")
    if rank() == 1:
        raise ValueError("seven is not a layout")
    time.sleep(60)  # as a rank that waits for the other in a collective


def test_a_rank_that_raises_ends_the_others_and_shows_why():
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 ended with exit code 1") as failure:
        run_ranks(fail_on_rank_1, 2)
    assert "rank 0 got this far" in str(failure.value)
    assert "ValueError: seven is not a layout" in str(failure.value)
    assert time.monotonic() - began < 30


def sleep_with_a_child(pid_file):
    if rank() == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        pid_file.write_text(str(child.pid))
    print(f"rank {rank()} falls asleep")
    time.sleep(60)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"  # a zombie waits only for init to collect it


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sleeping_ranks_are_killed_with_their_children_and_say_where_they_were(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(RanksFailed, match=r"ranks \[0, 1\] of 2 did not end in 5 seconds") as failure:
        run_ranks(sleep_with_a_child, 2, pid_file, timeout=5)
    message = str(failure.value)
    assert "rank 0 falls asleep" in message and "rank 1 falls asleep" in message
    assert message.count("in sleep_with_a_child") == 2  # the stack that faulthandler wrote
    time.sleep(0.1)
    assert not is_running(int(pid_file.read_text()))
