"""Log-probs and entropies from a vocabulary-parallel output layer, without keeping logits."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Tensor:
    """Score labels under softmax(hidden @ weight.T / temperature), a chunk of tokens at a time.

    At most `chunk` rows of logits exist at once, in the backward pass too, where they are computed
    again. Ranks exchange three numbers a token.

    Args:
        hidden: [N, H], the same on all ranks of `group`; its gradient is this rank's share of the sum.
        weight: [rows, H], this rank's rows of the output layer, in rank order.
        labels: [N] int64 ids below `vocab_size`.
        group: the tensor-parallel ranks.
        vocab_size: ids from here on are padding and have probability 0.
        temperature: divides the logits.
        chunk: tokens at a time.

    Returns:
        [N, 2] float32 nats: log-prob of the label, and entropy. Both can be differentiated.
    """
    return _LinearLogProbs.apply(hidden, weight, labels, group, vocab_size, temperature, chunk)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: Any, vocab: int, temperature: float, chunk: int) -> Tensor:
        first = group.rank() * weight.shape[0]
        num_rows = min(max(vocab - first, 0), weight.shape[0])
        parts = [
            _local_sums(_logits(h, weight, temperature, num_rows), y - first)
            for h, y in zip(hidden.split(chunk), labels.split(chunk))
        ]
        local = torch.cat(parts) if parts else hidden.new_empty(0, 3, dtype=torch.float32)
        log_norm, out = _merge(local, group)
        ctx.save_for_backward(hidden, weight, labels, log_norm, out[:, 1])
        ctx.settings = first, num_rows, temperature, chunk
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        hidden, weight, labels, log_norm, entropy = ctx.saved_tensors
        first, num_rows, temperature, chunk = ctx.settings
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0] if num_rows else 0, chunk):
            rows = slice(start, start + chunk)
            log_probs = _logits(hidden[rows], weight, temperature, num_rows).sub_(log_norm[rows, None])
            probs = log_probs.exp()
            # d log p(y) / dz = 1{y} - p;  d entropy / dz = -p (log p + entropy)
            slope = -probs * (grad[rows, :1] + grad[rows, 1:] * (log_probs + entropy[rows, None]))
            mine, index = _own(labels[rows] - first, num_rows)
            slope.scatter_add_(1, index[:, None], torch.where(mine, grad[rows, 0], 0.0)[:, None])
            slope = (slope / temperature).to(hidden.dtype)
            grad_hidden[rows] = slope @ weight[:num_rows]
            grad_weight[:num_rows].add_(slope.T @ hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, num_rows: int) -> Tensor:
    """[n, num_rows] float32: the product in the model's dtype, everything after it in float32."""
    return (hidden @ weight[:num_rows].T).float() / temperature


def _own(labels: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Which labels, counted from this rank's first row, it holds, and a valid index for all."""
    mine = (labels >= 0) & (labels < num_rows)
    return mine, torch.where(mine, labels, 0)


def _local_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, 3]: log of this rank's normaliser, its entropy within itself, and the label's logit (0 if another's)."""
    if logits.shape[1] == 0:  # a rank that holds nothing but padding
        return logits.new_tensor([-math.inf, 0.0, 0.0]).expand(logits.shape[0], 3)
    log_norm = logits.logsumexp(-1)
    mine, index = _own(labels, logits.shape[1])
    logit = torch.where(mine, logits.gather(1, index[:, None]).squeeze(1), 0.0)
    log_probs = logits.sub_(log_norm[:, None])
    entropy = -(log_probs.exp().mul_(log_probs)).sum(-1)
    return torch.stack((log_norm, entropy, logit), -1)


def _merge(local: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """[N, 3] of each rank -> [N] log normaliser of the vocabulary, [N, 2] log-prob and entropy.

    With w_r the probability of rank r's part: H = sum_r w_r (H_r - log w_r). Added in rank order.
    """
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    norms, entropies, logits = torch.stack(parts).unbind(-1)
    log_norm = norms.logsumexp(0)
    log_weight = norms - log_norm
    weight = log_weight.exp()
    entropy = torch.where(weight > 0, weight * (entropies - torch.where(weight > 0, log_weight, 0.0)), 0.0).sum(0)
    return log_norm, torch.stack((logits.sum(0) - log_norm, entropy), -1)
