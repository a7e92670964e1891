"""Checkpoints written in the background: beside, hashed, synced, renamed, and named by the tracker last.

    start   all ranks plan, and each forks a process that holds a snapshot of what it has to write
    ...     training goes on; the process writes, syncs and hashes its files
    poll    when all ranks' processes have ended well: hashes, rename, tracker, and what is too old is deleted

A step's name, its hashes and the tracker are written when all ranks have written their part. So whatever is killed or
fails at whatever moment, the tracker names a complete checkpoint.
"""

import contextlib
import gc
import inspect
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from rto_megatron.config.checkpoint import CheckpointConfig
from rto_megatron.distributed.checkpoint import (
    BEST,
    FORMAT,
    STEP_NAME,
    TRACKER,
    Manifest,
    digest_of,
    file_hash,
    step_of,
    weights_of,
)
from rto_megatron.distributed.children import belong_to, die_of_a_killed_child
from rto_megatron.distributed.collectives import broadcast_object, gather_objects
from rto_megatron.distributed.copies import check_copies
from rto_megatron.distributed.optimizer import Trainable, optimizer_state
from rto_megatron.distributed.runtime import is_main, rank
from rto_megatron.errors import CheckpointError

DRAFT = ".tmp"
"""What the names of folders end with that are not, or no longer, checkpoints."""

RESERVE, RESERVE_BYTES = "reserve", 8 << 20
"""Room that is kept while the large files are written: the small ones are written by one rank while others wait."""

HASHES = "hashes-of-rank-"
"""Beginning of the names of files by which the writers say that they are done."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete and named."""

    folder: Path
    seconds: float
    """From the start of the save to its name in the tracker."""
    num_bytes: int


@dataclass(frozen=True)
class _UnderWay:
    """A save that was started."""

    manifest: Manifest
    draft: Path
    is_best: bool
    started: float
    requests: list[Any]
    """Megatron's, in the order in which their files are written."""
    writer: BaseProcess
    said: Connection
    """Where it says why it could not write."""


