"""What a checkpoint on disk is, and how it is read; `distributed/save.py` writes it.

    RUN/checkpoints/latest.txt                  name of the newest complete step; best.txt that of the best
    RUN/checkpoints/step_00000020/
        checkpoint.json                         the Manifest
        tokenizer/                              what made the tokens
        policy/  value/  critic/                weights, a folder a role, in megatron-core's distributed format
        policy_optimizer/  ...                  optimizer state of a role that was trained, likewise
        integrity.json                          sha256 of every file above

Any layout loads any layout. Nothing is read whose hash was not compared first.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig, RopeScaling
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.optimizer import Trainable, load_optimizer_state, optimizer_state, sharded_weights
from rto_megatron.distributed.runtime import rank, world_size
from rto_megatron.distributed.shards import is_adapter, is_own
from rto_megatron.errors import CheckpointError

FORMAT = 3
TRACKER = "latest.txt"
STEP_NAME = re.compile(r"step_\d{8,}(\.\d+)?")
"""Of the folder of a complete checkpoint; drafts, and what a user copied aside, have other names."""
BEST = "best.txt"


@dataclass(frozen=True, kw_only=True)
class FrozenWeights:
    """The frozen weights that a role's adapters belong to, which its own folder does not hold."""

    id: str
    """Of their checkpoint."""
    folder: str
    """Of that checkpoint's step, when the adapters were saved; relative to the folder of the adapters' own step."""
    role: str
    lora: LoRAConfig
    """Of the adapters."""


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
    bases: dict[str, FrozenWeights] = field(default_factory=dict)
    """Role -> what its adapters belong to; a role that is not here has all its weights."""
    data: dict[str, str] = field(default_factory=dict)
    """Which data (`train`, `eval`) -> digest of the rows that were read, as token ids."""
    config: str = ""
    """The resolved config, as YAML."""
    optimizers: tuple[str, ...] = ()
    """Roles whose optimizer state is here too."""
    progress: dict[str, float] = field(default_factory=dict)
    """What else moves from step to step. Random streams do not: each is keyed by seed, purpose and step."""
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
            f"{folder}: the checkpoint is not complete, {Path(missing.filename).name} is missing; {_way_out(folder)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/checkpoint.json: cannot be read ({error}); the checkpoint is damaged, {_way_out(folder)}"
        ) from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{folder}/checkpoint.json: format must be {FORMAT}, but it was written by another version; train it "
            "again, or convert it to a Hugging Face folder with that version, and back with this one"
        )
    if hashlib.sha256(text).hexdigest() != written_hashes(folder).get("checkpoint.json"):
        raise CheckpointError(_changed(folder / "checkpoint.json"))
    try:
        models = {role: _architecture(model) for role, model in raw.pop("models").items()}
        raw["optimizers"] = tuple(raw["optimizers"])
        raw["bases"] = {role: _frozen_weights(base) for role, base in raw.get("bases", {}).items()}
        manifest = Manifest(**raw, models=models)
        if not (isinstance(manifest.step, int) and manifest.step >= 0 and models and manifest.score_std > 0):
            raise ValueError("step, models or score_std")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/checkpoint.json: is not what this version writes ({error}); restore it or train again"
        ) from None
    return Checkpoint(folder, manifest, hashlib.sha256(integrity).hexdigest()[:16])


def _architecture(raw: dict[str, Any]) -> ModelConfig:
    scaling = raw.pop("rope_scaling")
    return ModelConfig(**raw, rope_scaling=RopeScaling(**scaling) if scaling else None)


def _frozen_weights(raw: dict[str, Any]) -> FrozenWeights:
    lora = raw.pop("lora")
    return FrozenWeights(**raw, lora=LoRAConfig(**lora | {"targets": tuple(lora["targets"])}))


def open_base(checkpoint: Checkpoint, base: FrozenWeights) -> Checkpoint:
    """The checkpoint whose weights the adapters of `checkpoint` belong to.

    Raises:
        CheckpointError: it is not where it was, or another one is there.
    """
    folder = Path(os.path.normpath(checkpoint.folder / base.folder))
    hint = f"adapters are nothing without it; bring the checkpoint with id {base.id} back, or train again"
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint.folder}: its adapters belong to {folder}, which is not there; {hint}")
    found = open_checkpoint(folder)
    if found.id != base.id:
        raise CheckpointError(
            f"{checkpoint.folder}: its adapters belong to another checkpoint than {folder} ({found.id}); {hint}"
        )
    return found


