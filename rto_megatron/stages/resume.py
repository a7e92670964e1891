"""A run that stops, by plan or by accident, and goes on where it stopped.

Whatever is random is keyed by seed, purpose and step, and data order likewise. So a step count, the weights, the
optimizers' states and `progress` are all that moves, and a run that takes them up ends with the bits of one that was
never stopped: in float32, in the same layout.
"""

import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from rto_megatron.config.load import dump_run
from rto_megatron.config.run import DPORun, RewardRun, RTORun, SFTRun
from rto_megatron.data.readers import digest
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import (
    TRACKER,
    Checkpoint,
    Manifest,
    load_optimizer,
    load_weights,
    newest_step,
    open_checkpoint,
)
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.runtime import is_main
from rto_megatron.distributed.save import Saved, Saver
from rto_megatron.errors import CheckpointError, ConfigError, StoppedToContinue
from rto_megatron.metric_names import METRICS
from rto_megatron.metrics import Console

TrainingRun = SFTRun | DPORun | RewardRun | RTORun

FREE = (
    "run_dir",
    "parallel.",
    "compute.",
    "checkpoint.",
    "eval_every",
    "grader",
    "train.eval_every",
    "schedule.",
    "credit.",
    "alarms.",
)
"""Beginnings of settings that a run may change on its way: where and how it is computed, not what."""

FIXED = ("schedule.staleness", "schedule.minibatches", "checkpoint.best_metric")
"""Settings that it may not change though they begin so."""

FIXED_IF_LOGICAL = ("schedule.lanes", "schedule.slice_steps")
"""Likewise where minibatches are filled in the order in which responses end, which these decide too."""

NEWER = {
    "schedule.staleness": 0,
    "schedule.minibatches": "random",
    "ppo.importance_cap": 2.0,
    "checkpoint.best_metric": None,
    "dpo.length_coef": 0.0,
    "dpo.margin": 0.0,
    "dpo.drift_coef": 0.5,
    "drto.radius": 0.0,
    "drto.divergence": "kl",
    "drto.span_tokens": 8,
    "rollout.kv_block_tokens": 0,
}
"""Settings that a run of an earlier version does not name, and what it did."""

COMPARED_BY_CONTENT = (
    "start",
    "policy",
    "reference",
    "dpo",
    "reward_model",
    "critic",
    "data.train",
    "data.eval",
    "tokenizer.path",
    "tokenizer.chat_template",
)
"""Paths: they may differ if what lies there is the same."""

LENGTHS = ("num_steps", "train.num_epochs", "train.max_steps")
"""A run may be made longer; its learning-rate schedule becomes that of the new length."""

ALARM = "alarm."
"""Before the names of alarms among the numbers of a manifest."""


@dataclass(kw_only=True)
class Progress:
    """What moves from step to step beside weights and optimizers."""

    step: int = 0
    """How many steps are done."""
    kl_coef: float | None = None
    """Of an adaptive KL controller; None where the stage has none."""
    lanes: int | None = None
    """Decode batches of a step, where minibatches are filled in the order in which responses end."""
    best: float | None = None
    """The best held-out number at which a checkpoint was saved, with checkpoint.keep_best."""
    first_entropy: float | None = None
    """Of the policy in the run's first step, nats: what its later entropy is compared with."""
    alarms: dict[str, float] = field(default_factory=dict)
    """States of health alarms that ring or may begin to; see `algorithms/alarms.py`."""

    def numbers(self) -> dict[str, float]:
        """As a manifest holds them."""
        plain = {n: value for n, value in vars(self).items() if n not in ("step", "alarms") and value is not None}
        return plain | {ALARM + name: state for name, state in self.alarms.items()}

    @classmethod
    def of_numbers(cls, step: int, numbers: Mapping[str, float]) -> "Progress":
        """What a manifest holds."""
        alarms = {name.removeprefix(ALARM): state for name, state in numbers.items() if name.startswith(ALARM)}
        plain: dict[str, Any] = {name: value for name, value in numbers.items() if not name.startswith(ALARM)}
        return cls(step=step, **plain, alarms=alarms)


