"""Decoding on a GPU: the CPU's greedy tokens, and log-probs that the training forward agrees with."""

import pytest
import torch

from rto_megatron.rollout.kv_cache import KVCache
from rto_megatron.rollout.kv_pool import Pool
from rto_megatron.rollout.kv_store import CacheShape
from tests.gpu.device import ON_CPU, TIMEOUT, layout, needs
from tests.gpu.legs import hidden, write
from tests.ranks import run_ranks

pytestmark = needs()[:1]
LAYOUTS = [
    layout(1, {}, "one"),
    layout(2, {"tensor": 2}, "tensor 2"),
    layout(2, {"pipeline": 2, "virtual_stages": 2}, "pipeline 2 x virtual 2"),
]


@pytest.fixture(scope="module")
def on_cpu():
    return run_ranks(hidden, 1, write, timeout=TIMEOUT)[0]


@pytest.mark.parametrize(("num", "words"), LAYOUTS)
def test_greedy_tokens_in_float32_are_the_cpus(num, words, on_cpu):
    for found in run_ranks(write, num, words, timeout=TIMEOUT):
        assert torch.equal(found["tokens"], on_cpu["tokens"])
        torch.testing.assert_close(found["decode"], on_cpu["decode"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["decode"], found["forward"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("num", "words"), LAYOUTS)
def test_in_bfloat16_decoding_and_the_training_forward_agree(num, words):
    for found in run_ranks(_write_bfloat16, num, words, timeout=TIMEOUT):
        assert (found["decode"] - found["forward"]).abs().mean() < 0.03


def _write_bfloat16(words):
    return write(words, {"dtype": "bfloat16"}, temperature=1.0)


@pytest.mark.parametrize(("num", "words"), LAYOUTS[:2])
def test_recorded_steps_write_the_same_tokens_in_float32(num, words, on_cpu):
    for found in run_ranks(_write_recorded, num, words, timeout=TIMEOUT):
        assert torch.equal(found["tokens"], on_cpu["tokens"])
        torch.testing.assert_close(found["decode"], on_cpu["decode"], rtol=0, atol=1e-4)


def _write_recorded(words):
    return write(words, recorded=True)


@pytest.mark.parametrize("options", [{}, {"recorded": True}, {"kv_blocks": 9}], ids=str)
@pytest.mark.parametrize(("num", "words"), LAYOUTS)
def test_blocks_of_a_pool_hold_the_same_tokens_in_float32(num, words, options, on_cpu):
    if "recorded" in options and words.get("pipeline", 1) > 1:
        pytest.skip("recorded steps need pipeline 1")
    for found in run_ranks(_write_blocks, num, words, options, timeout=TIMEOUT):
        assert torch.equal(found["tokens"], on_cpu["tokens"])
        torch.testing.assert_close(found["decode"], on_cpu["decode"], rtol=0, atol=1e-4)


def _write_blocks(words, options):
    return write(words, kv_block_tokens=16, **options)


@pytest.mark.parametrize("recorded", [False, True], ids="recorded {}".format)
def test_in_bfloat16_decoding_from_blocks_of_256_and_the_training_forward_agree(recorded):
    for found in run_ranks(_write_large_blocks, 1, recorded, timeout=TIMEOUT):
        assert (found["decode"] - found["forward"]).abs().mean() < 0.03


def _write_large_blocks(recorded):
    return write({}, {"dtype": "bfloat16"}, temperature=1.0, kv_block_tokens=256, recorded=recorded)


def test_reading_blocks_where_they_lie_gives_what_slots_give():
    slots, blocks = (attention_of_a_batch(block_tokens) for block_tokens in (0, 256))
    for got, want in zip(blocks, slots, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-2)


def attention_of_a_batch(block_tokens):
    """Of prompts of up to three blocks, and of steps after them in which sequences take new blocks; bfloat16."""
    device, lengths = torch.device("cpu" if ON_CPU else "cuda"), [10, 254, 600]
    shape = {"num_layers": 1, "num_slots": 4, "max_length": 768, "num_kv_heads": 2, "head_dim": 64}
    angles = torch.outer(torch.arange(768.0), 0.5 ** torch.arange(32.0)).to(device)
    cache = KVCache(CacheShape(**shape, dtype=torch.bfloat16, device=device), angles=angles, block_tokens=block_tokens)
    if isinstance(cache.store, Pool):
        assert cache.store.reads_in_place == (not ON_CPU)
    generator, found = torch.Generator().manual_seed(1), []

    def attend(num_rows):
        drawn = torch.randn(num_rows, 2, 6, 64, generator=generator).to(device, torch.bfloat16)
        found.append(cache.attend(0, drawn[:, :, :4], drawn[:, :, 4], drawn[:, :, 5]).cpu())

    cache.plan_prefill(lengths, first_slot=0)
    attend(sum(lengths))
    for step in range(6):
        cache.plan_decode([length + step for length in lengths])
        attend(len(lengths))
    cache.plan_decode([length + 6 for length in lengths], num_rows=4)
    attend(4)
    found[-1] = found[-1][:3]  # the fourth row stands for nobody
    return found