class Saver:
    """Writes the checkpoints of a run, one at a time. Every method is called by all ranks.

    Raises:
        CheckpointError: from any method: some rank could not write, or holds other weights than its copies. The tracker
            still names the checkpoint before.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, save_tokenizer: Callable[[Path], None]) -> None:
        """Begin with a run folder; what an earlier, killed save left in it is deleted."""
        self.root, self.config, self.save_tokenizer = run_dir / "checkpoints", config, save_tokenizer
        self.last: Saved | None = None
        """The newest that is complete."""
        self._under_way: _UnderWay | None = None
        if is_main():
            for leftover in self.root.glob(f"step_*{DRAFT}"):
                if STEP_NAME.fullmatch(leftover.name.removesuffix(DRAFT)):
                    shutil.rmtree(leftover, ignore_errors=True)

    def start(
        self,
        manifest: Manifest,
        models: Mapping[str, MegatronModule | None],
        trained: Mapping[str, Trainable | None],
        *,
        is_best: bool = False,
        write_more: Callable[[Path], None] | None = None,
    ) -> None:
        """Take a snapshot and write it, in the background if the config says so; one under way is waited for.

        Args:
            models: role -> model whose weights are saved; the same roles on all ranks, None where a rank has no part.
            trained: role -> what holds the optimizer state to save; likewise.
            is_best: none before it did as well: it stays until a better one comes.
            write_more: writes other small files into the checkpoint's folder; on the main rank.
        """
        self.wait()
        started = time.perf_counter()
        check_copies(models)
        # a name of its own: processes of a killed run may still be writing into theirs
        draft = self.root / broadcast_object(f"step_{manifest.step:08d}.{time.time_ns()}{DRAFT}")
        with _all_or_none(draft):
            if is_main():
                self._write_small_files(draft, manifest, [*models, *(f"{role}_optimizer" for role in trained)])
                if write_more is not None:
                    write_more(draft)
        with _all_or_none(draft):
            requests = [
                _plan(weights_of(model) if model is not None else {}, draft / role) for role, model in models.items()
            ]
            requests += [
                _plan(_shared_state(trainable), draft / f"{role}_optimizer") for role, trainable in trained.items()
            ]
            said, say = multiprocessing.Pipe(duplex=False)
            held = [_on_host(request) for request in requests]
            writer = multiprocessing.get_context("fork").Process(
                target=_write, args=(requests, held, draft, rank(), os.getpid(), say)
            )
            writer.start()
            say.close()
        self._under_way = _UnderWay(manifest, draft, is_best, started, requests, writer, said)
        if not self.config.background:
            self.wait()

    def poll(self) -> None:
        """Complete the save under way if all its bytes are written; costs nothing where there is none."""
        if self._under_way is not None and not any(gather_objects(self._under_way.writer.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way and complete it."""
        if self._under_way is None:
            return
        done, self._under_way = self._under_way, None
        with _all_or_none(done.draft):
            done.writer.join()
            if done.writer.exitcode:
                why = _last_words(done.said)
                raise OSError(f"the process that writes its files ended with exit code {done.writer.exitcode}{why}")
            done.said.close()
            if is_main():
                (done.draft / RESERVE).unlink()
        with _all_or_none(done.draft):
            for request in done.requests:
                for finalize in request.finalize_fns:
                    finalize()
        saved = None
        with _all_or_none(done.draft):
            if is_main():
                num_bytes = _complete(done.draft)
                folder = self._name(done)
                saved = Saved(folder, time.perf_counter() - done.started, num_bytes)
        self.last = broadcast_object(saved)

    def _write_small_files(self, draft: Path, manifest: Manifest, folders: list[str]) -> None:
        for folder in folders:
            (draft / folder).mkdir(parents=True)
        (draft / RESERVE).write_bytes(bytes(RESERVE_BYTES))
        self.save_tokenizer(draft / "tokenizer")
        (draft / "checkpoint.json").write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1))

    def _name(self, done: _UnderWay) -> Path:
        """Give a complete draft its name, have the trackers name it, and delete what need not stay."""
        folder = _free_name(self.root, done.manifest.step)
        done.draft.rename(folder)
        if done.is_best:
            _replace(self.root / BEST, folder.name + "\n")
        _replace(self.root / TRACKER, folder.name + "\n")
        # later steps are of a run that the user went back from: none of this one's
        ours = [path for path in self.root.iterdir() if STEP_NAME.fullmatch(path.name)]
        older = [path for path in ours if path != folder and step_of(path)[0] <= done.manifest.step]
        older.sort(key=step_of)
        steps = {path: path.name.partition(".")[0] for path in [*older, folder]}
        kept = {steps[path] for path in [*older, folder][-self.config.keep_last :]} if self.config.keep_last else None
        best = (self.root / BEST).read_text().strip() if self.config.keep_best and (self.root / BEST).exists() else ""
        for path in older:
            if steps[path] == steps[folder] or (kept is not None and steps[path] not in kept and path.name != best):
                # by another name first: a folder that is half deleted must not look like a checkpoint
                with contextlib.suppress(OSError):  # it is in nobody's way, and the new one is named
                    shutil.rmtree(path.rename(path.with_name(path.name + DRAFT)), ignore_errors=True)
        return folder


def save_checkpoint(
    run_dir: Path, manifest: Manifest, models: Mapping[str, MegatronModule], save_tokenizer: Callable[[Path], None]
) -> Path:
    """Write all roles' weights as step `manifest.step` of a run, and name it as the newest; for a run that ends here.

    Raises:
        CheckpointError: some rank could not write; the tracker still names the step before.
    """
    saver = Saver(run_dir, CheckpointConfig(background=False), save_tokenizer)
    saver.start(manifest, models, {})
    assert saver.last is not None  # not in the background
    return saver.last.folder


def _shared_state(trainable: Trainable | None) -> dict[str, Any]:
    """The optimizer's state; on ranks that have none of it what its ranks have in common.

    Megatron writes what is not cut into shards, as the step count, from rank 0, which may have no part of the role.
    """
    state = {"optimizer": optimizer_state(trainable)} if trainable is not None else {}
    has = gather_objects(trainable is not None)
    if not all(has):
        common = broadcast_object(extract_sharded_base(state)[1], src=has.index(True))
        state = state or common
    return state


