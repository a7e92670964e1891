"""Attention where Megatron's own asks the global parallel state, which is never set up."""

from typing import Any, cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.distributed.context import chunks_of, keys_of_all
from rto_megatron.distributed.microbatches import PackedRows
from rto_megatron.models.elementwise import rotate


class GroupedAttention(SelfAttention):
    """Self-attention whose key-value heads may be fewer than the tensor ranks."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *rest: Any, **options: Any) -> Any:
        """[T, B, hidden] -> query, key and value of this rank's heads.

        Where several ranks share a key-value head, each holds a part of that head's columns of the matrix.
        """
        num_groups, group = self.config.num_query_groups, self.pg_collection.tp
        assert num_groups is not None  # Megatron's config fills it in
        if num_groups >= group.size():
            return super().get_query_key_value_tensors(hidden_states, *rest, **options)
        project: Any = self.linear_qkv  # its annotations say that it cannot be called
        mixed, _ = project(hidden_states)
        mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=group)
        my_group, my_part = divmod(group.rank(), group.size() // num_groups)
        dim, num_queries = self.hidden_size_per_attention_head, self.config.num_attention_heads // group.size()
        heads = mixed.chunk(num_groups, -1)[my_group].unflatten(-1, (-1, dim))  # the group's queries, then key, value
        query = heads[:, :, my_part * num_queries : (my_part + 1) * num_queries]
        key, value = heads[:, :, -2:-1], heads[:, :, -1:]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value


class PlainAttention(GroupedAttention):
    """The forward pass of the local layers: Megatron's asks for cosines and sines anew in each layer, twice."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        read: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """[T, B, hidden] -> [T, B, hidden], and no bias; packed, B is 1.

        Args:
            rotary_pos_emb: turns, from `with_turns`.
            read: [n] int64, packed, the only tokens that are wanted: [n, 1, hidden] of them; None wants all.
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
        attend, project = cast(Any, self.core_attention), cast(Any, self.linear_proj)
        attended = attend(query, key, value, attention_mask, packed_seq_params=packed_seq_params)
        return project(attended if read is None else attended.index_select(0, read))


def with_turns(model: Any, found: tuple, position_ids: Tensor) -> tuple:
    """What a GPT's `_preprocess` has found, with what `rotate` takes for its rotary angles: once for all layers.

    Args:
        found: hidden states, then angles: [positions, 1, 1, d] radians, of this rank's columns, or of all where packed.
        position_ids: [B, T]; packed [1, N].
    """
    hidden, angles, *rest = found
    if not isinstance(model.decoder.layers[0].self_attention, PlainAttention):
        return found
    half = angles[..., : angles.shape[-1] // 2]  # the other one is the same
    if model.config.context_parallel_size == 1:
        half = half[position_ids[0]]
    turns = torch.stack((half.cos(), half.sin())).to(model.config.params_dtype)
    if half.shape[-1] < WIDE:
        heads = model.config.num_attention_heads // model.config.tensor_model_parallel_size
        turns = turns.expand(-1, -1, -1, heads, -1).contiguous()
    return hidden, turns, *rest


WIDE = 64
"""Narrower heads are turned by a table as wide as all of them, as jumps between short rows would cost more."""


class CausalAttention(MegatronModule):
    """Attention by torch's scaled_dot_product_attention.

    Causal and without a mask: rows are padded on the right, so padding is never attended to by a
    real token. Megatron's own local attention keeps `[heads, T, T]` scores and reads the global
    parallel state; this one does neither.

    Of context ranks each has the queries of its own two chunks of the rows, and fetches the keys and values of all.
    """

    def __init__(
        self, config: TransformerConfig, *_: Any, pg_collection: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp  # else Megatron's checkpoints ask the global parallel state
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedRows | None = None,
        **__: Any,
    ) -> Tensor:
        """[T, B, heads, d], [T, B, kv heads, d] twice -> [T, B, heads * d]; T of this context rank's columns.

        Packed, B is 1 and each of the rows in T tokens sees itself alone.
        """
        group = self.context_group
        if packed_seq_params is not None:
            assert group.size() == 1, "a context rank has two chunks of every row, not of all together"
            rows = zip(*(x.split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(*row) for row in rows]).flatten(2)
        if group.size() == 1:
            out = self._attend(query, key, value)
        else:
            key, value = keys_of_all(torch.stack((key, value)), group, dim=1)
            size, chunks = query.shape[0] // 2, chunks_of(group.rank(), group.size())
            ends = [size * (number + 1) for number in chunks]  # nobody looks at what comes later
            parts = zip(query.split(size), ends, strict=True)
            out = torch.cat([self._attend(own, key[:end], value[:end]) for own, end in parts])
        return out.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[t, B, heads, d], [T, B, kv heads, d] twice -> [t, B, heads, d]; the queries are the last t of T tokens."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        num_before, mask = key.shape[2] - query.shape[2], None
        if num_before:  # torch counts from the first token of both
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(num_before)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.permute(2, 0, 1, 3)
