"""The passes between matrix products give what the plain expressions give, and so do their gradients."""

import pytest
import torch
from torch.nn import functional as F

from rto_megatron.models import elementwise
from rto_megatron.models.elementwise import rms_norm, rotate, swiglu


def plain_swiglu(x):
    gate, other = x.chunk(2, -1)
    return F.silu(gate) * other


def plain_rotate(x, turns):
    """The pair of halves as a complex number, times that of the angle."""
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(*turns)
    return torch.cat((turned.real, turned.imag), -1)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()


ANGLES = torch.linspace(0, 3, 5 * 2 * 3).view(5, 2, 1, 3)
TURNS = torch.stack((ANGLES.cos(), ANGLES.sin()))
WIDE = TURNS.expand(-1, -1, -1, 8, -1).contiguous()
CASES = {
    "swiglu": (swiglu, plain_swiglu, (numbers(7, 2, 10),)),
    "norm": (
        lambda x, weight: rms_norm(x, weight, 0.1),
        lambda x, weight: F.rms_norm(x, (6,), weight, 0.1),
        (numbers(5, 2, 6), numbers(6)),
    ),
    "norm of strided heads": (
        lambda x, weight: rms_norm(x[:, :, 1:3], weight, 0.1),
        lambda x, weight: F.rms_norm(x[:, :, 1:3], (6,), weight, 0.1),
        (numbers(5, 2, 4, 6), numbers(6)),
    ),
    "rotation": (lambda x: rotate(x, TURNS), lambda x: plain_rotate(x, TURNS), (numbers(5, 2, 4, 6),)),
    "rotation by a wider table": (
        lambda x: rotate(x[:, :, ::2], WIDE),
        lambda x: plain_rotate(x[:, :, ::2], TURNS),
        (numbers(5, 2, 4, 6),),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [1, elementwise.BLOCK])
def test_values_and_gradients_are_those_of_the_plain_expression(name, block, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", block)
    fast, plain, inputs = CASES[name]
    found, wanted = fast(*inputs), plain(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    slope = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, slope), torch.autograd.grad(wanted, inputs, slope), rtol=1e-5, atol=1e-6
    )