class Checkpoints:
    """The checkpoints of a running stage: what to take up, when to save, whether to stop."""

    def __init__(
        self,
        config: TrainingRun,
        trained: Mapping[str, Trainable | None],
        make_manifest: Callable[[], Manifest],
        tokenizer: Tokenizer,
        num_steps: int,
    ) -> None:
        """Begin.

        Args:
            trained: role -> model and optimizer; the same roles on all ranks, None where a rank has no part.
            make_manifest: what a checkpoint says of itself; step, config, optimizers and progress are filled in.
            num_steps: of the whole run; the last one is saved in any case.
        """
        self.config, self.trained, self.make_manifest = config, trained, make_manifest
        self.num_steps, self.best_metric = num_steps, best_metric_of(config)
        self._saver = Saver(config.run_dir, config.checkpoint, tokenizer.save)
        self._first_step = 0
        self._reported: Saved | None = None

    def take_up(self, own: Checkpoint | None, progress: Progress) -> Progress:
        """Load weights and optimizers of the run's own checkpoint, if there is one; where to go on.

        Args:
            progress: where a fresh run begins.

        Raises:
            CheckpointError: a piece of state is missing or damaged.
        """
        if own is None:
            return progress
        if missing := sorted(progress.numbers().keys() - own.manifest.progress.keys()):
            raise CheckpointError(f"{own.folder}/checkpoint.json: lacks progress.{missing[0]}; train again")
        begun = own.manifest.progress
        if progress.lanes != begun.get("lanes"):
            raise ConfigError(
                f"schedule.lanes: a step has {progress.lanes} on these ranks, but the run in {self.config.run_dir} "
                f"began with {begun['lanes']}, which decide its logical minibatches; set schedule.lanes to that"
            )
        for role, trainable in self.trained.items():
            load_weights(trainable.model if trainable else None, own, role)
            if self.config.checkpoint.resume == "all":
                load_optimizer(trainable, own, role)
            elif trainable:
                trainable.optimizer.reload_model_params()
        self._first_step = own.manifest.step
        return Progress.of_numbers(own.manifest.step, begun)

    def after(
        self,
        progress: Progress,
        *,
        held_out: Mapping[str, float] | None = None,
        hand_over: Callable[[Path], None] | None = None,
    ) -> dict[str, float]:
        """Save if it is time, once `progress.step` steps are done; the numbers of a save that was completed.

        Args:
            held_out: metrics, among them that by which the best is kept if it has just been measured.
            hand_over: writes what the next step has got already into the folder of a checkpoint; on the main rank.

        Raises:
            StoppedToContinue: the run was asked to stop; its state is saved.
        """
        if progress.step == self._first_step:
            if stop_requested():
                raise StoppedToContinue(f"{self.config.run_dir}: asked to stop before its first step; start it again")
            return {}
        self._saver.poll()
        every, last = self.config.checkpoint.save_every, progress.step == self.num_steps
        stop = stop_requested() and not last
        if last or stop or (every and progress.step % every == 0):
            is_best = self._is_best(progress, (held_out or {}).get(self.best_metric))
            optimizers = not last or self.config.checkpoint.optimizer_at_end
            self._save(progress, is_best=is_best, optimizers=optimizers, hand_over=hand_over)
        if last or stop:
            self._saver.wait()
        if stop:
            raise StoppedToContinue(
                f"{self.config.run_dir}: asked to stop, saved after step {progress.step} of {self.num_steps}; "
                "the same command goes on from there"
            )
        return self._report()

    def _is_best(self, progress: Progress, held_out: float | None) -> bool:
        if not self.config.checkpoint.keep_best or held_out is None:
            return False
        sign = -1 if LOWER_IS_BETTER.search(self.best_metric) else 1
        is_best = progress.best is None or sign * held_out > sign * progress.best
        if is_best:
            progress.best = held_out
        return is_best

    def _save(
        self,
        progress: Progress,
        *,
        is_best: bool,
        optimizers: bool,
        hand_over: Callable[[Path], None] | None,
    ) -> None:
        trained = self.trained if optimizers else {}
        manifest = replace(
            self.make_manifest(),
            step=progress.step,
            config=dump_run(self.config),
            optimizers=tuple(trained),
            progress=progress.numbers(),
        )
        models = {role: trainable.model if trainable else None for role, trainable in self.trained.items()}
        self._saver.start(manifest, models, trained, is_best=is_best, write_more=hand_over)

    def _report(self) -> dict[str, float]:
        saved = self._saver.last
        if saved is None or saved is self._reported:
            return {}
        self._reported = saved
        return {"checkpoint/write_seconds": saved.seconds, "checkpoint/bytes": saved.num_bytes}

    @property
    def last_folder(self) -> Path:
        """Of the newest complete checkpoint, once there is one."""
        assert self._saver.last is not None
        return self._saver.last.folder


LOWER_IS_BETTER = re.compile("loss$|kl$|length$|truncated_frac$")
"""Names of the held-out metrics of which the lowest is the best."""


def best_metric_of(config: TrainingRun) -> str:
    """The held-out metric by which the best checkpoint is known.

    Raises:
        ConfigError: checkpoint.best_metric names none that this run measures.
    """
    if isinstance(config, RTORun):
        beginning, default = "eval/", "eval/score"
    else:
        group = {SFTRun: "sft", DPORun: "dpo", RewardRun: "reward_model"}[type(config)]
        beginning, default = f"{group}/eval_", f"{group}/eval_loss"
    name = config.checkpoint.best_metric or default
    known = [metric for metric in METRICS if metric.startswith(beginning)]
    if isinstance(config, RTORun):
        without = [] if config.grader else ["eval/grade", "eval/grade_win_rate"]
        without += [] if config.rto.score_coef else ["eval/win_rate"]
        known = [metric for metric in known if metric not in without]
    if name not in known:
        raise ConfigError(
            f"checkpoint.best_metric must be a held-out metric of this run ({', '.join(known)}), got {name}"
        )
    return name


