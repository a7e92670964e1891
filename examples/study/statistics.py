"""What the runs of the study say: means over seeds, with bands from resampling whole seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

RESAMPLES = 10_000
ENOUGH_SEEDS = 6
"""With fewer, differences of one sign throughout are not rarer than 1 in 20 where there is none (2 / 2^seeds)."""


@dataclass(frozen=True)
class Band:
    """A number over seeds, and where 95 % of its resampled values lie."""

    mean: float
    low: float
    high: float
    seeds: int = 0

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def excludes_zero(self) -> bool:
        """Whether the band lies on one side of 0, and there are seeds enough for that to mean something."""
        return self.seeds >= ENOUGH_SEEDS and (self.low > 0 or self.high < 0)


def resamples(num_seeds: int) -> np.ndarray:
    """[RESAMPLES, seeds] seeds drawn with replacement: the same for every number, so that methods stay paired."""
    return np.random.default_rng(0).integers(0, num_seeds, (RESAMPLES, num_seeds))


def band(values: Sequence[float]) -> Band:
    """Of the mean of one number a seed."""
    x = np.asarray(values, dtype=float)
    means = x[resamples(len(x))].mean(1)
    low, high = map(float, np.quantile(means, (0.025, 0.975)))
    return Band(float(x.mean()), low, high, len(x))


def band_of(statistic: Callable[[np.ndarray], float | None], num_seeds: int) -> Band | None:
    """Of any statistic of a set of seeds [n] (indices); None where it has no value.

    A resample without a value counts as the worst there is: infinite.
    """
    value = statistic(np.arange(num_seeds))
    found = [statistic(seeds) for seeds in resamples(num_seeds)[:2000]]
    low, high = np.quantile([np.inf if x is None else x for x in found], (0.025, 0.975), method="nearest")
    return None if value is None else Band(float(value), float(low), float(high), num_seeds)


def first_reach(samples: Sequence[float], curve: Sequence[float], level: float) -> float | None:
    """Samples after which a curve first reaches a level, on the straight line between its points; None if never."""
    if curve[0] >= level:
        return float(samples[0])
    for (x0, y0), (x1, y1) in pairwise(zip(samples, curve, strict=True)):
        if y1 >= level:
            return float(x0 + (x1 - x0) * (level - y0) / (y1 - y0))
    return None