def newest_step(root: Path) -> Path | None:
    """The newest folder of a complete checkpoint in RUN/checkpoints, named by the tracker or not; None without any."""
    steps = [path for path in root.glob("step_*") if STEP_NAME.fullmatch(path.name)]
    return max(steps, key=step_of, default=None)


def step_of(folder: Path) -> tuple[int, int]:
    """The step that a checkpoint's folder is named for, and how often that step had been saved before."""
    step, _, times = folder.name.removeprefix("step_").partition(".")
    return int(step), int(times or 0)


def _step_folder(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run folder; run the stage that writes it first")
    if (path / "checkpoint.json").exists() or (path / "integrity.json").exists():
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        name = (root / TRACKER).read_text().strip()
        if not STEP_NAME.fullmatch(name):
            raise CheckpointError(
                f"{root / TRACKER}: must hold the name of a step's folder, like step_00000020, got {name[:80]!r}; name "
                "the newest one that is there"
            )
        return root / name
    except FileNotFoundError:
        hint = ""
        if (path / "config.json").exists():
            hint = "; it looks like a Hugging Face folder: bring it in with `python -m rto_megatron convert`"
        raise CheckpointError(f"{path}: holds no finished checkpoint ({root / TRACKER} is missing){hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: must be a run folder, but {root / TRACKER} cannot be read ({error})") from None


def load_weights(model: MegatronModule | None, checkpoint: Checkpoint, role: str, *, base: bool = False) -> None:
    """Fill a model from a checkpoint written in any layout; hashes are checked first. All ranks of the world call.

    A value model takes its backbone from a policy and then keeps its fresh head; a policy leaves a
    value model's head behind. An adapted model takes what is its own, adapters and head.

    Args:
        model: None on ranks that hold no part of it.
        role: the folder to read; one of the manifest's.
        base: of an adapted model, take all but the adapters.

    Raises:
        CheckpointError: a file is missing or changed, or the weights do not fit the model.
    """
    verify(checkpoint, role)
    folder, state = str(checkpoint.folder / role), {}
    if model is not None:
        state = base_weights_of(model) if base else weights_of(model)
    stored = set(dist_checkpointing.load_tensors_metadata(folder))
    if "value_head.weight" not in stored:
        state = {name: value for name, value in state.items() if not value.key.startswith("value_head.")}
    absent = sorted(key for keys in gather_objects(sorted({v.key for v in state.values()} - stored)) for key in keys)
    if absent:
        hint = "; a value model has no output layer, start from a policy" if "output_layer" in absent[0] else ""
        raise CheckpointError(f"{folder}: lacks {absent[0]}{hint}")
    try:
        loaded: Any = dist_checkpointing.load(state, folder, validate_access_integrity=False)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder}: cannot be loaded into this model ({error})") from None
    if model is not None:
        model.load_state_dict(loaded, strict=False)


def weights_of(model: MegatronModule) -> dict[str, Any]:
    """The sharded weights that a checkpoint of the model holds: all, or of an adapted model what is its own."""
    state = _without_extra_state(model)
    adapted = any(is_adapter(name) for name in state)
    return {name: value for name, value in state.items() if is_own(name) or not adapted}


def base_weights_of(model: MegatronModule) -> dict[str, Any]:
    """The model's sharded weights but its adapters: what the checkpoint that these belong to may hold."""
    return {name: value for name, value in _without_extra_state(model).items() if not is_adapter(name)}


def _without_extra_state(model: MegatronModule) -> dict[str, Any]:
    """All sharded weights. Extra state is Transformer Engine's alone and would tie a checkpoint to it."""
    return {name: value for name, value in sharded_weights(model).items() if "_extra_state" not in name}


def load_optimizer(trainable: Trainable | None, checkpoint: Checkpoint, role: str) -> None:
    """Take up the optimizer state of a role, written in any layout; hashes are checked first. All ranks call.

    Args:
        trainable: None on ranks that hold no part of it.

    Raises:
        CheckpointError: the checkpoint lacks it, it is damaged, or it is of another kind of optimizer or model.
    """
    if role not in checkpoint.manifest.optimizers:
        raise CheckpointError(
            f"{checkpoint.folder}: holds no optimizer state of the {role}: it was saved at the end of a run with "
            "checkpoint.optimizer_at_end false. Set checkpoint.resume to weights to go on with fresh optimizers"
        )
    verify(checkpoint, f"{role}_optimizer")
    folder = str(checkpoint.folder / f"{role}_optimizer")
    state = {"optimizer": optimizer_state(trainable, loading=True)} if trainable is not None else {}
    try:
        loaded: Any = dist_checkpointing.load(state, folder, strict="raise_all")
        if trainable is not None:
            load_optimizer_state(trainable, loaded["optimizer"])
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder}: cannot be loaded into this optimizer ({error})") from None