def find_own(config: TrainingRun, stage: str) -> Checkpoint | None:
    """The checkpoint that an earlier start of this run has left in its run folder.

    Raises:
        ConfigError: the folder holds another run: of another stage or with other settings.
    """
    best_metric_of(config)
    root = config.run_dir / "checkpoints"
    # a run that was killed before its first tracker was written, or whose tracker is lost, has its steps all the same
    newest = config.run_dir if (root / TRACKER).exists() else newest_step(root)
    if newest is None:
        return None
    own = open_checkpoint(newest)
    if own.manifest.stage != stage:
        raise ConfigError(
            f"run_dir {config.run_dir}: holds a run of the stage {own.manifest.stage}, this is {stage}; "
            "set another run_dir, or remove the folder"
        )
    begun, now = (_flat(yaml.safe_load(text)) for text in (own.manifest.config, dump_run(config)))
    begun = {name: value for name, value in NEWER.items() if name in now} | begun
    fixed = FIXED
    if isinstance(config, RTORun):
        fixed += FIXED_IF_LOGICAL if config.schedule.minibatches == "logical" else ()
    for name in sorted(begun.keys() | now.keys()):
        free = name in (*COMPARED_BY_CONTENT, *LENGTHS) or (name.startswith(FREE) and name not in fixed)
        if not free and begun.get(name) != now.get(name):
            raise ConfigError(
                f"{name} is {_shown(now, name)}, but the run in {config.run_dir} began with {_shown(begun, name)}, "
                "and a run goes on as it began; set it back, set another run_dir, or remove the folder"
            )
    return own


def own_checkpoint(config: TrainingRun, stage: str) -> Checkpoint | None:
    """`find_own`, agreed upon by all ranks.

    Raises:
        CheckpointError: ranks see different checkpoints, as on machines that do not share the run folder.
    """
    own = find_own(config, stage)
    seen = gather_objects((own.folder.name, own.id) if own else None)
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise CheckpointError(
                f"run_dir {config.run_dir}: must be one folder for all ranks, but rank 0 finds "
                f"{seen[0] or 'no checkpoint'} and rank {rank} {other or 'none'}; put it on a shared file system"
            )
    return own


def check_unchanged(own: Checkpoint | None, manifest: Manifest) -> None:
    """Raise CheckpointError unless a run that goes on finds the data, tokenizer and parents that it began with."""
    if own is None:
        return
    for kind, begun, now in (
        ("data", own.manifest.data, manifest.data),
        ("checkpoint", own.manifest.parents, manifest.parents),
        ("tokenizer", {"tokenizer": own.manifest.tokenizer}, {"tokenizer": manifest.tokenizer}),
    ):
        for name in sorted(begun.keys() | now.keys()):
            if begun.get(name) != now.get(name):
                what = f"data.{name}" if kind == "data" else name
                raise CheckpointError(
                    f"{own.folder}: the run began with another {kind} as {what} (digest {begun.get(name)}, now "
                    f"{now.get(name)}), and a run goes on as it began; bring it back, or set another run_dir"
                )


def is_finished(own: Checkpoint | None, num_steps: int) -> bool:
    """Whether there is nothing left to do, and say so.

    Raises:
        ConfigError: the run is longer than it is asked to be.
    """
    if own is None or own.manifest.step < num_steps:
        return False
    if own.manifest.step > num_steps:
        raise ConfigError(
            f"{own.folder}: has {own.manifest.step} steps, more than the {num_steps} of this config; "
            f"set another run_dir, or remove {own.folder.parents[1]}"
        )
    Console(is_main()).say(
        f"{own.folder}: all {num_steps} steps are done; to do them again, set another run_dir or remove "
        f"{own.folder.parents[1]}"
    )
    return True


def digests(rows: Sequence[Any], held_out: Sequence[Any]) -> dict[str, str]:
    """Of training rows and held-out rows, as a manifest holds them."""
    return {"train": digest(rows)} | ({"eval": digest(held_out)} if held_out else {})


_asked_to_stop: list[int] = []
"""The signals that came."""


@contextmanager
def listening_for_stop() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 do not end the process but ask the run to save and stop at the end of its step."""

    def note(number: int, _: FrameType | None) -> None:
        _asked_to_stop.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        _asked_to_stop.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Whether any rank has been asked; all ranks get the same answer."""
    return any(gather_objects(bool(_asked_to_stop)))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {key: item for name, inner in value.items() for key, item in _flat(inner, f"{prefix}{name}.").items()}


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not set"
