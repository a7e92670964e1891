"""One number a token: the model behind the critic and the reward model."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.distributed.context import own_columns, whole_rows
from rto_megatron.models.attention import with_turns
from rto_megatron.models.layer import read_of


class ScalarHead(MegatronModule):
    """hidden -> 1, in float32, the same weights on every tensor rank."""

    def __init__(self, config: TransformerConfig, group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = group
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        for parameter in self.parameters():
            # each tensor rank sees its share of the tokens, so finalize_model_grads must add the gradients
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_sbh: Tensor) -> Tensor:
        """[T, B, hidden] (this rank's share of T under sequence parallelism) -> [B, T] float32."""
        out = F.linear(hidden_sbh.float(), self.weight.float(), self.bias.float())
        if self.config.sequence_parallel:
            # every rank goes on with the same loss, so the gradient is cut, not summed
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.tp_group)
        return out.squeeze(-1).transpose(0, 1).contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The head under a name of its own.

        As `output_layer.weight` a [1, hidden] head would load row 0 of a language model's output
        layer without a word, because Megatron lets that key differ in shape.
        """
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class ScalarModel(GPTModel):
    """A GPT with a ScalarHead in place of the output layer."""

    true_vocab: int
    max_length: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            del self.output_layer
            self.value_head = ScalarHead(self.config, self.pg_collection.tp)

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        """Embeddings and rotary angles of this context rank's columns of [B, T] ids and positions."""
        ids, positions = (own_columns(x, self.pg_collection.cp, dim=1) for x in (input_ids, position_ids))
        return with_turns(self, super()._preprocess(ids, positions, **options), positions)

    def _postprocess(
        self, hidden_states: Tensor, *, input_ids: Tensor, packed_seq_params: Any = None, **_: Any
    ) -> Tensor:
        """Hidden states of the last stage -> [B, T] head outputs; column t is read after token t, 0 where it is not."""
        if not self.post_process:
            return hidden_states
        out, read = self.value_head(hidden_states), read_of(self.decoder.layers[-1], packed_seq_params)
        if read is not None:
            return out.new_zeros(input_ids.shape).index_copy(1, read, out)
        return whole_rows(out, self.pg_collection.cp, dim=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """All weights; past GPTModel's and LanguageModule's overrides, which are about an output layer."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
