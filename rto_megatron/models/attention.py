"""Self-attention that trains as Megatron's and decodes from a key-value cache."""

from typing import Any, Protocol

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


class DecodeContext(Protocol):
    """What a key-value cache offers to the attention layers while a model generates."""

    cos: Tensor
    """[rows, 1, head_dim] cosine of each row's rotary angles."""
    sin: Tensor
    """[rows, 1, head_dim] sine of the same."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values [rows, kv heads, d]; attend with query [rows, heads, d] -> [rows, heads * d]."""
        ...


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention; with a DecodeContext it attends to the cache instead.

    While decoding, hidden states are `[rows, 1, hidden]`: a row is one token of some sequence.
    """

    cache_layer: int
    """This layer's index among those of the pipeline stage; set by the engine."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        context = kwargs.get("inference_context")
        if context is None or not hasattr(context, "attend"):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = (x.squeeze(1) for x in self.get_query_key_value_tensors(hidden_states, None)[:3])
        query, key = _rotate(query, context), _rotate(key, context)
        return self.linear_proj(context.attend(self.cache_layer, query, key, value).unsqueeze(1))


def _rotate(x: Tensor, context: DecodeContext) -> Tensor:
    """Rotary embedding in Megatron's unfused arithmetic, halves rather than pairs."""
    first, second = x.chunk(2, -1)
    return x * context.cos + torch.cat((-second, first), -1) * context.sin


class CausalAttention(MegatronModule):
    """Core attention by torch's scaled_dot_product_attention, where Transformer Engine is not there.

    Causal and without a mask: rows are padded on the right, so padding is never attended to by a
    real token. Megatron's own local attention keeps `[heads, T, T]` scores and reads the global
    parallel state; this one does neither.
    """

    def __init__(self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, B, heads, d], [T, B, kv heads, d] twice -> [T, B, heads * d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)
