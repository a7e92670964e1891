"""Seconds of each item on a named GPU, from what bounds it: arithmetic, memory, links. Nothing here was measured.

Symbols: N parameters that tokens are multiplied with, L layers, h hidden size, t tensor ranks, p pipeline ranks.

    decode     max(read weights and cache, 2 N tokens) / t, and 2 L all-reduces of t ranks, and the host, each step
    prefill    (2 N + attention) tokens / ranks, and all-reduces of many tensor ranks; score the same for each model
    proximal   one forward of the policy, a share each
    train      3 forwards of each model that learns (one more with full recompute, one less for adapters), stretched by
               filling and draining the pipeline: once for both models, or once each (`pipeline_time.py`)
    optimizer  gradients out and weights in, over the node's network cards; a part hides behind the backward pass
    refit      one copy of the weights into every node; a scorer that trains copies within its own memory
    boundary   where a group does all: weights take the layout of the engines, and its cache comes and goes

Single numbers are good to about a quarter, ratios between schedules to about a tenth.
"""

import math
from dataclasses import dataclass, replace

from rto_megatron.config.model import ModelConfig
from rto_megatron.schedule.pipeline_time import stretch
from rto_megatron.schedule.placement import RoleMap
from rto_megatron.schedule.trace import Load
from rto_megatron.schedule.work import Item


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in a node of eight."""

    flops: float
    """bfloat16 operations per second, dense."""
    bandwidth: float
    """Bytes per second of its memory."""
    memory: float
    """Bytes."""
    link: float
    """Bytes per second to the other GPUs of its node, each way."""
    network: float = 50e9
    """Bytes per second of its network card."""


GPUS = {
    "a100": Gpu(flops=312e12, bandwidth=2.04e12, memory=80e9, link=300e9, network=25e9),
    "h100": Gpu(flops=989e12, bandwidth=3.35e12, memory=80e9, link=450e9),
    "h200": Gpu(flops=989e12, bandwidth=4.8e12, memory=141e9, link=450e9),
}
GPUS_PER_NODE = 8

_LLAMA3 = ModelConfig(num_query_groups=8, num_attention_heads=32, vocab_size=128256, tie_embeddings=False, head_dim=128)
MODELS = {
    "llama3-1b": replace(
        _LLAMA3, num_layers=16, hidden_size=2048, ffn_hidden_size=8192, head_dim=64, tie_embeddings=True
    ),
    "llama3-8b": replace(_LLAMA3, num_layers=32, hidden_size=4096, ffn_hidden_size=14336),
    "llama3-70b": replace(_LLAMA3, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64),
}


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What of a bound is reached; the defaults are usual values, not measured ones."""

    memory: float = 0.8
    """Of the bandwidth, in decoding."""
    compute: float = 0.36
    """Of the operations, in scoring and training."""
    gemm: float = 0.65
    """Of the operations, in matrix products alone."""
    tensor_hidden: float = 0.5
    """All-reduces of tensor ranks that `compute` stands for, relative to the matrix products; what is above it adds."""
    link: float = 0.7
    network: float = 0.8
    all_reduce_seconds: float = 9e-6
    """Latency of one all-reduce within a node."""
    host_seconds: float = 0.4e-3
    """Of a decode step: with CUDA graphs; without about 2e-3."""
    fp8: float = 1.7
    """How much faster than bfloat16 matrix products are in FP8."""
    swap_seconds: float = 0.3
    """Of a step, where a group does all: to make room for the cache, and to give it back."""
    exposed: float = 0.35
    """Share of the gradients' communication that nothing hides."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks of a group and how its roles are cut over them; a group may hold several copies of a role side by side."""

    engine_ranks: int
    """Of a group that writes."""
    train_ranks: int
    """Of a group that trains."""
    engine_tensor: int = 1
    engine_pipeline: int = 1
    engine_context: int = 1
    """Ranks that write the same."""
    train_tensor: int = 1
    pipeline: int = 1
    context: int = 1
    """Ranks that share the tokens of a microbatch."""
    virtual_stages: int = 1
    """Blocks of layers of a pipeline rank."""
    critic: tuple[int, int, int, int] | None = None
    """Tensor, pipeline and context ranks and virtual stages of a group that trains the critic alone; null is as the
    policy's."""
    micro_tokens: int = 4096
    """Room of a microbatch of training, in tokens."""
    filled: float = 0.85
    """Of that room: whole samples leave some of it. A usual value."""
    engine_fp8: bool = False
    """Weights of the engines take one byte each; the cache stays in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What is asked and trained, and how."""

    scored: float = 4
    """Models that score: reference, DPO, critic, reward model; one more where old log-probs are scored anew, and that
    share of one of which reused ones are checked."""
    scored_fp8: int = 0
    """Of these: models that score in FP8."""
    proximal: int = 1
    """Forwards of a proximal item; 0 where it is interpolated instead."""
    forwards: float = 3.0
    """Of a trained token, mean of the models that learn: forward and backward; one more with full recompute, and one
    less for adapters: frozen weights have no gradient."""
    padding: float = 1.0
    """Tokens that are computed for each one that counts, in scoring and training; 1 where sequences are packed."""
    one_stream: bool = True
    """Whether models that train on the same groups fill and drain the pipeline together, or one after the other."""


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all but the norms and the embedding."""
    queries, groups = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    layer = model.hidden_size * (2 * queries + 2 * groups + 3 * model.ffn_hidden_size)
    return model.num_layers * layer + model.vocab_size * model.hidden_size


def cache_bytes_per_token(model: ModelConfig) -> int:
    """Keys and values of one token in bfloat16."""
    return 2 * model.num_layers * model.num_query_groups * model.kv_channels * 2


def forward_flops(model: ModelConfig, *, tokens: float, squares: float) -> float:
    """Of one forward pass over sequences whose lengths and squared lengths add up to these."""
    width = model.num_attention_heads * model.kv_channels
    return 2 * matmul_parameters(model) * tokens + 2 * model.num_layers * width * squares


class Roofline:
    """Seconds of any item: a cost for `simulate`."""

    def __init__(
        self,
        model: ModelConfig,
        gpu: Gpu,
        placement: RoleMap,
        layout: Layout,
        *,
        roles: Roles | None = None,
        efficiency: Efficiency | None = None,
    ) -> None:
        """All roles have one architecture."""
        self.model, self.gpu, self.placement, self.layout = model, gpu, placement, layout
        self.roles, self.efficiency = roles or Roles(), efficiency or Efficiency()
        self.parameters = matmul_parameters(model)

    def __call__(self, item: Item, load: Load, group: int) -> float:
        """Seconds that `group` needs for its part of `item`."""
        if item.kind == "decode":
            return self.decode(num_steps=load.num_steps, tokens=load.tokens, context=load.context)
        if item.kind == "prefill":
            sharing = self.layout.engine_ranks // self.layout.engine_context
            return self._forward(load, sharing, self.layout.engine_tensor)
        if item.kind == "score":
            return self.score(load, self.ranks(group))
        if item.kind == "proximal":
            return self.roles.proximal * self._computed(load, self.layout.train_ranks, self.layout.train_tensor)
        if item.kind == "train":
            return self.train(load, num_models=2 if item.role == "both" else 1, alone=item.role == "critic")
        if item.kind == "optimizer":
            return self.efficiency.exposed * self.gradient_seconds()
        if item.kind == "refit":
            return self.refit_seconds(local=item.role == "scorer" and set(item.groups) <= set(self.placement.trainers))
        return self.boundary_seconds() if item.kind == "boundary" else 0.0

    def score(self, load: Load, ranks: int) -> float:
        """Seconds in which so many ranks ask all models that score about these samples."""
        forwards = self.roles.scored - self.roles.scored_fp8 * (1 - 1 / self.efficiency.fp8)
        return forwards * self._computed(load, ranks, self.layout.train_tensor)

    def ranks(self, group: int) -> int:
        """Of a group: a group that trains has the trainers' layout for scoring too."""
        return self.layout.train_ranks if group in self.placement.trainers else self.layout.engine_ranks

    def decode(self, *, num_steps: int, tokens: float, context: float) -> float:
        """Seconds of a slice of decoding on one group.

        Args:
            tokens: drawn, over all steps and sequences.
            context: attended to, over all steps and sequences.
        """
        layout, gpu, eta = self.layout, self.gpu, self.efficiency
        t = layout.engine_tensor
        copies = layout.engine_ranks // (t * layout.engine_pipeline * layout.engine_context)  # each has its share
        bytes_each, faster = (1, eta.fp8) if layout.engine_fp8 else (2, 1.0)
        read = bytes_each * self.parameters * num_steps + cache_bytes_per_token(self.model) * context / copies
        multiply = 2 * self.parameters * tokens / copies
        seconds = max(read / (t * gpu.bandwidth * eta.memory), multiply / (t * gpu.flops * eta.gemm * faster))
        if t > 1:
            sent = 2 * (t - 1) / t * tokens / copies * self.model.hidden_size * 2
            each = num_steps * eta.all_reduce_seconds + sent / (gpu.link * eta.link)
            seconds += 2 * self.model.num_layers * each
        return seconds + num_steps * eta.host_seconds

    def train(self, load: Load, *, num_models: int, alone: bool = False) -> float:
        """Seconds of forward and backward of a group's share of a minibatch, for models that learn from it.

        Args:
            alone: the model is the critic, and the group may have a layout of its own.
        """
        layout, forwards = self.layout, self.roles.forwards
        policy = layout.train_tensor, layout.pipeline, layout.context, layout.virtual_stages
        tensor, pipeline, context, chunks = (layout.critic if alone else None) or policy
        ranks = tensor * pipeline * context if alone and layout.critic else layout.train_ranks
        copies = ranks // (tensor * pipeline * context)
        micros = max(1, math.ceil(self.roles.padding * load.tokens / (copies * layout.micro_tokens * layout.filled)))
        together = num_models if self.roles.one_stream else 1
        computed = self._computed(load, ranks, tensor)
        sent = self._hidden_seconds(self.roles.padding * load.tokens / (copies * micros), tensor * context, pipeline)
        stretched = stretch(
            together * micros, pipeline, forwards, num_chunks=chunks, message=micros * sent / computed if sent else 0.0
        )
        return num_models * forwards * computed * stretched

    def gradient_seconds(self) -> float:
        """Reduce-scatter of bfloat16 gradients and all-gather of weights, nothing hidden; none with one copy."""
        layout, groups = self.layout, len(self.placement.policy)
        copy = layout.train_tensor * layout.pipeline
        if groups * layout.train_ranks == copy:
            return 0.0
        return 4 * self.parameters / (self._in_node(copy) or layout.pipeline * self._node_network)

    def refit_seconds(self, *, local: bool = False) -> float:
        """New weights of one model into every node; or, local, read and written where they are."""
        if local:
            ranks = self.layout.train_tensor * self.layout.pipeline
            return 2 * 2 * self.parameters / ranks / (self.gpu.bandwidth * self.efficiency.memory)
        return 2 * self.parameters / (self._in_node(self.layout.engine_tensor) or self._node_network)

    def boundary_seconds(self) -> float:
        """What a group that writes with the weights that it trains does between the two, in a step."""
        if not self.placement.shares_weights:
            return 0.0
        same = (self.layout.engine_tensor, self.layout.engine_pipeline) == (
            self.layout.train_tensor,
            self.layout.pipeline,
        )
        return self.efficiency.swap_seconds + (0.0 if same else self.refit_seconds())

    def _in_node(self, ranks: int) -> float:
        """Bytes per second into so many ranks from the others of their node; 0 where the run has several nodes."""
        alone = sum(map(self.ranks, self.placement.groups)) <= GPUS_PER_NODE
        return alone * ranks * self.gpu.link * self.efficiency.link

    @property
    def _node_network(self) -> float:
        return GPUS_PER_NODE * self.gpu.network * self.efficiency.network

    def _hidden_seconds(self, tokens: float, sharing: int, pipeline: int) -> float:
        """A microbatch's hidden states on their way to the next stage; the ranks of a stage send their shares."""
        if pipeline == 1:
            return 0.0
        gpu, eta = self.gpu, self.efficiency
        in_node = sharing * pipeline <= GPUS_PER_NODE
        return (
            tokens
            * self.model.hidden_size
            * 2
            / sharing
            / (gpu.link * eta.link if in_node else gpu.network * eta.network)
        )

    def _forward(self, load: Load, ranks: int, tensor: int) -> float:
        flops = forward_flops(self.model, tokens=load.tokens, squares=load.squares)
        eta = self.efficiency
        more = max(0.0, self._tensor_ratio(tensor) - eta.tensor_hidden) * eta.compute / eta.gemm
        return (1 + more) * flops / (ranks * self.gpu.flops * eta.compute)

    def _computed(self, load: Load, ranks: int, tensor: int) -> float:
        """As `_forward`, with the padding that scoring and training compute too."""
        return self.roles.padding * self._forward(load, ranks, tensor)

    def _tensor_ratio(self, tensor: int) -> float:
        """Seconds of a token's all-reduces, relative to those of its matrix products."""
        layers, width, eta = self.model.num_layers, self.model.hidden_size, self.efficiency
        sent = 2 * layers * 2 * (tensor - 1) / tensor * width * 2 / (self.gpu.link * eta.link)
        return sent / (2 * self.parameters / (tensor * self.gpu.flops * eta.gemm))
