"""Hugging Face weights in and out, a tensor at a time, whatever the layout.

A table says which Hugging Face tensors make up each weight of our checkpoints; `models/weights.py`
says which piece of that weight a rank holds. So nothing here knows of tensor or pipeline ranks.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.config.model import ModelConfig
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.collectives import bring_to_main, gather_objects
from rto_megatron.distributed.runtime import is_main, rank
from rto_megatron.errors import CheckpointError
from rto_megatron.models.hf_config import config_to_hf
from rto_megatron.models.weights import shards

INDEX = "model.safetensors.index.json"
PART_BYTES = 4 << 30


@dataclass(frozen=True)
class Recipe:
    """How Hugging Face tensors make up one weight of ours."""

    names: tuple[str, ...]
    """With `{i}` for the layer."""
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    """The tensors, in the order of `names` -> our weight."""
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    """Back; on a meta tensor it tells the shapes."""


def _same(name: str) -> Recipe:
    return Recipe((name,), lambda tensors, _: tensors[0], lambda whole, _: [whole])


def _vocabulary(name: str) -> Recipe:
    """One row a token: ours has rows of zeros behind the last."""
    return Recipe(
        (name,),
        lambda tensors, c: F.pad(tensors[0], (0, 0, 0, c.padded_vocab_size - c.vocab_size)),
        lambda whole, c: [whole[: c.vocab_size]],
    )


def _stacked(*names: str) -> Recipe:
    """Equal parts one below the other: gate and up projection."""
    return Recipe(names, lambda tensors, _: torch.cat(list(tensors)), lambda whole, _: whole.chunk(len(names)))


def _grouped(*names: str) -> Recipe:
    """Query, key and value of all heads: ours has, for each key-value head, its queries, its key, its value."""

    def join(tensors: Sequence[Tensor], c: ModelConfig) -> Tensor:
        rest = tensors[0].shape[1:]
        return torch.cat([t.reshape(c.num_query_groups, -1, *rest) for t in tensors], 1).reshape(-1, *rest)

    def split(whole: Tensor, c: ModelConfig) -> Sequence[Tensor]:
        groups, width, rest = c.num_query_groups, c.kv_channels, whole.shape[1:]
        widths = [c.num_attention_heads // groups * width, width, width]
        return [part.reshape(-1, *rest) for part in whole.reshape(groups, -1, *rest).split(widths, 1)]

    return Recipe(names, join, split)


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."

_LLAMA = {
    "embedding.word_embeddings.weight": _vocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": _same("model.norm.weight"),
    "output_layer.weight": _vocabulary("lm_head.weight"),
    _ATTENTION + "linear_qkv.layer_norm_weight": _same(_HF_LAYER + "input_layernorm.weight"),
    _ATTENTION + "linear_qkv.weight": _grouped(*(_HF_ATTENTION + f"{x}_proj.weight" for x in "qkv")),
    _ATTENTION + "linear_proj.weight": _same(_HF_ATTENTION + "o_proj.weight"),
    _LAYER + "mlp.linear_fc1.layer_norm_weight": _same(_HF_LAYER + "post_attention_layernorm.weight"),
    _LAYER + "mlp.linear_fc1.weight": _stacked(
        _HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"
    ),
    _LAYER + "mlp.linear_fc2.weight": _same(_HF_LAYER + "mlp.down_proj.weight"),
}

TABLES: dict[str, dict[str, Recipe]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA
    | {_ATTENTION + "linear_qkv.bias": _grouped(*(_HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"))},
    "Qwen3ForCausalLM": _LLAMA
    | {_ATTENTION + f"{x}_layernorm.weight": _same(_HF_ATTENTION + f"{x}_norm.weight") for x in "qk"},
}
"""Hugging Face class -> our weight -> where it comes from. A new family is a table here and a Family in hf_config.py."""


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
        return {name: path for path in files for name in self._open(path).keys()}

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
        raise CheckpointError(
            f"{source.folder}: lacks {_some(missing)}, which {config.architecture} needs with {config.num_layers} layers"
            + ("; set tie_word_embeddings in config.json if it shares the embedding" if missing == ["lm_head.weight"] else "")
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
    for name, part in zip(names, recipe.split(torch.empty(tuple(shape), device="meta"), config)):
        if source.shape(name) != tuple(part.shape):
            raise CheckpointError(
                f"{source.folder}: {name} must have the shape {list(part.shape)} by config.json, got "
                f"{list(source.shape(name))}; config.json and weights must be of one model"
            )
    return recipe.join([source.read(name) for name in names], config)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _raise_together(problem: str | None) -> None:
    """Let all ranks go on, or all stop with the first one's problem."""
    problems = [p for p in gather_objects(problem) if p]
    if problems:
        raise CheckpointError(problems[0])
