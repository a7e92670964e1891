"""The schedule of a run: what must hold for any map, sizes, lengths and durations."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rto_megatron.schedule.order import Inbox
from rto_megatron.schedule.placement import RoleMap, colocated, fused, split
from rto_megatron.schedule.policy import Schedule
from rto_megatron.schedule.simulate import Responses
from rto_megatron.schedule.work import Sizes, StepInput
from tests.schedule.runs import Case, cases, many, run

timings = st.integers(0, 10**6)


def who_did_what(ran):
    """(group, item) of all that ran; who scored a pack is a matter of time, and left out."""
    return {(-1, replace(item, groups=())) if item.kind == "score" else (group, item) for group, item in ran}


def trained_as(role, done, **wanted):
    """Train items of a role, on its own groups or together with the other."""
    return done.of("train", role=role, **wanted) + done.of("train", role="both", **wanted)


@many
@given(cases(), timings)
def test_every_item_runs_exactly_once_and_nothing_waits_forever(case, timing):
    done = run(case, timing=timing)  # raises if all groups wait
    keys = [(row.group, *item.key) for row, item in done.ran]
    assert len(keys) == len(set(keys))
    sizes, place = case.sizes, case.placement
    for step in range(sizes.num_steps):
        scored = Counter(sample for _, item in done.of("score", step=step) for sample in item.samples)
        assert scored == Counter(range(sizes.samples))
        first = Counter(sample for _, item in done.of("prefill", step=step) for sample in item.samples)
        assert first == Counter(range(sizes.samples))
        for role, groups in (("policy", place.policy), ("critic", place.critic)):
            shares = trained_as(role, done, step=step)
            trained = Counter(sample for _, item in shares for sample in item.samples)
            assert trained == {sample: case.epochs for sample in range(sizes.samples) if groups}
            assert len({item.number for _, item in shares}) == (case.epochs * sizes.minibatches if groups else 0)
            assert len(done.of("optimizer", step=step, role=role)) == len(shares)
        assert len(done.of("boundary", step=step)) == len(place.groups)
        assert len(done.of("proximal", step=step)) == len(place.policy) * case.staleness
    assert all(row.group in item.groups for row, item in done.ran)


@many
@given(cases(), timings)
def test_responses_get_all_of_their_tokens(case, timing):
    done, written = run(case, timing=timing), Counter()
    for row, item in done.of("prefill") + done.of("decode"):
        written[item.step] += row.tokens if item.kind == "decode" else len(item.samples)
        assert len(item.samples) <= case.sizes.slots
    assert written == {step: sum(case.lengths(step)) for step in range(case.sizes.num_steps)}


@many
@given(cases(), timings)
def test_nothing_begins_before_what_it_needs(case, timing):
    done = run(case, timing=timing)
    written, scored = done.ends(), {}
    for row, item in done.of("score"):
        assert all(written[item.step, sample] <= row.start for sample in item.samples)
        scored |= {(item.step, sample): row.end for sample in item.samples}
    known: dict[tuple, float] = {}
    for row, item in done.of("advantage"):
        assert all(scored[item.step, sample] <= row.start for sample in item.samples)
        assert row.group in case.placement.trainers
        for sample in item.samples:
            known[row.group, item.step, sample, item.number if case.early else 0] = row.end
    for row, item in done.of("train"):
        assert all(
            known[row.group, item.step, sample, item.number if case.early else 0] <= row.start
            for sample in item.samples
        )
    for row, item in done.of("optimizer"):
        shares = trained_as(item.role, done, step=item.step, number=item.number)
        assert max(share.end for share, _ in shares) <= row.start
        assert sorted(sample for _, share in shares for sample in share.samples) == sorted(item.samples)


@many
@given(cases(), timings)
def test_groups_run_one_item_at_a_time_and_meet_in_one_order(case, timing):
    done = run(case, timing=timing)
    together: dict[int, list[tuple]] = {}
    for group in case.placement.groups:
        mine = sorted(
            (row.start, row.end, item) for row, item in done.ran if row.group == group and row.end > row.start
        )
        assert all(one[1] <= other[0] for one, other in pairwise(mine))
        together[group] = [item.key for row, item in done.ran if row.group == group and len(item.groups) > 1]
    for one in together.values():
        for other in together.values():
            shared = set(one) & set(other)
            assert [key for key in one if key in shared] == [key for key in other if key in shared]


@many
@given(cases(), timings)
def test_responses_and_values_come_from_version_i_minus_k_and_no_other(case, timing):
    """Counted from what each group trained and was given, not from what the items say."""
    done, place = run(case, timing=timing), case.placement
    snapshots = place.snapshots(moves=place.moves(staleness=case.staleness, early=case.early))
    ends = defaultdict(list)
    for row, item in done.of("optimizer") + done.of("refit"):
        ends[item.kind, row.group, item.role].append(row.end)

    def trained_before(group, role, at):
        """Optimizer steps of the role that this group had taken, in whole steps; None within one."""
        each = case.epochs * case.sizes.minibatches
        taken = sum(end <= at for end in ends["optimizer", group, role])
        return taken // each if taken % each == 0 else None

    def given_before(group, role, at):
        return sum(end <= at for end in ends["refit", group, role])

    for row, item in done.ran:
        wanted = max(0, item.step - case.staleness)
        if item.kind in ("prefill", "decode"):
            count, role = (trained_before, "policy") if place.shares_weights else (given_before, "engine")
            # at its end too: weights stay the same while they are used
            assert count(row.group, role, row.start) == count(row.group, role, row.end) == item.version == wanted
        if item.kind == "score":
            if row.group in snapshots:
                assert given_before(row.group, "scorer", row.start) == item.version == wanted
            else:
                for role in ("policy", "critic"):
                    if row.group in getattr(place, role):
                        assert trained_before(row.group, role, row.start) == item.version == wanted
                    elif role == "policy":
                        assert given_before(row.group, "engine", row.start) == item.version == wanted
                    else:
                        assert not place.critic
        if item.kind == "refit":
            # what is handed out is whole: all steps before it, and none after
            for role, groups in (("policy", place.policy), ("critic", place.critic)):
                if groups and (role == "policy" or item.role == "scorer"):
                    assert {trained_before(group, role, row.start) for group in groups} == {item.version}


@many
@given(cases(), timings)
def test_queues_are_bounded(case, timing):
    done, sizes = run(case, timing=timing), case.sizes
    at = sorted({row.end for row, _ in done.ran})
    packs, written = done.of("score"), done.ends()
    closed = {item.key: max(written[item.step, sample] for sample in item.samples) for _, item in packs}
    if case.placement.streams:
        for lane in range(sizes.lanes):
            mine = [(row, item) for row, item in packs if item.lane == lane]
            for now in at:
                waiting = sum(closed[item.key] <= now < row.start for row, item in mine)
                # it stops at waiting_packs, and a slice that has begun can close one for each slot and the open one
                assert waiting <= sizes.waiting_packs + sizes.slots
    begun = {step: min(row.start for row, _ in done.of("prefill", step=step)) for step in range(sizes.num_steps)}
    over = {step: max(row.end for row, _ in done.of("optimizer", step=step, role="policy")) for step in begun}
    for step in begun:
        if step > case.staleness:
            assert over[step - case.staleness - 1] <= begun[step]  # so k + 1 steps of samples exist at most


@many
@given(cases(), timings, timings, st.floats(0, 3))
def test_packs_minibatches_and_their_order_are_the_same_for_any_timing(case, one, other, latency):
    def cut(done):
        items = who_did_what((row.group, item) for row, item in done.ran)
        programs = {
            group: [item for row, item in done.ran if row.group == group and item.lane < 0]
            for group in case.placement.groups
        }
        return items, programs

    assert cut(run(case, timing=one)) == cut(run(case, timing=other, latency=latency))


@many
@given(cases(), st.data(), timings)
def test_a_run_that_goes_on_at_a_boundary_does_what_it_would_have_done(case, data, timing):
    """What a step leaves for the next are its weights, and with staleness the samples of the next step."""
    first = data.draw(st.integers(0, case.sizes.num_steps - 1))
    handed = dict(enumerate(case.lengths(first))) if first and case.staleness else None
    rest = run(case, timing=timing, first_step=first, handed_over=handed)
    whole = [(row.group, item) for row, item in run(case).ran]
    lanes = ("prefill", "decode", "score")
    expected = who_did_what(
        (group, item)
        for group, item in whole
        if item.step >= first and not (handed and item.step == first and item.kind in lanes)
    )
    assert who_did_what((row.group, item) for row, item in rest.ran) == expected


@many
@given(cases(), timings)
def test_all_that_a_step_needs_is_there_at_its_boundary(case, timing):
    done = run(case, timing=timing)
    for step in range(case.sizes.num_steps):
        met = max(row.end for row, _ in done.of("boundary", step=step))
        for kind in ("prefill", "decode", "score"):
            ends = [row.end for row, item in done.ran if item.kind == kind and item.step <= step + case.staleness]
            assert max(ends) <= met
        # what is being written beyond them has the weights of the boundary, and is written again by who goes on there
        begun = [item for row, item in done.ran if row.start < met and item.step > step + case.staleness]
        assert all(item.version == step + 1 and item.kind in ("prefill", "decode", "score") for item in begun)


@many
@given(cases(staleness=0, early=False), timings)
def test_every_map_cuts_the_same_packs_and_minibatches_from_the_same_lanes(case, timing):
    def cut(done):
        packs = {(item.key, item.samples, item.version) for _, item in done.of("score")}
        return packs, {(item.key, item.samples, item.version) for _, item in done.of("optimizer")}

    sequential = replace(case, placement=colocated(1, critic=bool(case.placement.critic)))
    assert cut(run(case, timing=timing)) == cut(run(sequential))


@many
@given(cases(), timings)
def test_each_leader_may_keep_a_schedule_of_its_own_and_hear_of_the_others_late(case, timing):
    """Leaders hear of events in an order of their own, each as late as it likes, but none before those it followed."""
    rng, groups = random.Random(timing), case.placement.groups
    leaders = {group: case.schedule() for group in groups}
    inboxes = {group: Inbox(group, len(groups)) for group in groups}
    on_the_way = {group: [] for group in groups}
    responses = Responses(case.prompts, case.lengths)
    busy: dict[int, object] = {}
    ran = set()
    for _ in range(200_000):
        if all(leader.finished for leader in leaders.values()):
            break
        group = rng.choice(groups)
        if rng.random() < 0.5 and on_the_way[group]:
            letter = on_the_way[group].pop(rng.randrange(len(on_the_way[group])))
            for heard in inboxes[group].arrive(letter):
                leaders[group].done(heard.sender, *heard.content)
        elif group not in busy:
            if (item := leaders[group].next(group)) is not None:
                busy[group] = item
        else:
            item = busy[group]
            if any(getattr(busy.get(member), "key", None) != item.key for member in item.groups):
                continue  # none of them can end before all have begun
            ended = responses.write(item)[0] if item.kind in ("prefill", "decode") else {}
            for member in item.groups:
                mine = busy.pop(member)
                ran |= who_did_what([(member, mine)] if mine.kind != "give" else [])
                leaders[member].done(member, mine, ended)
                letter = inboxes[member].letter((mine, ended))
                for other in groups:
                    if other != member:
                        on_the_way[other].append(letter)
    else:
        pytest.fail("the leaders wait for each other")
    assert ran == who_did_what((row.group, item) for row, item in run(case).ran)


@many
@given(cases(), timings)
def test_a_pack_is_given_away_by_its_owner_and_at_most_once(case, timing):
    gifts = []

    class Noted(Schedule):
        def done(self, group, item, lengths=None):
            super().done(group, item, lengths)
            if item.kind == "give":
                gifts.append((item.step, item.lane, item.number))
                assert group == case.placement.owner_of(item.lane, item.number, case.sizes.lanes) != item.to

    run(case, timing=timing, kind=Noted)
    assert len(gifts) == len(set(gifts))


def sizes(**changed) -> Sizes:
    return Sizes(**({"num_steps": 2, "samples": 8, "minibatch": 4, "lanes": 2, "slots": 4} | changed))


def case_of(placement: RoleMap, **changed) -> Case:
    return Case(placement=placement, sizes=sizes(**changed), staleness=0, early=False, epochs=1, seed=7)


def test_colocated_runs_one_phase_after_the_other():
    done = run(case_of(colocated(2), slice_steps=4, pack_tokens=20))
    for step in range(2):
        phases = [done.of(kind, step=step) for kind in ("decode", "score", "train", "boundary")]
        for earlier, later in pairwise(phases):
            assert max(row.end for row, _ in earlier) <= min(row.start for row, _ in later)


def test_fused_scores_while_another_group_decodes():
    done = run(case_of(fused(2), slice_steps=4, pack_tokens=20), timing=None)
    last = max(row.end for row, _ in done.of("decode", step=0))
    assert min(row.start for row, _ in done.of("score", step=0)) < last


@pytest.mark.parametrize("placement", [fused(2), split(2, 1, score="all"), split(2, 1, score="rollout")])
def test_who_has_written_all_scores_for_who_writes(placement):
    class Uneven(Case):
        """The second half of the samples, which are the other lane's, are long."""

        def lengths(self, step):
            return [1 + 60 * (sample >= 12) + sample for sample in range(24)]

    case = case_of(placement, samples=24, minibatch=12, slots=3, pack_tokens=1, num_steps=1)
    done = run(Uneven(**vars(case)), timing=None)
    first, _ = placement.engines
    drained = max(row.end for row, item in done.of("decode") if row.group == first)
    theirs = [row for row, item in done.of("score") if item.lane == 1 and row.group == first]
    assert theirs and all(row.start >= drained for row in theirs)


