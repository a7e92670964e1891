"""Run a test function on several ranks, each a process of its own.

    def worker(scale):                      # in the test's module, not inside the test
        runtime = start_runtime(threads=1)
        ...
        return tensor

    def test_sums_over_ranks():
        first, second = run_ranks(worker, 2, 3.0)

Processes come from a fork server that has torch and Megatron loaded, so that starting them takes a fraction of a second
instead of many. They live for one call: one parallel layout a process, since gloo groups keep threads.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

PRELOAD = (
    "pytest",
    "torch",
    "megatron.core.dist_checkpointing",
    "rto_megatron.stages.rto",
    "rto_megatron.stages.sft",
)
"""What the fork server imports once for all ranks; none of it starts a thread."""

LAST_LINES = 25
"""Lines of each rank's output that a failure shows."""

GRACE_SECONDS = 3.0
"""How long the others may go on once one rank has failed: mostly they wait for it in a collective."""

_context = multiprocessing.get_context("forkserver")


class RanksFailed(AssertionError):
    """A rank raised, died, or did not end in time; the message has the last lines of each."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call fn(*args) in each of `world` rank processes; their results in rank order.

    Args:
        fn: a function of a module, which every rank imports; may call start_runtime.
        world: number of ranks.
        args: picklable; the same for every rank.
        timeout: seconds for all of it; then every rank and all its children are killed.

    Raises:
        RanksFailed: with the last lines of each rank's stdout and stderr.
    """
    # where there are GPUs, what is loaded once may begin to use them, and a forked process cannot go on with that.
    # Asked here and not on import, which ranks do too: who has asked can hide the GPUs from itself no more
    has_gpu = torch.cuda.is_available()
    _context.set_forkserver_preload([] if has_gpu else list(PRELOAD))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        # The parent keeps the store: no port is chosen before it is bound, so runs side by side cannot collide.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [
            _context.Process(target=_be_rank, args=(fn, args, rank, world, store.port, folder, not has_gpu))
            for rank in range(world)
        ]
        for rank in range(world):
            _log_file(folder, rank).touch()
        try:
            for process in processes:
                process.start()
            problem = _wait_for(processes, folder, timeout)
        finally:
            _kill(processes)
        if problem is not None:
            raise RanksFailed(f"{fn.__module__}.{fn.__name__}: {problem}\n{_last_lines(folder, world)}")
        # Written a moment ago by our own processes, so unpickling is safe.
        return [torch.load(_result_file(folder, rank), weights_only=False) for rank in range(world)]


def _wait_for(processes: list[BaseProcess], folder: str, timeout: float) -> str | None:
    """Wait until all have ended or one has failed; what went wrong, or None."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(processes))
    problem = None
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running.values()], timeout=max(0.0, deadline - time.monotonic()))
        for rank, process in list(running.items()):
            if process.exitcode is not None:
                del running[rank]
                if process.exitcode != 0 and problem is None:
                    problem = f"rank {rank} of {len(processes)} ended with exit code {process.exitcode}"
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if running and problem is None:
        problem = f"ranks {sorted(running)} of {len(processes)} did not end in {timeout:g} seconds"
    if running:
        _ask_where_they_are({process: _log_file(folder, rank) for rank, process in running.items()})
    return problem


def _ask_where_they_are(logs: dict[BaseProcess, Path]) -> None:
    """Have stuck ranks write the stack of every thread into their output, and wait until they have."""
    for process in logs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and not all(
        b"most recent call first" in log.read_bytes() for log in logs.values()
    ):
        time.sleep(0.1)


def _kill(processes: list[BaseProcess]) -> None:
    """End every rank and whatever it started; each leads a process group of its own."""
    for process in processes:
        if process.pid is None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():  # killed before it became a leader
            process.kill()
        process.join()
        process.close()


def _last_lines(folder: str, world: int) -> str:
    blocks = []
    for rank in range(world):
        log = _log_file(folder, rank)
        lines = log.read_text(errors="replace").splitlines()
        blocks.append("\n".join([f"--- rank {rank}, last lines ---", *lines[-LAST_LINES:]]))
    return "\n".join(blocks)


def _log_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.log"


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"


def _be_rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world: int,
    port: int,
    folder: str,
    strict: bool,
) -> None:
    """The rank process: own process group, output into a file, torchrun's environment, then the function."""
    os.setpgid(0, 0)
    _die_with_parent()
    log = os.open(_log_file(folder, rank), os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # torch's word for: the store is there already, rank 0 need not open it
    )
    # as in the test process; start_runtime then lists third parties' with reasons. Not where this process imports them
    # anew, for a GPU: what they say of it, and while they are imported, is for the log
    warnings.simplefilter("error" if strict else "default")
    try:
        torch.save(fn(*args), _result_file(folder, rank))
    except BaseException:
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    # Not sys.exit: tearing down gloo's threads takes time, and nothing is left to save.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Have Linux kill this rank with the fork server, which itself ends with pytest, however that ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
