"""KL of two vocabulary-parallel output layers at each token, without keeping logits."""

import math
from typing import Any

import torch
from torch import Tensor

from rto_megatron.distributed.log_probs import Head
from rto_megatron.distributed.replica import gather_over_tensor


def linear_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, head: Head) -> Tensor:
    """KL(softmax(ref_hidden @ ref_weight.T) || softmax(hidden @ weight.T)), a chunk of tokens at a time.

    At most `head.chunk` rows of both logits exist at once, in the backward pass too, where they are computed again.

    Args:
        hidden: [N, H], the same on all tensor ranks; its gradient is this rank's share of the sum.
        weight: [rows, H], this rank's rows of the output layer.
        ref_hidden, ref_weight: the same of the reference; no gradient.
        head: of both output layers.

    Returns:
        [N] float32 nats, 0 or more.
    """
    return _LinearKL.apply(hidden, weight, ref_hidden, ref_weight, head)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, head: Head) -> Tensor:
        parts = [
            _local_sums(head.logits(h, weight), head.logits(r, ref_weight))
            for h, r in zip(hidden.split(head.chunk), ref_hidden.split(head.chunk), strict=True)
        ]
        log_norm, ref_log_norm, kl = _merge(torch.cat(parts), head.group)
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, log_norm, ref_log_norm)
        ctx.head = head
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        hidden, weight, ref_hidden, ref_weight, log_norm, ref_log_norm = ctx.saved_tensors
        head: Head = ctx.head
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0] if head.num_rows else 0, head.chunk):
            rows = slice(start, start + head.chunk)
            probs = head.logits(hidden[rows], weight).sub_(log_norm[rows, None]).exp_()
            ref_probs = head.logits(ref_hidden[rows], ref_weight).sub_(ref_log_norm[rows, None]).exp_()
            # d KL / dz = p - p_ref
            slope = probs.sub_(ref_probs).mul_(grad[rows, None] / head.temperature).to(hidden.dtype)
            grad_hidden[rows] = slope @ weight[: head.num_rows]
            if grad_weight is not None:
                grad_weight[: head.num_rows].add_(slope.T @ hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _local_sums(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """[n, 3]: this rank's two log-normalisers, and its mean of ref - policy logits under its part of the reference."""
    if logits.shape[1] == 0:  # a rank that holds nothing but padding
        return logits.new_tensor([-math.inf, -math.inf, 0.0]).expand(logits.shape[0], 3)
    norm, ref_norm = logits.logsumexp(-1), ref_logits.logsumexp(-1)
    weights = ref_logits.sub(ref_norm[:, None]).exp_()
    return torch.stack((norm, ref_norm, weights.mul_(ref_logits.sub_(logits)).sum(-1)), -1)


def _merge(local: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """[N, 3] of each rank -> both log-normalisers of the vocabulary and the KL, [N] each; added in rank order.

    With w_r the reference's probability of rank r's part and z logits: KL = sum_r w_r mean_r(z_ref - z) - Z_ref + Z.
    """
    norms, ref_norms, means = gather_over_tensor(local, group).unbind(-1)
    log_norm, ref_log_norm = norms.logsumexp(0), ref_norms.logsumexp(0)
    kl = ((ref_norms - ref_log_norm).exp() * means).sum(0) - ref_log_norm + log_norm
    return log_norm, ref_log_norm, kl.clamp(min=0)  # rounding may take it below
