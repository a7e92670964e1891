"""The architecture of a model, independent of how it is cut over ranks."""

from dataclasses import dataclass
from typing import Literal

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, whatever the tensor-parallel size, so that a
checkpoint has the same shapes in every layout."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretraining length."""

    kind: Literal["linear", "llama3"] = "llama3"
    """`linear` divides all frequencies; `llama3` only the slow ones (Llama 3.1)."""
    factor: float = 8.0
    """How many times longer the context becomes; 1 changes nothing."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_length / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_length / this are left alone."""
    original_max_length: int = 8192
    """Tokens: the context length of pretraining."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"model.rope_scaling.factor must be 1 or more, got {self.factor}")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor must lie below high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: RoPE, RMSNorm, SwiGLU, grouped-query attention."""

    num_layers: int = 4
    """Transformer layers, each attention and SwiGLU."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int = 384
    """Width of the SwiGLU layer."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int = 2
    """Key-value heads; equal to num_attention_heads for plain multi-head attention."""
    head_dim: int | None = None
    """Width of one head; null is hidden_size / num_attention_heads."""
    vocab_size: int = 0
    """True vocabulary; 0 takes the tokenizer's."""
    max_length: int = 1024
    """Tokens: the longest sequence the model may see."""
    tie_embeddings: bool = True
    """Use the input embedding as output layer."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How they are stretched; null leaves them alone."""
    qkv_bias: bool = False
    """Qwen2: biases on query, key and value."""
    qk_norm: bool = False
    """Qwen3: RMSNorm on queries and keys."""
    init_std: float = 0.02
    """Standard deviation of fresh weights."""
    architecture: str = "LlamaForCausalLM"
    """The Hugging Face class that the weights came from or go to."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be 1 or more, got {getattr(self, name)}")
        if self.vocab_size < 0:
            raise ValueError(f"model.vocab_size must be 0 (the tokenizer's) or more, got {self.vocab_size}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_query_groups must divide num_attention_heads {self.num_attention_heads}, "
                f"got {self.num_query_groups}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads must divide hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}; or set model.head_dim"
            )
        if self.kv_channels < 2 or self.kv_channels % 2:
            raise ValueError(f"model.head_dim must be even (rotary embeddings) and 2 or more, got {self.kv_channels}")
        for name in ("norm_epsilon", "rope_theta", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name} must be positive, got {getattr(self, name)}")

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding; rows from vocab_size on are padding and are masked everywhere."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
