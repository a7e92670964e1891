"""What would be written where: is it allowed, is there room, and what is there already."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rto_megatron.config.checkpoint import CheckpointConfig
from rto_megatron.config.run import ConvertRun, EvaluateRun, GenerateRun, RTORun, stage_of
from rto_megatron.distributed.checkpoint import Manifest
from rto_megatron.distributed.save import DRAFT
from rto_megatron.doctor.data import Rows
from rto_megatron.doctor.findings import Section
from rto_megatron.doctor.roles import Roles
from rto_megatron.metrics import in_units, rows_before
from rto_megatron.models.counts import num_parameters
from rto_megatron.models.footprint import ITEM_BYTES, Model
from rto_megatron.stages.resume import check_unchanged, digests, find_own, is_finished


def check_place(found: Section, config: Any) -> None:
    """Whether what the run writes could be written, told without writing; for every stage."""
    name = "out" if isinstance(config, GenerateRun | ConvertRun) else "run_dir"
    path: Path = getattr(config, name)
    if isinstance(config, GenerateRun) and path.is_dir():
        found.error(f"out {path}: is a folder", why="the answers are one file", way_out="name a file")
    folder = path.parent if isinstance(config, GenerateRun) else path
    nearest = existing(folder)
    lost = "what was computed would be lost"
    if not nearest.is_dir():
        found.error(f"{name} {path}: cannot be written: {nearest} is a file", why=lost, way_out=f"set another {name}")
    elif not os.access(nearest, os.W_OK | os.X_OK):
        found.error(
            f"{name} {path}: cannot be written: {nearest} is not yours to write in",
            why=lost,
            way_out=f"set another {name}, or have its owner let you",
        )
    else:
        found.ok(f"{name} {path}: can be written")
    there = [file for file in _written_files(config) if file.exists()]
    if there:
        found.note(f"{', '.join(map(str, there))}: would be written over", why="what is there now is lost")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _written_files(config: Any) -> list[Path]:
    if isinstance(config, GenerateRun):
        return [config.out] if config.out.is_file() else []
    return [config.run_dir / "evaluation.json"] if isinstance(config, EvaluateRun) else []


def check_earlier_run(found: Section, config: Any, roles: Roles, rows: Rows, num_steps: int | None) -> None:
    """What an earlier start of this run has left, and whether this one would go on from it."""
    metrics = config.run_dir / "tensorboard" / "metrics.jsonl"
    if metrics.is_file():
        found.attempt(partial(rows_before, metrics, 0), why="what is measured goes on below what is there")
    mixed = "two runs in one folder cannot be told apart, and each deletes the other's checkpoints"
    before = len(found.findings)
    own = found.attempt(partial(find_own, config, stage_of(config)), why=mixed, way_out="set another run_dir")
    if own is None:
        if len(found.findings) == before:
            found.ok(f"run_dir {config.run_dir}: no earlier checkpoint, the run begins at step 0")
        return
    if roles.tokenizer is not None and rows.train:
        manifest = Manifest(
            stage=stage_of(config),
            step=0,
            models={},
            tokenizer=roles.tokenizer.digest(),
            parents={_parent_name(config, role): checkpoint.id for role, checkpoint in roles.opened.items()},
            data=digests(rows.train, rows.held_out),
        )
        found.attempt(partial(check_unchanged, own, manifest), why="a run that goes on must end as if it never stopped")
    if num_steps is not None and own.manifest.step > num_steps:
        found.attempt(partial(is_finished, own, num_steps), why="there is no way to take steps back")
    elif own.manifest.step == num_steps:
        found.note(
            f"{own.folder}: all {num_steps} steps are done",
            why="the run would say so and end",
            way_out="to do them again, set another run_dir or remove the run folder",
        )
    else:
        found.note(
            f"{own.folder}: the run would go on after step {own.manifest.step} of {num_steps or '?'}",
            why="the same command takes up what an earlier start has saved",
            way_out="to begin anew, set another run_dir or remove the folder",
        )
    drafts = list((config.run_dir / "checkpoints").glob(f"*{DRAFT}"))
    if drafts:
        found.note(
            f"{len(drafts)} unfinished saves in {config.run_dir}/checkpoints",
            why="a killed run left them; they are deleted when the next one begins",
        )


def _parent_name(config: Any, role: str) -> str:
    """What a manifest calls the run that a role came from."""
    return "reference" if stage_of(config) == "dpo" else role


def check_disk(
    found: Section, config: Any, models: Sequence[Model], *, num_steps: int, free: int | None = None
) -> None:
    """Compare what checkpoints take with what the file system of run_dir has.

    Bytes of a parameter: 4 or 2 as the weight; with optimizer state 12 more, or 8 where the optimizer is not
    distributed and there is no float32 copy to keep.
    """
    plan: CheckpointConfig = config.checkpoint
    weights = optimizer = 0
    for model in models:
        if model.optimizer is not None:
            count = num_parameters(model.architecture, model.kind)
            weights += count * ITEM_BYTES[config.compute.dtype]
            copies = model.optimizer.distributed or config.compute.dtype != "float32"
            optimizer += count * (12 if copies else 8)
    saves = -(-num_steps // plan.save_every) if plan.save_every else 1
    kept = min(saves, plan.keep_last or saves) + (1 if plan.keep_best and saves > 1 else 0)
    one = weights + (optimizer if saves > 1 or plan.optimizer_at_end else 0)
    most = one * (kept + (1 if saves > kept else 0))  # a new one is complete before an old one goes
    free = shutil.disk_usage(existing(config.run_dir)).free if free is None else free
    rows = [
        ("weights", in_units(weights)),
        ("optimizer states", in_units(optimizer)),
        ("a checkpoint", in_units(one)),
        ("checkpoints that are saved", saves),
        ("of these kept", kept),
        ("at most at one time", in_units(most)),
        ("free there", in_units(free)),
    ]
    found.table("disk", ("what", "size"), rows)
    why = "a save that fails ends the run, and what came after the checkpoint before is lost"
    way_out = "make room, set another run_dir, or keep fewer: checkpoint.keep_last, checkpoint.optimizer_at_end"
    if one > free:
        found.error(f"a checkpoint takes {in_units(one)}, and {in_units(free)} are free", why=why, way_out=way_out)
    elif most > free:
        found.warning(
            f"checkpoints take up to {in_units(most)}, and {in_units(free)} are free", why=why, way_out=way_out
        )
    else:
        found.ok(f"checkpoints take up to {in_units(most)}, and {in_units(free)} are free")
    _look_at_the_best(found, config)


def _look_at_the_best(found: Section, config: Any) -> None:
    plan = config.checkpoint
    if not plan.keep_best:
        return
    if config.data.eval is None:
        found.warning(
            "checkpoint.keep_best is true, but nothing is held out to be best on",
            why="no checkpoint would ever be the best",
            way_out="set data.eval, or checkpoint.keep_best to false",
        )
        return
    every = config.eval_every if isinstance(config, RTORun) else config.train.eval_every
    if plan.save_every and (not every or plan.save_every % every):
        evaluated = f"every {every} steps" if every else "only at the end"
        found.warning(
            f"checkpoint.keep_best is true, and the run saves every {plan.save_every} steps but evaluates {evaluated}",
            why="only a checkpoint whose step is evaluated can be the best",
            way_out="make save_every a multiple of eval_every",
        )
