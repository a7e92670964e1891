"""Hugging Face weights in and out, a tensor at a time, whatever the layout.

`hf_tables.py` says which Hugging Face tensors make up each weight; `weights.py` says which piece of
that weight a rank holds. So nothing here knows of tensor or pipeline ranks.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.collectives import bring_to_main, gather_objects
from rto_megatron.distributed.runtime import is_main, rank
from rto_megatron.errors import CheckpointError
from rto_megatron.models.hf_config import config_to_hf
from rto_megatron.models.hf_tables import TABLES, Recipe
from rto_megatron.models.weights import Shard, shards

INDEX = "model.safetensors.index.json"
PART_BYTES = 4 << 30
"""Size of one file of an export; rank 0 holds that much at a time."""


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
        _raise_together(problem)


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


@torch.no_grad()
def save_hf(
    model: MegatronModule, config: ModelConfig, folder: Path, tokenizer: Tokenizer, *, part_bytes: int = PART_BYTES
) -> None:
    """Write a folder that transformers reads: weights, config, generation config, tokenizer.

    One weight at a time travels to rank 0. The folder is written beside and renamed at the end.

    Raises:
        CheckpointError: the model is of no supported family, or a file could not be written.
    """
    ids = {"eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    described = config_to_hf(config, dtype=str(model.config.params_dtype).removeprefix("torch."), **ids)
    draft = folder.with_name(folder.name + ".tmp")
    writer = _PartWriter(draft, part_bytes) if is_main() else None
    problem = None
    for name, tensor in hf_tensors(model, config):  # to its end in any case: the other ranks are sending
        if problem is None and writer is not None:
            problem = _attempt(lambda: writer.add(name, tensor))  # noqa: B023 - called at once
    if problem is None and writer is not None:
        problem = _attempt(lambda: _finish(writer, described, tokenizer, folder))
    try:
        _raise_together(problem)
    except CheckpointError:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def hf_tensors(model: MegatronModule, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors, on rank 0; the others get none but must iterate too."""
    table = TABLES[config.architecture]
    for key, layer, whole in _whole_weights(model):
        if whole is None:
            continue
        for name, part in zip(table[key].names, table[key].split(whole, config), strict=True):
            yield name.format(i=layer), part.cpu().contiguous()


def _whole_weights(model: MegatronModule) -> Iterator[tuple[str, int | None, Tensor | None]]:
    """Each weight of the model put together on rank 0, None elsewhere; in the same order on all ranks."""
    mine: dict[tuple[str, int | None], list[Shard]] = {}
    for shard in shards(model):
        if shard.is_main:
            mine.setdefault((shard.key, shard.layer), []).append(shard)
    places = gather_objects({name: [(s.slices, s.full_shape) for s in held] for name, held in mine.items()})
    device, dtype = next(model.parameters()).device, model.config.params_dtype
    for key, layer in sorted(set().union(*places), key=lambda name: (name[1] is not None, name[1] or 0, name[0])):
        whole = None
        for owner, held in enumerate(places):
            for number, (slices, full_shape) in enumerate(held.get((key, layer), [])):
                own = mine[key, layer][number].data if owner == rank() else None
                shape = [s.stop - s.start for s in slices]
                piece = bring_to_main(own, owner=owner, shape=shape, dtype=dtype, device=device)
                if piece is not None:
                    whole = piece.new_empty(full_shape) if whole is None else whole
                    whole[slices] = piece
        yield key, layer, whole


class _PartWriter:
    """Safetensors files of a limited size, numbered when it is known how many they are."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self.folder, self.part_bytes = folder, part_bytes
        self._part: dict[str, Tensor] = {}
        self._parts: list[list[str]] = []
        self._part_size = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; write the part before if this one would make it too large."""
        size = tensor.numel() * tensor.element_size()
        if self._part and self._part_size + size > self.part_bytes:
            self._write()
        self._part[name] = tensor
        self._part_size += size
        self._total += size

    def close(self) -> None:
        """Write the last part, and the index."""
        self._write()
        where = {}
        for number, names in enumerate(self._parts, 1):
            name = f"model-{number:05d}-of-{len(self._parts):05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / name)
            where |= dict.fromkeys(names, name)
        _write_json(self.folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": where})

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parts.append(list(self._part))
        save_file(self._part, self.folder / f"part-{len(self._parts)}", metadata={"format": "pt"})
        self._part, self._part_size = {}, 0


def _finish(writer: _PartWriter, described: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    writer.close()
    tokenizer.save(writer.folder)
    _write_json(writer.folder / "config.json", described)
    ids = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(writer.folder / "generation_config.json", ids)
    writer.folder.rename(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _attempt(action: Callable[[], None]) -> str | None:
    """Why a write failed, or None."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return f"the Hugging Face folder could not be written: {error}"
    return None


def _raise_together(problem: str | None) -> None:
    """Let all ranks go on, or all stop with the first one's problem."""
    problems = [p for p in gather_objects(problem) if p]
    if problems:
        raise CheckpointError(problems[0])
