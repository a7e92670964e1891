"""How many parameters a model has, on a rank and in all, told from its architecture alone."""

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.models.gpt import Kind


def num_parameters(model: ModelConfig, kind: Kind, parallel: ParallelConfig | None = None, *, stage: int = 0) -> int:
    """Parameters that one rank of a pipeline stage holds; all of them without `parallel`.

    With tied embeddings the last of several stages has a copy of the embedding, which a checkpoint holds once.
    """
    parallel = parallel or ParallelConfig()
    tensor, last = parallel.tensor, stage == parallel.pipeline - 1
    embedding = model.padded_vocab_size // tensor * model.hidden_size
    total = model.num_layers // parallel.pipeline * _num_layer_parameters(model, tensor)
    if stage == 0:
        total += embedding
    if last:
        total += model.hidden_size  # the final norm
        if kind == "value":
            total += model.hidden_size + 1
        elif not model.tie_embeddings or parallel.pipeline > 1:
            total += embedding
    return total


def _num_layer_parameters(model: ModelConfig, tensor: int) -> int:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.kv_channels
    qkv = queries + 2 * model.num_query_groups * model.kv_channels
    matrices = hidden * (qkv + queries + 3 * ffn) // tensor
    biases = qkv // tensor if model.qkv_bias else 0
    norms = 2 * hidden + (2 * model.kv_channels if model.qk_norm else 0)
    return matrices + biases + norms


def num_own_parameters(
    model: ModelConfig, kind: Kind, lora: LoRAConfig | None, parallel: ParallelConfig | None = None, *, stage: int = 0
) -> int:
    """Those of them that an adapted model does not share: adapters and scalar head; without adapters the head alone."""
    parallel = parallel or ParallelConfig()
    head = model.hidden_size + 1 if kind == "value" and stage == parallel.pipeline - 1 else 0
    if lora is None:
        return head
    tensor, hidden, ffn = parallel.tensor, model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.kv_channels
    qkv = queries + 2 * model.num_query_groups * model.kv_channels
    rows_and_columns = {  # the factor that tensor ranks cut, and the one that each has whole
        "linear_qkv": qkv // tensor + hidden,
        "linear_proj": queries // tensor + hidden,
        "linear_fc1": 2 * ffn // tensor + hidden,
        "linear_fc2": ffn // tensor + hidden,
    }
    layer = lora.rank * sum(rows_and_columns[name] for name in lora.targets)
    return head + model.num_layers // parallel.pipeline * layer