def largest_difference(first: Path, second: Path) -> float:
    """The largest `relative_difference` of two checkpoint folders' numbers; infinite where one has others."""
    mine, its = (dict(leaves(dist_checkpointing.load_plain_tensors(str(folder)))) for folder in (first, second))
    if mine.keys() != its.keys():
        return float("inf")
    return max((relative_difference(value, its[name]) for name, value in mine.items()), default=0.0)


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 of all weights and optimizer states, by name: one value for equal bits, whatever layout wrote them."""
    digest = hashlib.sha256()
    for part in (*checkpoint.manifest.models, *(f"{role}_optimizer" for role in checkpoint.manifest.optimizers)):
        found = dict(leaves(dist_checkpointing.load_plain_tensors(str(checkpoint.folder / part)), part))
        for name in sorted(found):
            value = torch.as_tensor(found[name]).contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def relative_difference(first: Any, second: Any) -> float:
    """max |a - b| / (1 + |a|) of two tensors or lists of numbers; infinite where only one of a, b is a finite number.

    NaN equals NaN: it is asked whether two runs hold the same.
    """
    a, b = torch.as_tensor(first).double(), torch.as_tensor(second).double()
    same = (a == b) | (a.isnan() & b.isnan())
    off = ((a - b).abs() / (1 + a.abs())).nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(same, 0.0)
    return off.max().item() if off.numel() else 0.0


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and numbers of a nested state, by path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}/{key}")
    elif isinstance(value, Tensor | int | float):
        yield name, value


def verify(checkpoint: Checkpoint, part: str) -> None:
    """Compare the files of a folder of the checkpoint, and those beside it, with their hashes; on all ranks.

    Before anything is loaded: loading writes into live weights, so it must not fail half-way.
    """
    written = written_hashes(checkpoint.folder)
    names = [name for name in sorted(written) if name.split("/")[0] in (part, "tokenizer", name)]
    have = hash_files(checkpoint.folder, names)
    for name in names:
        check_file(checkpoint.folder / name, have.get(name), written[name])


def check_file(path: Path, found: str | None, written: str) -> None:
    """Raise CheckpointError unless a file has the hash that it was saved with; None where there is no file."""
    if found is None:
        raise CheckpointError(f"{path}: is missing; the checkpoint is damaged, {_way_out(path)}")
    if found != written:
        raise CheckpointError(_changed(path))


def _changed(path: Path) -> str:
    return f"{path}: changed since it was saved; the checkpoint is damaged, {_way_out(path)}"


def _way_out(damaged: Path) -> str:
    """What a user can do about a step's folder, or a file in it: go on from the step before, if there is one."""
    folder = next((path for path in (damaged, *damaged.parents) if STEP_NAME.fullmatch(path.name)), None)
    steps = [path for path in folder.parent.glob("step_*") if STEP_NAME.fullmatch(path.name)] if folder else []
    older = max((path for path in steps if folder and step_of(path) < step_of(folder)), key=step_of, default=None)
    other = f", write {older.name}, which lies beside it, into {older.parent / TRACKER}" if older else ""
    return f"restore it{other} or train again"


def written_hashes(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file, as it was saved."""
    path = folder / "integrity.json"
    try:
        written = json.loads(path.read_text())
        files, own = dict(written["files"].items()), written["digest"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: cannot be read; the checkpoint is damaged, {_way_out(path)}") from None
    if own != digest_of(files):
        raise CheckpointError(_changed(path))
    return files


def digest_of(files: dict[str, str]) -> str:
    """sha256 of all names and hashes: so a flipped bit in a hash is not taken for one in its file."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def hash_files(folder: Path, names: list[str]) -> dict[str, str]:
    """Relative name -> sha256, of those that exist; each rank reads its share of the files."""
    mine = {name: file_hash(folder / name) for name in names[rank() :: world_size()] if (folder / name).is_file()}
    return {name: digest for part in gather_objects(mine) for name, digest in part.items()}


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
