"""How long an item should take: from what was seen of its kind, at first from how much arithmetic it is."""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.schedule.rooflines import matmul_parameters
from rto_megatron.schedule.work import Item

# Guesses that nobody falls below. One that is too low only makes the first deadlines later.
SLOW_FLOPS = {"cpu": 3e9}
"""Operations per second of one rank; of a GPU it is the weights that it reads for a single token."""
SLOW_FLOPS_OF_GPU = 1e12
SLOW_PASS_SECONDS = 0.02
"""Of a forward through the model, however small it is."""
SLOW_BYTES = 5e7
"""Per second, to a disk or to another rank."""
FIRST_SECONDS = 15.0
"""For what a kind of work sets up when it is done for the first time."""

NUM_SEEN = 32
"""A slow start is forgotten after so many items of the kind."""

FORWARDS = {"score": 5, "proximal": 1, "train": 6, "prefill": 1, "decode": 1}
"""Passes of a model over each token; of score the most, which a pack whose rows are all checked takes with reused
log-probs too."""

SAVED_BYTES = 16
"""Of a parameter with its optimizer state."""


def save_seconds(parameters: int) -> float:
    """Of a checkpoint of so many parameters and their optimizers, for a deadline."""
    return FIRST_SECONDS + SAVED_BYTES * parameters / SLOW_BYTES


class Seen:
    """Seconds and tokens of the latest items of each kind."""

    def __init__(self) -> None:
        """None yet."""
        self._latest: dict[tuple[str, str], deque[tuple[float, int]]] = {}
        self._inside = 0.0
        """Seconds of what was timed inside what is being timed."""

    def latest(self, kind: str, role: str = "") -> Sequence[tuple[float, int]]:
        """(seconds, tokens), oldest first."""
        return self._latest.get((kind, role), ())

    @contextmanager
    def timed(self, kind: str, role: str = "", tokens: int = 1) -> Iterator[None]:
        """Add the block, without what is timed inside it."""
        start, outside, self._inside = time.perf_counter(), self._inside, 0.0
        yield
        took = time.perf_counter() - start
        self._latest.setdefault((kind, role), deque(maxlen=NUM_SEEN)).append((took - self._inside, tokens))
        self._inside = outside + took


class Pace:
    """Predicted seconds of items, for deadlines: meant to be too long rather than too short."""

    def __init__(self, config: RTORun, model: ModelConfig, *, device: str, num_held_out: int) -> None:
        """Nothing has been seen.

        Args:
            device: its type.
            num_held_out: prompts of an evaluation.
        """
        self._config, self._num_held_out = config, num_held_out
        self._window = config.rollout.longest
        self._parameters = matmul_parameters(model)
        self._flops = SLOW_FLOPS.get(device, SLOW_FLOPS_OF_GPU)
        self._seen = Seen()

    @contextmanager
    def item(self, item: Item) -> Iterator[float]:
        """Give the predicted seconds of an item, and learn from those that the block takes."""
        if item.kind in FORWARDS:
            steps = item.num_steps if item.kind == "decode" else self._window
            tokens = max(1, len(item.samples)) * steps
            passes = item.num_steps if item.kind == "decode" else FORWARDS[item.kind] * len(item.samples)
            guess = self._arithmetic(FORWARDS[item.kind] * tokens, passes)
        else:
            tokens, guess = 1, self._arithmetic(50, 1) + 2 * self._parameters / SLOW_BYTES
        # of what several groups do, most of the time may be waiting for the last of them, which is not too slow
        usual = statistics.median if len(item.groups) > 1 else max
        seen = self._seen.latest(item.kind, item.role)
        if seen:
            growth = max(1.0, tokens / max(number for _, number in seen))
            guess = growth * usual(seconds for seconds, _ in seen)
        else:
            guess += FIRST_SECONDS
        with self._seen.timed(item.kind, item.role, tokens):
            yield guess

    @contextmanager
    def phase(self, name: str) -> Iterator[float]:
        """The same of a phase of a step: of the sequential run, or at a boundary."""
        seen = [seconds for seconds, _ in self._seen.latest(name)]
        # most saves have nothing to do, which says nothing of the others
        guess = max([self._guess(name), *seen] if name == "save" or not seen else seen)
        with self._seen.timed(name):
            yield guess

    def _guess(self, phase: str) -> float:
        rollout, samples = self._config.rollout, self._config.prompts_per_step * self._config.samples_per_prompt
        if phase == "save":
            return save_seconds(2 * self._parameters)
        if phase in ("generate", "evaluate"):
            samples = samples if phase == "generate" else self._num_held_out
            passes = math.ceil(samples / rollout.surely_together) * rollout.max_new_tokens
            forwards = 1 if phase == "generate" else 1 + FORWARDS["score"]
            return FIRST_SECONDS + self._arithmetic(forwards * samples * self._window, passes)
        forwards = 1 + FORWARDS.get("train" if phase == "update" else phase, 0)
        return FIRST_SECONDS + self._arithmetic(forwards * samples * self._window, forwards * samples)

    def _arithmetic(self, tokens: int, passes: int) -> float:
        return 2.0 * self._parameters * tokens / self._flops + passes * SLOW_PASS_SECONDS
