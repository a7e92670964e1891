"""Keys and values of the sequences that are being written, and attention to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class _Run:
    """Neighbouring prompts of one length, which attend as one batch."""

    first_row: int
    first_slot: int
    num_prompts: int
    length: int


class KVCache:
    """Dense slots for the keys and values of one pipeline stage; Megatron's layers get it as `inference_context`.

    Live sequences sit in slots 0..n-1 (`move` closes holes), so that a decode step reads each layer's cache as a
    view, without gathering. Before each forward pass `plan_prefill` or `plan_decode` says what its rows are; a
    row is one token of some sequence. Rows beyond the planned ones are padding: they are neither stored nor
    attended to, and their output is 0.
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
        """Allocate zeroed slots: `num_layers` of this stage, `num_kv_heads` of this tensor rank.

        Args:
            angles: [max_length or more, head_dim / 2] float32 radians, rotary angle of each position.
            dtype: of keys and values.
        """
        shape = num_slots, num_kv_heads, max_length, head_dim
        # Zeroed, as positions that are masked out still meet their weight of 0: garbage could be NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=angles.device) for _ in range(num_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=angles.device) for _ in range(num_layers)]
        self.max_length = max_length
        angles = torch.cat((angles, angles), -1)[:max_length, None]
        self._cos, self._sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self._runs: list[_Run] = []
        self._num_rows = 0

    cos: Tensor
    """[rows, 1, head_dim] of the planned rows and their padding."""
    sin: Tensor

    def plan_prefill(self, lengths: Sequence[int], *, first_slot: int, num_rows: int) -> Tensor:
        """Say that the rows are whole prompts, packed, of the slots from `first_slot` on.

        Args:
            lengths: tokens of each prompt; equal lengths side by side are faster.
            first_slot: slot of the first prompt; the others follow.
            num_rows: rows of the forward pass, `sum(lengths)` or more.

        Returns:
            [num_rows] int64 position of each row in its sequence, 0 for padding.
        """
        self._runs, row, slot = [], 0, first_slot
        for length, group in groupby(lengths):
            num_prompts = len(list(group))
            self._runs.append(_Run(row, slot, num_prompts, length))
            row, slot = row + num_prompts * length, slot + num_prompts
        self._num_rows = row
        starts = torch.tensor([0, *accumulate(lengths)])
        ends = torch.arange(row)
        positions = ends - torch.repeat_interleave(starts[:-1], torch.tensor(list(lengths)))
        return self._rotate_to(F.pad(positions, (0, num_rows - row)).to(self._cos.device))

    def plan_decode(self, lengths: Sequence[int], *, num_rows: int) -> Tensor:
        """Say that row i is the next token of slot i, which holds `lengths[i]` tokens so far.

        Returns:
            [num_rows] int64 position of each row in its sequence, 0 for padding.
        """
        self._runs, self._num_rows = [], len(lengths)
        padded = [*lengths, *[0] * (num_rows - len(lengths))]
        positions = torch.tensor(padded, device=self._cos.device)
        self._slots = torch.arange(len(lengths), device=positions.device)
        self._positions = positions[: len(lengths)]
        self._longest = max(lengths) + 1
        seen = torch.arange(self._longest, device=positions.device) <= self._positions[:, None]
        self._bias = torch.where(seen, 0.0, -torch.inf).to(self._cos.dtype)[:, None, None]
        return self._rotate_to(positions)

    def _rotate_to(self, positions: Tensor) -> Tensor:
        self.cos, self.sin = self._cos[positions], self._sin[positions]
        return positions

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store keys and values, rotated already, and attend to all of each row's sequence so far.

        Args:
            layer: index among the layers of this stage.
            query: [rows, heads, d].
            key: [rows, kv heads, d]; query head h attends to kv head h * kv heads // heads.
            value: [rows, kv heads, d].

        Returns:
            [rows, heads * d].
        """
        padding = query.shape[0] - self._num_rows
        if padding:
            query, key, value = (x[: self._num_rows] for x in (query, key, value))
        attend = self._attend_prompts if self._runs else self._attend_next
        out = attend(self._keys[layer], self._values[layer], query, key, value)
        return F.pad(out, (0, 0, 0, padding)) if padding else out

    def _attend_next(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_rows, num_heads, dim = query.shape
        num_kv_heads = key.shape[1]
        keys[self._slots, :, self._positions] = key
        values[self._slots, :, self._positions] = value
        # The query heads that share a kv head stand as query rows: no key is copied per query head,
        # and torch's CPU kernel reads the cache in place (2-6 times as fast as enable_gqa here).
        out = F.scaled_dot_product_attention(
            query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, dim),
            keys[:num_rows, :, : self._longest],
            values[:num_rows, :, : self._longest],
            attn_mask=self._bias,
        )
        return out.reshape(num_rows, num_heads * dim)

    def _attend_prompts(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_heads, dim = query.shape[1:]
        out = []
        for run in self._runs:
            rows = slice(run.first_row, run.first_row + run.num_prompts * run.length)
            slots = slice(run.first_slot, run.first_slot + run.num_prompts)
            q, k, v = (
                x[rows].unflatten(0, (run.num_prompts, run.length)).transpose(1, 2) for x in (query, key, value)
            )
            keys[slots, :, : run.length] = k
            values[slots, :, : run.length] = v
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_heads != key.shape[1])
            out.append(o.transpose(1, 2).reshape(-1, num_heads * dim))
        return torch.cat(out) if len(out) > 1 else out[0]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for cache in (*self._keys, *self._values):
            cache[target, :, :length] = cache[source, :, :length]

    # What Megatron's transformer layers ask an inference context.

    def is_static_batching(self) -> bool:
        """No: rows are packed and each sequence has its own length."""
        return False

    def is_dynamic_batching(self) -> bool:
        """Yes, see above."""
        return True

    def is_decode_only(self) -> bool:
        """Whether the planned rows are next tokens rather than prompts."""
        return not self._runs
