"""Where keys and values of sequences lie: what a cache asks of it, and a slot for each sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What is to be kept, and in which numbers."""

    num_layers: int
    num_slots: int
    """Sequences at a time."""
    max_length: int
    """Tokens of a sequence."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Run:
    """Neighbouring prompts, or parts of them, of one length and begin, which attend as one batch."""

    first_row: int
    first_slot: int
    num_prompts: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Tokens of each prompt up to here."""
        return self.start + self.length

    @property
    def slots(self) -> range:
        """One a prompt."""
        return range(self.first_slot, self.first_slot + self.num_prompts)

    def of(self, x: Tensor) -> Tensor:
        """[rows, heads, d] of the pass -> [prompts, heads, length, d] of the run, a view."""
        rows = x[self.first_row : self.first_row + self.num_prompts * self.length]
        return rows.unflatten(0, (self.num_prompts, self.length)).transpose(1, 2)


class KVStore(Protocol):
    """What attention asks of a cache. A pass is planned once, then made layer by layer."""

    next_plan: tuple[Tensor, ...]
    """What `plan_next` has made, for a pass that is recorded."""
    generation: int
    """Changes when what a recorded pass has read lies elsewhere."""

    @property
    def num_bytes(self) -> int:
        """Of memory that keys and values have."""
        ...

    def plan_prompts(self, runs: Sequence[Run]) -> None:
        """The next pass writes these."""
        ...

    def plan_next(self, lengths: Sequence[int], *, num_rows: int, width: int) -> None:
        """The next pass writes one token of each slot, which holds `lengths` so far, and reads `width` places.

        Args:
            num_rows: of the pass, which may be more: those that are added write where no sequence lies.
        """
        ...

    def write_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store [rows, kv heads, d] of the runs."""
        ...

    def read_prompts(self, layer: int, run: Run) -> tuple[Tensor, Tensor]:
        """Keys and values [prompts, kv heads, end, d] of a run's prompts up to its end; of one that began before."""
        ...

    def attend_next(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Store [rows, kv heads, d], and attend: [rows, kv heads, heads that share one, d] -> [rows, heads * d].

        Args:
            bias: [rows, 1, 1, width], -inf at places that a row must not see.
        """
        ...

    def end(self, slot: int, last: int, length: int) -> None:
        """A slot's sequence has ended; that of slot `last`, of so many tokens, has the slot from now on."""
        ...


class Slots:
    """A slot of `max_length` tokens for each sequence, which a decode step reads as a view, without gathering."""

    generation = 0

    def __init__(self, shape: CacheShape) -> None:
        """Allocate zeroed slots."""
        size = shape.num_slots, shape.num_kv_heads, shape.max_length, shape.head_dim
        # Zeroed, as positions that are masked out still meet their weight of 0: garbage could be NaN.
        self._keys, self._values = (
            [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.num_layers)]
            for _ in range(2)
        )
        self._device = shape.device
        self.next_plan: tuple[Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of memory that keys and values have."""
        return sum(x.nbytes for x in (*self._keys, *self._values))

    def plan_prompts(self, runs: Sequence[Run]) -> None:
        """The next pass writes these."""
        self._runs = runs

    def plan_next(self, lengths: Sequence[int], *, num_rows: int, width: int) -> None:
        """See `KVStore`; rows that are added write the first place of slots that are free."""
        self._width = width
        positions = torch.tensor([*lengths, *[0] * (num_rows - len(lengths))], device=self._device)
        self.next_plan = torch.arange(num_rows, device=self._device), positions

    def write_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store [rows, kv heads, d] of the runs."""
        for run in self._runs:
            slots = slice(run.slots.start, run.slots.stop)
            self._keys[layer][slots, :, run.start : run.end] = run.of(key)
            self._values[layer][slots, :, run.start : run.end] = run.of(value)

    def read_prompts(self, layer: int, run: Run) -> tuple[Tensor, Tensor]:
        """Keys and values [prompts, kv heads, end, d] of a run's prompts up to its end."""
        place = slice(run.slots.start, run.slots.stop), slice(None), slice(run.end)
        return self._keys[layer][place], self._values[layer][place]

    def attend_next(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """See `KVStore`."""
        slots, positions = self.next_plan
        keys, values = self._keys[layer], self._values[layer]
        keys[slots, :, positions] = key
        values[slots, :, positions] = value
        live = slice(len(query)), slice(None), slice(self._width)
        return attend_masked(query, keys[live], values[live], bias)

    def end(self, slot: int, last: int, length: int) -> None:
        """See `KVStore`; copies what the other slot holds."""
        if last != slot:
            for cache in (*self._keys, *self._values):
                cache[slot, :, :length] = cache[last, :, :length]


def attend_masked(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """[rows, kv heads, heads that share one, d] and [rows, kv heads, width, d] twice -> [rows, heads * d]."""
    # The query heads that share a kv head stand as query rows: no key is copied per query head,
    # and torch's CPU kernel reads the cache in place (at 32 rows 1.4 times as fast as enable_gqa).
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias).flatten(1)
