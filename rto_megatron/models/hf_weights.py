"""Hugging Face weights into a model, a tensor at a time, whatever the layout.

`hf_tables.py` says which Hugging Face tensors make up each weight; `weights.py` says which piece of
that weight a rank holds. So nothing here knows of tensor or pipeline ranks.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.shards import Shard, shards
from rto_megatron.errors import CheckpointError
from rto_megatron.models.hf_config import hf_class, scoring_from_hf
from rto_megatron.models.hf_tables import SCORE_BIAS, TABLES, Recipe
from rto_megatron.models.safetensors_files import INDEX

DTYPES = ("F32", "BF16", "F16", "F64")
"""What safetensors calls the dtypes of plain weights; others belong to quantized ones."""


class HuggingFaceFolder:
    """The safetensors files of a folder: a tensor is read when asked for, and nothing stays in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where = self._index()
        self.scoring = scoring_from_hf(folder)
        self._beside = {SCORE_BIAS: torch.tensor([self.scoring.bias])} if self.scoring else {}

    @property
    def names(self) -> set[str]:
        """All tensors, and a value model's bias, which is in config.json unless it is among them."""
        return set(self._where) | set(self._beside)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the file's header; the tensor is not read.

        Raises:
            CheckpointError: it is of a dtype that no plain weights have.
        """
        if name not in self._where:
            return tuple(self._beside[name].shape)
        with self._open(self._where[name]) as file:
            about = file.get_slice(name)
            if about.get_dtype() not in DTYPES:
                raise CheckpointError(
                    f"{self._where[name]}: {name} must be of float32, bfloat16 or float16, got {about.get_dtype()}: "
                    "quantized weights cannot be converted; take the model's original"
                )
            return tuple(about.get_shape())

    def read(self, name: str) -> Tensor:
        """The whole tensor.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        if name not in self._where:
            return self._beside[name]
        # Opened anew for each tensor: pages that were read once stay in memory as long as their file is open.
        with self._open(self._where[name]) as file:
            tensor = file.get_tensor(name)
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{self._where[name]}: {name} must be finite, {int((~tensor.isfinite()).sum())} of its "
                f"{tensor.numel()} numbers are NaN or infinite; the model is damaged, copy or train it again"
            )
        return tensor

    def _index(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self.folder / part for name, part in parts.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: must be JSON with a weight_map, got: {error!r}") from None
        where = {}
        whole = self.folder / "model.safetensors"  # beside it may lie adapters, which transformers passes over too
        for path in [whole] if whole.exists() else sorted(self.folder.glob("*.safetensors")):
            with self._open(path) as file:
                where |= dict.fromkeys(file.keys(), path)
        if not where:
            found = ", ".join(sorted(path.name for path in self.folder.iterdir())[:10]) or "an empty folder"
            raise CheckpointError(
                f"{self.folder}: needs weights as *.safetensors, found {found}; save the model again with transformers"
            )
        return where

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, "pt") as file:
                yield file
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing, and {INDEX} names it; copy it again") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: must be a complete safetensors file, got: {error}") from None


@torch.no_grad()
def load_hf(model: MegatronModule, folder: Path, config: ModelConfig) -> None:
    """Fill a model with a Hugging Face folder's weights; each rank reads what its own pieces are made of.

    Raises:
        CheckpointError: tensors are missing, have another shape, or have no place in the model.
    """
    table = TABLES[config.architecture]
    mine = {name.format(i=shard.layer) for shard in shards(model) for name in table[shard.key].names}
    wanted = set().union(*gather_objects(mine))
    problem = None
    try:
        source = HuggingFaceFolder(folder)
        _check_names(wanted, source, config)
        for _, pieces in groupby(shards(model), lambda shard: shard.name):  # those of one weight come together
            _fill(list(pieces), source, config)
    except CheckpointError as error:
        problem = str(error)
    raise_together(problem)


def _check_names(wanted: set[str], source: HuggingFaceFolder, config: ModelConfig) -> None:
    missing = sorted(wanted - source.names)
    where = f"{hf_class(config, source.scoring)} with {config.num_layers} layers"
    if missing:
        way_out = "config.json and weights must be of one model"
        if missing == ["lm_head.weight"]:
            way_out = "set tie_word_embeddings in config.json if it shares the embedding"
        raise CheckpointError(f"{source.folder}: lacks {_some(missing)}, which {where} needs; {way_out}")
    # a tied model's files may hold the embedding twice, and old ones hold what is computed from the config
    left = {name for name in source.names - wanted if not name.endswith("rotary_emb.inv_freq")}
    left -= {"lm_head.weight"} if config.tie_embeddings or source.scoring else set()
    if left:
        raise CheckpointError(
            f"{source.folder}: has {_some(sorted(left))}, which {where} has no place for; "
            "config.json and weights must be of one model"
        )


def _fill(pieces: Sequence[Shard], source: HuggingFaceFolder, config: ModelConfig) -> None:
    """Read one weight and copy this rank's pieces of it; it is gone when this returns."""
    first = pieces[0]
    whole = _read(source, TABLES[config.architecture][first.key], first.layer, first.full_shape, config)
    for piece in pieces:
        piece.data.copy_(whole[piece.slices])


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
