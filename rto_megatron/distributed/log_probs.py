"""Log-probs and entropies from a vocabulary-parallel output layer, without keeping logits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rto_megatron.distributed.replica import gather_over_tensor


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
    chunk: int = 512,
    banned_ids: tuple[int, ...] = (),
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
        banned_ids: ids that are never sampled, such as the pad id; they have probability 0 too.

    Returns:
        [N, 2] float32 nats: log-prob of the label, and entropy. Both can be differentiated.
    """
    head = head_of(
        weight, group=group, vocab_size=vocab_size, temperature=temperature, chunk=chunk, banned_ids=banned_ids
    )
    return _LinearLogProbs.apply(hidden, weight, labels, head)


def head_of(
    weight: Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    chunk: int,
    banned_ids: tuple[int, ...],
) -> "Head":
    """How this rank's rows of an output layer are read; arguments as in `linear_log_probs`."""
    first = group.rank() * weight.shape[0]
    num_rows = min(max(vocab_size - first, 0), weight.shape[0])
    mine = [i - first for i in banned_ids if first <= i < first + num_rows]
    return Head(group, first, num_rows, temperature, chunk, torch.tensor(mine, dtype=torch.long, device=weight.device))


IMPOSSIBLE = -1e30
"""The logit of a banned id. Finite: the entropy multiplies its log by a probability of 0."""


@dataclass(frozen=True)
class Head:
    """What does not change from token to token."""

    group: Any
    first: int
    """The id of this rank's first row."""
    num_rows: int
    """Rows that are not padding."""
    temperature: float
    chunk: int
    banned: Tensor
    """Of this rank's rows."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, num_rows] float32: the product in the model's dtype, everything after it in float32."""
        logits = (hidden @ weight[: self.num_rows].T).float()
        if self.temperature != 1.0:
            logits /= self.temperature
        return logits.index_fill_(1, self.banned, IMPOSSIBLE)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: Head) -> Tensor:
        parts = [
            _local_sums(head.logits(h, weight), y - head.first)
            for h, y in zip(hidden.split(head.chunk), labels.split(head.chunk), strict=True)
        ]
        local = torch.cat(parts)
        log_norm, out = _merge(local, head.group)
        ctx.save_for_backward(hidden, weight, labels, log_norm, out[:, 1])
        ctx.head = head
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        hidden, weight, labels, log_norm, entropy = ctx.saved_tensors
        head: Head = ctx.head
        grad_hidden = torch.zeros_like(hidden)
        # a frozen output layer (adapters) has no gradient: it would be as large as the layer, and a third of the work
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0] if head.num_rows else 0, head.chunk):
            rows = slice(start, start + head.chunk)
            log_probs = head.logits(hidden[rows], weight).sub_(log_norm[rows, None])
            probs, wanted = log_probs.exp(), grad[rows] / head.temperature
            # d log p(y) / dz = 1{y} - p;  d entropy / dz = -p (log p + entropy). In place: memory is what it costs
            slope = log_probs.add_(entropy[rows, None]).mul_(-wanted[:, 1:]).sub_(wanted[:, :1]).mul_(probs)
            mine, index = _own(labels[rows] - head.first, head.num_rows)
            slope.scatter_add_(1, index[:, None], torch.where(mine, wanted[:, 0], 0.0)[:, None])
            slope = slope.to(hidden.dtype)
            grad_hidden[rows] = slope @ weight[: head.num_rows]
            if grad_weight is not None:
                grad_weight[: head.num_rows].add_(slope.T @ hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _own(labels: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Which labels, counted from this rank's first row, it holds, and a valid index for all."""
    mine = (labels >= 0) & (labels < num_rows)
    return mine, torch.where(mine, labels, 0)


def _local_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """[n, 3]: log of this rank's normaliser, its entropy within itself, and the label's logit (0 if another's)."""
    if logits.shape[1] == 0:  # a rank that holds nothing but padding
        return logits.new_tensor([-math.inf, 0.0, 0.0]).expand(logits.shape[0], 3)
    mine, index = _own(labels, logits.shape[1])
    logit = torch.where(mine, logits.gather(1, index[:, None]).squeeze(1), 0.0)
    # with z counted from the largest and s = sum exp(z): entropy = log s - sum(exp(z) z) / s, in two passes over exp
    largest = logits.amax(-1)
    z = logits.sub_(largest[:, None])
    weights = z.exp()
    total = weights.sum(-1)
    entropy = total.log() - weights.mul_(z).sum(-1) / total
    return torch.stack((largest + total.log(), entropy, logit), -1)


def _merge(local: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """[N, 3] of each rank -> [N] log normaliser of the vocabulary, [N, 2] log-prob and entropy.

    With w_r the probability of rank r's part: H = sum_r w_r (H_r - log w_r). Added in rank order.
    """
    if group.size() == 1:  # the same bits, and nothing to wait for
        norm, entropy, logit = local.unbind(-1)
        return norm, torch.stack((logit - norm, entropy), -1)
    norms, entropies, logits = gather_over_tensor(local, group).unbind(-1)
    log_norm = norms.logsumexp(0)
    log_weight = norms - log_norm
    weight = log_weight.exp()
    entropy = torch.where(weight > 0, weight * (entropies - torch.where(weight > 0, log_weight, 0.0)), 0.0).sum(0)
    return log_norm, torch.stack((logits.sum(0) - log_norm, entropy), -1)
