"""How long an item should take: from what was seen of its kind, at first from how much arithmetic it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.schedule.rooflines import matmul_parameters
from rto_megatron.schedule.work import Item

SLOW_FLOPS = 1e9
"""Operations per second of one rank that nobody falls below. A guess that is too low only makes deadlines later."""

BOUNDARY_SECONDS = 240.0
"""For an evaluation and a checkpoint; more once one has taken longer."""

FORWARDS = {"score": 5, "proximal": 1, "train": 6, "prefill": 1, "decode": 1}
"""Passes of a model over each token."""


class Pace:
    """Predicted seconds of items, for deadlines: meant to be too long rather than too short."""

    def __init__(self, config: RTORun, model: ModelConfig) -> None:
        """Nothing has been seen."""
        self._window = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
        self._parameters = matmul_parameters(model)
        self._slowest: dict[tuple[str, str], float] = {}
        """(kind, role) -> largest seconds of a token, or of the item where tokens do not count."""

    def predict(self, item: Item) -> float:
        """Seconds."""
        seen = self._slowest.get((item.kind, item.role))
        if seen is not None:
            return seen * self._tokens(item)
        if item.kind in FORWARDS:
            return 2.0 * self._parameters * FORWARDS[item.kind] * self._tokens(item) / SLOW_FLOPS
        if item.kind == "boundary":
            return BOUNDARY_SECONDS
        return 100 * self._parameters / SLOW_FLOPS  # optimizer, refit: a few passes over the weights

    @contextmanager
    def timed(self, item: Item) -> Iterator[float]:
        """Give the predicted seconds, and learn from those that the block takes."""
        start = time.perf_counter()
        yield self.predict(item)
        key, took = (item.kind, item.role), (time.perf_counter() - start) / self._tokens(item)
        self._slowest[key] = max(took, self._slowest.get(key, BOUNDARY_SECONDS if item.kind == "boundary" else 0.0))

    def _tokens(self, item: Item) -> int:
        """At most; 1 for what does not depend on them."""
        if item.kind not in FORWARDS:
            return 1
        return max(1, len(item.samples)) * (item.num_steps if item.kind == "decode" else self._window)
