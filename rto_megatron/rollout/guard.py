"""Log-probs of decoding held against those of the training forward: the guard that lets a run reuse the former."""

from dataclasses import dataclass

from torch import Tensor

from rto_megatron.algorithms.masked import last_response_token, widen
from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.data.sampler import random_order
from rto_megatron.errors import DecodeError

LIMITS = {"float32": (1e-3, 1e-2), "bfloat16": (0.1, float("inf"))}
"""dtype -> largest mean and largest single difference, nats. Float32 differs by 1e-6 to 1e-5; a wrong weight, angle or
temperature by 0.1 and more. In bfloat16 a single unlikely token may be off by a nat where nothing is wrong."""


def rows_to_check(num_rows: int, config: RolloutConfig, *, seed: int, step: int) -> frozenset[int]:
    """Rows of a step on which reused log-probs are held against the training forward; drawn by seed and step."""
    return frozenset(random_order(num_rows, f"checked log-probs/{seed}/{step}")[: config.check_rows])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far decoding is from the training forward, over tokens that both speak of."""

    values: Tensor
    """[n] nats: |decoding - training forward| of each token's log-prob."""
    weights: Tensor
    """[n] probability under the training forward over that under decoding."""

    @property
    def effective_share(self) -> float:
        """Effective sample size over sample size, (sum w)^2 / (n sum w^2): 1 where both agree."""
        weights = self.weights.double()
        return (weights.sum() ** 2 / (len(weights) * (weights**2).sum())).item() if len(weights) else 1.0


def difference_of(rollout: Rollout, signals: Signals) -> Difference:
    """Of the checked rows' response tokens; an EOS that overwrote another token was never decoded."""
    mask = rollout.response_mask
    drawn = mask & ~(last_response_token(mask) & rollout.truncated[:, None])
    both = drawn & signals.checked[:, None]
    log_ratio = widen(signals.forward_log_probs[both]) - widen(rollout.decode_log_probs[both])
    return Difference(values=log_ratio.abs(), weights=log_ratio.exp())


def check_decoding(rollout: Rollout, signals: Signals, config: RolloutConfig, *, dtype: str, step: int) -> None:
    """Raise DecodeError where decoding is farther from the training forward than the config allows.

    Args:
        dtype: of the model, `compute.dtype`.
    """
    found = difference_of(rollout, signals).values
    if not len(found):
        return
    mean_limit, limit = LIMITS[dtype]
    for what, name, got, allowed in (
        ("on average", "max_mean_difference", found.mean().item(), config.max_mean_difference or mean_limit),
        ("at most", "max_difference", found.max().item(), config.max_difference or limit),
    ):
        if not got <= allowed:  # NaN too
            way_out = "set rollout.reuse_log_probs to false" if config.reuse_log_probs else "look for what differs"
            raise DecodeError(
                f"step {step}: log-probs of decoding and of the training forward differ by {got:.3g} nats {what} over "
                f"{len(found)} tokens, and rollout.{name} allows {allowed:g} ({dtype}); {way_out}, or raise the limit "
                "if this is the rounding of the layout and its dtype"
            )
