"""Bytes of a model on a rank, told from its architecture.

Bytes of a parameter, on the rank that holds it (b = 4 in float32, 2 in bfloat16; D data-parallel ranks):

    weights     b       every role
    gradients   4       of what learns: they are summed in float32
    optimizer   8 + m   of what learns: two running means, and in bfloat16 a float32 copy of the weight (m = 4);
                        divided by D where optimizer.distributed is true, and by the context ranks

Activations are guessed from what a layer keeps for its backward pass, with attention that keeps no scores: within a
third or so of what torch keeps.

With adapters only these and a scalar head learn, and frozen weights that several roles have in common count once.
"""

from dataclasses import dataclass

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.models.counts import num_own_parameters, num_parameters
from rto_megatron.models.gpt import Kind

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that the run builds."""

    name: str
    architecture: ModelConfig
    kind: Kind
    optimizer: OptimizerConfig | None
    """None where it is frozen."""
    lora: LoRAConfig | None = None
    """Of its adapters, where they are apart from its weights."""
    shared: bool = False
    """Whether its frozen weights are those of a model before it."""
    stays: bool = False
    """Whether it is frozen and a model that learns uses its weights, so that they are never moved to the host."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one model on one rank."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def model_bytes(model: Model, parallel: ParallelConfig, compute: ComputeConfig, *, stage: int, num_data: int) -> Bytes:
    """Memory of a model on one rank of a pipeline stage."""
    own = num_own_parameters(model.architecture, model.kind, model.lora, parallel, stage=stage)
    whole, item = num_parameters(model.architecture, model.kind, parallel, stage=stage), ITEM_BYTES[compute.dtype]
    head = num_own_parameters(model.architecture, model.kind, None, parallel, stage=stage)
    weights = (0 if model.shared else whole - head) + own
    if model.optimizer is None:
        return Bytes(weights=weights * item, gradients=0, optimizer=0)
    learned = whole if model.lora is None else own
    states = learned * (8 if compute.dtype == "float32" else 12)
    return Bytes(
        weights=weights * item,
        gradients=learned * 4,
        optimizer=states // (num_data * parallel.context if model.optimizer.distributed else 1),
    )


def offloaded_bytes(models: list[Model], parallel: ParallelConfig, compute: ComputeConfig, *, stage: int) -> int:
    """Most that frozen roles take while they visit the device: the role that scores and the next, which is fetched."""
    sizes = [size for model in models if (size := hosted_bytes(model, parallel, compute, stage=stage))]
    return max((sum(pair) for pair in zip(sizes, [*sizes[1:], 0], strict=True)), default=0)


def hosted_bytes(model: Model, parallel: ParallelConfig, compute: ComputeConfig, *, stage: int) -> int:
    """Of a frozen model, what `compute.offload_frozen` keeps in host memory: all that no model that learns uses too."""
    if is_offloaded(model):
        return model_bytes(model, parallel, compute, stage=stage, num_data=1).weights
    own = num_own_parameters(model.architecture, model.kind, model.lora, parallel, stage=stage)
    return own * ITEM_BYTES[compute.dtype]


def is_offloaded(model: Model) -> bool:
    """Whether `compute.offload_frozen` keeps the whole model in host memory."""
    return model.optimizer is None and not model.stays


def cached_bytes(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> int:
    """Keys and values of a token that is written, on the rank that has most layers."""
    groups, layers = max(1, model.num_query_groups // parallel.tensor), -(-model.num_layers // parallel.pipeline)
    return 2 * groups * model.kv_channels * layers * ITEM_BYTES[compute.dtype]


def activation_bytes(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, *, tokens: int) -> int:
    """Roughly what one microbatch keeps on one rank until its backward pass, and the logits of one chunk."""
    logits = 3 * 4 * compute.log_prob_chunk * model.padded_vocab_size // parallel.tensor
    return kept_bytes(model, parallel, compute, tokens=tokens) + logits


def kept_bytes(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, *, tokens: int) -> int:
    """The same without logits, which are never kept."""
    wide = parallel.tensor if parallel.sequence else 1  # norms and residuals
    queries = model.num_attention_heads * model.kv_channels
    keys_values = 2 * model.num_query_groups * model.kv_channels
    residuals = 5 * model.hidden_size // wide
    # of its own tokens; and the keys and values of the other context ranks' tokens, which local attention keeps whole
    attention = (3 * queries + (1 + parallel.context) * keys_values) // parallel.tensor
    mlp = 4 * model.ffn_hidden_size // parallel.tensor
    kept = {
        "none": residuals + attention + mlp,
        "selective": residuals + attention,
        "full": model.hidden_size // wide,
    }[compute.recompute]
    stages, chunks = parallel.pipeline, parallel.virtual_stages
    # the first stage's microbatches between forward and backward; with chunks, each of these apart (`training_plan`)
    waiting = stages if chunks == 1 else 2 * stages - 1 + (chunks - 1) * stages
    layers = model.num_layers // (stages * chunks)
    above = 3 * model.hidden_size // wide  # the last norm's input and output, and what the head reads
    own = -(-tokens // parallel.context)
    return own * (layers * kept * waiting + above) * ITEM_BYTES[compute.dtype]
