"""bfloat16 with float32 main weights: near float32, whichever layers it has, packed or padded."""

import pytest

from tests.gpu.device import needs
from tests.gpu.parity import BFLOAT16, assert_close, on_cpu, on_device

BF16 = {"dtype": "bfloat16"}
pytestmark = needs()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_local_layers_are_near_float32(packed):
    found = on_device(1, compute=BF16, packed=packed, local=True)
    assert_close(found, on_cpu(), **BFLOAT16)
    assert not found["policy is fused"]


def test_weights_are_bfloat16_and_what_adam_steps_is_float32():
    assert on_device(1, compute=BF16, steps=1)["policy dtypes"].tolist() == [True, True]


@needs(engine=True)[1]
@pytest.mark.parametrize("packed", [True, False], ids=["thd", "padded"])
def test_transformer_engines_layers_are_near_float32(packed):
    found = on_device(1, compute=BF16, packed=packed)
    assert found["policy is fused"] and found["value is fused"]
    assert_close(found, on_cpu(), **BFLOAT16)


@needs(engine=True)[1]
def test_transformer_engines_layers_are_near_megatrons_own():
    assert_close(on_device(1, compute=BF16), on_device(1, compute=BF16, local=True), **BFLOAT16)


@needs(engine=True)[1]
def test_norms_of_queries_and_keys_are_transformer_engines_too():
    model = {"qk_norm": True}
    found, own = (on_device(1, compute=BF16, model=model, local=local) for local in (False, True))
    assert_close(found, own, **BFLOAT16)


@needs(engine=True)[1]
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activations_computed_again_are_near_too(recompute):
    assert_close(on_device(1, compute=BF16 | {"recompute": recompute}), on_cpu(), **BFLOAT16)
