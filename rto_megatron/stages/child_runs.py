"""Runs that a command starts to prove something: worlds of their own, as a cluster would start them."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rto_megatron.config.load import load_any, print_options, split_options
from rto_megatron.distributed.runtime import environment_alone, world_size
from rto_megatron.errors import ConfigError, UserError


def read_words(command: str, options_class: type, path: Path | None, words: list[str]) -> tuple[Any, list[str], Any]:
    """What a command that starts runs was told: its own options, the words that start such a run, and its config.

    Raises:
        ConfigError: as `load_any`; or it is one of several ranks.
    """
    if world_size() > 1:
        raise ConfigError(f"{command} starts its ranks itself: run it with plain python, and give --ranks=N")
    if "-h" in words or "--help" in words:
        print_options(options_class, f"python -m rto_megatron {command} RUN.yaml [--section.field=value ...]")
    options, rest = split_options(options_class, words)
    stage, config = load_any(path, rest)
    return options, [stage, *([str(path)] if path else []), *rest], config


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
    is_due = False
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment_alone(), start_new_session=True)
        try:
            while process.poll() is None and not (is_due := until is not None and until()):
                time.sleep(0.02)
        finally:
            _kill(process)
    if process.returncode and not is_due:
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
