"""Core attention for machines without Transformer Engine."""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


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
