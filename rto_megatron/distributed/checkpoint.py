"""Checkpoints: written beside, hashed, synced, renamed, and named by the tracker last.

    RUN/checkpoints/latest.txt                  name of the newest complete step
    RUN/checkpoints/step_00000020/
        checkpoint.json                         the Manifest
        tokenizer/                              what made the tokens
        policy/  value/  critic/                one folder a role, in megatron-core's distributed format
        integrity.json                          sha256 of every file above

Any layout loads any layout. The step's name, its hashes and the tracker are only written when all
ranks have written their part, so a killed or failed save leaves the last good checkpoint named.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from rto_megatron.config.model import ModelConfig, RopeScaling
from rto_megatron.distributed.collectives import broadcast_object, gather_objects
from rto_megatron.distributed.runtime import is_main, rank, world_size
from rto_megatron.errors import CheckpointError

FORMAT = 2
TRACKER = "latest.txt"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself."""

    stage: str
    step: int
    models: dict[str, ModelConfig]
    """Role -> architecture. Each role has a folder of weights: `policy`, `value` or `critic`."""
    tokenizer: str
    """Digest of tokenizer and chat template."""
    parents: dict[str, str] = field(default_factory=dict)
    """Role -> id of the checkpoint that it came from."""
    score_mean: float = 0.0
    """Of a reward model's raw scores: on its held-out rows, or its training rows where there are none."""
    score_std: float = 1.0
    """Standard deviation of the same."""

    def architecture_for(self, kind: str) -> ModelConfig:
        """Of that role."""
        return self.models[self.role_for(kind)]

    def role_for(self, kind: str) -> str:
        """The role that a policy or a value model starts from: its own kind if it is there, else the backbone."""
        wanted = ("policy",) if kind == "policy" else ("value", "critic")
        return next((role for role in wanted if role in self.models), next(iter(self.models)))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest
    id: str
    """Hash of its hashes: two checkpoints with one id hold the same bytes."""

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a run folder (its newest) or at a step folder; weights are not read yet.

    Raises:
        CheckpointError: there is none, or it is not complete.
    """
    folder = _step_folder(path)
    try:
        text = (folder / "checkpoint.json").read_bytes()
        raw = json.loads(text)
        integrity = (folder / "integrity.json").read_bytes()
    except FileNotFoundError as missing:
        raise CheckpointError(
            f"{folder}: the checkpoint is not complete, {Path(missing.filename).name} is missing"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/checkpoint.json: cannot be read ({error})") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise CheckpointError(f"{folder}/checkpoint.json: format must be {FORMAT}; it was written by another version")
    if hashlib.sha256(text).hexdigest() != _written_hashes(folder).get("checkpoint.json"):
        raise CheckpointError(_changed(folder / "checkpoint.json"))
    models = {role: _architecture(model) for role, model in raw.pop("models").items()}
    return Checkpoint(folder, Manifest(**raw, models=models), hashlib.sha256(integrity).hexdigest()[:16])


def _architecture(raw: dict[str, Any]) -> ModelConfig:
    scaling = raw.pop("rope_scaling")
    return ModelConfig(**raw, rope_scaling=RopeScaling(**scaling) if scaling else None)


def _step_folder(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run folder; run the stage that writes it first")
    if (path / "checkpoint.json").exists() or (path / "integrity.json").exists():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        return root / (root / TRACKER).read_text().strip()
    except FileNotFoundError:
        hint = ""
        if (path / "config.json").exists():
            hint = "; it looks like a Hugging Face folder: bring it in with `python -m rto_megatron convert`"
        raise CheckpointError(f"{path}: holds no finished checkpoint ({root / TRACKER} is missing){hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: must be a run folder, but {root / TRACKER} cannot be read ({error})") from None


def save_checkpoint(
    run_dir: Path,
    manifest: Manifest,
    models: Mapping[str, MegatronModule],
    save_tokenizer: Callable[[Path], None],
) -> Path:
    """Write all roles' weights as step `manifest.step` of a run, and name it as the newest.

    Raises:
        CheckpointError: some rank could not write; the tracker still names the step before.
    """
    root = run_dir / "checkpoints"
    draft = root / f"step_{manifest.step:08d}.tmp"
    with _all_or_none(draft):
        if is_main():
            shutil.rmtree(draft, ignore_errors=True)
            for role in models:
                (draft / role).mkdir(parents=True)
            save_tokenizer(draft / "tokenizer")
            text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
            (draft / "checkpoint.json").write_text(text)
    for role, model in models.items():
        with _all_or_none(draft):
            dist_checkpointing.save(_weights(model), str(draft / role))
    with _all_or_none(draft):
        files = _hash_files(draft)
        if is_main():
            (draft / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}, indent=1))
            _sync_tree(draft)
            final = _free_name(root, manifest.step)
            draft.rename(final)
            _replace(root / TRACKER, final.name + "\n")
            for older in root.glob(f"step_{manifest.step:08d}*"):
                if older != final:
                    shutil.rmtree(older)
    return _step_folder(run_dir)


def _free_name(root: Path, step: int) -> Path:
    """A folder for this step that is not there yet: the one that the tracker names stays until the new one is named."""
    path, tries = root / f"step_{step:08d}", itertools.count(1)
    while path.exists():
        path = root / f"step_{step:08d}.{next(tries)}"
    return path


@contextlib.contextmanager
def _all_or_none(draft: Path) -> Any:
    """Let all ranks go on, or all fail with the first rank's reason and the draft removed."""
    reason = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        # megatron-core's messages hold whole tracebacks, whose last line says what happened
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" )")]
        reason = f"rank {rank()}: {type(error).__name__}: {lines[-1] if lines else 'without a message'}"
        with contextlib.suppress(OSError):  # torch does not say that the disk is full
            reason += f"; {shutil.disk_usage(draft.parent).free >> 20} MiB are free there"
    reasons = [r for r in gather_objects(reason) if r]
    if reasons:
        if is_main():
            shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"{draft}: the checkpoint could not be written, the one before is untouched ({reasons[0]})"
        )


