"""A model as a Hugging Face folder: weights one at a time to rank 0, from any layout."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rto_megatron.config.model import ModelConfig
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.data.tokenizer_files import eos_ids, write_tokenizer_files
from rto_megatron.distributed.collectives import bring_to_main, gather_objects
from rto_megatron.distributed.runtime import is_main, rank
from rto_megatron.distributed.shards import Shard, shards
from rto_megatron.errors import CheckpointError
from rto_megatron.models.hf_config import Scoring, config_to_hf
from rto_megatron.models.hf_tables import SCORE_BIAS, TABLES
from rto_megatron.models.hf_weights import raise_together
from rto_megatron.models.safetensors_files import SafetensorsFiles

PART_BYTES = 4 << 30
"""Size of one file of weights."""


@torch.no_grad()
def save_hf(
    model: MegatronModule,
    config: ModelConfig,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    scoring: Scoring | None = None,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write a folder that transformers reads: weights, config, generation config, tokenizer.

    One weight at a time travels to rank 0, and from there into its file.

    Args:
        folder: a draft; where this fails, what was written of it is removed.
        scoring: of a value model, whose bias and pad id are filled in here; None writes a policy.

    Raises:
        CheckpointError: the model is of no supported family, a weight is not finite, or a file could not be written.
    """
    dtype = model.config.params_dtype
    ids = {"eos_id": eos_ids(tokenizer), "bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id}
    told = {"dtype": str(dtype).removeprefix("torch."), **ids}
    config_to_hf(config, **told)  # refuses a model of no family before anything is written
    shapes = {name: shape for name, shape in hf_shapes(model, config).items() if name != SCORE_BIAS}
    files = SafetensorsFiles(folder, shapes, dtype, part_bytes=part_bytes)
    problem = attempt(lambda: folder.mkdir(parents=True))
    for name, tensor in hf_tensors(model, config):  # to its end in any case: the other ranks are sending
        problem = problem or _not_finite(name, tensor)
        if name == SCORE_BIAS and scoring is not None:
            scoring = replace(scoring, bias=tensor.item(), pad_id=tokenizer.pad_id)
        elif problem is None:
            problem = attempt(partial(files.write, name, tensor))
        del tensor  # before the next one comes
    if is_main():
        described = config_to_hf(config, **told, scoring=scoring)
        problem = problem or attempt(files.close)
        problem = problem or attempt(lambda: _write_beside(folder, described, tokenizer, is_value=scoring is not None))
    if problem is not None:
        files.abandon()
        shutil.rmtree(folder, ignore_errors=True)
    raise_together(problem)


def hf_shapes(model: MegatronModule, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all Hugging Face tensors, in the order in which `hf_tensors` gives them; all ranks must call."""
    shapes = {}
    for weight in _survey(model)[1]:
        recipe = TABLES[config.architecture][weight.key]
        parts = recipe.split(torch.empty(weight.shape, device="meta"), config)
        names = (name.format(i=weight.layer) for name in recipe.names)
        shapes |= {name: tuple(part.shape) for name, part in zip(names, parts, strict=True)}
    return shapes


@torch.no_grad()
def hf_tensors(model: MegatronModule, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors, on rank 0; the others get none but must iterate too."""
    mine, weights = _survey(model)
    device, dtype = next(model.parameters()).device, model.config.params_dtype
    for weight in weights:
        whole = None
        for owner, number, slices in weight.pieces:
            own = mine[weight.key, weight.layer][number].data if owner == rank() else None
            shape = [s.stop - s.start for s in slices]
            piece = bring_to_main(own, owner=owner, shape=shape, dtype=dtype, device=device)
            if piece is not None:
                whole = piece.new_empty(weight.shape) if whole is None else whole
                whole[slices] = piece
            del piece
        if whole is not None:
            recipe = TABLES[config.architecture][weight.key]
            for name, part in zip(recipe.names, recipe.split(whole, config), strict=True):
                yield name.format(i=weight.layer), part.cpu().contiguous()
                del part


@dataclass(frozen=True)
class _Whole:
    """One of our weights, and which ranks hold which pieces of it."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    pieces: list[tuple[int, int, tuple[slice, ...]]]
    """Owner's rank, number among the owner's pieces of this weight, place in the whole."""


def _survey(model: MegatronModule) -> tuple[dict[tuple[str, int | None], list[Shard]], list[_Whole]]:
    """This rank's pieces by key and layer; and all weights, in the same order on all ranks."""
    mine: dict[tuple[str, int | None], list[Shard]] = {}
    for shard in shards(model):
        if shard.is_main:
            mine.setdefault((shard.key, shard.layer), []).append(shard)
    told = {name: (held[0].full_shape, [shard.slices for shard in held]) for name, held in mine.items()}
    found: dict[tuple[str, int | None], _Whole] = {}
    for owner, held in enumerate(gather_objects(told)):
        for (key, layer), (shape, places) in held.items():
            weight = found.setdefault((key, layer), _Whole(key, layer, shape, []))
            weight.pieces.extend((owner, number, slices) for number, slices in enumerate(places))
    return mine, sorted(found.values(), key=lambda w: (w.layer is not None, w.layer or 0, w.key))


def _write_beside(folder: Path, described: Mapping[str, Any], tokenizer: Tokenizer, *, is_value: bool) -> None:
    """All that is not weights."""
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tokenizer_files(tokenizer, folder, names_pad=is_value)


def _not_finite(name: str, tensor: Tensor) -> str | None:
    """What to say of a weight that nothing can be computed with."""
    if tensor.isfinite().all():
        return None
    return f"{name} holds NaN or infinity: the run diverged; convert an earlier checkpoint of it"


def attempt(action: Callable[[], object]) -> str | None:
    """Why the main rank cannot; None where it can, and on the other ranks, which do not try."""
    try:
        if is_main():
            action()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"the Hugging Face folder could not be written: {error}"
    return None
