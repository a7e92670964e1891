"""compute.deterministic: two runs, the same bits."""

import pytest

from tests.gpu.device import TIMEOUT, layout, needs
from tests.gpu.legs import write
from tests.gpu.parity import assert_same_bits, on_device
from tests.ranks import run_ranks

pytestmark = needs()[:1]
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize(
    ("num", "words"),
    [
        layout(1, {}, "one"),
        layout(2, {"tensor": 2, "sequence": True}, "tensor 2, sequence parallel"),
        layout(2, {"pipeline": 2}, "pipeline 2"),
    ],
)
def test_training_gives_the_same_bits_twice(num, words, dtype):
    compute = {"dtype": dtype, "deterministic": True}
    first, second = (on_device(num, words, compute, steps=3) for _ in range(2))
    assert_same_bits(first, second)


@DTYPES
@needs()[1]
def test_writing_gives_the_same_bits_twice(dtype):
    first, second = (run_ranks(_write, 1, dtype, timeout=TIMEOUT)[0] for _ in range(2))
    assert_same_bits(first, second)


def _write(dtype):
    return write({}, {"dtype": dtype, "deterministic": True}, temperature=1.0)
