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
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from rto_megatron.distributed.children import LAUNCHER
from rto_megatron.errors import NOT_PROVEN, STOPPED, USER_ERROR

AGENT_SECONDS = 30.0
"""How long torchrun may go on after the last of its ranks: with its meeting point behind a cut cable, minutes."""


def main(words: Sequence[str]) -> int:
    """Start the ranks, wait for them, and return the exit code that they agree on."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `_exit_code` says it in a line a rank
    os.environ[LAUNCHER] = str(os.getpid())  # its ranks do not outlive it
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    threading.Thread(target=_end_soon_after_the_ranks, daemon=True).start()
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


def _end_soon_after_the_ranks() -> None:
    """torchrun tells its meeting point how its ranks ended, and waits for an answer that may never come."""
    codes: dict[int, int | None] = {}  # process -> exit code; None while it runs
    rank_of: dict[int, int] = {}
    since = 0.0
    while True:
        time.sleep(0.5)
        for child in psutil.Process().children():
            with suppress(psutil.Error, KeyError):
                if child.pid not in codes:
                    rank_of[child.pid], codes[child.pid] = int(child.environ()["RANK"]), None
        for pid in [pid for pid, code in codes.items() if code is None]:
            codes[pid] = _code_of(pid)
            since = time.monotonic()
        if codes and None not in codes.values() and time.monotonic() - since > AGENT_SECONDS:
            by_rank = {rank_of[pid]: code or 0 for pid, code in codes.items()}
            print(f"torchrun did not end within {AGENT_SECONDS:.0f} s of its ranks", file=sys.stderr)
            code = _exit_code(by_rank) if any(by_rank.values()) else 0
            sys.stderr.flush()
            os._exit(code)


def _code_of(pid: int) -> int | None:
    """Exit code of a child, which is left for torchrun to collect; None while it runs, 1 if torchrun was faster."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 1
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


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
