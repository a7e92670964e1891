"""Decoding on a GPU: the CPU's greedy tokens, and log-probs that the training forward agrees with."""

import pytest
import torch

from tests.gpu.device import TIMEOUT, layout, needs
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
