"""Role maps: which group of ranks decodes, scores and trains.

A group is a model-parallel replica: the ranks that share one copy of a model, and do the same items in the same order.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoleMap:
    """The groups of each role. A group may have several roles; made by `colocated`, `fused` or `split`."""

    name: str
    engines: tuple[int, ...]
    """Groups that write responses; lanes are dealt out to them."""
    scorers: tuple[int, ...]
    """Groups that score packs; those that write too, once they have written all."""
    policy: tuple[int, ...]
    """Groups that train the policy, each a share of every minibatch."""
    critic: tuple[int, ...]
    """Groups that train the critic; none without one."""
    streams: bool
    """Whether a pack may be scored while other responses are still being written."""

    def __post_init__(self) -> None:
        for name in ("engines", "scorers", "policy"):
            if not getattr(self, name):
                raise ValueError(f"the {self.name} map needs at least one group in {name}")

        if 0 < len(set(self.engines) & set(self.policy)) < len(self.engines):
            raise ValueError(f"the {self.name} map: either all groups that write train the policy, or none does")

    @property
    def groups(self) -> range:
        """All of them."""
        return range(1 + max(*self.engines, *self.scorers, *self.trainers))

    @property
    def trainers(self) -> tuple[int, ...]:
        """Those that train policy or critic."""
        return tuple(sorted({*self.policy, *self.critic}))

    @property
    def shares_weights(self) -> bool:
        """Whether every engine decodes with the weights that its own group trains: nothing is copied."""
        return set(self.engines) <= set(self.policy)

    def engine_of(self, lane: int, num_lanes: int) -> int:
        """The group that writes the responses of a lane."""
        return self.engines[lane * len(self.engines) // num_lanes]

    def owner_of(self, lane: int, pack: int, num_lanes: int) -> int:
        """The group that scores a pack, or gives it away: who wrote it; if that does not score, each scorer in turn."""
        writer = self.engine_of(lane, num_lanes)
        return writer if writer in self.scorers else self.scorers[(lane + pack) % len(self.scorers)]

    def moves(self, *, staleness: int, early: bool) -> bool:
        """Whether training may move the weights while responses that they wrote are unscored."""
        return staleness > 0 or (early and not self.shares_weights)

    def needs_copy(self, group: int, role: str, *, moves: bool) -> bool:
        """Whether a group scores with a copy of `policy` or `critic`, not with what it trains or writes with."""
        trained = getattr(self, role)
        has_it = group in trained or (role == "policy" and group in self.engines)
        return group in self.scorers and bool(trained) and (moves or not has_it)

    def snapshots(self, *, moves: bool) -> tuple[int, ...]:
        """Scorers that need a copy of policy or critic as they were when the responses were written."""
        roles = ("policy", "critic")
        return tuple(g for g in self.scorers if any(self.needs_copy(g, role, moves=moves) for role in roles))


def colocated(num_groups: int, *, critic: bool = True) -> RoleMap:
    """All roles everywhere, one phase after the other: the sequential run."""
    every = tuple(range(num_groups))
    return RoleMap(
        name="colocated", engines=every, scorers=every, policy=every, critic=every if critic else (), streams=False
    )


def fused(num_groups: int, *, critic: bool = True) -> RoleMap:
    """All roles everywhere; a group whose responses are written turns to scoring while others still write."""
    every = tuple(range(num_groups))
    return RoleMap(
        name="fused", engines=every, scorers=every, policy=every, critic=every if critic else (), streams=True
    )


def split(
    num_rollout: int, num_policy: int, num_critic: int = 0, *, critic: bool = True, score: str = "train"
) -> RoleMap:
    """The first groups train the policy, the next write, and the last train the critic if it has its own.

    Args:
        num_critic: groups that train the critic; 0 trains both on the policy's groups.
        score: the groups that score: `train` those of the policy, `rollout` those that write, or `all` of these.
    """
    rest = num_policy + num_rollout
    policy, engines, own = (
        tuple(range(num_policy)),
        tuple(range(num_policy, rest)),
        tuple(range(rest, rest + num_critic)),
    )
    scorers = {"train": policy, "rollout": engines, "all": policy + engines}
    if score not in scorers:
        raise ValueError(f"score must be one of {', '.join(scorers)}, got {score!r}")
    critics = (own or policy) if critic else ()
    return RoleMap(name="split", engines=engines, scorers=scorers[score], policy=policy, critic=critics, streams=True)
