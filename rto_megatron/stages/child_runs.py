"""Runs that a command starts to prove something: worlds of their own, as a cluster would start them."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rto_megatron.distributed.runtime import environment_alone
from rto_megatron.errors import UserError


def run_world(words: Sequence[str], log: Path, *, ranks: int, until: Callable[[], bool] | None = None) -> None:
    """Start `python -m rto_megatron WORDS` on so many ranks of this machine and wait for its end.

    Args:
        log: file for all that it says; added to.
        until: once it is true, all of it is killed.

    Raises:
        UserError: it ended with an error; its last lines.
    """
    launcher = ["-m", "rto_megatron.launch", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, "-m", "rto_megatron", *words]
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment_alone(), start_new_session=True)
        try:
            while process.poll() is None and not (until is not None and until()):
                time.sleep(0.02)
        finally:
            _kill(process)
    was_killed = until is not None and process.returncode == -signal.SIGKILL
    if process.returncode and not was_killed:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise UserError(f"{log}: the run ended with exit code {process.returncode}; its last lines:\n{last}")


def _kill(launcher: subprocess.Popen) -> None:
    """End a launcher and all that it started; its ranks are in sessions of their own, so it alone would not take them.

    Does nothing where it has ended.
    """
    if launcher.poll() is None:
        family = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family[1:], timeout=10)
    launcher.wait()
