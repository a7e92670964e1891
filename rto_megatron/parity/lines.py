"""The lines of a parity certificate: what is compared, how far it may be off, and how far it is.

A line compares one quantity of a step on the run's layout with the same quantity in one process. The *relative*
difference is the absolute one over the largest size that the quantity has in one process: over a whole line, or over
a whole tensor where the line is made of tensors.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rto_megatron.batch import Rollout, pad_columns
from rto_megatron.distributed.collectives import gather_objects
from rto_megatron.distributed.shards import Shard

LINES = {
    "start/policy_weights": ("same", "policy before the step, as each rank loaded its pieces"),
    "start/critic_weights": ("same", "critic before the step, its fresh head included"),
    "rollout/tokens": ("tokens", "responses that took another token; relative: of all tokens up to there"),
    "rollout/decode_log_probs": ("log_probs", "nats, as sampled with the key-value cache, up to the first other token"),
    "signal/policy_log_probs": ("log_probs", "nats, by the forward of training"),
    "signal/ref_log_probs": ("log_probs", "nats, of the reference"),
    "signal/dpo_log_probs": ("log_probs", "nats, of the DPO policy"),
    "signal/values": ("heads", "reward units, of the critic"),
    "signal/raw_scores": ("heads", "the reward model's own units"),
    "signal/scores": ("heads", "normalised and clipped"),
    "reward/dpo": ("derived", "reward units, a token: scaled, clipped and placed"),
    "reward/kl": ("derived", "reward units, a token"),
    "reward/score": ("derived", "reward units, on the last token"),
    "reward/total": ("derived", "reward units, a token"),
    "advantage/raw": ("derived", "reward units, before whitening"),
    "advantage/returns": ("derived", "reward units: the critic's target"),
    "advantage/whitened": ("derived", "over all tokens of the step"),
    "policy/entropy": ("report", "nats, mean of each minibatch"),
    "policy/loss": ("report", "of each minibatch"),
    "policy/grad_norm": ("report", "of each minibatch, before clipping"),
    "policy/learning_rate": ("derived", "of each minibatch"),
    "policy/gradient": ("gradient", "each weight's, clipped: Adam's running mean over the minibatches"),
    "policy/weights": ("step", "after the step; relative: of the step"),
    "policy/copies": ("same", "pieces of weights of which two ranks hold other bits"),
    "critic/loss": ("report", "of each minibatch"),
    "critic/grad_norm": ("report", "of each minibatch, before clipping"),
    "critic/learning_rate": ("derived", "of each minibatch"),
    "critic/gradient": ("gradient", "as the policy's"),
    "critic/weights": ("step", "as the policy's"),
    "critic/copies": ("same", "as the policy's"),
    "after/policy_log_probs": ("log_probs", "nats, of the same responses under the updated policy"),
    "after/values": ("heads", "reward units, of the updated critic"),
}
"""Line -> its kind and what it is, in the order of the step: the first one that fails is nearest to the fault."""


@dataclass(frozen=True)
class Tolerance:
    """A difference passes up to `absolute + relative * largest`, the largest size in one process."""

    absolute: float = 0.0
    relative: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.absolute:.2g}"] if self.absolute else []
        parts += [f"{self.relative:.2g} rel"] if self.relative else []
        return " + ".join(parts) or "0"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a line is off, at worst."""

    max_abs: float
    max_rel: float
    used: float
    """Share of the tolerance; above 1 the line fails."""
    where: str

    @property
    def passed(self) -> bool:
        """Whether all of the line is within its tolerance."""
        return self.used <= 1

    def worst(self, other: "Difference") -> "Difference":
        """Both together: the larger of each number, and where most of the tolerance is used."""
        return Difference(
            max_abs=max(self.max_abs, other.max_abs),
            max_rel=max(self.max_rel, other.max_rel),
            used=max(self.used, other.used),
            where=self.where if self.used >= other.used else other.where,
        )


NOTHING = Difference(max_abs=0.0, max_rel=0.0, used=0.0, where="")

TOLERANCES = {
    "float32": {
        "same": Tolerance(),
        "tokens": Tolerance(relative=1e-4),
        "log_probs": Tolerance(1e-5, 3e-5),
        "heads": Tolerance(1e-6, 3e-5),
        "derived": Tolerance(relative=1e-6),
        "report": Tolerance(1e-5, 2e-4),
        "gradient": Tolerance(relative=5e-4),
        "step": Tolerance(relative=1e-3),
    },
    "bfloat16": {
        "same": Tolerance(),
        "tokens": Tolerance(relative=0.1),
        "log_probs": Tolerance(0.1, 0.06),
        "heads": Tolerance(1e-3, 0.1),
        "derived": Tolerance(relative=1e-6),
        "report": Tolerance(0.01, 0.1),
        "gradient": Tolerance(relative=0.6),
        "step": Tolerance(relative=0.3),
    },
}
"""compute.dtype -> kind of line -> tolerance.

Several times what rounding alone was seen to do, relative and at worst, of SmolLM2-135M (30 layers; tensor 3) and a
model of 4 layers and width 32 (tensor 2, with and without sequence parallelism, pipeline 2, data 2), on CPU:

              tokens   log-probs   heads   report   gradient    step
    float32        0      2.3e-6  1.4e-6   2.3e-5     2.9e-5  7.3e-6
    bfloat16       0        0.03    0.04     0.03       0.23    0.10

What is *derived* is the same arithmetic on the same numbers: on a CPU the same bits. A loss is a sum that may cancel
to nothing, hence the absolute part of reports. The faults of tests/parity/faults.py are all beyond float32's.
"""


def tolerance(line: str, dtype: str) -> Tolerance:
    """How far a line may be off in that arithmetic."""
    return TOLERANCES[dtype][LINES[line][0]]


