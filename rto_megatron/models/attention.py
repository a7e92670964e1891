"""Attention where Megatron's own asks the global parallel state, which is never set up."""

from typing import Any

from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


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


class CausalAttention(MegatronModule):
    """Attention by torch's scaled_dot_product_attention.

    Causal and without a mask: rows are padded on the right, so padding is never attended to by a
    real token. Megatron's own local attention keeps `[heads, T, T]` scores and reads the global
    parallel state; this one does neither.
    """

    def __init__(
        self, config: TransformerConfig, *_: Any, pg_collection: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp  # else Megatron's checkpoints ask the global parallel state
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, B, heads, d], [T, B, kv heads, d] twice -> [T, B, heads * d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)
