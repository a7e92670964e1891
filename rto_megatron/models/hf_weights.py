"""Hugging Face weights into a model, a tensor at a time, whatever the layout.

`hf_tables.py` says which Hugging Face tensors make up each weight; `weights.py` says which piece of
that weight a rank holds. So nothing here knows of tensor or pipeline ranks.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.errors import CheckpointError
from rto_megatron.models.hf_tables import TABLES, Recipe
from rto_megatron.models.weights import shards

INDEX = "model.safetensors.index.json"


class HuggingFaceFolder:
    """The safetensors files of a folder, mapped into memory: a tensor is read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._closing = ExitStack()
        self._where = self._index()

    def __enter__(self) -> "HuggingFaceFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header; the tensor is not read."""
        return tuple(self._open(self._where[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._open(self._where[name]).get_tensor(name)

    def _index(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index}: must be JSON with a weight_map, got: {error!r}") from None
            return {name: self.folder / part for name, part in parts.items()}
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            found = ", ".join(sorted(path.name for path in self.folder.iterdir())[:10]) or "an empty folder"
            raise CheckpointError(
                f"{self.folder}: needs weights as *.safetensors, found {found}; save the model again with transformers"
            )
        return {name: path for path in files for name in self._open(path).keys()}  # noqa: SIM118 - not a dict

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = self._closing.enter_context(safe_open(path, "pt"))
            except FileNotFoundError:
                raise CheckpointError(f"{path}: is missing, and {INDEX} names it; copy it again") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: must be a complete safetensors file, got: {error}") from None
        return self._files[path]


@torch.no_grad()
def load_hf(model: MegatronModule, folder: Path, config: ModelConfig) -> None:
    """Fill a model with a Hugging Face folder's weights; each rank reads what its own pieces are made of.

    Raises:
        CheckpointError: tensors are missing, have another shape, or have no place in the model.
    """
    table = TABLES[config.architecture]
    with HuggingFaceFolder(folder) as source:
        mine = {name.format(i=shard.layer) for shard in shards(model) for name in table[shard.key].names}
        _check_names(set().union(*gather_objects(mine)), source, config)
        problem = None
        try:
            _copy_weights(model, source, config)
        except CheckpointError as error:
            problem = str(error)
        raise_together(problem)


def _check_names(wanted: set[str], source: HuggingFaceFolder, config: ModelConfig) -> None:
    missing = sorted(wanted - source.names)
    if missing:
        way_out = "config.json and weights must be of one model"
        if missing == ["lm_head.weight"]:
            way_out = "set tie_word_embeddings in config.json if it shares the embedding"
        raise CheckpointError(
            f"{source.folder}: lacks {_some(missing)}, which {config.architecture} needs with {config.num_layers} "
            f"layers; {way_out}"
        )
    # a tied model's files may hold the embedding twice, and old ones hold what is computed from the config
    left = {name for name in source.names - wanted if not name.endswith("rotary_emb.inv_freq")}
    left -= {"lm_head.weight"} if config.tie_embeddings else set()
    if left:
        raise CheckpointError(
            f"{source.folder}: has {_some(sorted(left))}, which {config.architecture} has no place for with "
            f"{config.num_layers} layers; config.json and weights must be of one model"
        )


def _copy_weights(model: MegatronModule, source: HuggingFaceFolder, config: ModelConfig) -> None:
    name, whole = "", torch.empty(0)
    for shard in shards(model):
        if shard.name != name:  # pieces of one weight come one after another
            name = shard.name
            whole = _read(source, TABLES[config.architecture][shard.key], shard.layer, shard.full_shape, config)
        shard.data.copy_(whole[shard.slices])


def _read(
    source: HuggingFaceFolder, recipe: Recipe, layer: int | None, shape: Sequence[int], config: ModelConfig
) -> Tensor:
    names = [name.format(i=layer) for name in recipe.names]
    for name, part in zip(names, recipe.split(torch.empty(tuple(shape), device="meta"), config), strict=True):
        if source.shape(name) != tuple(part.shape):
            raise CheckpointError(
                f"{source.folder}: {name} must have the shape {list(part.shape)} by config.json, got "
                f"{list(source.shape(name))}; config.json and weights must be of one model"
            )
    return recipe.join([source.read(name) for name in names], config)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def raise_together(problem: str | None) -> None:
    """Let all ranks go on, or all stop with the first one's problem."""
    problems = [p for p in gather_objects(problem) if p]
    if problems:
        raise CheckpointError(problems[0])
