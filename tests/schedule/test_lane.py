"""A lane, worked by hand: its clock counts passes, and packs close by tokens and by the clock."""

from rto_megatron.rollout.blocks import FixedPool
from rto_megatron.schedule.lane import Lane, Pass
from rto_megatron.schedule.work import Sizes


def write(lengths, *, prompts=None, **changed):
    """All passes and packs of one lane whose responses turn out to have these lengths."""
    num = len(lengths)
    sizes = Sizes(**({"num_steps": 1, "samples": num, "minibatch": num, "lanes": 1, "slots": num} | changed))
    lane = Lane(sizes, prompts or [1] * num, step=0, number=0)
    written, passes, packs = [0] * num, [], []
    while now := lane.upcoming():
        ended = {}
        for sample in now.samples:
            written[sample] += now.num_steps
            if written[sample] >= lengths[sample]:
                ended[sample] = lengths[sample]
        packs += lane.advance(ended)
        passes.append(now)
    return lane, passes, packs


def test_a_prefill_is_one_pass_and_draws_the_first_token():
    lane, passes, _ = write([1, 3, 6], slice_steps=4)
    # the prefill ends the response of one token; 4 more steps that of 3; then one step is all that is left
    assert passes == [Pass("prefill", (0, 1, 2), 1), Pass("decode", (1, 2), 4), Pass("decode", (2,), 4)]
    assert lane.ended == [(1, 0), (3, 1), (6, 2)]
    assert (lane.clock, lane.num_passes) == (6, 3)


def test_new_prompts_come_in_once_a_quarter_of_the_slots_is_free():
    _, passes, _ = write([2, 2, 9, 9, 9, 9, 9, 9, 9, 9, 9], slots=8, slice_steps=1)
    assert passes[0].samples == tuple(range(8))
    assert passes[2] == Pass("prefill", (8, 9), 1)  # two slots of eight


def test_a_pool_of_fixed_size_lets_fewer_in_than_there_are_slots():
    # 2 tokens of prompt and 6 of response at most are 2 blocks each: two of them together
    pool = FixedPool(blocks=5, block_tokens=4, longest=8)
    more = {"slots": 4, "slice_steps": 2, "new_tokens": 6, "pool": pool}
    lane, passes, _ = write([6, 2, 4], prompts=[2, 2, 2], **more)
    assert [now.samples for now in passes if now.kind == "prefill"] == [(0, 1), (2,)]
    # a prefill and two steps end sample 1; sample 2 begins beside sample 0, which has 3 tokens
    assert passes[:4] == [
        Pass("prefill", (0, 1), 1), Pass("decode", (0, 1), 2), Pass("prefill", (2,), 1), Pass("decode", (0, 2), 2)
    ]  # fmt: skip
    assert sorted(sample for _, sample in lane.ended) == [0, 1, 2]


def test_a_prefill_holds_so_many_prompt_tokens_but_always_one_prompt():
    _, passes, _ = write([9, 9, 9], prompts=[7, 3, 3], prefill_tokens=6)
    assert [now.samples for now in passes if now.kind == "prefill"] == [(0,), (1, 2)]


def test_a_pack_closes_when_the_next_sample_does_not_fit():
    # prompt and response: 2, 3, 4, 5 tokens; budget 9
    _, _, packs = write([1, 2, 3, 4], pack_tokens=9)
    assert [pack.samples for pack in packs] == [(0, 1, 2), (3,)]


def test_a_sample_over_the_budget_is_a_pack_of_its_own():
    _, _, packs = write([1, 30, 31], pack_tokens=9)
    assert [pack.samples for pack in packs] == [(0,), (1,), (2,)]


def test_a_pack_closes_at_every_watermark_full_or_not():
    _, _, packs = write([2, 8, 9, 16, 17], pack_steps=8, slice_steps=5)
    # clocks 1 to 8, 9 to 16, 17 to 24
    assert [pack.samples for pack in packs] == [(0, 1), (2, 3), (4,)]
    assert [pack.closed for pack in packs] == [8, 16, 17]


def test_who_ends_at_one_clock_is_ordered_by_number():
    lane, _, _ = write([4, 2, 4, 2], slice_steps=8)
    assert lane.ended == [(2, 1), (2, 3), (4, 0), (4, 2)]


def test_ends_and_packs_are_those_of_any_slicing_where_all_fit_into_the_slots():
    lengths = [5, 1, 12, 7, 30, 2, 2, 19]
    one, other = (write(lengths, slice_steps=steps, pack_tokens=20, pack_steps=6) for steps in (1, 13))
    assert one[0].ended == other[0].ended
    assert one[2] == other[2]
