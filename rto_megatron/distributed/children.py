"""Processes that a rank forks: they end with it, and do not wait for what was killed below them."""

import contextlib
import ctypes
import os
import signal
import sys
from typing import Any

import psutil

LAUNCHER = "RTO_MEGATRON_LAUNCHER"
"""Environment variable with the process that has started the ranks: `rto_megatron.launch`."""


def belong_to(parent: int) -> None:
    """Tie this process to the rank `parent` that forked it: it takes no orders to stop but from it, and ends with it.

    Linux ends it with a rank that is killed before it can say goodbye, and all that is forked below with it, which
    would wait for ever for a lock that it held. Elsewhere it goes on to the end of its work.
    """
    # a cluster signals every process of a job, and the rank may want to save before it stops
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
    forks: list[int] = []  # who does, at any depth: the child asks after the one that it comes from
    os.register_at_fork(before=lambda: forks.append(os.getpid()), after_in_child=lambda: end_with(forks[-1]))


def end_with(parent: int) -> None:
    """Have Linux end this process with its parent, however that one ends; elsewhere nothing is done."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before the line above
            os._exit(1)


def die_of_a_killed_child() -> None:
    """End this process, exit code 1, when one of its own children ends in any way but well.

    Megatron's checkpoint writer would wait for the child's report for ever.
    """

    def look(*_: Any) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(ChildProcessError):  # collected meanwhile
                # WNOWAIT leaves it to be collected by whoever started it
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is not None and (ended.si_code != os.CLD_EXITED or ended.si_status != 0):
                    os._exit(1)

    signal.signal(signal.SIGCHLD, look)
