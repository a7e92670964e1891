"""A Megatron GPT from a ModelConfig: the policy, with log-probs as output."""

import math
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig, RopeScaling
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed.chunks import ChunkedModel
from rto_megatron.distributed.context import own_columns, whole_rows
from rto_megatron.distributed.divergence import linear_kl
from rto_megatron.distributed.log_probs import head_of, linear_log_probs
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.runtime import check_fp8
from rto_megatron.errors import ConfigError
from rto_megatron.models.attention import CausalAttention, GroupedAttention, PlainAttention, with_turns
from rto_megatron.models.elementwise import rms_norm, swiglu
from rto_megatron.models.heads import ScalarModel
from rto_megatron.models.layer import ColumnLinear, PlainLayer, RowLinear, read_of
from rto_megatron.models.lora import adapt_spec, freeze_base
from rto_megatron.models.weights import initialize

FP8_WIDTH = 16
"""What the rows and columns of a matrix must be a multiple of, for products in 8 bits."""

Kind = Literal["policy", "value"]
"""A policy scores tokens; a value model (critic, reward model) gives one number a token."""


class PolicyModel(GPTModel):
    """A GPT whose forward gives log-probs and entropies of response tokens, never their logits."""

    true_vocab: int
    """Ids from here on are padding of the vocabulary."""
    temperature: float
    log_prob_chunk: int
    banned_ids: tuple[int, ...]
    """Ids that have probability 0 in sampling and in log-probs alike: the pad id."""
    max_length: int
    beside: tuple[Tensor, Tensor] | None = None
    """[T, B, H] and [rows, H]: hidden states of a reference on the tokens of the coming forward, and its output layer.
    The output then has a third column, the KL of the reference's distribution and this one's."""
    gives_hidden: bool = False
    """Without a loss mask the forward ends before the output layer."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        """Embeddings and rotary angles of this context rank's columns of [B, T] ids and positions."""
        ids, positions = (own_columns(x, self.pg_collection.cp, dim=1) for x in (input_ids, position_ids))
        return with_turns(self, super()._preprocess(ids, positions, **options), positions)

    def _postprocess(
        self,
        hidden_states: Tensor,
        *,
        input_ids: Tensor,
        loss_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        **rest: Any,
    ) -> Tensor:
        """Hidden states of the last stage -> [B, T, 2] log-prob and entropy in nats, 0 outside `loss_mask`.

        With a reference `beside` [B, T, 3].
        Only positions that predict a token of `loss_mask` [B, T] go through the output layer, each on the context rank
        that has it; the result is the same on all of them. The last layer may have left out the others already.
        """
        if not self.post_process or (loss_mask is None and not self.gives_hidden):
            rest |= {"input_ids": input_ids, "loss_mask": loss_mask, "packed_seq_params": packed_seq_params}
            return super()._postprocess(hidden_states=hidden_states, **rest)
        group, context = self.pg_collection.tp, self.pg_collection.cp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        if loss_mask is None:
            return hidden
        # the one shift between logits and tokens on the Megatron path: column t is predicted by t - 1. Of whole rows,
        # because the next token may be another context rank's
        following = (F.pad(x[:, 1:], (0, 1)) for x in (loss_mask, input_ids))
        predicts, labels = (own_columns(x, context, dim=1) for x in following)
        # picked out of the sequence-first tensor as it lies: the gradient of a transposed one is not contiguous, and
        # Megatron's sum of it over tensor ranks (0.16.1: all_reduce of a contiguous copy) is then lost
        rows, columns = predicts.nonzero(as_tuple=True)
        left_out = read_of(self.decoder.layers[-1], packed_seq_params) is not None
        picked, weight = hidden[:, 0] if left_out else hidden[columns, rows], self.output_weight()
        layer = {
            "group": group,
            "vocab_size": self.true_vocab,
            "temperature": self.temperature,
            "chunk": self.log_prob_chunk,
            "banned_ids": self.banned_ids,
        }
        scored = linear_log_probs(picked, weight, labels[predicts], **layer)
        if self.beside is not None:
            of_ref, ref_weight = self.beside
            kl = linear_kl(picked, weight, of_ref[columns, rows], ref_weight, head_of(weight, **layer))
            scored = torch.cat((scored, kl[:, None]), -1)
        out = hidden.new_zeros(*predicts.shape, scored.shape[-1], dtype=torch.float32)
        out = out.index_put((rows, columns), scored)
        return F.pad(whole_rows(out, context, dim=1)[:, :-1], (0, 0, 1, 0))

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, [padded vocabulary / tensor ranks, hidden]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None  # only tied embeddings leave it out
        return weight


