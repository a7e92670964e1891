"""Attention through the cache equals attention over the whole sequence."""

import torch
from torch.nn import functional as F

from rto_megatron.rollout.kv_cache import KVCache

HEADS, KV_HEADS, DIM = 4, 2, 8
ANGLES = torch.arange(32.0)[:, None] * torch.tensor([1.0, 0.5, 0.1, 0.01])


def make_cache(num_slots=4, num_layers=2):
    return KVCache(
        num_layers=num_layers,
        num_slots=num_slots,
        max_length=16,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        angles=ANGLES,
        dtype=torch.float32,
    )


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


def test_prefill_then_decode_equals_full_attention():
    lengths = [3, 3, 5]
    sequences = [random_sequence(12, seed) for seed in range(3)]
    want = [full_attention(*s) for s in sequences]
    cache = make_cache()
    out = prefill(cache, sequences, lengths)
    for s, first, n in zip(range(3), [0, 3, 6], lengths, strict=True):
        torch.testing.assert_close(out[first : first + n], want[s][:n])
    for step in range(5):
        out = decode(cache, sequences, [n + step for n in lengths])
        torch.testing.assert_close(out, torch.stack([want[s][n + step] for s, n in enumerate(lengths)]))


def test_parts_of_prompts_attend_to_what_their_slots_hold():
    lengths, sequences, cache = [7, 4, 7], [random_sequence(9, seed) for seed in range(3)], make_cache()
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


def test_layers_do_not_share_their_cache():
    a, b = random_sequence(4, 0), random_sequence(4, 1)
    cache = make_cache()
    prefill(cache, [a], [3], layer=0)
    prefill(cache, [b], [3], layer=1)
    torch.testing.assert_close(decode(cache, [a], [3], layer=0)[0], full_attention(*a)[3])
    torch.testing.assert_close(decode(cache, [b], [3], layer=1)[0], full_attention(*b)[3])


def test_a_sequence_admitted_later_and_one_moved_into_a_hole_go_on_as_if_alone():
    a, b, c = (random_sequence(8, seed) for seed in range(3))
    cache = make_cache(num_slots=3)
    prefill(cache, [a, b], [2, 6])
    prefill(cache, [c], [4], first_slot=2)
    cache.move(2, 0, 4)  # `a` has ended: slot 0 goes to `c`, with keys of `a` no longer in the way
    out = decode(cache, [c, b], [4, 6])
    torch.testing.assert_close(out, torch.stack([full_attention(*c)[4], full_attention(*b)[6]]))


def test_a_slot_that_held_a_longer_sequence_hides_its_rest():
    long, short, mate = random_sequence(10, 0), random_sequence(4, 1), random_sequence(10, 2)
    cache = make_cache(num_slots=2)
    prefill(cache, [long, mate], [9, 9])
    prefill(cache, [short], [2])
    out = decode(cache, [short, mate], [2, 9])
    torch.testing.assert_close(out[0], full_attention(*short)[2])


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
