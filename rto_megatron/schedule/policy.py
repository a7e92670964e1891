"""Which item runs next, on which group: the schedule of a run as a state machine, without a clock, torch or messages.

    loop of a group's leader                      what a group does, most urgent first
        item = schedule.next(group)                   1. leave a pack to a group that has nothing to write
        ... every rank of the group runs it           2. its program, if its next item may begin
        schedule.done(group, item, lengths)           3. the next pass of one of its lanes
                                                      4. the oldest pack that it is to score; before 3. if of an
                                                         earlier step

The *program* lists training and all that groups do together; each group does its part of it, in order:

    step i:   proximal                                     with staleness: the policy is another one than wrote
              advantage                                    once all samples of the step are scored; with early
                                                           minibatches on ranks that do not write, each once its own are
              for each minibatch:
                  train policy, train critic               one item where they share their groups
                  optimizer policy, optimizer critic
              refit engine, version i + 1                  of groups that write and do not train, once no response of
                                                           an older version is being written
              refit scorer, version i + 1                  of groups that score with copies, once no response of an
                                                           older version is unscored
              boundary                                     everybody

A lane has prompts left or responses live, holds the right version, and writes on unless `waiting_packs` of its packs
wait. A pack that it has closed may be scored at once; in the colocated map, once the step's last response is written.
Whose it is tells `packs.py`.

As everybody meets the shared items in one order, no two groups can wait for each other in different ones. Who decodes
which lane is fixed by numbers, and what is in a pack or minibatch by the lanes' clocks (`lane.py`). Time decides only
when something is done, and by whom a pack is scored, which all do alike: so the weights come out the same however long
anything takes.

Responses of step i are written and judged by version max(0, i - staleness): version v is the weights after v steps.
So at a boundary with staleness 1 the next step's samples are there, written and scored by weights that are gone: they
are part of the state that a run goes on from (`handed_over`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from rto_megatron.schedule.lane import Pack
from rto_megatron.schedule.packs import WaitingPacks
from rto_megatron.schedule.placement import RoleMap
from rto_megatron.schedule.step import Step
from rto_megatron.schedule.work import Item, Sizes, StepInput


class Schedule:
    """The state of a run's schedule: asked by each group for work, told what is done.

    One process may answer for all groups, or each leader may keep its own: then it must be told what the others have
    done, sooner or later, no event before those that it followed from.
    """

    def __init__(
        self,
        placement: RoleMap,
        sizes: Sizes,
        inputs: Callable[[int], StepInput],
        *,
        staleness: int = 0,
        early: bool = False,
        first_step: int = 0,
        handed_over: Mapping[int, int] | None = None,
    ) -> None:
        """Nothing has run; engines and scorers hold the weights of version `first_step`.

        Args:
            inputs: what is known of a step beforehand; asked once a step.
            staleness: 0 writes the responses of a step with the newest weights; 1 with those of the step before.
            early: fill the minibatches of the first epoch with responses in the order in which they end, each
                whitened by itself. Where other groups write than train, each is trained once it is scored.
            first_step: where to go on.
            handed_over: tokens of each response of the first step, where these are written and scored already.

        Raises:
            ValueError: the numbers do not fit each other.
        """
        _check(placement, sizes, staleness, early)
        self.placement, self.sizes, self.staleness, self.early = placement, sizes, staleness, early
        self._inputs, self._steps = inputs, {}
        self._snapshots = placement.snapshots(moves=placement.moves(staleness=staleness, early=early))
        self._oldest = self._version_at_start = first_step
        """Of the steps that are not over; the version that everybody began with."""
        self._handed_over = handed_over
        self._programs = {group: chain.from_iterable(self._parts(group)) for group in placement.groups}
        self._heads: dict[int, Item | None] = {group: next(self._programs[group], None) for group in placement.groups}
        self._ended: Counter[tuple] = Counter()
        self._running: dict[int, Item] = {}
        self._lanes_of: dict[int, list[int]] = {group: [] for group in placement.engines}
        for lane in range(sizes.lanes):
            self._lanes_of[placement.engine_of(lane, sizes.lanes)].append(lane)
        self._refits: Counter[tuple[int, str]] = Counter()
        self._packs = WaitingPacks(placement, num_lanes=sizes.lanes)

    def follow(self, scored_by: Mapping[tuple[int, int, int], int]) -> None:
        """Give packs to the groups that scored them in a trace, by step, lane and number, not to who is free."""
        self._packs.scored_by = scored_by

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return all(head is None for head in self._heads.values())

    def next(self, group: int) -> Item | None:
        """What `group` runs now; None if it has to wait until something else is done."""
        if group in self._running:
            raise ValueError(f"group {group} asks for work and has not said that {self._running[group].key} is done")
        item = self._of_program(group)
        gives = self.placement.streams and group in self._lanes_of
        packs = self._ready(group) if gives or item is None else []
        if item is None:
            item = self._of_lanes(group)
        if packs:
            if gives and (gift := self._gift(group, packs, is_free=item is None)):
                return gift
            # a pack of an earlier step comes before the lanes: training waits for it, and with it the next weights
            if item is None or (item.kind in ("prefill", "decode") and packs[0].step < item.step):
                item = self._pack_item(group, packs[0])
        if item is not None:
            self._running[group] = item
        return item

    def done(self, group: int, item: Item, lengths: Mapping[int, int] | None = None) -> None:
        """`group` has done its part of `item`.

        Args:
            lengths: prefill and decode: tokens of each response that ended in it.

        Raises:
            ValueError: it was not `group`'s to do, or not now.
        """
        self._running.pop(group, None)
        if item.kind in ("prefill", "decode"):
            self._pass_made(item, lengths or {})
        elif item.kind == "give":
            self._pack_given(group, item)
        elif item.kind == "score":
            self._pack_scored(group, item)
        else:
            self._program_moves(group, item)

    def describe(self) -> str:
        """The queues in words, for who asks why nothing moves."""
        heads = ", ".join(
            f"group {group} before {head.kind} {head.number} of step {head.step}"
            if head
            else f"group {group} at its end"
            for group, head in self._heads.items()
        )
        steps = "; ".join(
            f"step {number}: {sum(not lane.drained for lane in step.lanes)} lanes writing, {len(step.scored)} scored"
            for number, step in self._steps.items()
        )
        waiting = ", ".join(f"{count} for group {group}" for group, count in self._packs.counts().items() if count)
        return f"{heads}; {steps}; packs: {waiting or 'none'}"

    # The program: training, and what groups do together.

    def _parts(self, group: int) -> Iterator[Iterator[Item]]:
        for step in range(self._oldest, self.sizes.num_steps):
            yield (item for item in self._program(step) if group in item.groups)

    def _program(self, step: int) -> Iterator[Item]:
        """All items of one step that are not of a lane, in the order of every group; their samples come later."""
        place = self.placement
        learners = {role: groups for role in ("policy", "critic") if (groups := getattr(place, role))}
        together = {"both": place.policy} if place.policy == place.critic else learners
        if self.staleness:
            yield Item(kind="proximal", step=step, groups=place.policy, number=0, version=step)
        for number in range(len(self._step(step).minibatches)):
            work: dict[str, Any] = {"step": step, "number": number, "version": step}
            if self.early or number == 0:
                yield Item(kind="advantage", groups=place.trainers, **work)
            for role, groups in together.items():
                yield Item(kind="train", groups=groups, role=role, **work)
            for role, groups in learners.items():
                yield Item(kind="optimizer", groups=groups, role=role, **work)
        refit: dict[str, Any] = {"kind": "refit", "step": step, "number": step + 1, "version": step + 1}
        if not place.shares_weights:
            yield Item(groups=_union(place.policy, place.engines), role="engine", **refit)
        if self._snapshots:
            yield Item(groups=_union(place.trainers, self._snapshots), role="scorer", **refit)
        yield Item(kind="boundary", step=step, groups=tuple(place.groups), number=0, version=step + 1)

    def _of_program(self, group: int) -> Item | None:
        head = self._heads[group]
        if head is None:
            return None
        if head.kind == "refit":
            return head if self._may_refit(head) else None
        if head.kind == "boundary":
            return head
        samples = self._members(head)
        if samples is None or not self._are_scored(head, samples):
            return None
        if head.kind == "train":
            # Each group does a share of its own; they meet again in the optimizer step.
            share = self._step(head.step).shares(samples, len(head.groups))[head.groups.index(group)]
            return replace(head, groups=(group,), samples=share)
        return replace(head, groups=(group,) if head.kind == "advantage" else head.groups, samples=samples)

    def _members(self, item: Item) -> tuple[int, ...] | None:
        """The samples that a step of training is about; None if it is not known yet."""
        step = self._step(item.step)
        if item.kind == "proximal" or (item.kind == "advantage" and not self.early):
            return tuple(range(self.sizes.samples))
        if not self.early or item.number >= self.sizes.minibatches:
            return tuple(step.minibatches[item.number])
        known, first = step.in_order_of_ending(), item.number * self.sizes.minibatch
        return known[first : first + self.sizes.minibatch] if len(known) >= first + self.sizes.minibatch else None

    def _are_scored(self, item: Item, samples: tuple[int, ...]) -> bool:
        scored = self._step(item.step).scored
        if self.placement.shares_weights:  # training moves the weights that write and score
            return len(scored) == self.sizes.samples
        return len(scored) >= len(samples) and scored.issuperset(samples)

    def _may_refit(self, item: Item) -> bool:
        """Whether the new weights exist, and the old ones are done with: steps before this one used them."""
        last = len(self._step(item.step).minibatches) - 1
        trained = [
            self._all_ended(Item(kind="optimizer", step=item.step, groups=groups, number=last, role=role))
            for role, groups in (("policy", self.placement.policy), ("critic", self.placement.critic))
            if groups and (role == "policy" or item.role == "scorer")
        ]
        of_older = range(self._oldest, min(item.version + self.staleness, self.sizes.num_steps))
        if item.role == "engine":
            return all(trained) and all(self._step(step).drained for step in of_older)
        return all(trained) and all(len(self._step(step).scored) == self.sizes.samples for step in of_older)

    def _all_ended(self, item: Item) -> bool:
        return self._ended[item.key] == len(item.groups)

    def _program_moves(self, group: int, item: Item) -> None:
        head = self._heads[group]
        if head is None or head.key != item.key:
            raise ValueError(f"group {group} has done {item.key}, and its program says {head and head.key}")
        self._ended[item.key] += 1
        if item.kind == "refit":
            self._refits[group, item.role] += 1
        self._heads[group] = next(self._programs[group], None)
        at = min((head.step for head in self._heads.values() if head), default=self.sizes.num_steps)
        while self._oldest < at:
            del self._steps[self._oldest]
            self._oldest += 1
            self._ended = Counter({key: count for key, count in self._ended.items() if key[1] >= self._oldest})

    # The lanes: writing responses.

    def _of_lanes(self, group: int) -> Item | None:
        # One more than are in flight: the refit of scorers may still wait when engines already have theirs.
        for number in range(self._oldest, min(self._oldest + self.staleness + 2, self.sizes.num_steps)):
            mine = [lane for lane in self._lanes_of.get(group, ()) if not self._step(number).lanes[lane].drained]
            if not mine:
                continue
            free = [lane for lane in mine if self._has_credit(lane)]
            if not free or not self._has_version(group, number):
                return None
            return self._lane_item(number, min(free, key=lambda lane: self._step(number).lanes[lane].clock))
        return None

    def _lane_item(self, step: int, number: int) -> Item | None:
        lane = self._step(step).lanes[number]
        now = lane.upcoming()
        return now and Item(
            kind=now.kind,
            step=step,
            groups=(self.placement.engine_of(number, self.sizes.lanes),),
            number=lane.num_passes,
            lane=number,
            samples=now.samples,
            num_steps=now.num_steps,
            version=self._version(step),
        )

    def _has_credit(self, lane: int) -> bool:
        """Whether few enough packs of the lane wait; where scoring waits for the last response, all may."""
        return not self.placement.streams or self._packs.of_lane(lane) < self.sizes.waiting_packs

    def _has_version(self, group: int, step: int) -> bool:
        """Whether the group's engine holds the weights that write the responses of the step."""
        if self.placement.shares_weights:
            head = self._heads[group]
            return head is None or head.step == step
        return self._given(group, "engine") == self._version(step)

    def _given(self, group: int, role: str) -> int:
        """The version that a group's engine or snapshot holds."""
        return self._version_at_start + self._refits[group, role]

    def _version(self, step: int) -> int:
        return max(0, step - self.staleness)

    def _pass_made(self, item: Item, lengths: Mapping[int, int]) -> None:
        if item != self._lane_item(item.step, item.lane):
            raise ValueError(f"{item.key} is done, and is not the next pass of lane {item.lane}")
        for pack in self._step(item.step).lanes[item.lane].advance(lengths):
            self._packs.close(pack)

    # The packs: scoring.

    def _ready(self, group: int) -> list[Pack]:
        """The packs that a group may score now, oldest first."""
        packs = (pack for pack in self._packs.of(group) if self._may_score(group, pack))
        return sorted(packs, key=lambda pack: pack.age)

    def _gift(self, group: int, ready: list[Pack], *, is_free: bool) -> Item | None:
        """A pack of its own that a group which writes leaves to another that scores, writes nothing and holds few.

        Args:
            is_free: it could score the first of them itself, now.
        """
        found = self._packs.gift(group, ready, kept=int(is_free), may_take=self._may_take)
        return found and replace(self._pack_item(group, found[0]), kind="give", to=found[1])

    def _may_take(self, group: int, pack: Pack) -> bool:
        """Whether a group has written all of its own of the pack's step, and may score it."""
        lanes = self._step(pack.step).lanes
        return all(lanes[lane].drained for lane in self._lanes_of.get(group, ())) and self._may_score(group, pack)

    def _pack_given(self, group: int, item: Item) -> None:
        self._packs.give(group, self._waiting_as(group, replace(item, kind="score", to=-1)), item.to)

    def _may_score(self, group: int, pack: Pack) -> bool:
        if not self.placement.streams and not self._step(pack.step).drained:
            return False
        # Without a snapshot it scores with what it trains, which is at this version: its program came first.
        return group not in self._snapshots or self._given(group, "scorer") == self._version(pack.step)

    def _pack_item(self, group: int, pack: Pack) -> Item:
        return Item(
            kind="score",
            step=pack.step,
            groups=(group,),
            number=pack.number,
            lane=pack.lane,
            samples=pack.samples,
            version=self._version(pack.step),
        )

    def _pack_scored(self, group: int, item: Item) -> None:
        pack = self._waiting_as(group, item)
        self._packs.take(group, pack)
        self._step(pack.step).scored.update(pack.samples)

    def _waiting_as(self, group: int, item: Item) -> Pack:
        for pack in self._packs.of(group):
            if self._pack_item(group, pack) == item:
                return pack
        raise ValueError(f"group {group} has scored {item.key}, which does not wait there")

    def _step(self, number: int) -> Step:
        if number not in self._steps:
            known = self._inputs(number)
            known.check(self.sizes, step=number)
            self._steps[number] = Step(known, self.sizes, number)
            if self._handed_over is not None and number == self._version_at_start:
                self._steps[number].take_over(self._handed_over)
        return self._steps[number]


def _union(*groups: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*groups)))


def _check(placement: RoleMap, sizes: Sizes, staleness: int, early: bool) -> None:
    if staleness not in (0, 1):
        raise ValueError(f"staleness must be 0 or 1, got {staleness}")
    if staleness and placement.shares_weights:
        raise ValueError(
            f"staleness {staleness} needs the split map, got {placement.name}: a group that writes with the weights "
            "that it trains has no older ones"
        )
    if sizes.lanes % len(placement.engines):
        raise ValueError(
            f"lanes must be a multiple of the {len(placement.engines)} groups that write, got {sizes.lanes}"
        )
    for role in ("policy", "critic"):
        num = len(getattr(placement, role))
        if sizes.minibatch < num:
            raise ValueError(
                f"minibatch must be at least the {num} groups that train the {role}, got {sizes.minibatch}"
            )
