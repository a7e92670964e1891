"""Which Hugging Face tensors make up each weight of our checkpoints, family by family.

Keyed by the names that checkpoints use, which are the same in every layout and with or without
Transformer Engine. A new family is a table here and a Family in hf_config.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.config.model import ModelConfig


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

SCORE_BIAS = "score.bias"
"""A value model's bias. transformers' classes have none: it is `score_bias` in config.json, not among the tensors."""

_LLAMA = {
    "embedding.word_embeddings.weight": _vocabulary("model.embed_tokens.weight"),
    "decoder.final_layernorm.weight": _same("model.norm.weight"),
    "output_layer.weight": _vocabulary("lm_head.weight"),
    "value_head.weight": _same("score.weight"),
    "value_head.bias": _same(SCORE_BIAS),
    _ATTENTION + "linear_qkv.layer_norm_weight": _same(_HF_LAYER + "input_layernorm.weight"),
    _ATTENTION + "linear_qkv.weight": _grouped(*(_HF_ATTENTION + f"{x}_proj.weight" for x in "qkv")),
    _ATTENTION + "linear_proj.weight": _same(_HF_ATTENTION + "o_proj.weight"),
    _LAYER + "mlp.linear_fc1.layer_norm_weight": _same(_HF_LAYER + "post_attention_layernorm.weight"),
    _LAYER + "mlp.linear_fc1.weight": _stacked(_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
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
"""Hugging Face class -> our weight -> what it is made of."""
