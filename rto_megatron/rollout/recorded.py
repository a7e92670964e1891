"""Decode steps of few sizes, each recorded once and launched as a whole: a step's time is else that of its launches."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rto_megatron.distributed.runtime import Recording
from rto_megatron.rollout.forward import ForwardPass
from rto_megatron.rollout.kv_cache import KVCache

WIDTH = 256
"""Places of a slot that a step reads are a multiple of this, or all."""


class RecordedSteps:
    """The passes of one decode batch over its cache, on one pipeline stage.

    Rows are padded to a power of two and the places that are read to a multiple of WIDTH, so that a long batch has few
    recordings. A recording reads and writes the tensors that it was made with; what a step is about is copied into
    them.
    """

    def __init__(self, forward: ForwardPass, cache: KVCache, *, num_slots: int, max_length: int) -> None:
        """Nothing is recorded."""
        self._forward, self._cache = forward, cache
        self._num_slots, self._max_length = num_slots, max_length
        self._generation = cache.store.generation
        self._made: dict[tuple[int, int], tuple[Recording, tuple[Tensor, ...]]] = {}

    def run(self, ids: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
        """Pass the next token of each slot, which holds `lengths` tokens; [slots, H] normed hidden states."""
        size = self._size(len(ids), max(lengths) + 1)
        self._cache.plan_decode(lengths, num_rows=size[0], width=size[1])
        if self._generation != self._cache.store.generation:
            self._made.clear()  # recordings of what lies elsewhere now
            self._generation = self._cache.store.generation
        tokens = torch.tensor([*ids, *[0] * (size[0] - len(ids))], device=device)
        now = tokens, *self._cache.decode_plan
        if size not in self._made:
            own = tuple(tensor.clone() for tensor in now)
            # of nothing that refers back here: the cache's memory goes with its batch, not when Python looks for cycles
            self._made[size] = Recording(partial(_pass, self._forward, self._cache, own), device), own
        recording, own = self._made[size]
        for held, new in zip(own, now, strict=True):
            held.copy_(new)
        return recording.again()[: len(ids)]

    def _size(self, num_rows: int, width: int) -> tuple[int, int]:
        rows = min(1 << (num_rows - 1).bit_length(), self._num_slots)
        return rows, min(-(-width // WIDTH) * WIDTH, self._max_length)


def _pass(forward: ForwardPass, cache: KVCache, held: tuple[Tensor, ...]) -> Tensor:
    tokens, *plan = held
    cache.decode_plan = tuple(plan)
    hidden = forward.run(tokens, cache)
    assert hidden is not None, "one stage is the last"
    return hidden