def build_model(
    config: ModelConfig,
    mesh: Mesh,
    *,
    kind: Kind,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    temperature: float = 1.0,
    banned_ids: tuple[int, ...] = (),
    seed: int | None = 0,
    lora: LoRAConfig | None = None,
    local: bool = False,
) -> Any:
    """This rank's part of a model with fresh weights, the same in every layout for the same seed.

    With `seed` None nothing is known of the weights: they are to be loaded. A ChunkedModel with virtual stages.

    Args:
        lora: adapters, which alone are trained.
        local: Megatron's own layers also where Transformer Engine is there; adapters need them, and so do models that
            share weights with an adapted one.

    Raises:
        ConfigError: the layout does not divide the model.
    """
    parallel.check_model(config)
    fused = mesh.runtime.has_fused_layers(compute.dtype) and lora is None and not local
    if compute.fp8 != "none":
        check_fp8(compute, mesh.runtime, adapted=lora is not None or local)
        check_fp8_sizes(config, mesh.tensor.size)
    megatron_config = transformer_config(config, mesh, parallel=parallel, compute=compute, fused=fused)
    chunks = [
        _build_chunk(number, kind, config, megatron_config, mesh, parallel=parallel, lora=lora, fused=fused)
        for number in range(parallel.virtual_stages)
    ]
    for chunk in chunks:
        chunk.true_vocab, chunk.max_length = config.vocab_size, config.max_length
        if isinstance(chunk, PolicyModel):
            chunk.temperature, chunk.log_prob_chunk, chunk.banned_ids = temperature, compute.log_prob_chunk, banned_ids
    model = chunks[0] if len(chunks) == 1 else ChunkedModel(chunks)
    if seed is not None:
        initialize(model, config, seed=seed)
    if lora is not None:
        for chunk in chunks:
            freeze_base(chunk, recomputes=compute.recompute != "none")
    return model.to(mesh.device)


def _build_chunk(
    number: int,
    kind: Kind,
    config: ModelConfig,
    megatron_config: TransformerConfig,
    mesh: Mesh,
    *,
    parallel: ParallelConfig,
    lora: LoRAConfig | None,
    fused: bool,
) -> Any:
    """This rank's block `number` of the layers, and what stands before or behind all of them where it is an end."""
    num_chunks = parallel.virtual_stages
    num_layers = config.num_layers // (mesh.pipeline.size * num_chunks)
    chunk = {"policy": PolicyModel, "value": ScalarModel}[kind](
        megatron_config,
        _layer_spec(config, lora, fused=fused, num_layers=num_layers),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_length,
        pre_process=mesh.is_first_stage and number == 0,
        post_process=mesh.is_last_stage and number == num_chunks - 1,
        share_embeddings_and_output_weights=config.tie_embeddings and kind == "policy",
        position_embedding_type="rope",
        rotary_base=config.rope_theta,
        pg_collection=mesh.groups,
        vp_stage=number if num_chunks > 1 else None,
    )
    chunk.rotary_pos_emb.inv_freq = rope_frequencies(config).to(mesh.device)
    if chunk.pre_process:
        chunk.embedding.register_forward_hook(_plain_strides)
    if chunk.post_process and not fused and not parallel.sequence:  # which cuts the tokens into equal shares
        chunk.decoder.layers[-1].ends_model = True
    return chunk


def _plain_strides(_module: Any, _inputs: Any, embeddings: Tensor) -> Tensor:
    """[T, 1, hidden] with the stride of a contiguous tensor in its dimension of size 1 too.

    Megatron transposes [1, T, hidden] and leaves the stride T * hidden there. torch's matmul then takes another way
    where the weight is frozen than where it is trained, a slower one with other last bits: a policy that has learned
    nothing yet differed from its reference.
    """
    return embeddings.view(embeddings.shape)


