"""Bytes of a rank of each kind in each phase: what is always there, and what comes and goes.

    always     weights of every role that the rank has, but not of those in host memory (compute.offload_frozen);
               gradients and optimizer of what it trains, the copies that engines and scorers keep, libraries
    generate   and the cache of keys and values
    score      and one layer's activations of a pack, and frozen roles from the host; the cache where others write
    train      and the activations that the backward pass needs

Weights, gradients and optimizer are counted from the architecture; the rest is a guess (`models/footprint.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.models.footprint import (
    Model,
    activation_bytes,
    cached_bytes,
    is_offloaded,
    model_bytes,
    offloaded_bytes,
)
from rto_megatron.schedule.placement import RoleMap

Phase = Literal["generate", "score", "train"]
LIBRARIES = 4 << 30
"""Of a GPU: its context, communication buffers, fragmentation. A usual value, not a measured one."""
LEARN = ("policy", "critic")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the memory of a run depends on."""

    models: Sequence[Model]
    """All roles, each once; `policy` and `critic` have an optimizer."""
    placement: RoleMap
    train: ParallelConfig
    """Of the groups that train the policy, and of all that score beside them."""
    engine: ParallelConfig
    critic: ParallelConfig
    """Of the groups that train the critic alone."""
    compute: ComputeConfig
    moves: bool
    """Whether weights may move while responses that they wrote are unscored."""
    num_data: int
    """Copies of the policy that its optimizer is spread over."""
    num_critic_data: int
    micro_tokens: int
    """Of a microbatch of training."""
    pack_tokens: int
    """Of a pack that is scored."""


@dataclass(frozen=True)
class Rank:
    """A kind of rank: what its group does."""

    writes: bool
    scores: bool
    trains: tuple[str, ...]
    copies: tuple[str, ...]
    """Of policy and critic, those that it keeps as they were when the responses were written, to score with."""

    @property
    def name(self) -> str:
        """In words."""
        words = ["writes"] * self.writes + ["scores"] * self.scores
        words += [f"trains {' and '.join(self.trains)}"] * bool(self.trains)
        return ", ".join(words)


def ranks_of(setting: Setting) -> list[Rank]:
    """The kinds of ranks that a map has."""
    place, names = setting.placement, {model.name for model in setting.models}
    kinds = [
        Rank(
            writes=group in place.engines,
            scores=group in place.scorers,
            trains=tuple(name for name in LEARN if name in names and group in getattr(place, name)),
            copies=tuple(n for n in LEARN if n in names and place.needs_copy(group, n, moves=setting.moves)),
        )
        for group in place.groups
    ]
    return list(dict.fromkeys(kinds))


def always(setting: Setting, rank: Rank) -> dict[str, float]:
    """Part -> bytes that the fullest rank of the kind has in all phases."""
    parts: dict[str, float] = {}
    for model in setting.models:
        if setting.compute.offload_frozen and model.name not in LEARN and is_offloaded(model):
            continue  # it comes and goes
        if model.name in rank.trains or (rank.scores and model.name not in LEARN):
            parts[model.name] = _bytes(setting, rank, model)
        if model.name in rank.copies:
            parts[f"{model.name} snapshot"] = _bytes(setting, rank, replace(model, optimizer=None, shared=False))
    own = "policy" in rank.trains and _cut(setting.engine) == _cut(setting.train)
    if rank.writes and not own:
        policy = next(model for model in setting.models if model.name == "policy")
        parts["engine"] = _fullest(
            replace(policy, optimizer=None, shared=False), setting.engine, setting.compute, num_data=1
        )
    return parts | {"libraries": LIBRARIES}


def by_phase(setting: Setting, rank: Rank, *, cache: float) -> dict[Phase, dict[str, float]]:
    """Phase -> part -> bytes of the fullest rank of a kind.

    Args:
        cache: bytes of keys and values on a rank that writes.
    """
    base = always(setting, rank)
    found: dict[Phase, dict[str, float]] = {}
    if rank.writes:
        found["generate"] = base | {"cache": cache}
    if rank.scores:
        beside = {"cache": cache} if rank.writes and not rank.trains else {}
        found["score"] = base | beside | _visitors(setting) | {"activations": _of_scoring(setting)}
    if rank.trains:
        found["train"] = base | {"activations": _of_training(setting, rank)}
    return found


def _visitors(setting: Setting) -> dict[str, float]:
    """Frozen roles that live in host memory: the two that are on the fullest rank together."""
    if not setting.compute.offload_frozen:
        return {}
    frozen = [model for model in setting.models if model.name not in LEARN]
    stages = range(setting.train.pipeline)
    return {
        "frozen roles from the host": max(
            offloaded_bytes(frozen, setting.train, setting.compute, stage=stage) for stage in stages
        )
    }


def cache_bytes_of_a_token(setting: Setting) -> int:
    """Keys and values of a token on the fullest rank that writes."""
    policy = next(model for model in setting.models if model.name == "policy").architecture
    return cached_bytes(policy, setting.engine, setting.compute)


def _cut(parallel: ParallelConfig) -> tuple[int, int]:
    return parallel.tensor, parallel.pipeline


def _bytes(setting: Setting, rank: Rank, model: Model) -> float:
    alone = rank.trains == ("critic",)
    parallel = setting.critic if alone else setting.train if rank.trains or rank.scores else setting.engine
    num_data = setting.num_critic_data if alone or model.name == "critic" else setting.num_data
    return _fullest(model, parallel, setting.compute, num_data=num_data)


def _fullest(model: Model, parallel: ParallelConfig, compute: ComputeConfig, *, num_data: int) -> float:
    return max(
        model_bytes(model, parallel, compute, stage=stage, num_data=num_data).total
        for stage in range(parallel.pipeline)
    )


def _of_training(setting: Setting, rank: Rank) -> float:
    parallel = setting.critic if rank.trains == ("critic",) else setting.train
    return max(
        activation_bytes(model.architecture, parallel, setting.compute, tokens=setting.micro_tokens)
        for model in setting.models
        if model.name in rank.trains
    )


def _of_scoring(setting: Setting) -> float:
    compute = replace(setting.compute, recompute="none")
    alone = replace(setting.train, pipeline=1, virtual_stages=1)
    return max(
        activation_bytes(replace(model.architecture, num_layers=1), alone, compute, tokens=setting.pack_tokens)
        for model in setting.models
    )
