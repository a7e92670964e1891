"""Blocks have one owner each and all come back, and who begins can come to its full length."""

import random

import pytest

from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.rollout.blocks import BlockTables, FixedPool, blocks_of, num_beginning


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_a_block_has_one_owner_and_comes_back(seed):
    draw = random.Random(seed)
    size, lengths = draw.randint(1, 7), []
    tables, most = BlockTables(size), 0
    for _ in range(300):
        if lengths and draw.random() < 0.2:
            ended = draw.randrange(len(lengths))
            tables.end(ended, len(lengths) - 1)
            last = lengths.pop()
            if ended < len(lengths):
                lengths[ended] = last
        elif len(lengths) < 6 and draw.random() < 0.3:
            lengths.append(draw.randint(1, 30))
            tables.cover(len(lengths) - 1, lengths[-1])
        for slot in range(len(lengths)):
            lengths[slot] += draw.randint(0, 3)
            tables.cover(slot, lengths[slot])
        owned = [block for slot in range(len(lengths)) for block in tables.of(slot)]
        assert len(set(owned)) == len(owned)
        assert 0 not in owned and max(owned, default=0) < tables.num_blocks
        assert [len(tables.of(slot)) for slot in range(len(lengths))] == [blocks_of(n, size) for n in lengths]
        assert len(owned) + len(tables._free) == tables.num_blocks - 1
        most = max(most, len(owned))
        assert tables.num_blocks == 1 + most  # never more than were taken at a time
    for slot in reversed(range(len(lengths))):
        tables.end(slot, slot)
    assert sorted(tables._free) == list(range(1, tables.num_blocks))


def test_a_token_lies_in_its_block_and_a_sequence_that_moves_takes_its_blocks_along():
    tables = BlockTables(4)
    tables.cover(0, 5)
    tables.cover(1, 9)
    assert (tables.of(0), tables.of(1)) == ([1, 2], [3, 4, 5])
    assert [tables.place(1, position) for position in (0, 3, 4, 8)] == [12, 15, 16, 20]
    tables.end(0, 1)
    assert tables.of(0) == [3, 4, 5]
    tables.cover(1, 9)
    assert tables.of(1) == [1, 2, 6]  # those that came back first


def test_those_begin_whose_full_length_the_pool_holds_beside_the_others():
    pool = FixedPool(blocks=10, block_tokens=4, longest=12)
    # 3 and 2 blocks are spoken for; of the 5 left 3 and 2 go to the first two, and the third must wait
    assert num_beginning([9, 8], [12, 5, 1], slots=8, pool=pool) == 2
    assert num_beginning([9, 8], [12, 5, 1], slots=3, pool=pool) == 1
    assert num_beginning([9, 8], [12, 12, 1], slots=8, pool=pool) == 1  # nobody overtakes
    assert num_beginning([], [12] * 5, slots=8, pool=pool) == 3
    assert num_beginning([12, 12, 12], [1], slots=8, pool=pool) == 1
    assert num_beginning([12, 12, 12], [5], slots=8, pool=pool) == 0


def test_beside_others_nobody_begins_before_a_quarter_has_room():
    pool = FixedPool(blocks=24, block_tokens=4, longest=12)  # 8 of the longest together: a quarter is 2
    assert num_beginning([12] * 7, [12] * 5, slots=32, pool=pool) == 0
    assert num_beginning([12] * 6, [12] * 5, slots=32, pool=pool) == 2
    assert num_beginning([12] * 7, [12], slots=32, pool=pool) == 1  # no others wait
    assert num_beginning([1] * 7, [1] * 5, slots=8, pool=None) == 0
    assert num_beginning([1] * 6, [1] * 5, slots=8, pool=None) == 2


def config(**words):
    return RolloutConfig(**{"max_prompt_tokens": 30, "max_new_tokens": 20, "max_slots": 4} | words)


def test_a_pool_that_cannot_hold_one_sequence_is_refused_with_the_size_that_can():
    config(kv_block_tokens=16, kv_blocks=4)
    message = r"rollout\.kv_blocks must hold .* 50 tokens or 4 blocks of 16, got 3; raise it, or null"
    with pytest.raises(ValueError, match=message):
        config(kv_block_tokens=16, kv_blocks=3)
    with pytest.raises(ValueError, match=r"kv_blocks needs rollout\.kv_block_tokens of 1 or more, got 9 blocks"):
        config(kv_blocks=9)
    with pytest.raises(ValueError, match=r"rollout\.kv_block_tokens must be 0 or more, got -1"):
        config(kv_block_tokens=-1)
    config(kv_block_tokens=256)
    with pytest.raises(ValueError, match=r"kv_block_tokens must be at most .*, 50, or 256, got 257: no sequence would"):
        config(kv_block_tokens=257)


def test_the_memory_that_is_foretold_follows_the_setting():
    assert config().most_cached(3) == 3 * 50
    assert config(kv_block_tokens=16).most_cached(3) == (1 + 3 * 4) * 16
    assert config(kv_block_tokens=16, kv_blocks=9).most_cached(3) == (1 + 9) * 16
    assert [config(kv_block_tokens=16, kv_blocks=n).surely_together for n in (4, 9, 40)] == [1, 2, 4]
