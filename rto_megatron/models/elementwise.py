"""What lies between the matrix products of a layer, in few passes over memory: for ranks without a GPU's fused kernels.

On a CPU these passes, not the products, are most of what a small model costs beyond its FLOPs. Values are those of the
plain expressions up to rounding; each backward is written out, so that it makes no more passes than it needs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 1 << 18
"""Numbers of a tensor that are gone through together where several passes follow each other: 1 MB stays in a cache."""


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 * width], the gate's half first -> silu(gate) * other half, [..., width]."""
    return _SwiGLU.apply(x)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension; float32."""
    return _RMSNorm.apply(x, weight, epsilon)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding: the pair (x[i], x[i + d / 2]) of each head turned by the angle of its token.

    Args:
        x: [T, B, heads, d].
        turns: [2, T, B or 1, heads or more, d / 2], cosine and sine of the angles; or 1 for all heads.
    """
    return _Rotate.apply(x, turns)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, other = x.chunk(2, -1)
        return F.silu(gate).mul_(other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        [x] = ctx.saved_tensors
        found, rows = torch.empty_like(x), max(1, BLOCK // x.shape[-1]) if x.device.type == "cpu" else x.numel()
        for block, slope, into in zip(*(y.flatten(0, -2).split(rows) for y in (x, grad, found)), strict=True):
            (gate, other), (into_gate, into_other) = block.chunk(2, -1), into.chunk(2, -1)
            torch.mul(slope, F.silu(gate), out=into_other)
            torch.ops.aten.silu_backward.grad_input(slope * other, gate, grad_input=into_gate)
        return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        # y = x s w, s = (mean(x^2) + epsilon)^-1/2:  dx = s g w - x s^3 mean(g w x),  dw = sum over tokens of g x s
        x, weight, scale = ctx.saved_tensors
        shape, width = x.shape, x.shape[-1]
        x, grad, scale = x.reshape(-1, width), grad.reshape(-1, width), scale.reshape(-1, 1)
        product = grad * x
        slope = (product @ weight)[:, None].mul_(scale).mul_(scale).mul_(scale).mul_(-1 / width)
        grad_weight = product.T @ scale[:, 0] if ctx.needs_input_grad[1] else None
        return (grad * weight).mul_(scale).addcmul_(x, slope).view(shape), grad_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        turns = turns[..., : x.shape[-2], :]
        ctx.save_for_backward(turns)
        return _turn(x, *turns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        [turns] = ctx.saved_tensors
        cos, sin = turns
        return _turn(grad, cos, -sin), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (into_a, into_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=into_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=into_b).addcmul_(a, sin)
    return out
