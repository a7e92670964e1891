"""Draw tokens from vocabulary-parallel logits, each sequence from its own random stream.

Gumbel-max: the token is argmax over v of z[v] + noise[v]. The noise is a pure function of (seed of the
sequence, index of the token in the response, v), so a draw depends on no generator, batch mate, slot,
order or layout; only the rounding of the logits can, and that moves an argmax far less often than it
moves the inverse of a cumulative sum.
"""

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rto_megatron.data.sampler import stream_seed
from rto_megatron.distributed.replica import gather_over_tensor

SHARES_OF_1 = 2**52
"""Probabilities that are added up are whole numbers of these shares."""


def request_seed(seed: int, step: int, prompt_id: int, sample_id: int) -> int:
    """The random stream of one response, 63 bits: whichever rank, slot or order it is written in."""
    return stream_seed(f"{seed}/{step}/{prompt_id}/{sample_id}")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the sampler needs to know of each of B rows of logits."""

    seeds: Tensor
    """[B] int64: the random stream of the row's sequence."""
    indices: Tensor
    """[B] int64: 0 for the first token of the response, and so on; the place in the stream."""
    temperatures: tuple[float, ...]
    """Divides the logits; 0 is greedy."""
    top_k: tuple[int, ...]
    """Sample among this many likeliest tokens; 0 among all."""
    top_p: tuple[float, ...]
    """Sample among the likeliest tokens that hold this share of the probability; 1 among all."""

    @property
    def filtered(self) -> list[int]:
        """Rows that need top-k or top-p."""
        settings = zip(self.temperatures, self.top_k, self.top_p, strict=True)
        return [i for i, (t, k, p) in enumerate(settings) if t > 0 and (k > 0 or p < 1)]

    def __getitem__(self, part: slice) -> "Rows":
        """Some of the rows."""
        return Rows(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def sample(logits: Tensor, rows: Rows, *, first_id: int, banned: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: [B, V/tp] float32, this tensor rank's shard of the vocabulary.
        rows: how each row is sampled.
        first_id: the token id of the shard's first column.
        banned: [n] int64 columns of this shard that can never be drawn: padded vocabulary, pad id.
        group: the tensor-parallel group.

    Returns:
        [B] int64 tokens, and [B] float32 nats: their log-probs under the distribution they were drawn from
        (tempered, filtered, without the banned ids). A greedy row's log-prob is at temperature 1, without
        filters: that of a point mass would always be 0. Both are equal on all ranks of the group.
    """
    z = logits / torch.tensor([[t or 1.0] for t in rows.temperatures], device=logits.device)
    z.index_fill_(1, banned, -torch.inf)
    _keep_likeliest(z, rows, group)
    greedy = [i for i, t in enumerate(rows.temperatures) if t == 0]
    scores = z
    if len(greedy) < len(z):
        noise = gumbel(rows.seeds, rows.indices, first_id=first_id, num_ids=z.shape[1])
        if greedy:
            noise[greedy] = 0.0
        scores = noise.add_(z)
    best, column = scores.max(-1)
    # float64 because token ids travel with the scores, exactly.
    shard = torch.stack((best, column + first_id, z.gather(1, column[:, None])[:, 0], z.logsumexp(-1))).double()
    if group.size() == 1:
        _, token, z_token, normaliser = shard
        return token.long(), (z_token - normaliser).float()
    shards = gather_over_tensor(shard, group)  # [tp, 4, B]: 32 bytes a row and rank, never the logits
    winner = shards[:, 0].argmax(0)
    _, token, z_token, _ = shards.gather(0, winner.expand(1, 4, -1))[0]
    return token.long(), (z_token - shards[:, 3].logsumexp(0)).float()


def _keep_likeliest(z: Tensor, rows: Rows, group: ProcessGroup) -> None:
    """Set what top-k and top-p leave out of `z` [B, V/tp] to -inf, in place; ties at the edge stay in.

    Gathers the vocabulary of the rows that are filtered: rare in training, where neither is on.
    """
    index = rows.filtered
    if not index:
        return
    picked = z[index]
    full = torch.cat(tuple(gather_over_tensor(picked, group)), dim=-1) if group.size() > 1 else picked
    least = torch.stack([_least_kept(row, rows.top_k[i], rows.top_p[i]) for i, row in zip(index, full, strict=True)])
    z[index] = picked.masked_fill(picked < least[:, None], -torch.inf)


def _least_kept(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """The smallest logit of one row `z` [V] that stays; top-p counts probability within the top-k."""
    size = z.shape[0]
    likeliest = z.topk(min(top_k, size) if top_k > 0 else size).values
    if top_p == 1:
        return likeliest[-1]
    probs = likeliest.softmax(-1)
    # in whole numbers: on a GPU floats are added in another order each time, and its deterministic mode refuses to
    shares = (probs.double() * SHARES_OF_1).round().long()
    before = shares.cumsum(-1) - shares  # a token stays where those before it hold less than top_p
    return likeliest[(before < top_p * SHARES_OF_1).sum().clamp(min=1) - 1]


def gumbel(seeds: Tensor, indices: Tensor, *, first_id: int, num_ids: int) -> Tensor:
    """Standard Gumbel noise [B, num_ids] float32 of the tokens from `first_id` on.

    Element (b, v) depends on seeds[b], indices[b] and first_id + v alone. Integer arithmetic, the same on CPU
    and GPU: 64 bits a row to spread (seed, index), then two rounds of a 32-bit hash (lowbias32) an element.
    """
    low, high = _spread(seeds, indices)
    x = _spaced_ids(first_id, num_ids, seeds.device) + low[:, None]
    x ^= _shift_right(x, 16)
    x *= 0x7FEB352D
    x ^= high[:, None]
    x ^= _shift_right(x, 15)
    x *= _signed32(0x846CA68B)
    x ^= _shift_right(x, 16)
    # Uniform in (0, 1), exact near 0, where the largest noise comes from; 1 itself would give -inf.
    uniform = _shift_right(x, 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    exponential = uniform.neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _spread(seeds: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Two [B] int32 keys from (seed, index): the finaliser of splitmix64, in wrapping int64 arithmetic."""
    x = (indices + 1) * _signed64(0x9E3779B97F4A7C15) + seeds
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed64(0x94D049BB133111EB)
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x << 32 >> 32).to(torch.int32), (x >> 32).to(torch.int32)


@cache
def _spaced_ids(first_id: int, num_ids: int, device: torch.device) -> Tensor:
    """[1, num_ids] int32: token ids times an odd constant, so that neighbours differ in every bit."""
    return torch.arange(first_id, first_id + num_ids, dtype=torch.int32, device=device)[None] * _signed32(0x9E3779B1)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int32; torch's own keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


def _signed64(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
