"""How a run is cut over ranks, and in which arithmetic it is done."""

from dataclasses import dataclass
from typing import Literal

from rto_megatron.config.model import ModelConfig
from rto_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout of every role; data parallelism is what is left of the world."""

    tensor: int = 1
    """Ranks that share each matrix."""
    pipeline: int = 1
    """Ranks that share the layers."""
    context: int = 1
    """Ranks that share the tokens of each sequence in training and scoring; while generating they do the same work."""
    virtual_stages: int = 1
    """Blocks of layers of one pipeline rank (interleaved pipeline): more of them shorten the time in which ranks wait
    for the first and last microbatches, and send that many times as much between ranks; needs pipeline > 1."""
    sequence: bool = False
    """Cut norms and residuals over the tensor ranks too; needs tensor > 1."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context", "virtual_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} must be 1 or more, got {getattr(self, name)}")
        if self.virtual_stages > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_stages {self.virtual_stages} needs parallel.pipeline > 1, got pipeline 1; "
                "set parallel.virtual_stages to 1"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence needs parallel.tensor > 1, got tensor 1; set parallel.sequence to false"
            )

    @property
    def replica(self) -> int:
        """Ranks that hold one copy of a model."""
        return self.tensor * self.context * self.pipeline

    @property
    def sizes(self) -> str:
        """The axes of a replica, for messages; the context axis where it is cut."""
        context = f"context {self.context} x " if self.context > 1 else ""
        return f"tensor {self.tensor} x {context}pipeline {self.pipeline}"

    def data(self, world: int) -> int:
        """Data-parallel size in a world of that many ranks."""
        if world % self.replica:
            fields = " x ".join(f"parallel.{size}" for size in self.sizes.split(" x "))
            raise ConfigError(
                f"{fields} does not divide the {world} ranks that were started; start a multiple of {self.replica} "
                "(torchrun --nproc-per-node)"
            )
        return world // self.replica

    def check_model(self, model: ModelConfig, name: str = "parallel") -> None:
        """Raise ConfigError unless the layout, the setting `name`, divides the model."""
        for size in ("num_attention_heads", "ffn_hidden_size"):
            if getattr(model, size) % self.tensor:
                raise ConfigError(f"{name}.tensor must divide model.{size} {getattr(model, size)}, got {self.tensor}")
        groups = model.num_query_groups
        if groups % self.tensor and self.tensor % groups:
            raise ConfigError(
                f"{name}.tensor must divide model.num_query_groups {groups} or be a multiple of it, got {self.tensor}"
            )
        if model.padded_vocab_size % self.tensor:
            raise ConfigError(
                f"{name}.tensor must divide the padded vocabulary {model.padded_vocab_size}, got {self.tensor}"
            )
        if model.num_layers % self.pipeline:
            raise ConfigError(f"{name}.pipeline must divide model.num_layers {model.num_layers}, got {self.pipeline}")
        if model.num_layers % (self.pipeline * self.virtual_stages):
            raise ConfigError(
                f"{name}.pipeline x {name}.virtual_stages must divide model.num_layers {model.num_layers}, "
                f"got {self.pipeline} x {self.virtual_stages}"
            )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How large a microbatch may be: up to both limits, and one row or pair at least."""

    rows: int | None = None
    """A pair (two sequences) is one row; null sets no limit."""
    tokens: int | None = None
    """Padding included, where there is any; null sets no limit."""
    packed: bool = False
    """Rows one after another, rather than padded to the longest."""

    def most_tokens(self, longest: int) -> int:
        """Tokens of the largest microbatch of rows (or pairs) of up to `longest` tokens."""
        by_rows = None if self.rows is None else self.rows * longest
        by_tokens = None if self.tokens is None else max(self.tokens, longest)
        return min(limit for limit in (by_rows, by_tokens) if limit is not None)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Arithmetic and memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations. Log-probs, rewards, advantages and losses are float32 either way."""
    micro_batch_tokens: int | None = 2048
    """Tokens in one forward and backward pass at most, padding included; one row (or pair) in any case; null sets no
    limit."""
    micro_batch_size: int | None = None
    """Rows in it at most; a pair (two sequences) is one row; null sets no limit."""
    score_micro_batch_tokens: int | None = 4096
    """Tokens in one forward pass without gradient at most, likewise."""
    score_micro_batch_size: int | None = None
    """Sequences in it at most; null sets no limit."""
    packing: bool | None = None
    """Put the rows of a microbatch one after another rather than pad them to the longest; each sees itself alone. Not
    with parallel.context > 1; null packs where it can be done."""
    log_prob_chunk: int = 512
    """Tokens whose logits exist at one time; smaller takes less memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to compute again in the backward pass rather than keep: those of the MLPs, or all."""
    offload_frozen: bool = False
    """Keep reference, DPO policy and reward model in host memory while they do not score (rto, ppo, evaluate); each is
    fetched while the one before scores. On a GPU the host memory is pinned."""
    threads: int = 1
    """CPU threads of one rank; more than cores / ranks makes it slower."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """Multiply the layers' matrices in 8 bits, in training and scoring; weights, their gradients, output layer, heads
    and decoding stay as they are. `hybrid` takes E4M3 forward and E5M2 for gradients, `e4m3` that one for both. Needs
    bfloat16, Transformer Engine and a GPU of compute capability 8.9 or more."""
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """What shares a scale: a tensor as it is now, a block of 128 numbers (9.0 or more), or of 32 (10.0 or more)."""
    deterministic: bool = False
    """Let GPU kernels and sums over ranks take one order, so that a run gives the same bits twice; slower. On a CPU it
    changes nothing: there it is so anyway."""

    def __post_init__(self) -> None:
        if self.fp8 != "none" and self.dtype != "bfloat16":
            raise ValueError(
                f"compute.fp8 {self.fp8} needs compute.dtype bfloat16, got {self.dtype}; set compute.dtype to "
                "bfloat16, or compute.fp8 to none"
            )
        for name in ("log_prob_chunk", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"compute.{name} must be 1 or more, got {getattr(self, name)}")
        for rows, tokens in (
            ("micro_batch_size", "micro_batch_tokens"),
            ("score_micro_batch_size", "score_micro_batch_tokens"),
        ):
            for name in (rows, tokens):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise ValueError(f"compute.{name} must be 1 or more or null, got {value}")
            if getattr(self, rows) is None and getattr(self, tokens) is None:
                raise ValueError(
                    f"compute.{tokens} or compute.{rows} must limit a microbatch, got null for both; set one of them"
                )

    @property
    def cut(self) -> Cut:
        """Of what is trained on."""
        return Cut(rows=self.micro_batch_size, tokens=self.micro_batch_tokens, packed=self.packing is not False)

    @property
    def score_cut(self) -> Cut:
        """Of what is scored."""
        return Cut(
            rows=self.score_micro_batch_size, tokens=self.score_micro_batch_tokens, packed=self.packing is not False
        )
