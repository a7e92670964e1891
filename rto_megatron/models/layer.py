"""A transformer layer without Transformer Engine: Megatron's local one, by fewer steps and for fewer tokens.

Megatron's own forward goes through dropout, offloading and autograd functions of its own that have nothing to do here,
and of a small model on a CPU they take a tenth of a training step. The bits are the same.
"""

from typing import Any, cast

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.distributed.microbatches import PackedRows


class PlainLayer(TransformerLayer):
    """Attention and MLP around their residuals; no dropout, no biases."""

    ends_model: bool = False
    """What follows looks at the tokens of `PackedRows.read` alone: once attended to, the others end here."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        rotary_pos_emb: Tensor,
        **_: Any,
    ) -> tuple[Any, None]:
        """[T, B, hidden] -> [T, B, hidden]; of the last layer [n, 1, hidden] where only n tokens are read."""
        attend, normed = cast(Any, self.self_attention), cast(Any, self.input_layernorm)(hidden_states)
        read = read_of(self, packed_seq_params)
        more, _ = attend(
            normed, attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, read=read
        )
        hidden = more + (hidden_states if read is None else hidden_states.index_select(0, read))
        if self.recompute_mlp:
            return self._forward_mlp(hidden), None
        more, _ = cast(Any, self.mlp)(cast(Any, self.pre_mlp_layernorm)(hidden))
        return hidden + more, None


def read_of(layer: Any, packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """The tokens whose hidden states come out of a layer; None for all."""
    if not getattr(layer, "ends_model", False) or not isinstance(packed_seq_params, PackedRows):
        return None
    return packed_seq_params.read


class ColumnLinear(ColumnParallelLinear):
    """Column-parallel; on a single tensor rank a plain product."""

    def forward(self, input_: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[T, B, in] -> [T, B, out / tensor ranks]; no bias beside it."""
        if (
            self.config.tensor_model_parallel_size > 1
            or self.weight is None
            or (self.skip_bias_add and self.bias is not None)
        ):
            return super().forward(input_, *rest, **options)
        return _product(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Row-parallel; on a single tensor rank a plain product."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, B, in / tensor ranks] -> [T, B, out]; no bias beside it."""
        if self.config.tensor_model_parallel_size > 1 or self.bias is not None:
            return super().forward(input_)
        return _product(input_, self.weight, None), None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # of a matrix: with more dimensions torch takes another way where the weight is frozen, with other last bits
    return F.linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])
