"""The command line: `python -m rto_megatron STAGE RUN.yaml [--section.field=value ...]`.

Exit codes: 0 done; 2 the user's config, data or files are wrong, with one message; 3 what a command is to prove does
not hold; 75 stopped on request (SIGTERM, SIGUSR1) with its state saved, start it again; 1 a bug.
"""

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rto_megatron import __version__
from rto_megatron.config.load import load_run
from rto_megatron.config.run import STAGES
from rto_megatron.distributed.children import LAUNCHER, end_with
from rto_megatron.distributed.runtime import (
    import_megatron,
    is_main,
    is_main_of_node,
    prepare_imports,
    rank,
    start_runtime,
    stop_runtime,
    world_size,
)
from rto_megatron.distributed.verdict import to_user
from rto_megatron.errors import STOPPED, USER_ERROR, ConfigError, StoppedToContinue, UserError

COMMANDS = {
    "doctor": "doctor.command",
    "parity": "parity.command",
    "plan": "planner.plan",
    "preflight": "doctor.preflight",
    "report": "report.command",
    "simulate": "planner.simulate",
    "verify-resume": "stages.verify_resume",
    "verify-schedule": "stages.verify_schedule",
}
"""What looks at the run of a stage and does not train it -> module with `main(path, words)`, which returns the exit
code."""

USAGE = f"""usage: python -m rto_megatron STAGE RUN.yaml [--section.field=value ...]
       torchrun --nproc-per-node N -m rto_megatron STAGE RUN.yaml [--section.field=value ...]
       python -m rto_megatron COMMAND RUN.yaml [...]

stages: {", ".join(STAGES)}
commands: {", ".join(COMMANDS)}
`python -m rto_megatron STAGE --help` lists all that a stage's YAML file may say.
"""


def main(words: list[str]) -> int:
    """Run one stage or command; return the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else USER_ERROR
    if words[0] == "--version":
        print(__version__)
        return 0
    if os.environ.get(LAUNCHER) == str(os.getppid()):
        end_with(os.getppid())
    try:
        return _run(words[0], words[1:])
    except UserError as error:
        if world_size() > 1:  # torchrun ends all ranks after the first: it would cut off the message and the exit code
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_main_of_node():  # elsewhere the watchdog prints it, if the node's first rank does not raise it too
            print(to_user(str(error), rank=rank()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except StoppedToContinue as stopped:
        if is_main():
            print(stopped, file=sys.stderr)
        stop_runtime()
        return STOPPED


def _run(stage: str, words: list[str]) -> int:
    if stage not in (*STAGES, *COMMANDS):
        raise ConfigError(f"the stage must be one of {', '.join(STAGES)} (or {', '.join(COMMANDS)}), got {stage!r}")
    path = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    if stage in COMMANDS:
        if stage == "report":  # which mostly does without Megatron
            prepare_imports()
        elif stage != "doctor":  # which tells what keeps Megatron from being imported
            import_megatron()
        return importlib.import_module(f"rto_megatron.{COMMANDS[stage]}").main(path, words)
    config = _load(stage, path, words)
    import_megatron()  # before a stage imports parts of it
    module = importlib.import_module(f"rto_megatron.stages.{'rto' if stage == 'ppo' else stage}")
    runtime = start_runtime(threads=config.compute.threads, deterministic=config.compute.deterministic)
    module.run(config, runtime)
    stop_runtime()
    return 0


def _load(stage: str, path: Path | None, words: list[str]) -> Any:
    try:
        return load_run(stage, path, words)
    except ConfigError as error:
        if path is None or not path.is_file():
            raise
        raise ConfigError(f"{error}\n(`python -m rto_megatron doctor {path}` lists all mistakes at once)") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
