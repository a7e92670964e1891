"""What no schedule can beat: seconds of a step, however its items are ordered."""

from collections.abc import Sequence

from rto_megatron.config.model import ModelConfig
from rto_megatron.schedule.placement import RoleMap, colocated
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
from rto_megatron.schedule.simulate import Cost
from rto_megatron.schedule.trace import Load
from rto_megatron.schedule.work import Item, Kind, StepInput

CACHE_FRAC = 0.85
"""Of an engine's memory that weights and cache may take."""


def resident_tokens(model: ModelConfig, gpu: Gpu, *, tensor: int) -> float:
    """Tokens whose keys and values fit beside the weights; below 0 where the weights do not fit."""
    return (CACHE_FRAC * gpu.memory * tensor - 2 * matmul_parameters(model)) / cache_bytes_per_token(model)


def decode_seconds(model: ModelConfig, gpu: Gpu, *, batch: float, context: float, tensor: int) -> float:
    """One decode step of one engine with so many sequences of that many tokens."""
    layout = Layout(engine_ranks=tensor, train_ranks=tensor, engine_tensor=tensor)
    return Roofline(model, gpu, colocated(1), layout).decode(num_steps=1, tokens=batch, context=batch * context)


def resource_bound(
    model: ModelConfig,
    gpu: Gpu,
    known: StepInput,
    lengths: list[int],
    *,
    num_gpus: int,
    num_learners: int = 2,
    roles: Roles | None = None,
    efficiency: Efficiency | None = None,
) -> float:
    """All work of a step, spread over all GPUs without a gap, decoding in the largest batches that fit.

    Args:
        num_learners: models that train: policy and critic, or the policy alone.

    Raises:
        ValueError: the model does not fit into the eight GPUs of a node.
    """
    roles, efficiency = roles or Roles(), efficiency or Efficiency()
    totals = [prompt + length for prompt, length in zip(known.prompt_tokens, lengths, strict=True)]
    forward = forward_flops(model, tokens=sum(totals), squares=sum(total * total for total in totals))
    epochs = sum(map(len, known.minibatches)) / len(totals)
    compute = forward * (roles.scored + num_learners * epochs * roles.forwards) / (gpu.flops * efficiency.compute)
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


def longest_chain(
    cost: Cost,
    placement: RoleMap,
    lengths: Sequence[int],
    *,
    prompt_tokens: int,
    minibatch: int,
    staleness: int,
) -> float:
    """Seconds of what must follow one another in a step: the longest response, then the last minibatch and new weights.

    With staleness the step's training overlaps with the next responses, and only those and new weights follow.

    Args:
        lengths: tokens of a step's responses.
        prompt_tokens: of every prompt.
    """
    engine, trainer, longest = placement.engines[0], placement.policy[0], max(lengths)
    alone = Load(tokens=longest)
    alone.num_steps = longest
    alone.context = longest * prompt_tokens + longest * (longest + 1) // 2
    read = Load([prompt_tokens])
    seconds = cost(_item("prefill", engine), read, engine) + cost(_item("decode", engine), alone, engine)
    if not placement.shares_weights:
        everyone = tuple(sorted({*placement.policy, *placement.engines}))
        seconds += cost(Item(kind="refit", step=0, groups=everyone, number=1, role="engine"), Load(), engine)
    if staleness:
        return seconds
    scorer = placement.scorers[0]
    seconds += cost(_item("score", scorer), Load([prompt_tokens + longest]), scorer)
    mean = prompt_tokens + sum(lengths) / len(lengths)
    share = Load([round(mean)] * max(1, minibatch // len(placement.policy)))
    role = "both" if placement.policy == placement.critic else "policy"
    seconds += cost(_item("train", trainer, role), share, trainer)
    together = Item(kind="optimizer", step=0, groups=placement.policy, number=0, role="policy")
    return seconds + cost(together, share, trainer)


def _item(kind: Kind, group: int, role: str = "") -> Item:
    return Item(kind=kind, step=0, groups=(group,), number=0, role=role)
