"""Keys and values of the sequences that are being written, and attention to them."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from rto_megatron.rollout.kv_pool import Pool
from rto_megatron.rollout.kv_store import CacheShape, KVStore, Run, Slots


class KVCache:
    """Rotary angles, masks and attention over what a store keeps.

    Live sequences have slots 0..n-1 (`end` closes holes). Before each pass `plan_prefill` or `plan_decode` says what
    its rows are; a row is one token of some sequence.
    """

    def __init__(self, shape: CacheShape, *, angles: Tensor, block_tokens: int = 0, blocks: int | None = None) -> None:
        """No sequence is held.

        Args:
            angles: [max_length or more, head_dim / 2] float32 radians, rotary angle of each position.
            block_tokens: of a block where sequences share a pool; 0 gives each a slot of `max_length`.
            blocks: of the pool, made now; None makes them as they are needed.
        """
        self.store: KVStore = Pool(shape, block_tokens, blocks) if block_tokens else Slots(shape)
        angles = angles[: shape.max_length, None, None]
        self._cos = torch.cat((angles.cos(), angles.cos()), -1).to(shape.dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1).to(shape.dtype)
        self._runs: list[Run] = []

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
            self._runs.append(Run(row, slot, num_prompts, start, length))
            row, slot = row + num_prompts * length, slot + num_prompts
        self.store.plan_prompts(self._runs)
        positions = [torch.arange(start, start + length) for start, length in parts]
        self._rotate_to(torch.cat(positions).to(self._cos.device))

    def plan_decode(self, lengths: Sequence[int], *, num_rows: int = 0, width: int = 0) -> None:
        """Say that row i is the next token of slot i, which holds `lengths[i]` tokens so far.

        Args:
            num_rows: at least as many rows; those that are added touch no sequence.
            width: at least as many places of each sequence are read.
        """
        self._runs, num_rows = [], max(num_rows, len(lengths))
        width = max(width, max(lengths) + 1)
        self.store.plan_next(lengths, num_rows=num_rows, width=width)
        positions = torch.tensor([*lengths, *[0] * (num_rows - len(lengths))], device=self._cos.device)
        hidden = torch.arange(width, device=self._cos.device) > positions[:, None]
        self._bias = torch.zeros(hidden.shape, dtype=self._cos.dtype, device=hidden.device)
        self._bias = self._bias.masked_fill_(hidden, -torch.inf)[:, None, None]
        self._rotate_to(positions)

    @property
    def decode_plan(self) -> tuple[Tensor, ...]:
        """All tensors that `plan_decode` has made, for a pass that is recorded."""
        return self._bias, self._row_cos, self._row_sin, *self.store.next_plan

    @decode_plan.setter
    def decode_plan(self, plan: tuple[Tensor, ...]) -> None:
        self._bias, self._row_cos, self._row_sin, *rest = plan
        self.store.next_plan = tuple(rest)

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
        if not self._runs:
            return self.store.attend_next(layer, query, key, value, self._bias)
        self.store.write_prompts(layer, key, value)
        out = [self._attend_run(run, layer, query, key, value) for run in self._runs]
        return torch.cat(out) if len(out) > 1 else out[0]

    def _attend_run(self, run: Run, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = run.of(query.flatten(1, 2)), run.of(key), run.of(value)
        seen = None
        if run.start:  # torch counts from the first token of both
            k, v = self.store.read_prompts(layer, run)
            seen = torch.ones(run.length, run.end, dtype=torch.bool, device=q.device).tril(run.start)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=query.shape[2] > 1
        )
        return out.transpose(1, 2).reshape(-1, query.shape[1:].numel())

    def end(self, slot: int, last: int, length: int) -> None:
        """A slot's sequence has ended; that of slot `last`, of so many tokens, has the slot from now on."""
        self.store.end(slot, last, length)