def difference(own: Tensor, one: Tensor, allowed: Tolerance, axes: tuple[str, ...]) -> Difference:
    """Two tensors of one shape, the second that of one process; `axes` names their dimensions."""
    return _judge(_delta(own, one), one, allowed, lambda at: ", ".join(map("{} {}".format, axes, at)))


def token_differences(own: Rollout, one: Rollout, dtype: str) -> dict[str, Difference]:
    """Where responses part, and the decode log-probs of what was sampled alike before."""
    width = max(own.tokens.shape[1], one.tokens.shape[1])
    column = torch.arange(width)
    inside = column < torch.maximum(own.num_tokens, one.num_tokens)[:, None]
    other = inside & (pad_columns(own.tokens, width) != pad_columns(one.tokens, width))
    first = torch.where(other.any(1), other.int().argmax(1), width)
    alike = pad_columns(one.response_mask, width) & (column < first[:, None])
    num_parted = int(other.any(1).sum())
    share = num_parted / max(1, int(alike.sum()) + num_parted)
    row = int(first.argmin())
    parted = Difference(
        max_abs=num_parted,
        max_rel=share,
        used=_used(share, tolerance("rollout/tokens", dtype).relative),
        where=f"row {row}, token {int(first[row])}" if num_parted else "",
    )
    own_said, one_said = (pad_columns(x.decode_log_probs, width).where(alike, 0.0) for x in (own, one))
    return {
        "rollout/tokens": parted,
        "rollout/decode_log_probs": difference(
            own_said, one_said, tolerance("rollout/decode_log_probs", dtype), ("row", "token")
        ),
    }


def shard_difference(shard: Shard, one: Tensor, allowed: Tolerance) -> Difference:
    """A rank's piece of a weight against the whole one of one process."""
    return _judge(_delta(shard.data, one[shard.slices]), one, allowed, lambda at: _place(shard, at))


def gradient_difference(shard: Shard, one: Tensor, allowed: Tolerance) -> Difference:
    """A rank's piece of a gradient against the whole one of one process.

    relative = sum of |own - one| over the piece / sum of |one| over the weight: single elements may well be sums of
    large numbers that cancel, and have no more right digits than their neighbours' size allows.
    """
    return _by_share(shard, one, weight=torch.ones(()), whole=one, allowed=allowed)


def step_difference(shard: Shard, *, start: Tensor, one: Tensor, gradient: Tensor, allowed: Tolerance) -> Difference:
    """A rank's piece of an updated weight against that of one process, as a share of the step it took there.

    relative = sum of |gradient * (own - one)| over the piece / sum of |gradient * (one - start)| over the weight:
    about the share of the step's effect on the loss. Adam moves a weight by about the learning rate whatever the
    size of its gradient, so where the gradient is nothing but rounding two right steps may go opposite ways; weighted
    by the gradient, such elements do not count.
    """
    return _by_share(shard, one, weight=gradient, whole=one.double() - start.double(), allowed=allowed)


def _by_share(shard: Shard, one: Tensor, *, weight: Tensor, whole: Tensor, allowed: Tolerance) -> Difference:
    """Sum of |weight * (own - one)| over the piece as a share of the sum of |weight * whole| over all of it."""
    delta, weight = _delta(shard.data, one[shard.slices]), weight.double().abs().expand(one.shape)
    off = (weight[shard.slices] * delta).nan_to_num(nan=math.inf, posinf=math.inf)
    share = _used(off.sum().item(), (weight * whole.double().abs()).sum().item())
    most, at = _largest(off)
    return Difference(
        max_abs=_largest(delta)[0],
        max_rel=share,
        used=_used(share, allowed.relative),
        where=_place(shard, at) if most else "",
    )


def copy_differences(pieces: Iterable[Shard]) -> Difference:
    """Pieces that several ranks of the world hold, whose bits are not the same on all; every rank must call."""
    mine = [(shard.name, shard.offset, _digest(shard.data)) for shard in pieces]
    digests: dict[tuple[str, tuple[int, ...]], set[str]] = {}
    for name, offset, digest in (piece for held in gather_objects(mine) for piece in held):
        digests.setdefault((name, offset), set()).add(digest)
    torn = [name for (name, _), found in digests.items() if len(found) > 1]
    return Difference(
        max_abs=len(torn),
        max_rel=len(torn) / max(1, len(digests)),
        used=_used(len(torn), 0),
        where=torn[0] if torn else "",
    )


def _delta(own: Tensor, one: Tensor) -> Tensor:
    """Absolute difference in float64; infinite where either is not a number."""
    return (own.detach().cpu().double() - one.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)


def _judge(delta: Tensor, one: Tensor, allowed: Tolerance, place: Callable[[list[int]], str]) -> Difference:
    (worst, at), (size, _) = _largest(delta), _largest(one)
    return Difference(
        max_abs=worst,
        max_rel=_used(worst, size),
        used=_used(worst, allowed.absolute + allowed.relative * size),
        where=place(at) if worst else "",
    )


def _largest(x: Tensor) -> tuple[float, list[int]]:
    """The largest size of an element, and its place; 0 and nowhere where there is none."""
    if not x.numel():
        return 0.0, []
    size = x.double().abs()
    return size.max().item(), [int(i) for i in torch.unravel_index(size.argmax(), size.shape)]


def _used(amount: float, allowed: float) -> float:
    """Share of what is allowed; of nothing, any amount is too much."""
    if allowed:
        return amount / allowed
    return math.inf if amount else 0.0


def _place(shard: Shard, at: list[int]) -> str:
    return f"{shard.name}[{', '.join(str(start + i) for start, i in zip(shard.offset, at, strict=True))}]"


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
