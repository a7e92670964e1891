"""Seconds of each item from a trace: non-negative least squares, one line a kind and role.

decode                    a * steps + b * tokens + c * context
prefill, score, train     a + b * tokens + c * (tokens of each sample)^2
advantage                 a + b * tokens
optimizer, refit          a
"""

from collections.abc import Sequence

import numpy as np

from rto_megatron.errors import DataError
from rto_megatron.schedule.simulate import Load
from rto_megatron.schedule.trace import Row
from rto_megatron.schedule.work import Item, Kind


def _features(kind: Kind, load: Load | Row) -> list[float]:
    if kind == "decode":
        return [load.num_steps, load.tokens, load.context]
    if kind in ("prefill", "score", "train"):
        return [1.0, load.tokens, load.squares]
    return [1.0, load.tokens] if kind == "advantage" else [1.0]


class Fitted:
    """A cost for `simulate` that says what a trace says of items of that size."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Fit all kinds and roles that the trace holds."""
        self.weights: dict[tuple[str, str], np.ndarray] = {}
        for name in sorted({(row.kind, row.role) for row in rows}):
            of_name = [row for row in rows if (row.kind, row.role) == name]
            features = np.array([_features(row.kind, row) for row in of_name], dtype=float)
            self.weights[name] = _non_negative(features, np.array([row.seconds for row in of_name]))

    def __call__(self, item: Item, load: Load, group: int) -> float:
        """Seconds of an item.

        Raises:
            DataError: the trace holds no such item.
        """
        if (item.kind, item.role) not in self.weights:
            raise DataError(
                f"the trace holds no {item.kind} {item.role}, which this schedule runs; take one of a map that has it"
            )
        return float(np.dot(self.weights[item.kind, item.role], _features(item.kind, load)))


def _non_negative(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Least squares with weights of 0 or more: of the fits on subsets of the columns, the best one allowed."""
    num, best, least = features.shape[1], None, np.inf
    scale = np.maximum(np.abs(features).max(axis=0), 1e-30)  # squared lengths and ones in one solve
    for subset in range(1, 2**num):
        columns = [i for i in range(num) if subset >> i & 1]
        found, *_ = np.linalg.lstsq(features[:, columns] / scale[columns], seconds, rcond=None)
        error = float(((features[:, columns] / scale[columns] @ found - seconds) ** 2).sum())
        if (found >= 0).all() and error < least * (1 - 1e-9):
            best, least = np.zeros(num), error
            best[columns] = found / scale[columns]
    return np.zeros(num) if best is None else best
