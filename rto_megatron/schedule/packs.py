"""Packs that wait to be scored, by group; and which of them a busy group leaves to a free one."""

from collections.abc import Callable, Mapping, Sequence

from rto_megatron.schedule.lane import Pack
from rto_megatron.schedule.placement import RoleMap

HELD = 4
"""Packs that a group may hold and still be given none: it scores them while the next are on their way."""


class WaitingPacks:
    """A pack is its owner's, fixed by numbers; the owner alone may give it away, once: so no two groups claim it."""

    def __init__(self, placement: RoleMap, *, num_lanes: int) -> None:
        """Nothing waits."""
        self._placement, self._num_lanes = placement, num_lanes
        self._of: dict[int, list[Pack]] = {group: [] for group in placement.scorers}
        self._given: set[tuple[int, int, int]] = set()
        """Step, lane and number of those that are not their owner's any more."""
        self.scored_by: Mapping[tuple[int, int, int], int] | None = None
        """Step, lane and number of every pack -> the group to score it, where a trace is followed."""

    def of(self, group: int) -> Sequence[Pack]:
        """Those that the group is to score, in the order in which they came to it."""
        return self._of.get(group, ())

    def of_lane(self, lane: int) -> int:
        """How many of the lane wait, anywhere."""
        return sum(pack.lane == lane for packs in self._of.values() for pack in packs)

    def counts(self) -> dict[int, int]:
        """Group -> how many wait for it."""
        return {group: len(packs) for group, packs in self._of.items()}

    def close(self, pack: Pack) -> None:
        """A lane has filled a pack: it waits for its owner."""
        self._of[self._placement.owner_of(pack.lane, pack.number, self._num_lanes)].append(pack)

    def gift(
        self, group: int, ready: Sequence[Pack], *, kept: int, may_take: Callable[[int, Pack], bool]
    ) -> tuple[Pack, int] | None:
        """A pack that the group should give, and to whom: a scorer that holds few.

        Args:
            ready: what the group could score now, oldest first.
            kept: of its own among these, that it does not give.
            may_take: whether a group has time for a pack and may score it.
        """
        own = [pack for pack in ready if _key(pack) not in self._given]
        if self.scored_by is not None:
            to = self.scored_by
            return next(((pack, to[_key(pack)]) for pack in own if to[_key(pack)] != group), None)
        if len(own) <= kept:
            return None
        pack = own[kept]
        takers = [
            (len(self._of[other]), other)
            for other in self._placement.scorers
            if other != group and len(self._of[other]) < HELD and may_take(other, pack)
        ]
        return (pack, min(takers)[1]) if takers else None

    def give(self, group: int, pack: Pack, to: int) -> None:
        """It waits for another group now."""
        self._of[group].remove(pack)
        self._given.add(_key(pack))
        self._of[to].append(pack)

    def take(self, group: int, pack: Pack) -> None:
        """It is scored, and waits no more."""
        self._of[group].remove(pack)
        self._given.discard(_key(pack))


def _key(pack: Pack) -> tuple[int, int, int]:
    return pack.step, pack.lane, pack.number
