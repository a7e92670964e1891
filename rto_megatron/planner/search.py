"""Every role map and layout of so many GPUs, with memory and simulated seconds; those that do not fit are left out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.errors import ConfigError
from rto_megatron.models.footprint import Model
from rto_megatron.models.gpt import Kind
from rto_megatron.planner.memory import LEARN, Setting, always, by_phase, cache_bytes_of_a_token, ranks_of
from rto_megatron.planner.told import Memory, Timed, timed
from rto_megatron.schedule.limits import CACHE_FRAC, decode_seconds
from rto_megatron.schedule.placement import RoleMap, colocated, fused, split
from rto_megatron.schedule.rooflines import GPUS_PER_NODE, Gpu, Layout, Roles, Roofline
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload

COMPUTE = ComputeConfig(dtype="bfloat16", recompute="selective")
ROLES: tuple[tuple[str, Kind], ...] = (
    ("policy", "policy"),
    ("critic", "value"),
    ("reference", "policy"),
    ("dpo", "policy"),
    ("reward_model", "value"),
)
SCORED = Roles(scored=len(ROLES))
"""The trainer asks every role, the policy for its old log-probs too."""
REUSED = Roles(scored=len(ROLES) - 1)
"""With rollout.reuse_log_probs; the few rows that are checked are not counted."""
PACK_TOKENS = 8192
SPLITS = (1, 2, 3, 4, 5)
"""Eighths of the GPUs that write."""
CONTEXTS = (1, 2, 4, 8)
VIRTUAL_STAGES = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What of a run saves memory of the roles."""

    lora_rank: int = 0
    """Policy, critic and DPO policy as adapters of this rank on the weights of the reference; 0 has five models."""
    offload_frozen: bool = False
    """As compute.offload_frozen."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run it."""

    placement: RoleMap
    layout: Layout
    staleness: int
    early: bool
    saving: Saving = Saving()

    @property
    def name(self) -> str:
        """As the table prints it."""
        how = [self.placement.name]
        if self.placement.name == "split":
            writing = len(self.placement.engines) * self.layout.engine_ranks
            how.append(f"{writing}+{len(self.placement.policy) * self.layout.train_ranks}")
            if self.placement.critic != self.placement.policy:
                how[-1] += f"+{len(self.placement.critic) * self.layout.train_ranks} for the critic"
            who = {self.placement.engines: "engines score", self.placement.policy: ""}
            how += [word for word in [who.get(self.placement.scorers, "all score")] if word]
        how += ["one step off"] * self.staleness + ["early minibatches"] * self.early
        return ", ".join(how)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A candidate that fits, and what the simulator says of it."""

    candidate: Candidate
    memory: Memory
    slots: int
    """Of a lane: what the cache has room for."""
    timed: Timed
    cost: Roofline


def plan(
    model: ModelConfig,
    gpu: Gpu,
    *,
    num_gpus: int,
    workload: Workload,
    samples: int,
    minibatch: int,
    max_staleness: int,
    roles: Roles = SCORED,
    saving: Saving | None = None,
) -> list[Planned]:
    """All that fits, the fastest first.

    Of the split maps the fastest are tried with other scorers and critics too, and of each map the fastest that has a
    pipeline with several blocks of layers a rank.

    Raises:
        ConfigError: nothing fits.
    """
    limits = {"num_gpus": num_gpus, "workload": workload, "max_staleness": max_staleness}
    tried = list(candidates(model, gpu, **limits, saving=saving))
    many = [one for one in tried if len(one.placement.engines) <= samples and len(one.placement.policy) <= minibatch]
    if tried and not many:
        raise ConfigError(
            f"samples: {samples} samples in minibatches of {minibatch} are too few for {num_gpus} GPUs: every group "
            "that writes or trains needs one; take more samples or fewer nodes"
        )

    def all_timed(some: Iterable[Candidate]) -> list[Planned]:
        timed = (_timed(one, model, gpu, workload, samples=samples, minibatch=minibatch, roles=roles) for one in some)
        return sorted((one for one in timed if one), key=lambda planned: planned.timed.seconds)

    found = all_timed(many)
    found += all_timed(other for planned in _best_splits(found) for other in _variants(planned.candidate))
    found += all_timed(other for planned in _best_pipelines(found) for other in _interleaved(planned.candidate, model))
    if not found:
        raise ConfigError(
            f"nodes: no map and layout fits the model, its training and one response of {workload.max_new_tokens} "
            f"tokens into {num_gpus} GPUs; take more nodes, a larger GPU or a smaller max_new_tokens"
        )
    return sorted(found, key=lambda planned: planned.timed.seconds)


def _timed(
    candidate: Candidate,
    model: ModelConfig,
    gpu: Gpu,
    workload: Workload,
    *,
    samples: int,
    minibatch: int,
    roles: Roles,
) -> Planned | None:
    """Simulate a candidate; None where it does not fit."""
    memory, slots = memory_of(candidate, model, gpu, workload)
    if slots < 1:
        return None
    place, staleness = candidate.placement, candidate.staleness
    sizes = Sizes(
        num_steps=3 + 2 * staleness,
        samples=samples,
        minibatch=minibatch,
        lanes=len(place.engines),
        slots=min(slots, samples),
        slice_steps=max(16, workload.max_new_tokens // 32),
        prefill_tokens=1 << 18,
        pack_tokens=PACK_TOKENS,
        pack_steps=max(16, workload.max_new_tokens // 16),
        waiting_packs=samples,
    )
    cost = Roofline(model, gpu, place, candidate.layout, roles=roles)
    rows = workload.run(cost, sizes, place, staleness=staleness, early=candidate.early)
    return Planned(
        candidate=candidate,
        memory=memory,
        slots=slots,
        timed=timed(rows, [cost.ranks(group) for group in place.groups], staleness=staleness),
        cost=cost,
    )


def _best_splits(found: Sequence[Planned]) -> Iterator[Planned]:
    """The fastest split map with and without early minibatches and staleness."""
    seen: set[tuple[bool, int]] = set()
    for planned in found:
        one = planned.candidate
        if one.placement.name == "split" and (one.early, one.staleness) not in seen:
            seen.add((one.early, one.staleness))
            yield planned


def _variants(candidate: Candidate) -> Iterator[Candidate]:
    """A split map where others score too, or where the critic has ranks of its own."""
    place, layout = candidate.placement, candidate.layout
    writing, training = len(place.engines), len(place.policy)
    ranks = max(layout.engine_ranks, layout.train_tensor * layout.context)
    if layout.pipeline == 1 and writing * layout.engine_ranks >= ranks:
        # Engines that score hold the other roles, and themselves, in the layout of those who train.
        alike = replace(layout, engine_tensor=layout.train_tensor, engine_context=layout.context, engine_ranks=ranks)
        for score in ("all", "rollout"):
            placement = split(writing * layout.engine_ranks // ranks, training, score=score)
            yield replace(candidate, placement=placement, layout=alike)
    if training > 1:
        yield replace(candidate, placement=split(writing, training - training // 2, training // 2))


def _best_pipelines(found: Sequence[Planned]) -> Iterator[Planned]:
    """The fastest of each map that has a pipeline."""
    seen: set[str] = set()
    for planned in sorted(found, key=lambda planned: planned.timed.seconds):
        name = planned.candidate.placement.name
        if planned.candidate.layout.pipeline > 1 and name not in seen:
            seen.add(name)
            yield planned


def _interleaved(candidate: Candidate, model: ModelConfig) -> Iterator[Candidate]:
    """The same with several blocks of layers a rank."""
    layout = candidate.layout
    for blocks in VIRTUAL_STAGES:
        if model.num_layers % (layout.pipeline * blocks) == 0:
            yield replace(candidate, layout=replace(layout, virtual_stages=blocks))


def candidates(
    model: ModelConfig,
    gpu: Gpu,
    *,
    num_gpus: int,
    workload: Workload,
    max_staleness: int,
    saving: Saving | None = None,
) -> Iterator[Candidate]:
    """Maps and layouts worth a simulation: of the training layouts that fit, those with the fewest ranks a copy."""
    saving = saving or Saving()
    for layout in _layouts(model, gpu, num_gpus=num_gpus, workload=workload, saving=saving):
        together = max(layout.engine_ranks, layout.train_ranks)
        alike = (layout.engine_tensor, 1) == (layout.train_tensor, layout.pipeline)  # who writes then keeps the axis
        context = layout.context if alike else 1
        both = replace(layout, engine_ranks=together, train_ranks=together, engine_context=context)
        for make in (colocated, fused):
            placement = make(num_gpus // together)
            yield Candidate(placement=placement, layout=both, staleness=0, early=False, saving=saving)
        if saving.lora_rank:
            continue  # as a run would refuse it
        for eighths in SPLITS:
            writing = num_gpus * eighths // 8 // layout.engine_ranks
            training = (num_gpus - writing * layout.engine_ranks) // layout.train_ranks
            if writing and training:
                placement = split(writing, training)
                yield Candidate(placement=placement, layout=layout, staleness=0, early=False, saving=saving)
                yield Candidate(placement=placement, layout=layout, staleness=0, early=True, saving=saving)
                if max_staleness:
                    yield Candidate(placement=placement, layout=layout, staleness=1, early=False, saving=saving)


def _layouts(model: ModelConfig, gpu: Gpu, *, num_gpus: int, workload: Workload, saving: Saving) -> list[Layout]:
    """Those that fit; each with as few context ranks as it needs: one, unless a row by itself is a microbatch."""
    found: list[tuple[int, float, Layout]] = []
    node = min(GPUS_PER_NODE, num_gpus)
    for engine, tensor, pipeline in product((1, 2, 4, 8), repeat=3):
        if engine > node or tensor > node or not _divides(model, engine, tensor, pipeline):
            continue
        for context in CONTEXTS if _window(workload) > Layout.micro_tokens else (1,):
            copy = tensor * context * pipeline
            if tensor * context > node or copy > num_gpus:
                break
            layout = Layout(
                engine_ranks=node if num_gpus > GPUS_PER_NODE else engine,  # a node's copies side by side
                train_ranks=max(copy, node if num_gpus > GPUS_PER_NODE else 1),
                engine_tensor=engine,
                train_tensor=tensor,
                pipeline=pipeline,
                context=context,
            )
            place = colocated(1) if saving.lora_rank else split(1, 1)
            trial = Candidate(placement=place, layout=layout, staleness=0, early=False, saving=saving)
            _, slots = memory_of(trial, model, gpu, workload, num_gpus=num_gpus)
            if slots >= 1:
                alone = decode_seconds(model, gpu, batch=1, context=workload.max_new_tokens / 2, tensor=engine)
                found.append((copy, alone, layout))
                break
    fewest = sorted({copy for copy, _, _ in found})[:2]
    kept = sorted((entry for entry in found if entry[0] in fewest), key=lambda entry: entry[:2])
    return [layout for _, _, layout in kept][:12]


def _window(workload: Workload) -> int:
    return workload.prompt_tokens + workload.max_new_tokens


def _divides(model: ModelConfig, engine: int, tensor: int, pipeline: int) -> bool:
    try:
        ParallelConfig(tensor=tensor, pipeline=pipeline).check_model(model)
        ParallelConfig(tensor=engine).check_model(model)
    except ConfigError:
        return False
    return True


def _models(model: ModelConfig, saving: Saving) -> list[Model]:
    """All roles in the order in which a run loads them: the reference first, whose weights others may share."""
    optimizer = OptimizerConfig(distributed=True)
    lora = LoRAConfig(rank=saving.lora_rank) if saving.lora_rank else None
    made = []
    for name, kind in sorted(ROLES, key=lambda role: role[0] in LEARN):
        adapted = lora is not None and name in (*LEARN, "dpo")
        made.append(
            Model(
                name=name,
                architecture=model,
                kind=kind,
                optimizer=optimizer if name in LEARN else None,
                lora=lora if adapted else None,
                shared=adapted,
                stays=lora is not None and name == "reference",
            )
        )
    return made


def setting_of(candidate: Candidate, model: ModelConfig, workload: Workload, *, num_gpus: int | None = None) -> Setting:
    """What the memory of a candidate depends on; `num_gpus` spreads the optimizer over all of them."""
    layout, place = candidate.layout, candidate.placement
    train = ParallelConfig(
        tensor=layout.train_tensor,
        pipeline=layout.pipeline,
        context=layout.context,
        virtual_stages=layout.virtual_stages,
        sequence=layout.train_tensor > 1,
    )
    training = len(place.policy) * layout.train_ranks
    return Setting(
        models=_models(model, candidate.saving),
        placement=place,
        train=train,
        engine=ParallelConfig(tensor=layout.engine_tensor),
        critic=train,
        compute=replace(COMPUTE, offload_frozen=candidate.saving.offload_frozen),
        moves=place.moves(staleness=candidate.staleness, early=candidate.early),
        num_data=max(1, (num_gpus or training) // train.replica),
        num_critic_data=max(1, (num_gpus or len(place.critic) * layout.train_ranks) // train.replica),
        micro_tokens=max(_window(workload), layout.micro_tokens),
        pack_tokens=max(_window(workload), PACK_TOKENS),
    )


def memory_of(
    candidate: Candidate, model: ModelConfig, gpu: Gpu, workload: Workload, *, num_gpus: int | None = None
) -> tuple[Memory, int]:
    """Bytes by kind of rank, phase and part, and the slots of a group that writes: 0 where something has no room.

    Where a rank both writes and trains, its engine has weights of its own unless both have one layout.
    """
    setting = setting_of(candidate, model, workload, num_gpus=num_gpus)
    kinds, layout = ranks_of(setting), candidate.layout
    room = CACHE_FRAC * gpu.memory - max(sum(always(setting, rank).values()) for rank in kinds if rank.writes)
    a_slot = _window(workload) * cache_bytes_of_a_token(setting)
    copies = layout.engine_ranks // (layout.engine_tensor * layout.engine_context)
    slots = int(room // a_slot) * copies if room > 0 else 0
    memory = {rank.name: by_phase(setting, rank, cache=max(0.0, room)) for rank in kinds}
    fits = all(sum(held.values()) <= gpu.memory for phases in memory.values() for held in phases.values())
    return memory, slots if fits else 0
