"""Seconds of each item from a trace: non-negative least squares, one line a kind and role.

decode                              a * steps + b * tokens + c * context
prefill, score, proximal, train     a + b * samples + c * tokens + d * (tokens of each sample)^2
advantage                           a + b * tokens
refit                               a + b * bytes
optimizer, boundary                 a; the median boundary, whose mean would spread a checkpoint over all steps

Microbatches of so many samples each take their time whatever is in them: that is b of prefill, score and train.
"""

from collections.abc import Mapping, Sequence
from statistics import mean, median

import numpy as np

from rto_megatron.errors import DataError
from rto_megatron.schedule.trace import Load, Row
from rto_megatron.schedule.work import Item, Kind


def _features(kind: Kind, load: Load | Row) -> list[float]:
    if kind == "decode":
        return [load.num_steps, load.tokens, load.context]
    if kind in ("prefill", "score", "proximal", "train"):
        return [1.0, load.samples, load.tokens, load.squares]
    if kind == "refit":
        return [1.0, load.num_bytes]
    return [1.0, load.tokens] if kind == "advantage" else [1.0]


class Fitted:
    """A cost for `simulate` that says what a trace says of items of that size."""

    def __init__(self, rows: Sequence[Row], *, num_bytes: Mapping[str, int] | None = None) -> None:
        """Fit all kinds and roles that the trace holds.

        Args:
            rows: of one run or several, one after the other: a row an item and group, each group's in their order;
                measured ones as `meet` and `of_leaders` leave them.
            num_bytes: role of a refit -> bytes that a group gets, in the run that is to be told, which a schedule does
                not know; None takes the trace's, of those who got any.
        """
        self.latency = _latency(rows)
        """Seconds from an item to the next that follows from it, for `simulate`."""
        refits: dict[str, list[int]] = {}
        for row in rows:
            if row.kind == "refit" and row.num_bytes:  # an item takes as long as it takes those who receive
                refits.setdefault(row.role, []).append(row.num_bytes)
        self._num_bytes = {role: median(found) for role, found in refits.items()} | dict(num_bytes or {})
        self.weights: dict[tuple[str, str], np.ndarray] = {}
        for name in sorted({(row.kind, row.role) for row in rows}):
            of_name = [row for row in rows if (row.kind, row.role) == name]
            features = np.array([_features(row.kind, row) for row in of_name], dtype=float)
            seconds = np.array([row.seconds for row in of_name])
            if name[0] == "boundary":  # few of them save or evaluate, and these say nothing of the others
                seconds = np.full_like(seconds, np.median(seconds))
            self.weights[name] = _non_negative(features, seconds)

    def __call__(self, item: Item, load: Load, group: int) -> float:
        """Seconds of an item.

        Raises:
            DataError: the trace holds no such item.
        """
        if (item.kind, item.role) not in self.weights:
            held = ", ".join(" ".join(name).strip() for name in self.weights)
            raise DataError(
                f"the trace holds no {f'{item.kind} {item.role}'.strip()}, which this schedule runs, only {held}; "
                "take one of a map that has it"
            )
        if item.kind == "refit":
            return float(np.dot(self.weights["refit", item.role], [1.0, self._num_bytes.get(item.role, 0)]))
        return float(np.dot(self.weights[item.kind, item.role], _features(item.kind, load)))


def _latency(rows: Sequence[Row]) -> float:
    """Mean time between two passes of a step that follow each other on a group: there it waits for nobody.

    The mean and not the median, because a makespan adds up the late ones too.
    """
    last: dict[int, Row] = {}
    gaps: list[float] = []
    for row in rows:
        before = last.get(row.group)
        if before and row.kind == "decode" and before.kind in ("prefill", "decode") and before.step == row.step:
            gaps.append(row.start - before.end)
        last[row.group] = row
    return mean(gaps) if gaps else 0.0


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