def _plan(state: dict[str, Any], folder: Path) -> Any:
    """Megatron's request to write a state: all ranks agree who writes what, nothing is written yet."""
    # 0.19 would take another library's writer
    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    strategy: dict[str, Any] = {"async_strategy": "mcore"} if takes_strategy else {}
    return dist_checkpointing.save(state, str(folder), async_sharded_save=True, **strategy)


def _on_host(request: Any) -> list[Any]:
    """The arguments of a request's writer, with tensors in host memory."""
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    return arguments


def _write(
    requests: list[Any], arguments: list[list[Any]], draft: Path, rank: int, parent: int, say: Connection
) -> None:
    """Write this rank's files and, when all are on disk, their hashes; runs in a process of its own.

    Raises:
        SystemExit: it could not; the reason is told to the rank.
    """
    gc.disable()  # collecting what the parent had on a GPU would ask CUDA, which does not survive a fork
    belong_to(parent)
    die_of_a_killed_child()
    try:
        for request, held in zip(requests, arguments, strict=True):
            if request.async_fn is not None:  # nothing of it is this rank's
                request.async_fn(*held, **request.async_fn_kwargs)
        files = {str(path.relative_to(draft)): file_hash(path) for path in draft.glob(f"*/__{rank}_*.distcp")}
        (draft / f"{HASHES}{rank}").write_text(json.dumps(files))
    except OSError as error:
        say.send(str(error))
        raise SystemExit(1) from None


def _last_words(said: Connection) -> str:
    """What a writer that has ended said, to be put after its exit code; empty where it was killed."""
    with said, contextlib.suppress(EOFError):
        if said.poll():
            return f": {said.recv()}"
    return ""


def _complete(draft: Path) -> int:
    """Put all hashes into one file and everything to disk; the number of bytes."""
    files: dict[str, str] = {}
    for part in draft.glob(f"{HASHES}*"):
        files |= json.loads(part.read_text())
        part.unlink()
    paths = [path for path in draft.rglob("*") if path.is_file()]
    for path in paths:
        name = str(path.relative_to(draft))
        if name not in files:
            files[name] = file_hash(path)
    written = {"algorithm": "sha256", "files": files, "digest": digest_of(files)}
    (draft / "integrity.json").write_text(json.dumps(written, indent=1))
    for path in [*draft.rglob("*"), draft]:
        _sync(path)
    return sum(path.stat().st_size for path in [*paths, draft / "integrity.json"])


def _free_name(root: Path, step: int) -> Path:
    """A folder for this step that is not there yet: the one that the tracker names stays until the new one is named."""
    path, tries = root / f"step_{step:08d}", itertools.count(1)
    while path.exists():
        path = root / f"step_{step:08d}.{next(tries)}"
    return path


@contextlib.contextmanager
def _all_or_none(draft: Path) -> Iterator[None]:
    """Let all ranks go on, or all fail with the first rank's reason and the draft removed."""
    reason = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        # megatron-core's messages hold whole tracebacks, whose last line says what happened
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" )")]
        reason = f"rank {rank()}: {type(error).__name__}: {lines[-1] if lines else 'without a message'}"
        with contextlib.suppress(OSError):  # torch does not say that the disk is full
            reason += f"; {shutil.disk_usage(draft.parent).free >> 20} MiB are free for checkpoints"
    reasons = [r for r in gather_objects(reason) if r]
    if reasons:
        _forget_reports()
        if is_main():
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"{draft}: the checkpoint could not be written, the one before is untouched ({reasons[0]})"
        )


def _forget_reports() -> None:
    """Empty Megatron's queue of writers' reports: the next save would take a failed one's for its own."""
    with contextlib.suppress(OSError, EOFError):  # its process, if it has one, may be what was killed
        reports = filesystem_async._get_write_results_queue()
        while not reports.empty():
            reports.get_nowait()


def _replace(path: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one."""
    draft = path.with_name(path.name + DRAFT)
    draft.write_text(text)
    _sync(draft)
    draft.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Force a file, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
