"""Adam on a GPU: Transformer Engine's, apex's or ours; the distributed optimizer, and apex's sums of gradients."""

import pytest
import torch

from tests.gpu.device import layout, needs
from tests.gpu.parity import BFLOAT16, EXACT, assert_close, on_cpu, on_device

pytestmark = needs()[:1]


@pytest.mark.parametrize(("num", "words"), [layout(1, {}, "one"), layout(2, {}, "data 2")])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_it_steps_as_the_cpus(distributed, num, words):
    assert_close(on_device(num, words, optimizer={"distributed": distributed}), on_cpu(), **EXACT)


@needs(engine=True, apex=True)[1]
def test_gradients_that_apex_adds_up_are_near_float32(monkeypatch):
    found = on_device(1, compute={"dtype": "bfloat16"})
    assert_close(found, on_cpu(), **BFLOAT16)
    assert torch.isfinite(found["policy norms"]).all()
