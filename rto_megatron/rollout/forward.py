"""A Megatron GPT's forward pass while it generates: the same weights, as bare matrix products.

Megatron's modules are made for training. Their autograd functions, dropout and hooks take four fifths of a decode
step of a small model on a CPU, and sequence parallelism would cut the few rows of a step over the ranks. This
pass reads their parameters where they lie, so nothing is copied or synchronised, and leaves no trace in the modules.
The tests hold it to Megatron's own forward.
"""

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.distributed.chunks import model_chunks
from rto_megatron.distributed.replica import (
    gather_over_tensor,
    receive_from_previous_stage,
    send_to_next_stage,
    sum_over_tensor,
)
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.models.lora import Factors, factors_of
from rto_megatron.rollout.kv_cache import KVCache
from rto_megatron.rollout.kv_store import CacheShape


@dataclass(frozen=True)
class _Layer:
    """Parameters of one transformer layer: this tensor rank's part of each matrix."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    proj: Tensor
    mlp_norm: Tensor
    fc1: Tensor
    """[2 * width, H]: the gate's rows, then those that it multiplies."""
    fc2: Tensor
    adapters: tuple[Factors | None, ...]
    """Of qkv, proj, fc1 and fc2."""

    @classmethod
    def of(cls, layer: Any) -> "_Layer":
        attention, mlp = layer.self_attention, layer.mlp
        qk_norm = attention.config.qk_layernorm
        return cls(
            attention_norm=_norm_weight(layer.input_layernorm, attention.linear_qkv),
            qkv=attention.linear_qkv.weight,
            qkv_bias=attention.linear_qkv.bias if attention.config.add_qkv_bias else None,
            query_norm=attention.q_layernorm.weight if qk_norm else None,
            key_norm=attention.k_layernorm.weight if qk_norm else None,
            proj=attention.linear_proj.weight,
            mlp_norm=_norm_weight(layer.pre_mlp_layernorm, mlp.linear_fc1),
            fc1=mlp.linear_fc1.weight,
            fc2=mlp.linear_fc2.weight,
            adapters=tuple(
                factors_of(linear)
                for linear in (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
            ),
        )


def _norm_weight(norm: Any, linear: Any) -> Tensor:
    """Transformer Engine keeps a norm's weight in the linear layer that follows it."""
    return linear.layer_norm_weight if hasattr(linear, "layer_norm_weight") else norm.weight


def _linear(x: Tensor, weight: Tensor, adapter: Factors | None, bias: Tensor | None = None) -> Tensor:
    """This rank's part of a product; the adapter's is added before ranks are summed, so it needs no sum of its own."""
    y = F.linear(x, weight, bias)
    return y if adapter is None else y + adapter.apply(x)


class ForwardPass:
    """What this rank computes of a pass over packed rows; a row is one token of some sequence."""

    def __init__(self, model: PolicyModel) -> None:
        config: Any = model.config  # Megatron fills what its annotations call optional
        self._chunks = model_chunks(model)
        attention: Any = self._chunks[0].decoder.layers[0].self_attention
        self._tensor, self._pipeline = model.pg_collection.tp, model.pg_collection.pp
        place = count()  # in the cache
        self._layers = [[(next(place), _Layer.of(layer)) for layer in chunk.decoder.layers] for chunk in self._chunks]
        self._hidden_size, self._dtype = config.hidden_size, config.params_dtype
        self._epsilon = config.layernorm_epsilon
        self._num_groups = config.num_query_groups
        self._num_local_groups = attention.num_query_groups_per_partition
        self._heads_per_group = config.num_attention_heads // config.num_query_groups
        self._head_dim = attention.hidden_size_per_attention_head

    def allocate(self, *, num_slots: int, max_length: int, block_tokens: int = 0, blocks: int | None = None) -> KVCache:
        """A cache that fits this rank's layers and heads; see `KVCache` for the blocks."""
        _, first = self._layers[0][0]
        shape = CacheShape(
            num_layers=sum(map(len, self._layers)),
            num_slots=num_slots,
            max_length=max_length,
            num_kv_heads=self._num_local_groups,
            head_dim=self._head_dim,
            dtype=self._dtype,
            device=first.qkv.device,
        )
        angles = self._chunks[0].rotary_pos_emb.get_freqs_non_repeated(max_length).to(shape.device)
        return KVCache(shape, angles=angles, block_tokens=block_tokens, blocks=blocks)

    def run(self, tokens: Tensor, cache: KVCache) -> Tensor | None:
        """Pass the rows that `cache` was told of through this stage's layers, chunk after chunk.

        Args:
            tokens: [rows] int64 ids.

        Returns:
            [rows, H] normed hidden states on the last stage; None on the others, which hand theirs on.
        """
        hidden: Any = None  # each chunk begins with one
        for chunk, layers in zip(self._chunks, self._layers, strict=True):
            if chunk.pre_process:
                hidden = self._embed(tokens)
            else:
                shape = len(tokens), self._hidden_size
                hidden = receive_from_previous_stage(shape, self._pipeline, dtype=self._dtype, device=tokens.device)
            for index, layer in layers:
                hidden = hidden + self._attention(layer, index, self._norm(hidden, layer.attention_norm), cache)
                hidden = hidden + self._mlp(layer, self._norm(hidden, layer.mlp_norm))
            if not chunk.post_process:
                send_to_next_stage(hidden, self._pipeline)
        last = self._chunks[-1]
        return self._norm(hidden, last.decoder.final_layernorm.weight) if last.post_process else None

    def _embed(self, tokens: Tensor) -> Tensor:
        weight = self._chunks[0].embedding.word_embeddings.weight
        if self._tensor.size() == 1:
            return F.embedding(tokens, weight)
        index = tokens - self._tensor.rank() * len(weight)
        others = (index < 0) | (index >= len(weight))
        return self._sum(F.embedding(index.masked_fill(others, 0), weight).masked_fill(others[:, None], 0.0))

    def _attention(self, layer: _Layer, index: int, x: Tensor, cache: KVCache) -> Tensor:
        of_qkv, of_proj, _, _ = layer.adapters
        qkv = self._split_heads(_linear(x, layer.qkv, of_qkv, layer.qkv_bias))
        rotating, value = qkv[:, :, :-1], qkv[:, :, -1]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._norm(qkv[:, :, :-2], layer.query_norm), self._norm(qkv[:, :, -2:-1], layer.key_norm)
            rotating = torch.cat((query, key), 2)
        rotated = cache.rotate(rotating)
        attended = cache.attend(index, rotated[:, :, :-1], rotated[:, :, -1], value)
        return self._sum(_linear(attended, layer.proj, of_proj))

    def _split_heads(self, qkv: Tensor) -> Tensor:
        """[rows, width of a rank] -> [rows, groups, heads of a group + 2, d]: a group's queries, its key, its value."""
        num_ranks = self._tensor.size()
        if self._num_groups >= num_ranks:
            return qkv.unflatten(1, (self._num_local_groups, self._heads_per_group + 2, self._head_dim))
        # More ranks than groups: the ranks of a group hold pieces of its matrix that do not end with a head.
        whole = torch.cat(tuple(gather_over_tensor(qkv, self._tensor)), 1)
        ranks_per_group = num_ranks // self._num_groups
        group, part = divmod(self._tensor.rank(), ranks_per_group)
        mine = whole.unflatten(1, (self._num_groups, self._heads_per_group + 2, self._head_dim))[:, group : group + 1]
        num_heads = self._heads_per_group // ranks_per_group
        return torch.cat((mine[:, :, part * num_heads : (part + 1) * num_heads], mine[:, :, -2:]), 2)

    def _mlp(self, layer: _Layer, x: Tensor) -> Tensor:
        _, _, of_fc1, of_fc2 = layer.adapters
        gate, up = _linear(x, layer.fc1, of_fc1).chunk(2, -1)
        return self._sum(_linear(F.silu(gate) * up, layer.fc2, of_fc2))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self._epsilon)

    def _sum(self, x: Tensor) -> Tensor:
        return x if self._tensor.size() == 1 else sum_over_tensor(x, self._tensor)
