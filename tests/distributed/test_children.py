"""Processes that a rank forks end with it."""

import multiprocessing
import os
import select
import signal
import sys

import pytest

from rto_megatron.distributed.children import belong_to
from tests.ranks import run_ranks


def fork_a_child_and_wait(ready):
    child = multiprocessing.get_context("fork").Process(target=be_a_child, args=(os.getpid(), ready))
    child.start()
    while True:
        signal.pause()


def be_a_child(parent, ready):
    belong_to(parent)
    multiprocessing.get_context("fork").Process(target=signal.pause).start()
    os.write(ready, b"x")
    while True:
        signal.pause()


def holders_after_a_kill():
    """Kill a process whose child has a child; what then comes out of a pipe that both of these hold open."""
    reader, writer = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=fork_a_child_and_wait, args=(writer,))
    process.start()
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    process.kill()
    process.join()
    ended, _, _ = select.select([reader], [], [], 20)
    return os.read(reader, 1) if ended else "still held"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_rank_that_is_killed_leaves_no_process_behind():
    assert run_ranks(holders_after_a_kill, 1) == [b""]
