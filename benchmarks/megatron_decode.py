"""Megatron-Core's own dynamic inference engine on one GPU: what `benchmarks.gpu_step` measures of ours.

A plain Megatron GPT of the same shape with fresh weights, in bfloat16, of Transformer Engine's layers where it is
installed; all requests begin together, log-probs are told. Written against megatron-core 0.16.1, whose engine attends
by flash-attn's kernels alone: what it needs and what is missing is `missing()`.
"""

import asyncio
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version

from benchmarks.machine import spread
from benchmarks.shapes import VOCAB, model_config
from rto_megatron.distributed.runtime import prepare_imports
from rto_megatron.rollout.blocks import blocks_of

BLOCK = 256
"""Tokens of a block of its cache: its default."""
GIB = 1 << 30


class NoTokenizer:
    """The engine wants text in the end; ours is not measured on it either."""

    bos, eod = -1, -1

    def detokenize(self, tokens: list[int]) -> str:
        """Nothing."""
        return ""


def missing() -> list[str]:
    """What this machine lacks of what the engine asks for."""
    lacks = [] if torch.cuda.is_available() else ["an NVIDIA GPU"]
    lacks += [name for name in ("triton", "einops") if find_spec(name) is None]
    if not any(find_spec(name) for name in ("flash_attn_3", "flashattn_hopper")):
        try:
            found = version("flash-attn")
        except PackageNotFoundError:
            found = None
        if found is None or Version(found) < Version("2.7.3"):
            lacks.append(f"flash-attn 2.7.3 or newer, or FlashAttention 3 (found {found or 'neither'})")
    return lacks


def measure(name: str, sizes: dict[str, int], *, graphs: bool) -> dict[str, Any]:
    """Seconds of decode steps of a full batch, as `gpu_step.decoding` tells them.

    Args:
        graphs: record a layer's steps as CUDA graphs (`cuda_graph_impl: local`).
    """
    prepare_imports()
    from megatron.core.inference.sampling_params import SamplingParams

    generator = torch.Generator().manual_seed(0)
    engine = make_engine(name, sizes, graphs=graphs)
    for uid in range(sizes["slots"]):
        prompt = torch.randint(1, VOCAB[name], (sizes["prompt"],), generator=generator).tolist()
        told = {"return_log_probs": True, "skip_prompt_log_probs": True}
        sampling = SamplingParams(num_tokens_to_generate=sizes["new"] + 1, termination_id=-1, **told)
        engine.add_request(uid, prompt, sampling)
    start = time.perf_counter()
    engine.step_modern()  # all prompts fit into one pass
    torch.cuda.synchronize()
    prefill, seconds = time.perf_counter() - start, []
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step_modern()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert abs(len(seconds) - sizes["new"]) <= 1, f"{sizes['new']} steps were asked for, it made {len(seconds)}"
    took = spread(seconds[len(seconds) // 4 :])
    return {
        "seconds": took,
        "prefill_seconds": prefill,
        "tokens_per_second": sizes["slots"] / took["median"],
        "layers": _layers(),
    }


def make_engine(name: str, sizes: dict[str, int], *, graphs: bool) -> Any:
    """The engine over a fresh model, for as many requests as there are slots."""
    from megatron.core import parallel_state
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)
    asyncio.set_event_loop(asyncio.new_event_loop())
    slots, longest = sizes["slots"], sizes["prompt"] + sizes["new"] + 1
    model = make_model(name, longest=longest, graphs=graphs)
    config = model.config
    blocks = slots * blocks_of(longest, BLOCK) + 2
    block_bytes = BLOCK * 2 * config.num_layers * config.num_query_groups * config.kv_channels * 2
    context = DynamicInferenceContext(
        params_dtype=torch.bfloat16,
        num_layers=config.num_layers,
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups,
        max_sequence_length=longest,
        buffer_size_gb=blocks * block_bytes / GIB,
        max_requests=slots,
        max_tokens=slots * sizes["prompt"],
        block_size_tokens=BLOCK,
        num_cuda_graphs=1 if graphs else None,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    wrapping = InferenceWrapperConfig(
        hidden_size=config.hidden_size,
        params_dtype=torch.bfloat16,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=VOCAB[name],
        inference_max_requests=slots,
        inference_max_seq_length=longest,
    )
    wrapped = GPTInferenceWrapper(model, wrapping, context)
    return DynamicInferenceEngine(TextGenerationController(wrapped, NoTokenizer()), context, random_seed=0)


def make_model(name: str, *, longest: int, graphs: bool) -> Any:
    """A plain Megatron GPT of a shape, fresh, in bfloat16."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer import TransformerConfig

    shape = model_config(name, max_length=longest)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
        persist_layer_norm=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        cuda_graph_impl="local" if graphs else "none",
    )
    te = _layers() == "Transformer Engine"
    spec: Any = (
        get_gpt_layer_with_transformer_engine_spec() if te else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    model = GPTModel(
        config,
        spec,
        VOCAB[name],
        longest,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tie_embeddings,
        parallel_output=False,
    )
    model = model.bfloat16().eval()
    return model.cuda() if torch.cuda.is_available() else model


def _layers() -> str:
    return "Transformer Engine" if find_spec("transformer_engine") and torch.cuda.is_available() else "local"
