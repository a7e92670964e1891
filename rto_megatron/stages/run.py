"""What every stage does around its algorithm: the run folder, the log, the clock, the start table."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rto_megatron.config.load import dump_run
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.collectives import broadcast_object
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.runtime import is_main, rank, world_size
from rto_megatron.errors import ConfigError, UserError, writing
from rto_megatron.metrics import Console, TensorBoardLog

LOCK = ".lock"
"""File in a run folder that its running process holds."""


@dataclass
class Clock:
    """Seconds of each phase since the last `take`."""

    seconds: dict[str, float] = field(default_factory=dict)
    watch: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
    """Goes around each phase: so that a hang is noticed."""
    _start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's seconds to a phase."""
        start = time.perf_counter()
        with self.watch(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`time/*` metrics of the step that ends now, and start the next."""
        now = time.perf_counter()
        rows = {f"time/{name}_seconds": value for name, value in self.seconds.items()}
        rows["time/step_seconds"] = now - self._start
        self.seconds, self._start = {}, now
        return rows


@dataclass(frozen=True)
class Run:
    """An open run: where its numbers go."""

    folder: Path
    log: TensorBoardLog
    console: Console


def check_writable(name: str, path: Path) -> None:
    """Raise ConfigError with the field `name` now rather than after hours if a file cannot be written at `path`."""
    if path.is_dir():
        raise ConfigError(f"{name} {path}: is a folder; name a file")
    draft = path.with_name(f"{path.name}.{rank()}.tmp")
    with writing(name, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        draft.unlink()


def write_text(name: str, path: Path, text: str) -> None:
    """Write a file that is complete or not there; ConfigError with the field `name` if it cannot be."""
    draft = path.with_name(path.name + ".tmp")
    with writing(name, path):
        try:
            draft.write_text(text)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def json_lines(rows: list[dict]) -> str:
    """The text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def open_run(
    config: Any, stage: str, mesh: Mesh, sizes: Sequence[tuple[str, object]], *, own: Checkpoint | None = None
) -> Iterator[Run]:
    """Make the run folder, write the resolved config into it, print what was derived, and open the log.

    Args:
        sizes: rows of the start table: name and value.
        own: the checkpoint that an earlier start of this run has left, if it goes on from there.
    """
    folder, console, start = config.run_dir, Console(is_main()), own.manifest.step if own else 0
    log = _open_log(folder, dump_run(config), start)
    layout = f"{config.parallel.sizes} x data {mesh.data.size}"
    compute = config.compute
    layers = "Transformer Engine" if mesh.runtime.has_fused_layers(compute.dtype) else "local"
    layers += f" layers, FP8 {compute.fp8} {compute.fp8_recipe}" if compute.fp8 != "none" else " layers"
    where = f"{world_size()} x {mesh.runtime.device.type}, {compute.dtype}, {layers}"
    where += ", deterministic" if compute.deterministic else ""
    console.table(f"{stage}: {folder}", ("size", "value"), [("ranks", where), ("layout", layout), *sizes])
    if own:
        console.say(f"going on after step {start}: {own.folder}")
    try:
        yield Run(folder, log, console)
    finally:
        log.close()


def _open_log(folder: Path, config_text: str, start: int) -> TensorBoardLog:
    """Make the folder; where the main rank cannot, all ranks stop with its reason."""
    log, problem = TensorBoardLog(folder / "tensorboard", enabled=False), None
    if is_main():
        try:
            with writing("run_dir", folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "checkpoints").mkdir(exist_ok=True)
                _lock(folder)
                (folder / "run.yaml").write_text(config_text)
            log = TensorBoardLog(folder / "tensorboard", enabled=True, start=start)
        except UserError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    return log


_locks: list[IO[str]] = []
"""Kept open: a lock ends with its file, or with the process."""


def _lock(folder: Path) -> None:
    """Keep a second start out of a run folder for as long as this process lives, but none of those that it forks."""
    lock = (folder / LOCK).open("a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise ConfigError(
            f"run_dir {folder}: is in use by {lock.read().strip() or 'another process'}; wait for that run or end "
            "it, or set another run_dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    _locks.append(lock)
