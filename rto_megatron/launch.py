"""torchrun, with the exit codes of the ranks: `python -m rto_megatron.launch TORCHRUN_WORDS -m rto_megatron STAGE ...`.

    python -m rto_megatron.launch --nproc-per-node 8 -m rto_megatron rto RUN.yaml

Plain torchrun works as well, but ends with 1 whatever its ranks end with, prints a traceback of its own, and kills the
ranks 30 seconds after a SIGTERM. Here SIGTERM and SIGUSR1 go to the ranks, which save and stop when their step is done;
a cluster's script can start the job again on exit code 75.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rto_megatron.distributed.children import LAUNCHER
from rto_megatron.errors import NOT_PROVEN, STOPPED, USER_ERROR


def main(words: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code that they agree on."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_exit_code` says it in a line a rank
    os.environ[LAUNCHER] = str(os.getpid())  # its ranks do not outlive it
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    try:
        # the other signals end the ranks at once, as torchrun does it
        run.run(run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *_apart(words)]))
    except ChildFailedError as failed:
        return _exit_code({rank: failure.exitcode for rank, failure in failed.failures.items()})
    return 0


def _apart(words: Sequence[str]) -> list[str]:
    """The words with a `--` before the module's name: torchrun would take a `--start=` of ours for one of its own."""
    at = words.index("-m") + 1 if "-m" in words else 0
    return [*words[:at], "--", *words[at:]] if at else list(words)


_asked_to_stop: list[int] = []
"""The signals that were handed on."""


def _pass_on(number: int, _: FrameType | None) -> None:
    _asked_to_stop.append(number)
    children = psutil.Process().children()
    if not children:
        sys.exit(STOPPED)  # before there are ranks
    for child in children:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child.pid, number)


def _exit_code(codes: dict[int, int]) -> int:
    """One for all: what the user can do something about comes first.

    The rank that ends first is the one whose code counts; torchrun then ends the others.
    """
    for code in (USER_ERROR, STOPPED, NOT_PROVEN):
        if code in codes.values():
            return code
    if any(-code in _asked_to_stop for code in codes.values()):
        return STOPPED  # a rank that had not begun to listen; it had done nothing either
    for rank, code in codes.items():
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"rank {rank} ended with {what}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