def test_early_minibatches_take_responses_in_the_order_in_which_they_end():
    case = replace(case_of(split(1, 1), slots=8, lanes=1, slice_steps=1, pack_tokens=1, num_steps=1), early=True)
    lengths = case.lengths(0)  # all in one prefill: who is shorter ends before
    order = sorted(range(8), key=lambda sample: (lengths[sample], sample))
    done = run(case, timing=None)
    assert [item.samples for _, item in done.of("train")] == [tuple(order[:4]), tuple(order[4:])]
    assert min(row.start for row, _ in done.of("train")) < max(row.end for row, _ in done.of("decode"))


@pytest.mark.parametrize(
    ("placement", "changed", "message"),
    [
        (fused(2), {"staleness": 1}, "staleness 1 needs the split map, got fused: a group that writes"),
        (split(1, 1), {"staleness": 2}, "staleness must be 0 or 1, got 2"),
        (split(3, 1), {}, "lanes must be a multiple of the 3 groups that write, got 2"),
        (split(1, 5), {}, "minibatch must be at least the 5 groups that train the policy, got 4"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(placement, changed, message):
    with pytest.raises(ValueError, match=message):
        Schedule(placement, sizes(), lambda step: StepInput([1] * 8, [range(4), range(4, 8)]), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": 0}, "slots must be 1 or more, got 0"),
        ({"minibatch": 3}, "minibatch must divide the 8 samples of a step, got 3"),
        ({"lanes": 9}, "lanes must be at most the 8 samples of a step, got 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        sizes(**changed)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (StepInput([1] * 7, [range(4), range(4, 8)]), "step 0 needs 8 prompt lengths, got 7"),
        (StepInput([1] * 8, [range(4), range(4)]), "must hold each of 8 samples once"),
        (StepInput([1] * 8, []), "must hold each of 8 samples once"),
        (StepInput([1] * 8, [range(3), range(3, 8)]), "every minibatch must hold 4 samples"),
    ],
)
def test_a_step_that_does_not_fit_the_sizes_is_refused(known, message):
    with pytest.raises(ValueError, match=message):
        Schedule(colocated(1), sizes(), lambda step: known)


def test_a_false_report_is_refused():
    def fresh():
        schedule = Schedule(colocated(1), sizes(lanes=1), lambda step: StepInput([1] * 8, [range(4), range(4, 8)]))
        return schedule, schedule.next(0)

    schedule, prefill = fresh()
    assert (prefill.kind, prefill.samples) == ("prefill", (0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"group 0 asks for work and has not said that \('prefill'.* is done"):
        schedule.next(0)
    with pytest.raises(ValueError, match="sample 7 of step 0 was told to have ended, and is not being written"):
        schedule.done(0, prefill, {7: 1})
    schedule, prefill = fresh()
    with pytest.raises(ValueError, match="ended with 2 tokens; it had 0 before a pass of 1"):
        schedule.done(0, prefill, {0: 2})
    schedule, prefill = fresh()
    schedule.done(0, prefill)
    with pytest.raises(ValueError, match="is not the next pass of lane 0"):
        schedule.done(0, prefill)
    with pytest.raises(ValueError, match="which does not wait there"):
        schedule.done(0, replace(prefill, kind="score"))
    with pytest.raises(ValueError, match="and its program says"):
        schedule.done(0, replace(prefill, kind="train", role="policy"))
