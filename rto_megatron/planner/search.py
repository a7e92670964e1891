"""Every role map and layout of so many GPUs, with memory and simulated seconds; those that do not fit are left out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.doctor.memory import Model, activation_bytes, model_bytes
from rto_megatron.errors import ConfigError
from rto_megatron.schedule.limits import CACHE_FRAC, decode_seconds
from rto_megatron.schedule.placement import RoleMap, colocated, fused, split
from rto_megatron.schedule.rooflines import GPUS_PER_NODE, Gpu, Layout, Roofline, cache_bytes_per_token
from rto_megatron.schedule.trace import Summary, summarise
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload, seconds_per_step

COMPUTE = ComputeConfig(dtype="bfloat16", recompute="selective", micro_batch_size=1)
FROZEN = (("reference", "policy"), ("dpo", "policy"), ("reward_model", "value"))
TRAINED = (("policy", "policy"), ("critic", "value"))
LIBRARIES = 4 << 30
"""Of a GPU: CUDA context, communication buffers, fragmentation. A usual value, not a measured one."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run it."""

    placement: RoleMap
    layout: Layout
    staleness: int
    early: bool

    @property
    def name(self) -> str:
        """As the table prints it."""
        how = [self.placement.name]
        if self.placement.name == "split":
            writing = len(self.placement.engines) * self.layout.engine_ranks
            how.append(f"{writing}+{len(self.placement.policy) * self.layout.train_ranks}")
        how += ["one step off"] * self.staleness + ["early minibatches"] * self.early
        return ", ".join(how)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A candidate that fits, and what the simulator says of it."""

    candidate: Candidate
    memory: dict[str, dict[str, float]]
    """Kind of rank (`writes`, `trains`) -> part -> bytes on the fullest rank."""
    slots: int
    """Of a lane: what the cache has room for."""
    seconds: float
    """Of a step."""
    summary: Summary


def plan(
    model: ModelConfig, gpu: Gpu, *, num_gpus: int, workload: Workload, samples: int, minibatch: int, max_staleness: int
) -> list[Planned]:
    """All that fits, the fastest first.

    Raises:
        ConfigError: nothing fits.
    """
    found = []
    for candidate in candidates(model, gpu, num_gpus=num_gpus, workload=workload, max_staleness=max_staleness):
        if len(candidate.placement.engines) > samples or len(candidate.placement.policy) > minibatch:
            continue
        memory, slots = memory_of(candidate, model, gpu, workload)
        if slots < 1:
            continue
        sizes = Sizes(
            num_steps=3,
            samples=samples,
            minibatch=minibatch,
            lanes=len(candidate.placement.engines),
            slots=min(slots, samples),
            slice_steps=max(16, workload.max_new_tokens // 32),
            prefill_tokens=1 << 18,
            pack_steps=max(16, workload.max_new_tokens // 16),
        )
        cost = Roofline(model, gpu, candidate.placement, candidate.layout)
        rows = workload.run(cost, sizes, candidate.placement, staleness=candidate.staleness, early=candidate.early)
        found.append(
            Planned(
                candidate=candidate,
                memory=memory,
                slots=slots,
                seconds=seconds_per_step(rows),
                summary=summarise(rows, candidate.placement.groups),
            )
        )
    if not found:
        raise ConfigError(
            f"nodes: no map and layout fits the model into {num_gpus} GPUs; take more nodes or a larger GPU"
        )
    return sorted(found, key=lambda planned: planned.seconds)


def candidates(
    model: ModelConfig, gpu: Gpu, *, num_gpus: int, workload: Workload, max_staleness: int
) -> Iterator[Candidate]:
    """Maps and layouts worth a simulation: of the training layouts that fit, those with the fewest ranks a copy."""
    for layout in _layouts(model, gpu, num_gpus=num_gpus, workload=workload):
        together = max(layout.engine_ranks, layout.train_ranks)
        both = replace(layout, engine_ranks=together, train_ranks=together)
        for make in (colocated, fused):
            yield Candidate(placement=make(num_gpus // together), layout=both, staleness=0, early=False)
        for eighths in (1, 2, 3, 4, 5):
            writing = num_gpus * eighths // 8 // layout.engine_ranks
            training = (num_gpus - writing * layout.engine_ranks) // layout.train_ranks
            if writing and training:
                placement = split(writing, training)
                yield Candidate(placement=placement, layout=layout, staleness=0, early=False)
                yield Candidate(placement=placement, layout=layout, staleness=0, early=True)
                if max_staleness:
                    yield Candidate(placement=placement, layout=layout, staleness=1, early=False)


def _layouts(model: ModelConfig, gpu: Gpu, *, num_gpus: int, workload: Workload) -> list[Layout]:
    found: list[tuple[int, float, Layout]] = []
    node = min(GPUS_PER_NODE, num_gpus)
    for engine in (1, 2, 4, 8):
        for tensor in (1, 2, 4, 8):
            for pipeline in (1, 2, 4, 8):
                copy = tensor * pipeline
                if engine > node or tensor > node or copy > num_gpus or not _divides(model, engine, tensor, pipeline):
                    continue
                layout = Layout(
                    engine_ranks=node if num_gpus > GPUS_PER_NODE else engine,  # a node's copies side by side
                    train_ranks=max(copy, node if num_gpus > GPUS_PER_NODE else 1),
                    engine_tensor=engine,
                    train_tensor=tensor,
                    pipeline=pipeline,
                )
                trial = Candidate(placement=split(1, 1), layout=layout, staleness=0, early=False)
                memory, slots = memory_of(trial, model, gpu, workload, num_gpus=num_gpus)
                if slots >= 1 and sum(memory["trains"].values()) < gpu.memory:
                    alone = decode_seconds(model, gpu, batch=1, context=workload.max_new_tokens / 2, tensor=engine)
                    found.append((copy, alone, layout))
    fewest = sorted({copy for copy, _, _ in found})[:2]
    kept = sorted((entry for entry in found if entry[0] in fewest), key=lambda entry: entry[:2])
    return [layout for _, _, layout in kept][:12]


def _divides(model: ModelConfig, engine: int, tensor: int, pipeline: int) -> bool:
    try:
        ParallelConfig(tensor=tensor, pipeline=pipeline).check_model(model)
        ParallelConfig(tensor=engine).check_model(model)
    except ConfigError:
        return False
    return True


def memory_of(
    candidate: Candidate, model: ModelConfig, gpu: Gpu, workload: Workload, *, num_gpus: int | None = None
) -> tuple[dict[str, dict[str, float]], int]:
    """Bytes of the fullest rank that writes and of the fullest that trains, and the slots that the cache has room for.

    Where a rank does both, its engine has weights of its own unless both have one layout.
    """
    layout, place = candidate.layout, candidate.placement
    window = workload.prompt_tokens + workload.max_new_tokens
    parallel = ParallelConfig(tensor=layout.train_tensor, pipeline=layout.pipeline, sequence=layout.train_tensor > 1)
    num_data = (num_gpus or len(place.policy) * layout.train_ranks) // (layout.train_tensor * layout.pipeline)
    optimizer = OptimizerConfig(distributed=True)

    def bytes_of(name: str, kind: str, learns: bool) -> float:
        built = Model(name=name, architecture=model, kind=kind, optimizer=optimizer if learns else None)  # type: ignore[arg-type]
        return max(
            model_bytes(built, parallel, COMPUTE, stage=stage, num_data=max(1, num_data)).total
            for stage in range(layout.pipeline)
        )

    trains = {name: bytes_of(name, kind, True) for name, kind in TRAINED}
    trains |= {name: bytes_of(name, kind, False) for name, kind in FROZEN}
    if place.snapshots(moves=candidate.early or candidate.staleness > 0):
        trains["critic snapshot"] = bytes_of("critic", "value", False)
    trains["activations"] = activation_bytes(model, parallel, COMPUTE, tokens=max(window, layout.micro_tokens))
    trains["libraries"] = LIBRARIES
    engine = ParallelConfig(tensor=layout.engine_tensor)
    weights = model_bytes(
        Model(name="engine", architecture=model, kind="policy", optimizer=None), engine, COMPUTE, stage=0, num_data=1
    ).total
    writes: dict[str, float] = {"engine": weights, "libraries": LIBRARIES}
    if place.shares_weights:
        same = (layout.engine_tensor, 1) == (layout.train_tensor, layout.pipeline)
        # activations are gone while it writes, so the cache has their place
        writes = {name: size for name, size in trains.items() if name != "activations"}
        writes |= {} if same else {"engine": weights}
    room = CACHE_FRAC * gpu.memory - sum(writes.values())
    a_slot = window * cache_bytes_per_token(model) / layout.engine_tensor
    slots = int(room // a_slot) * (layout.engine_ranks // layout.engine_tensor) if room > 0 else 0
    if sum(trains.values()) > gpu.memory:
        slots = 0
    writes["cache"] = max(0.0, room)
    return {"writes": writes, "trains": trains}, slots
