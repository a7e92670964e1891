"""Products in 8 bits: near float32 in every format and recipe that the GPU has."""

import pytest

from tests.gpu.device import needs
from tests.gpu.parity import FP8, assert_close, on_cpu, on_device

pytestmark = needs(engine=True, capability=(8, 9))


@pytest.mark.parametrize("packed", [True, False], ids=["thd", "padded"])
@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_a_scale_a_tensor_is_near_float32(fp8, packed):
    found = on_device(1, compute={"dtype": "bfloat16", "fp8": fp8}, packed=packed)
    assert found["policy is fused"]
    assert_close(found, on_cpu(), **FP8)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param("blockwise", marks=needs(engine=True, capability=(9, 0))[1:]),
        pytest.param("mxfp8", marks=needs(engine=True, capability=(10, 0))[1:]),
    ],
)
def test_scales_of_blocks_are_near_float32(recipe):
    # E4M3 for gradients too, for which scales of blocks are meant
    compute = {"dtype": "bfloat16", "fp8": "e4m3", "fp8_recipe": recipe}
    assert_close(on_device(1, compute=compute), on_cpu(), **FP8)


def test_it_differs_from_bfloat16():
    found = on_device(1, compute={"dtype": "bfloat16", "fp8": "hybrid"}, steps=1)
    other = on_device(1, compute={"dtype": "bfloat16"}, steps=1)
    assert not found["policy scores"].equal(other["policy scores"])
