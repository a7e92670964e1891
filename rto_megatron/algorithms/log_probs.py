"""Log-probs and entropy from whole logits: the plain version that the sharded one is tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.algorithms.masked import widen


def token_log_probs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Score each token by the logits that predicted it; [B, T, V], [B, T] -> [B, T] nats.

    The only place where logits and tokens are shifted against each other: everywhere
    else `log_probs[:, t]` belongs to `tokens[:, t]`. Column 0 is 0: nothing predicted it.
    """
    predicted = (widen(logits[:, :-1]) / temperature).log_softmax(-1)
    scored = predicted.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return F.pad(scored, (1, 0))


def token_entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution each token was drawn from; [B, T, V] -> [B, T] nats.

    H[t] = - sum over v of p(v) log p(v), with p from the logits before token t. Column 0 is 0.
    """
    log_p = (widen(logits[:, :-1]) / temperature).log_softmax(-1)
    log_p = log_p.masked_fill(log_p == -torch.inf, 0.0)  # a banned id adds 0, where 0 * -inf would add NaN
    return F.pad(-(log_p.exp() * log_p).sum(-1), (1, 0))
