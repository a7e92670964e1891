"""Every layout gives what one CPU process gives: in float32 but for rounding, in bfloat16 and 8 bits nearly."""

import pytest

from tests.gpu.device import layout, needs
from tests.gpu.parity import BFLOAT16, EXACT, FP8, assert_close, on_cpu, on_device

pytestmark = needs()[:1]
LAYOUTS = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence parallel": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2 x virtual 2": (2, {"pipeline": 2, "virtual_stages": 2}),
    "context 2": (2, {"context": 2}),
    "data 2": (2, {}),
    "tensor 2 x pipeline 2 x virtual 2, sequence parallel": (
        4,
        {"tensor": 2, "pipeline": 2, "virtual_stages": 2, "sequence": True},
    ),
    "tensor 2 x context 2": (4, {"tensor": 2, "context": 2, "sequence": True}),
    "data 2 x pipeline 2": (4, {"pipeline": 2}),
}
every_layout = pytest.mark.parametrize(("num", "words"), [layout(*each, name) for name, each in LAYOUTS.items()])
on_engine = pytest.mark.parametrize(
    ("num", "words"), [layout(*each, name, engine=True) for name, each in LAYOUTS.items()]
)


@every_layout
def test_in_float32(num, words):
    assert_close(on_device(num, words, packed="context" not in words), on_cpu(), **EXACT)


@every_layout
def test_in_bfloat16_on_local_layers(num, words):
    found = on_device(num, words, {"dtype": "bfloat16"}, packed="context" not in words, local=True)
    assert not found["policy is fused"]
    assert_close(found, on_cpu(), **BFLOAT16)


@on_engine
def test_in_bfloat16_on_transformer_engine(num, words):
    found = on_device(num, words, {"dtype": "bfloat16"}, packed="context" not in words)
    assert found["policy is fused"]
    assert_close(found, on_cpu(), **BFLOAT16)


@pytest.mark.parametrize(
    ("num", "words"),
    [
        layout(2, {"tensor": 2, "sequence": True}, "tensor 2, sequence parallel", engine=True, capability=(8, 9)),
        layout(2, {"pipeline": 2, "virtual_stages": 2}, "pipeline 2 x virtual 2", engine=True, capability=(8, 9)),
        layout(2, {"context": 2}, "context 2", engine=True, capability=(8, 9)),
    ],
)
def test_in_8_bits(num, words):
    compute = {"dtype": "bfloat16", "fp8": "hybrid"}
    assert_close(on_device(num, words, compute, packed="context" not in words), on_cpu(), **FP8)
