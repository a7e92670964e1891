"""Runs over one another: their scalars out of TensorBoard's event files, put into `curves.html`, which draws them."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rto_megatron.errors import ConfigError, DataError
from rto_megatron.metric_names import METRICS
from rto_megatron.pages.render import render, visible

SEED = r"[-_.]?seed[-_=]?\d+"
"""What the names of runs of one group differ in."""
MOST_NUMBERS = 400_000
"""Of a page, about 3 MB: with more, neighbouring steps are put together."""
KL = {"eval": "eval/kl", "": "kl/sequence"}
"""First part of a metric's name -> the metric that is its KL axis."""
DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The scalars of one run."""

    name: str
    scalars: dict[str, dict[int, float]]
    """Metric -> number by step, in order; NaN and infinities are left out."""
    samples_per_step: int | None = None
    """None where the run's config is not there, or has no such number."""
    notes: list[str] = field(default_factory=list)


def read_curves(run_dir: Path, name: str) -> Curves:
    """Read all scalars of a run.

    Args:
        run_dir: a run folder, or any folder with event files.

    Raises:
        DataError: there is no such folder, or no number in it.
    """
    folder = run_dir / "tensorboard" if (run_dir / "tensorboard").is_dir() else run_dir
    if not folder.is_dir():
        raise DataError(f"{run_dir}: there is no such run folder; paths are relative to the working directory")
    files = sorted(path for path in folder.iterdir() if "tfevents" in path.name)
    if not files:
        nested = sorted({path.parent.parent for path in run_dir.glob("*/tensorboard/*tfevents*")})
        hint = f"; name the runs in it: {' '.join(map(str, nested[:4]))}" if nested else ""
        raise DataError(f"{run_dir}: holds no event files of TensorBoard (*tfevents*){hint}")
    notes: list[str] = []
    found = _read(folder, files, notes)
    scalars: dict[str, dict[int, float]] = {}
    for metric, values in found.items():
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            notes.append(f"{name}: {metric} is no finite number at {len(values) - len(finite)} steps, left out")
        if finite:
            scalars[metric] = dict(sorted(finite.items()))
    if not scalars:
        raise DataError(f"{folder}: its event files hold no scalar; wait until the run's first step has ended")
    return Curves(name=name, scalars=scalars, samples_per_step=_samples_per_step(run_dir), notes=notes)


def _read(folder: Path, files: list[Path], notes: list[str]) -> dict[str, dict[int, float]]:
    """Metric -> value by step, as TensorBoard shows them: a step that was run again counts as it was run last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.CRITICAL)  # what it warns of is in our notes
    for path in files:
        if cut_off := _bytes_after_last_record(path):
            notes.append(f"{path.name}: {cut_off} bytes at its end are damaged or cut off, and are left out")
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    try:
        accumulator.Reload()
    except Exception as error:  # protobuf, and whatever else the library meets in a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{folder}: TensorBoard cannot read its event files: {reason}; remove the damaged one"
        ) from None
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


def _bytes_after_last_record(path: Path) -> int:
    """Of an event file: records are 8 bytes of length, 4 of checksum, the data, and 4 of checksum."""
    size, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at < size:
            head = file.read(12)
            end = at + 16 + int.from_bytes(head[:8], "little")
            if len(head) < 12 or end > size:
                break
            file.seek(at := end)
    return size - at


def _samples_per_step(run_dir: Path) -> int | None:
    """From the run's resolved config."""
    try:
        config = yaml.safe_load((run_dir / "run.yaml").read_text(encoding="utf-8"))
        if "prompts_per_step" in config:
            return int(config["prompts_per_step"]) * int(config["samples_per_prompt"])
        return int(config["train"]["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def names_of(runs: Sequence[Path]) -> list[str]:
    """Names that tell runs apart: their paths without what all have in common.

    Raises:
        ConfigError: a run is named twice.
    """
    paths = [run.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"report curves takes each run once, got {path} twice")
    parts = [path.parts for path in paths]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return ["/".join(part[common:]) for part in parts]


def groups_of(names: Sequence[str], pattern: str | None) -> list[str]:
    """The group of each run: its name without what `pattern` matches; None puts each run into its own."""
    if pattern is None:
        return list(names)
    try:
        cut = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"group must be a regular expression, got {pattern!r}: {error}") from None
    return [re.sub("/{2,}", "/", cut.sub("", name)).strip("/") or name for name in names]


def page(runs: Sequence[Curves], groups: Sequence[str], *, metric: str | None = None) -> str:
    """The whole HTML page.

    Args:
        groups: of each run.
        metric: shown first; None picks one.

    Raises:
        ConfigError: no run has it.
    """
    metrics = sorted({name for run in runs for name in run.scalars})
    if metric is not None and metric not in metrics:
        near = [name for name in metrics if metric.split("/")[-1] in name] or metrics
        raise ConfigError(f"metric must be one that a run has, such as {', '.join(near[:8])}; got {metric!r}")
    notes = [note for run in runs for note in run.notes]
    count = sum(len(values) for run in runs for values in run.scalars.values())
    every = -(-count // MOST_NUMBERS)
    if every > 1:
        notes.append(f"{count:,} numbers are too many for a page: each shown is a mean of {every} steps")
    preferred = ("eval/score", "reward/total_sum", "dpo/loss", "reward_model/loss", "sft/loss")
    return render(
        Path(__file__).with_name("curves.html"),
        name=f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
        notes=[visible(note) for note in notes],
        data={
            "first": metric or next((name for name in preferred if name in metrics), metrics[0]),
            "metrics": [{"name": visible(name), "key": name, "meaning": METRICS.get(name, "")} for name in metrics],
            "kl": KL,
            "runs": [
                {
                    "name": visible(run.name),
                    "group": visible(group),
                    "samples": run.samples_per_step,
                    "scalars": {name: _columns(values, every) for name, values in run.scalars.items()},
                }
                for run, group in zip(runs, groups, strict=True)
            ],
        },
    )


def _columns(values: dict[int, float], every: int) -> list[list[Any]]:
    """Steps and values; with `every` above 1 the mean of so many neighbours, at the last one's step."""
    items = list(values.items())
    blocks = [items[start : start + every] for start in range(0, len(items), every)]
    means = [sum(value for _, value in block) / len(block) for block in blocks]
    return [[block[-1][0] for block in blocks], [float(f"{mean:.{DIGITS}g}") for mean in means]]
