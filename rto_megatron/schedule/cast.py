"""Who is who: the ranks of each role and group, from a config and the size of the world. Arithmetic only."""

from dataclasses import dataclass, replace

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.errors import ConfigError
from rto_megatron.rollout.blocks import FixedPool
from rto_megatron.schedule.placement import RoleMap, colocated, fused, split
from rto_megatron.schedule.work import Sizes


@dataclass(frozen=True, kw_only=True)
class Troupe:
    """Ranks next to each other that hold one role in one layout."""

    ranks: range
    parallel: ParallelConfig

    @property
    def num_replicas(self) -> int:
        """Copies of the model."""
        return len(self.ranks) // self.parallel.replica

    def replica(self, number: int) -> tuple[int, ...]:
        """Ranks of one copy, its first pipeline stage first: tensor ranks are neighbours, stages farthest apart."""
        stage_ranks, d = self.parallel.tensor * self.parallel.context, self.num_replicas
        return tuple(
            self.ranks.start + place + stage_ranks * (number + d * stage)
            for stage in range(self.parallel.pipeline)
            for place in range(stage_ranks)
        )


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The roles of a run on the ranks of its world: policy trainers, then rollout ranks, then the critic's own."""

    placement: RoleMap
    policy: Troupe
    engine: Troupe
    critic: Troupe
    lanes: int

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each group of the placement; the first leads."""
        troupes = dict.fromkeys((self.policy, self.engine, self.critic))
        return tuple(troupe.replica(number) for troupe in troupes for number in range(troupe.num_replicas))

    def group_of(self, rank: int) -> int:
        """The group of a rank."""
        return next(number for number, ranks in enumerate(self.groups) if rank in ranks)

    def describe(self) -> str:
        """In a line of the start table."""
        if self.placement.name != "split":
            return f"{self.placement.name}, {self.policy.num_replicas} groups, {self.lanes} lanes"
        parts = [f"policy on ranks {_span(self.policy)}", f"rollouts on {_span(self.engine)}"]
        if self.critic is not self.policy:
            parts.append(f"critic on {_span(self.critic)}")
        return f"split: {', '.join(parts)}, {self.lanes} lanes"

    @property
    def judges(self) -> Troupe:
        """Who answers held-out prompts: ranks that score, and share one layout."""
        return self.policy if set(self.placement.policy) & set(self.placement.scorers) else self.engine


def _span(troupe: Troupe) -> str:
    layout = f"{troupe.parallel.sizes} x data {troupe.num_replicas}"
    return f"{troupe.ranks.start}-{troupe.ranks.stop - 1} ({layout})"


def cast_of(config: RTORun, world: int) -> Cast:
    """Deal out the roles.

    Raises:
        ConfigError: the ranks are too few, or a layout does not divide its ranks.
    """
    plan, parallel = config.schedule, config.parallel
    has_critic = config.advantage.estimator == "gae"
    if plan.map != "split":
        every = _troupe("parallel", parallel, range(world))
        make = fused if plan.map == "fused" else colocated
        placement = make(every.num_replicas, critic=has_critic)
        return Cast(placement=placement, policy=every, engine=every, critic=every, lanes=_lanes(config, placement))
    training = world - plan.rollout_ranks - plan.critic_ranks
    if training < 1:
        raise ConfigError(
            f"schedule.rollout_ranks {plan.rollout_ranks} and schedule.critic_ranks {plan.critic_ranks} leave no rank "
            f"of {world} to train the policy; start {least_ranks(config)} ranks or more, or set fewer"
        )
    writing = training + plan.rollout_ranks
    policy = _troupe("parallel", parallel, range(training))
    alike = parallel if plan.score != "train" else replace(parallel, context=1)
    engine = _troupe("schedule.rollout", plan.rollout or alike, range(training, writing))
    critic = policy
    if plan.critic_ranks:
        critic = _troupe("schedule.critic", plan.critic or parallel, range(writing, world))
        if config.samples_per_optimizer_step % critic.num_replicas:
            raise ConfigError(
                f"samples_per_optimizer_step must be a multiple of the {critic.num_replicas} replicas of the critic, "
                f"got {config.samples_per_optimizer_step}; change it, or schedule.critic_ranks"
            )
    placement = split(
        engine.num_replicas,
        policy.num_replicas,
        critic.num_replicas if plan.critic_ranks else 0,
        critic=has_critic,
        score=plan.score,
    )
    return Cast(placement=placement, policy=policy, engine=engine, critic=critic, lanes=_lanes(config, placement))


def least_ranks(config: RTORun) -> int:
    """The fewest ranks that the config can run on: one replica that trains, and what it asks for beside it."""
    plan = config.schedule
    return config.parallel.replica + plan.rollout_ranks + plan.critic_ranks


def sizes_of(config: RTORun, cast: Cast) -> Sizes:
    """The numbers that the work is cut by."""
    plan = config.schedule
    return Sizes(
        num_steps=config.num_steps,
        samples=config.prompts_per_step * config.samples_per_prompt,
        minibatch=config.samples_per_optimizer_step,
        lanes=cast.lanes,
        slots=config.rollout.max_slots,
        slice_steps=plan.slice_steps,
        pack_tokens=plan.pack_tokens,
        pack_steps=plan.pack_steps,
        waiting_packs=plan.waiting_packs,
        new_tokens=config.rollout.max_new_tokens,
        pool=FixedPool.of(config.rollout),
    )


def _troupe(name: str, parallel: ParallelConfig, ranks: range) -> Troupe:
    if len(ranks) % parallel.replica:
        raise ConfigError(
            f"{name}: {parallel.sizes} does not divide its {len(ranks)} ranks; give it a multiple of {parallel.replica}"
        )
    return Troupe(ranks=ranks, parallel=parallel)


def _lanes(config: RTORun, placement: RoleMap) -> int:
    """As the config says; else the fewest that those who write can share, one a replica of the policy or more."""
    writers = len(placement.engines)
    samples = config.prompts_per_step * config.samples_per_prompt
    lanes = config.schedule.lanes
    if lanes is None:
        lanes = writers * -(-len(placement.policy) // writers)
        if lanes > samples:
            raise ConfigError(
                f"prompts_per_step x samples_per_prompt must give each of {lanes} replicas a sample to write, got "
                f"{samples}; raise it, or start fewer ranks"
            )
    if lanes % writers or lanes > samples:
        raise ConfigError(
            f"schedule.lanes must be a multiple of the {writers} replicas that write, and at most the {samples} "
            f"samples of a step, got {lanes}"
        )
    return lanes
