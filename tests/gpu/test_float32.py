"""float32 on a GPU takes Megatron's own layers, and says what the CPU says."""

import pytest

from tests.gpu.device import needs
from tests.gpu.parity import EXACT, assert_close, on_cpu, on_device

pytestmark = needs()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_scores_gradients_and_steps_are_the_cpus(packed):
    found = on_device(1, packed=packed)
    assert_close(found, on_cpu(), **EXACT)
    assert not found["policy is fused"] and not found["value is fused"]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activations_computed_again_are_the_same(recompute):
    assert_close(on_device(1, compute={"recompute": recompute}), on_cpu(), **EXACT)
