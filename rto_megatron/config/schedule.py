"""Who does what, when: the roles of a run on its ranks, and what may overlap."""

from dataclasses import dataclass
from typing import Literal

from rto_megatron.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the work of a step is laid out over ranks and time.

    With staleness 0 it moves work, not results: every map gives the weights of the sequential run at the same
    training layout and `lanes`, to the last bit (`verify-schedule` proves it for a config).
    """

    map: Literal["sequential", "colocated", "fused", "split"] = "sequential"
    """`sequential`: all ranks generate, then score, then update. `colocated`: the same as work items of an event loop.
    `fused`: ranks whose responses are written score while others still write. `split`: some ranks write, others train,
    and finished responses are scored while the rest are being written."""
    rollout_ranks: int = 0
    """Ranks that write responses and train nothing; split only."""
    critic_ranks: int = 0
    """Ranks that train the critic alone, while others train the policy; 0 trains both on the same. Split only."""
    rollout: ParallelConfig | None = None
    """Layout of the rollout ranks; null takes `parallel`, with context 1 where they do not score: context ranks have
    nothing to share while they write."""
    critic: ParallelConfig | None = None
    """Layout of the critic's own ranks; null takes `parallel`."""
    score: Literal["train", "rollout", "all"] = "train"
    """Who scores in the split map: the ranks that train the policy, those that write, or both."""
    staleness: Literal[0, 1] = 0
    """1 writes the responses of a step while the step before is trained, with the weights from before that: exactly one
    step old. The loss is then decoupled PPO with truncated importance weights (ppo.importance_cap). Split only."""
    minibatches: Literal["random", "logical"] = "random"
    """`random`: minibatches of a seeded shuffle, advantages whitened over the step, as in the paper's code. `logical`:
    in the order in which responses end, counted in decode steps, each minibatch whitened by itself: the same on every
    map, `sequential` too, but only the split map then trains the first while the last is being written. Short responses
    come first, so learning differs."""
    lanes: int | None = None
    """Decode batches of rollout.max_slots sequences; null takes the fewest that all replicas can share. The same
    number gives the same decode batches, and so the same bits, on every map."""
    slice_steps: int = 16
    """Decode steps between two looks at what else there is to do."""
    pack_tokens: int = 8192
    """Tokens, prompts included, that are scored together."""
    pack_steps: int = 256
    """Decode steps after which a pack is scored though it is not full."""
    waiting_packs: int = 64
    """Packs of a lane that may wait for scoring before its decoding waits too."""
    hang_seconds: float = 60.0
    """Shortest time after which work that does not end is reported as hung; longer where more was predicted."""
    delay_seconds: float = 0.0
    """Longest random pause before each work item and message: for proofs that time changes nothing."""

    def __post_init__(self) -> None:
        for name in ("rollout_ranks", "critic_ranks"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("slice_steps", "pack_tokens", "pack_steps", "waiting_packs"):
            if getattr(self, name) < 1:
                raise ValueError(f"schedule.{name} must be 1 or more, got {getattr(self, name)}")
        if self.lanes is not None and self.lanes < 1:
            raise ValueError(f"schedule.lanes must be 1 or more or null, got {self.lanes}")
        if self.hang_seconds <= 0:
            raise ValueError(f"schedule.hang_seconds must be positive, got {self.hang_seconds}")
        if self.delay_seconds < 0:
            raise ValueError(f"schedule.delay_seconds must be 0 or more, got {self.delay_seconds}")
        self._check_split()

    def _check_split(self) -> None:
        if self.map == "split":
            if self.rollout_ranks == 0:
                raise ValueError(
                    "schedule.rollout_ranks must be 1 or more with schedule.map split, got 0; set it to the ranks that "
                    "are to write responses, or take another map"
                )
            if self.score != "train" and self.rollout is not None:
                raise ValueError(
                    f"schedule.score must be train where schedule.rollout gives a layout of its own, got {self.score}: "
                    "the other roles are cut as `parallel` says; or set schedule.rollout to null"
                )
        else:
            for name, default in (
                ("rollout_ranks", 0),
                ("critic_ranks", 0),
                ("rollout", None),
                ("critic", None),
                ("score", "train"),
                ("staleness", 0),
            ):
                value = getattr(self, name)
                if value != default:
                    got = value.sizes if isinstance(value, ParallelConfig) else value
                    raise ValueError(
                        f"schedule.{name} needs schedule.map split, got {got} with schedule.map {self.map}; set "
                        f"schedule.map to split, or schedule.{name} to {'null' if default is None else default}"
                    )
        if self.critic is not None and self.critic_ranks == 0:
            raise ValueError(
                f"schedule.critic needs schedule.critic_ranks of 1 or more, got {self.critic.sizes} and 0 ranks; set "
                "schedule.critic_ranks, or schedule.critic to null"
            )
