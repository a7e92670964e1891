"""What no schedule can beat: seconds of a step, however its items are ordered."""

from rto_megatron.config.model import ModelConfig
from rto_megatron.schedule.placement import colocated
from rto_megatron.schedule.rooflines import (
    Efficiency,
    Gpu,
    Layout,
    Roles,
    Roofline,
    cache_bytes_per_token,
    forward_flops,
    matmul_parameters,
)
from rto_megatron.schedule.work import StepInput

CACHE_FRAC = 0.85
"""Of an engine's memory that weights and cache may take."""


def resident_tokens(model: ModelConfig, gpu: Gpu, *, tensor: int) -> float:
    """Tokens whose keys and values fit beside the weights; below 0 where the weights do not fit."""
    return (CACHE_FRAC * gpu.memory * tensor - 2 * matmul_parameters(model)) / cache_bytes_per_token(model)


def decode_seconds(model: ModelConfig, gpu: Gpu, *, batch: float, context: float, tensor: int) -> float:
    """One decode step of one engine with so many sequences of that many tokens."""
    layout = Layout(engine_ranks=tensor, train_ranks=tensor, engine_tensor=tensor)
    return Roofline(model, gpu, colocated(1), layout).decode(num_steps=1, tokens=batch, context=batch * context)


def latency_bound(model: ModelConfig, gpu: Gpu, *, max_new_tokens: int, context: float, tensor: int) -> float:
    """Of one version's responses: the longest decodes alone to its end."""
    return max_new_tokens * decode_seconds(model, gpu, batch=1, context=context, tensor=tensor)


def resource_bound(
    model: ModelConfig,
    gpu: Gpu,
    known: StepInput,
    lengths: list[int],
    *,
    num_gpus: int,
    roles: Roles | None = None,
    efficiency: Efficiency | None = None,
) -> float:
    """All work of a step, spread over all GPUs without a gap, decoding in the largest batches that fit.

    Raises:
        ValueError: the model does not fit into the eight GPUs of a node.
    """
    roles, efficiency = roles or Roles(), efficiency or Efficiency()
    totals = [prompt + length for prompt, length in zip(known.prompt_tokens, lengths, strict=True)]
    forward = forward_flops(model, tokens=sum(totals), squares=sum(total * total for total in totals))
    epochs = sum(map(len, known.minibatches)) / len(totals)
    compute = forward * (roles.scored + 2 * epochs * roles.forwards) / (gpu.flops * efficiency.compute)
    context = sum(known.prompt_tokens) / len(totals) + sum(lengths) / len(totals) / 2
    batches = {t: min(len(totals), resident_tokens(model, gpu, tensor=t) / context) for t in (1, 2, 4, 8)}
    a_token = [
        t * decode_seconds(model, gpu, batch=batch, context=context, tensor=t) / batch
        for t, batch in batches.items()
        if batch >= 1
    ]
    if not a_token:
        raise ValueError(f"{2 * matmul_parameters(model) / 1e9:.0f} GB of weights do not fit into a node of eight GPUs")
    return (compute + min(a_token) * sum(lengths)) / num_gpus