def transformer_config(
    config: ModelConfig, mesh: Mesh, *, parallel: ParallelConfig, compute: ComputeConfig, fused: bool
) -> TransformerConfig:
    """Megatron's view of the architecture, the layout and the arithmetic.

    Args:
        fused: layers are Transformer Engine's.
    """
    dtype = getattr(torch, compute.dtype)
    recompute: dict[str, Any] = {}
    fp8: dict[str, Any] = {} if compute.fp8 == "none" else {"fp8": compute.fp8, "fp8_recipe": compute.fp8_recipe}
    if compute.recompute == "selective":
        # the MLP's activations are the largest; those of attention are not kept by its fused kernels anyway
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    elif compute.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=compute.dtype == "bfloat16",
        tensor_model_parallel_size=mesh.tensor.size,
        pipeline_model_parallel_size=mesh.pipeline.size,
        context_parallel_size=mesh.context.size,
        cp_comm_type="p2p",  # of Transformer Engine: a ring, on which keys and values never lie whole
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if parallel.virtual_stages > 1 else None,
        sequence_parallel=parallel.sequence,
        # our losses are divided by their count beforehand: gradients are summed, never averaged
        calculate_per_token_loss=True,
        # microbatches are as wide as their own longest row
        variable_seq_lengths=mesh.pipeline.size > 1,
        moe_token_dispatcher_type="alltoall",  # there are no experts, yet the other choice forbids the line above
        # Megatron draws from a different stream in each layout; `initialize` does not
        use_cpu_initialization=mesh.device.type == "cpu",
        bias_activation_fusion=fused,
        # a module of the spec, whose ever it is: `SwiGLU` below
        use_te_activation_func=not fused,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=fused and mesh.runtime.has_fused_gradients,
        apply_rope_fusion=fused,
        deterministic_mode=compute.deterministic,
        **recompute,
        **fp8,
    )


class SwiGLU(MegatronModule):
    """The activation of the local layers' MLP: Megatron's own adds a 0 to each number, and passes over all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 * width] -> [..., width]."""
        return swiglu(x)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing; Megatron's asks the global parallel state for it."""
        return {}


class RMSNorm(torch.nn.RMSNorm):
    """The norm of the local layer spec: Megatron 0.16's refuses sequence parallelism and ignores params_dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # read by finalize_model_grads, which sums such gradients over the tensor ranks
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return super().forward(x)  # which has a kernel of its own, or widens what it sums
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def check_fp8_sizes(config: ModelConfig, num_tensor: int) -> None:
    """Raise ConfigError unless products in 8 bits can take a tensor rank's matrices."""
    queries, keys = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    sizes = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size / num_tensor,
        "head_dim times its heads": queries / num_tensor,
        "head_dim times query, key and value heads": (queries + 2 * keys) / num_tensor,
    }
    if wrong := [f"{name} {size:g}" for name, size in sizes.items() if size % FP8_WIDTH]:
        raise ConfigError(
            f"compute.fp8 needs model sizes of a tensor rank that are multiples of {FP8_WIDTH}, got model."
            f"{', '.join(wrong)}; set compute.fp8 to none, or parallel.tensor smaller"
        )


def _layer_spec(
    config: ModelConfig, lora: LoRAConfig | None, *, fused: bool, num_layers: int
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers, or Megatron's local ones with our attention and norm."""
    if fused:
        theirs: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_norm)
        theirs.submodules.self_attention.module = GroupedAttention
        return theirs
    spec: Any = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=config.qk_norm
    )  # its annotations say object
    layer, attention, mlp = spec.submodules, spec.submodules.self_attention, spec.submodules.mlp.submodules
    spec.module, attention.module, attention.submodules.core_attention = PlainLayer, PlainAttention, CausalAttention
    attention.submodules.linear_qkv = mlp.linear_fc1 = ColumnLinear
    attention.submodules.linear_proj = mlp.linear_fc2 = RowLinear
    mlp.activation_func = SwiGLU
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    if lora is not None:
        adapt_spec(layer, lora)
    norm: Any = RMSNorm
    return TransformerBlockSubmodules([spec] * num_layers, norm)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[head_dim / 2] radians per position of each rotary pair, scaling applied.

    Set on the model from here, because Megatron 0.16 hard-codes three of the four llama3 constants.
    """
    dim = config.kv_channels
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return frequencies if config.rope_scaling is None else _scale_frequencies(frequencies, config.rope_scaling)


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """`linear`: f / factor. `llama3`: that for slow pairs, f for fast ones, a blend between (Llama 3.1 model card)."""
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_max_length * frequencies / (2 * math.pi)
    blend = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * slow + blend * frequencies
