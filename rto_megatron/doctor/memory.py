"""How much memory a rank needs: what is certain from the architecture, and a rough guess at the rest.

The formulas are in `models/footprint.py`.
"""

from collections.abc import Sequence
from typing import Any

import psutil

from rto_megatron.config.run import DPORun, EvaluateRun, GenerateRun, RewardRun, RTORun
from rto_megatron.doctor.findings import Section
from rto_megatron.doctor.machine import Place
from rto_megatron.metrics import in_units
from rto_megatron.models.counts import num_parameters
from rto_megatron.models.footprint import (
    Bytes,
    Model,
    activation_bytes,
    cached_bytes,
    is_offloaded,
    model_bytes,
    offloaded_bytes,
)
from rto_megatron.stages.memory import JUDGES
from rto_megatron.stages.resume import TrainingRun

GIB = 1 << 30
LIBRARIES = GIB // 2
"""Torch, Megatron and their like, in every process."""


def check_memory(found: Section, config: Any, models: Sequence[Model], place: Place, *, num_data: int) -> None:
    """Compare what the fullest rank needs with what it has."""
    stages = [
        [model_bytes(model, config.parallel, config.compute, stage=stage, num_data=num_data) for model in models]
        for stage in range(config.parallel.pipeline)
    ]
    passing = passing_bytes(config, models, num_data=num_data)
    if config.compute.offload_frozen and isinstance(config, RTORun | EvaluateRun):
        judges = [model for model in models if model.name in JUDGES]
        stages = [[_on_device(model, part) for model, part in zip(models, parts, strict=True)] for parts in stages]
        passing["frozen roles on their way from the host"] = max(
            offloaded_bytes(judges, config.parallel, config.compute, stage=stage)
            for stage in range(config.parallel.pipeline)
        )
    fullest = max(stages, key=lambda parts: sum(part.total for part in parts))
    if isinstance(config, TrainingRun) and config.checkpoint.background and not place.hardware.num_gpus:
        trained = [part for model, part in zip(models, fullest, strict=True) if model.optimizer is not None]
        passing["checkpoint on its way to the disk"] = sum(part.weights + part.optimizer for part in trained)
    certain = sum(part.total for part in fullest)
    needed = certain + sum(passing.values()) + LIBRARIES
    rows = [
        (model.name, num_parameters(model.architecture, model.kind), *map(in_units, _columns(part)))
        for model, part in zip(models, fullest, strict=True)
    ]
    rows += [(f"{name}, roughly", "", "", "", "", in_units(size)) for name, size in passing.items()]
    rows += [("libraries, roughly", "", "", "", "", in_units(LIBRARIES)), ("sum", "", "", "", "", in_units(needed))]
    found.table("memory of the fullest rank", ("role", "parameters", "weights", "gradients", "optimizer", "sum"), rows)
    has, whose = rank_memory(place)
    why = "a rank that runs out of memory ends, and the others wait for it"
    way_out = (
        "more ranks with parallel.tensor or parallel.pipeline, compute.dtype bfloat16, optimizer.distributed true, "
        "adapters (lora, critic_lora), compute.offload_frozen; "
        "for activations compute.recompute, a smaller compute.micro_batch_tokens and, where one row is too long, "
        "parallel.context; for the cache rollout.max_slots or rollout.kv_blocks"
    )
    if certain > has:
        found.error(
            f"models alone take {in_units(certain)} of a rank, which has {in_units(has)} ({whose})",
            why=why,
            way_out=way_out,
        )
    elif needed > has:
        found.warning(
            f"a rank needs about {in_units(needed)} and has {in_units(has)} ({whose})", why=why, way_out=way_out
        )
    else:
        found.ok(f"a rank needs about {in_units(needed)} and has {in_units(has)} ({whose})")


def _on_device(model: Model, part: Bytes) -> Bytes:
    """What `compute.offload_frozen` leaves of a role on the device for good."""
    moved = model.name in JUDGES and is_offloaded(model)
    return Bytes(weights=0, gradients=0, optimizer=0) if moved else part


def _columns(part: Bytes) -> tuple[int, int, int, int]:
    return part.weights, part.gradients, part.optimizer, part.total


def passing_bytes(config: Any, models: Sequence[Model], *, num_data: int) -> dict[str, int]:
    """What comes and goes: the largest of each kind."""
    passing: dict[str, int] = {}
    trained = [model for model in models if model.optimizer is not None]
    if trained:
        tokens = config.compute.cut.most_tokens(longest_of(config))
        passing["activations"] = max(
            activation_bytes(model.architecture, config.parallel, config.compute, tokens=tokens) for model in trained
        )
    if isinstance(config, RTORun | GenerateRun | EvaluateRun):
        slots = config.rollout.max_slots
        if isinstance(config, RTORun):
            slots = min(slots, config.prompts_per_step * config.samples_per_prompt // num_data)
        writers = [model.architecture for model in models if model.kind == "policy"]
        a_token = max((cached_bytes(w, config.parallel, config.compute) for w in writers), default=0)
        passing["key-value cache"] = config.rollout.most_cached(slots) * a_token
    return passing


def longest_of(config: Any) -> int:
    """Tokens of the longest row, or pair of rows, that the run trains on."""
    if hasattr(config, "rollout"):
        return config.rollout.longest
    return config.data.max_length * (2 if isinstance(config, DPORun | RewardRun) else 1)


def rank_memory(place: Place) -> tuple[int, str]:
    """Bytes that a rank can have, and whose they are."""
    if place.memory is not None:
        return int(place.memory * GIB), "--memory"
    if place.hardware.num_gpus:
        return place.hardware.gpu_bytes, place.hardware.device
    return psutil.virtual_memory().available // place.ranks_here, f"what is free here, over {place.ranks_here} ranks"
