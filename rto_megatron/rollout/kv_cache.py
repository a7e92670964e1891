"""Keys and values of the sequences that are being written, and attention to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class _Run:
    """Neighbouring prompts, or parts of them, of one length and begin, which attend as one batch."""

    first_row: int
    first_slot: int
    num_prompts: int
    start: int
    length: int


class KVCache:
    """Dense slots for the keys and values of one pipeline stage, this tensor rank's heads.

    Live sequences sit in slots 0..n-1 (`move` closes holes), so that a decode step reads each layer's cache as a
    view, without gathering. Before each pass `plan_prefill` or `plan_decode` says what its rows are; a row is
    one token of some sequence.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        angles: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Allocate zeroed slots.

        Args:
            angles: [max_length or more, head_dim / 2] float32 radians, rotary angle of each position.
            dtype: of keys and values.
        """
        shape = num_slots, num_kv_heads, max_length, head_dim
        # Zeroed, as positions that are masked out still meet their weight of 0: garbage could be NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=angles.device) for _ in range(num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=angles.device) for _ in range(num_layers)]
        angles = angles[:max_length, None, None]
        self._cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
        self._runs: list[_Run] = []

    def plan_prefill(self, lengths: Sequence[int], *, first_slot: int, starts: Sequence[int] | None = None) -> None:
        """Say that the rows are prompts of these lengths, packed, of the slots from `first_slot` on.

        Prompts of equal length side by side attend as one batch.

        Args:
            starts: of parts of prompts, where each begins: its slot holds so many tokens already; None for whole ones.
        """
        self._runs, row, slot = [], 0, first_slot
        parts = list(zip(starts or [0] * len(lengths), lengths, strict=True))
        for (start, length), group in groupby(parts):
            num_prompts = len(list(group))
            self._runs.append(_Run(row, slot, num_prompts, start, length))
            row, slot = row + num_prompts * length, slot + num_prompts
        positions = [torch.arange(start, start + length) for start, length in parts]
        self._rotate_to(torch.cat(positions).to(self._cos.device))

    def plan_decode(self, lengths: Sequence[int], *, num_rows: int = 0, width: int = 0) -> None:
        """Say that row i is the next token of slot i, which holds `lengths[i]` tokens so far.

        Args:
            num_rows: at least as many rows; those that are added write and read the first place of slots that are free.
            width: at least as many places of the slots are read.
        """
        self._runs = []
        lengths = [*lengths, *[0] * (num_rows - len(lengths))]
        self._positions = torch.tensor(lengths, device=self._cos.device)
        self._slots = torch.arange(len(lengths), device=self._cos.device)
        self._longest = max(width, max(lengths) + 1)
        hidden = torch.arange(self._longest, device=self._cos.device) > self._positions[:, None]
        self._bias = torch.zeros(hidden.shape, dtype=self._cos.dtype, device=hidden.device)
        self._bias = self._bias.masked_fill_(hidden, -torch.inf)[:, None, None]
        self._rotate_to(self._positions)

    @property
    def decode_plan(self) -> tuple[Tensor, ...]:
        """All tensors that `plan_decode` has made, for a pass that is recorded."""
        return self._positions, self._slots, self._bias, self._row_cos, self._row_sin

    @decode_plan.setter
    def decode_plan(self, plan: tuple[Tensor, ...]) -> None:
        self._positions, self._slots, self._bias, self._row_cos, self._row_sin = plan

    def _rotate_to(self, positions: Tensor) -> None:
        self._row_cos, self._row_sin = self._cos[positions], self._sin[positions]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of `x` [rows, ..., ..., d] at the rows' positions; halves make pairs, not neighbours."""
        # (a, b) -> (a cos - b sin, b cos + a sin): the table holds the sign of each half.
        return x * self._row_cos + x.roll(x.shape[-1] // 2, -1) * self._row_sin

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values, rotated already, and attend to all of each row's sequence so far.

        Args:
            layer: index among the layers of this stage.
            query: [rows, kv heads, heads that share a kv head, d].
            key: [rows, kv heads, d].
            value: [rows, kv heads, d].

        Returns:
            [rows, heads * d].
        """
        attend = self._attend_prompts if self._runs else self._attend_next
        return attend(self._keys[layer], self._values[layer], query, key, value)

    def _attend_next(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys[self._slots, :, self._positions] = key
        values[self._slots, :, self._positions] = value
        # The query heads that share a kv head stand as query rows: no key is copied per query head,
        # and torch's CPU kernel reads the cache in place (at 32 rows 1.4 times as fast as enable_gqa).
        live = slice(len(query)), slice(None), slice(self._longest)
        out = F.scaled_dot_product_attention(query, keys[live], values[live], attn_mask=self._bias)
        return out.flatten(1)

    def _attend_prompts(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = []
        for run in self._runs:
            rows = slice(run.first_row, run.first_row + run.num_prompts * run.length)
            slots = slice(run.first_slot, run.first_slot + run.num_prompts)
            q, k, v = (
                x[rows].unflatten(0, (run.num_prompts, run.length)).transpose(1, 2)
                for x in (query.flatten(1, 2), key, value)
            )
            end, seen = run.start + run.length, None
            keys[slots, :, run.start : end] = k
            values[slots, :, run.start : end] = v
            if run.start:  # torch counts from the first token of both
                k, v = keys[slots, :, :end], values[slots, :, :end]
                seen = torch.ones(run.length, end, dtype=torch.bool, device=q.device).tril(run.start)
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=query.shape[2] > 1
            )
            out.append(o.transpose(1, 2).reshape(-1, query.shape[1:].numel()))
        return torch.cat(out) if len(out) > 1 else out[0]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for cache in (*self._keys, *self._values):
            cache[target, :, :length] = cache[source, :, :length]
