"""Blocks have one owner each, and all come back."""

import random

import pytest

from rto_megatron.rollout.blocks import BlockTables, blocks_of


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
        assert len(set(owned)) == len(owned) == tables.num_taken
        assert 0 not in owned and max(owned, default=0) < tables.num_blocks
        assert [len(tables.of(slot)) for slot in range(len(lengths))] == [blocks_of(n, size) for n in lengths]
        assert len(owned) + len(tables._free) == tables.num_blocks - 1
        most = max(most, len(owned))
        assert tables.num_blocks == 1 + most  # never more than were taken at a time
    for slot in reversed(range(len(lengths))):
        tables.end(slot, slot)
    assert tables.num_taken == 0 and sorted(tables._free) == list(range(1, tables.num_blocks))


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
