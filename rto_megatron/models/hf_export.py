"""A model as a Hugging Face folder: weights one at a time to rank 0, from any layout."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from rto_megatron.distributed.collectives import bring_to_main, gather_objects
from rto_megatron.distributed.runtime import is_main, rank
from rto_megatron.errors import CheckpointError
from rto_megatron.models.hf_config import config_to_hf
from rto_megatron.models.hf_tables import TABLES
from rto_megatron.models.hf_weights import INDEX, raise_together
from rto_megatron.models.weights import Shard, shards

PART_BYTES = 4 << 30
"""Size of one file; rank 0 holds that much at a time."""


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
        raise_together(problem)
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
    if not (writer.folder / "tokenizer.json").exists():
        _name_special_tokens(writer.folder, described)
    _write_json(writer.folder / "config.json", described)
    ids = {name: described[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(writer.folder / "generation_config.json", ids)
    writer.folder.rename(folder)


def _name_special_tokens(folder: Path, described: dict[str, Any]) -> None:
    """Tell transformers what ends and fills texts, which a sentencepiece file leaves open."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
    ids = {name: described[f"{name}_id"] for name in ("bos_token", "eos_token", "pad_token")}
    names = {name: pieces.id_to_piece(i) for name, i in ids.items() if i is not None}
    _write_json(folder / "tokenizer_config.json", {"add_bos_token": False, "add_eos_token": False, **names})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _attempt(action: Callable[[], None]) -> str | None:
    """Why a write failed, or None."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return f"the Hugging Face folder could not be written: {error}"
    return None
