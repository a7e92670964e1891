"""Attention through the cache equals attention over the whole sequence, in slots and in blocks of a pool."""

import pytest
import torch
from torch.nn import functional as F

from rto_megatron.rollout.blocks import blocks_of
from rto_megatron.rollout.kv_cache import KVCache
from rto_megatron.rollout.kv_pool import Pool, attend_in_place
from rto_megatron.rollout.kv_store import CacheShape

HEADS, KV_HEADS, DIM = 4, 2, 8
ANGLES = torch.arange(32.0)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])


@pytest.fixture(params=[0, 1, 3, 16], ids="blocks of {}".format)
def block_tokens(request):
    return request.param


def make_cache(num_slots=4, num_layers=2, block_tokens=0):
    shape = CacheShape(
        num_layers=num_layers,
        num_slots=num_slots,
        max_length=16,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return KVCache(shape, angles=ANGLES, block_tokens=block_tokens)


def random_sequence(length, seed):
    """Queries, keys and values [length, heads, d] of one sequence."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(length, heads, DIM, generator=g) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def full_attention(query, key, value):
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)


def packed(sequences, starts, ends):
    """One tensor each of queries, keys and values: positions start to end of every sequence, side by side."""
    return [torch.cat([s[i][a:b] for s, a, b in zip(sequences, starts, ends, strict=True)]) for i in range(3)]


def attend(cache, layer, query, key, value):
    return cache.attend(layer, query.unflatten(1, (KV_HEADS, HEADS // KV_HEADS)), key, value)


def decode(cache, sequences, lengths, layer=0):
    cache.plan_decode(lengths)
    return attend(cache, layer, *packed(sequences, lengths, [n + 1 for n in lengths]))


def prefill(cache, sequences, lengths, layer=0, first_slot=0):
    cache.plan_prefill(lengths, first_slot=first_slot)
    return attend(cache, layer, *packed(sequences, [0] * len(lengths), lengths))


def test_prefill_then_decode_equals_full_attention(block_tokens):
    lengths = [3, 3, 5]
    sequences = [random_sequence(12, seed) for seed in range(3)]
    want = [full_attention(*s) for s in sequences]
    cache = make_cache(block_tokens=block_tokens)
    out = prefill(cache, sequences, lengths)
    for s, first, n in zip(range(3), [0, 3, 6], lengths, strict=True):
        torch.testing.assert_close(out[first : first + n], want[s][:n])
    for step in range(5):
        out = decode(cache, sequences, [n + step for n in lengths])
        torch.testing.assert_close(out, torch.stack([want[s][n + step] for s, n in enumerate(lengths)]))


def test_parts_of_prompts_attend_to_what_their_slots_hold(block_tokens):
    lengths, sequences = [7, 4, 7], [random_sequence(9, seed) for seed in range(3)]
    cache = make_cache(block_tokens=block_tokens)
    want = [full_attention(*s) for s in sequences]
    prefill(cache, sequences[:1], [3])
    for first, starts, ends in ((0, [3, 0], [5, 2]), (1, [2, 0], [4, 2]), (0, [5], [7]), (2, [2], [7])):
        mine = sequences[first : first + len(starts)]
        cache.plan_prefill([b - a for a, b in zip(starts, ends, strict=True)], first_slot=first, starts=starts)
        out = attend(cache, 0, *packed(mine, starts, ends))
        parts = zip(want[first:], starts, ends, strict=False)
        torch.testing.assert_close(out, torch.cat([w[a:b] for w, a, b in parts]))
    out = decode(cache, sequences, lengths)
    torch.testing.assert_close(out, torch.stack([want[s][n] for s, n in enumerate(lengths)]))


def test_layers_do_not_share_their_cache(block_tokens):
    a, b = random_sequence(4, 0), random_sequence(4, 1)
    cache = make_cache(block_tokens=block_tokens)
    prefill(cache, [a], [3], layer=0)
    prefill(cache, [b], [3], layer=1)
    torch.testing.assert_close(decode(cache, [a], [3], layer=0)[0], full_attention(*a)[3])
    torch.testing.assert_close(decode(cache, [b], [3], layer=1)[0], full_attention(*b)[3])


def test_a_sequence_admitted_later_and_one_moved_into_a_hole_go_on_as_if_alone(block_tokens):
    a, b, c = (random_sequence(8, seed) for seed in range(3))
    cache = make_cache(num_slots=3, block_tokens=block_tokens)
    prefill(cache, [a, b], [2, 6])
    prefill(cache, [c], [4], first_slot=2)
    cache.end(0, 2, 4)  # `a` has ended: slot 0 goes to `c`, with keys of `a` no longer in the way
    out = decode(cache, [c, b], [4, 6])
    torch.testing.assert_close(out, torch.stack([full_attention(*c)[4], full_attention(*b)[6]]))


def test_a_slot_that_held_a_longer_sequence_hides_its_rest(block_tokens):
    long, short, mate = random_sequence(10, 0), random_sequence(4, 1), random_sequence(10, 2)
    cache = make_cache(num_slots=2, block_tokens=block_tokens)
    prefill(cache, [mate, long], [9, 9])
    cache.end(1, 1, 9)
    prefill(cache, [short], [2], first_slot=1)
    out = decode(cache, [mate, short], [9, 2])
    torch.testing.assert_close(out[1], full_attention(*short)[2])


def write_bits(cache, sequences, lengths, num_steps):
    """What a pass over prompts and some steps give, a sequence ending and another beginning among them."""
    found = [prefill(cache, sequences[:3], lengths[:3])]
    now = list(lengths[:3])
    for _ in range(num_steps):
        found.append(decode(cache, sequences[:3], now))
        now = [n + 1 for n in now]
    cache.end(0, 2, now[2])
    found.append(prefill(cache, sequences[3:], lengths[3:], first_slot=2))
    found.append(decode(cache, [sequences[2], sequences[1], sequences[3]], [now[2], now[1], lengths[3]]))
    return found


def test_blocks_give_the_bits_of_slots_wherever_they_lie(block_tokens):
    sequences, lengths = [random_sequence(16, seed) for seed in range(4)], [2, 5, 3, 7]
    want = write_bits(make_cache(), sequences, lengths, 6)
    plain, shuffled = make_cache(block_tokens=block_tokens), make_cache(block_tokens=block_tokens)
    if isinstance(shuffled.store, Pool):
        tables = shuffled.store.tables
        most = 4 * blocks_of(16, block_tokens)  # as if all of them had been taken, and given back in a wild order
        order = torch.randperm(most, generator=torch.Generator().manual_seed(5)) + 1
        tables.num_blocks, tables._free = 1 + most, order.tolist()
    for cache in (plain, shuffled):
        got = write_bits(cache, sequences, lengths, 6)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    if isinstance(plain.store, Pool) and isinstance(shuffled.store, Pool):
        assert plain.store.tables.of(1) != shuffled.store.tables.of(1)


def test_a_pool_takes_the_memory_that_is_written_and_a_slot_that_which_may_be():
    slots, pool = make_cache(num_slots=4), make_cache(num_slots=4, block_tokens=2)
    prefill(pool, [random_sequence(4, 0)], [3])
    a_token = 2 * 2 * KV_HEADS * DIM * 4  # layers, keys and values, float32
    assert slots.store.num_bytes == 4 * 16 * a_token
    assert pool.store.num_bytes == (2 + 1) * 2 * a_token  # two blocks for 3 tokens, and nobody's


def test_torchs_kernel_takes_blocks_as_they_lie():
    """On no device, so that it holds for the call alone: its numbers are compared on a GPU, in tests/gpu."""
    with torch.device("meta"):
        half = {"dtype": torch.bfloat16}
        query, pool = torch.empty(3, KV_HEADS, 2, DIM, **half), torch.empty(5, 256, KV_HEADS, DIM, **half)
        table, used, starts = (torch.empty(size, dtype=torch.int32) for size in ((3, 2), (3,), (4,)))
        out = attend_in_place(query, pool, pool, table=table, used=used, starts=starts, width=300)
    assert out.shape == (3, KV_HEADS * 2 * DIM)


def test_rows_are_rotated_by_the_angles_of_their_positions():
    x = torch.randn(5, KV_HEADS, 2, DIM, generator=torch.Generator().manual_seed(0))
    cache = make_cache()
    cache.plan_prefill([3, 2], first_slot=0)
    torch.testing.assert_close(cache.rotate(x), plain_rotation(x, [0, 1, 2, 0, 1]))
    cache.plan_decode([3, 7, 0, 15, 2])
    torch.testing.assert_close(cache.rotate(x), plain_rotation(x, [3, 7, 0, 15, 2]))


def plain_rotation(x, positions):
    """Pairs (i, i + d/2) as complex numbers, turned by their angle."""
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(()), ANGLES[positions])[:, None, None]
    return torch.cat((turned.real, turned.imag), -1)
