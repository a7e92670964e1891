"""The one process that parity compares a layout with: a program of its own, started by rank 0.

python -m rto_megatron.parity.one_process FOLDER PARENT     reads FOLDER/run.yaml, writes the leg beside it

It ends with PARENT, the process id of rank 0.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from rto_megatron.config.load import dump_run, load_any
from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.distributed.children import belong_to
from rto_megatron.distributed.runtime import environment_alone, prepare_imports, start_runtime
from rto_megatron.errors import UserError

LOG = "log.txt"


def start(config: RTORun, folder: Path) -> subprocess.Popen:
    """Start the leg of one process: the run's own config but for the layout. What it says goes into FOLDER/log.txt."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(dump_run(replace(config, parallel=ParallelConfig())))
    with (folder / LOG).open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rto_megatron.parity.one_process", str(folder), str(os.getpid())],
            env=environment_alone(),
            stdout=log,
            stderr=log,
        )


def main(folder: Path, parent: int) -> int:
    """Take the step and write it down; return the exit code."""
    belong_to(parent)
    try:
        _, config = load_any(folder / "run.yaml", [])
        prepare_imports()
        # after prepare_imports, because they import Megatron
        from rto_megatron.parity.leg import walk, write_weights
        from rto_megatron.stages.rto import prepare

        runtime = start_runtime(threads=config.compute.threads, deterministic=config.compute.deterministic)
        setup, _ = prepare(config, runtime)
        walk(setup, config, write_weights(folder)).save(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