def load_weights(model: MegatronModule, checkpoint: Checkpoint, role: str) -> None:
    """Fill a model from a checkpoint written in any layout; hashes are checked first.

    A value model takes its backbone from a policy and then keeps its fresh head; a policy leaves a
    value model's head behind.

    Args:
        role: the folder to read; one of the manifest's.

    Raises:
        CheckpointError: a file is missing or changed, or the weights do not fit the model.
    """
    _verify(checkpoint)
    folder, state = str(checkpoint.folder / role), _weights(model)
    stored = set(dist_checkpointing.load_tensors_metadata(folder))
    if "value_head.weight" not in stored:
        state = {name: value for name, value in state.items() if not value.key.startswith("value_head.")}
    absent = sorted(key for keys in gather_objects(sorted({v.key for v in state.values()} - stored)) for key in keys)
    if absent:
        hint = "; a value model has no output layer, start from a policy" if "output_layer" in absent[0] else ""
        raise CheckpointError(f"{folder}: lacks {absent[0]}{hint}")
    try:
        loaded: Any = dist_checkpointing.load(state, folder)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder}: cannot be loaded into this model ({error})") from None
    model.load_state_dict(loaded, strict=False)


def _weights(model: MegatronModule) -> dict[str, Any]:
    """The model's sharded weights; extra state is Transformer Engine's alone and would tie a checkpoint to it."""
    return {name: value for name, value in model.sharded_state_dict().items() if "_extra_state" not in name}


def _verify(checkpoint: Checkpoint) -> None:
    """Compare all files with their hashes: loading writes into live weights, so it must not fail half-way."""
    have = _hash_files(checkpoint.folder)
    for name, digest in sorted(_written_hashes(checkpoint.folder).items()):
        if name not in have:
            raise CheckpointError(
                f"{checkpoint.folder / name}: is missing; the checkpoint is damaged, restore it or train again"
            )
        if have[name] != digest:
            raise CheckpointError(_changed(checkpoint.folder / name))


def _changed(path: Path) -> str:
    return f"{path}: changed since it was saved; the checkpoint is damaged, restore it or train again"


def _written_hashes(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file, as it was saved."""
    path = folder / "integrity.json"
    try:
        return dict(json.loads(path.read_text())["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: cannot be read; the checkpoint is damaged, restore it or train again") from None


def _hash_files(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file but the hashes; each rank reads its share of the files."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "integrity.json")
    names = broadcast_object(names)
    mine = {}
    for name in names[rank() :: world_size()]:
        with open(folder / name, "rb") as file:
            mine[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest for part in gather_objects(mine) for name, digest in part.items()}


def _sync_tree(folder: Path) -> None:
    """Force all files below `folder`, and the folders that name them, to disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write a small file so that readers see the old text or the new one."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
