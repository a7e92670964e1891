"""Keys and values in blocks of a pool, which sequences take as they grow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rto_megatron.distributed.runtime import has_flash_attention
from rto_megatron.rollout.blocks import BlockTables, blocks_of
from rto_megatron.rollout.kv_store import CacheShape, Run, attend_masked

KERNEL_BLOCK = 256
"""Of this many tokens, or a multiple, FlashAttention 2 takes blocks."""


class Pool:
    """Blocks of a few tokens, which a sequence takes as it grows: memory follows what was written.

    Tensors are [blocks, tokens of a block, kv heads, d]. The pool grows with what is needed, by a quarter at least.
    A decode step gathers the blocks of its sequences; on a GPU that has the kernel for it, attention reads them where
    they lie.
    """

    def __init__(self, shape: CacheShape, block_tokens: int, blocks: int | None = None) -> None:
        """Allocate `blocks`, or nothing but block 0 where it is None."""
        self._shape, self._device = shape, shape.device
        self.tables = BlockTables(block_tokens)
        self._most = 1 + shape.num_slots * blocks_of(shape.max_length, block_tokens)
        first = 1 if blocks is None else min(1 + blocks, self._most)
        self._keys, self._values = ([self._zeros(first) for _ in range(shape.num_layers)] for _ in range(2))
        self.reads_in_place = has_paged_kernel(shape, block_tokens)
        """Whether a decode step gathers nothing."""
        self.next_plan: tuple[Tensor, ...] = ()
        self.generation = 0

    @property
    def num_bytes(self) -> int:
        """Of memory that keys and values have."""
        return sum(x.nbytes for x in (*self._keys, *self._values))

    def plan_prompts(self, runs: Sequence[Run]) -> None:
        """The next pass writes these; their blocks are taken. Tables are made once, for all layers."""
        places: list[int] = []
        for run in runs:
            for slot in run.slots:
                self.tables.cover(slot, run.end)
                places += [self.tables.place(slot, position) for position in range(run.start, run.end)]
        self._places = torch.tensor(places, device=self._device)
        self._tables = {run: self._table(run.slots, run.end, num_rows=run.num_prompts) for run in runs if run.start}
        self._grow()

    def plan_next(self, lengths: Sequence[int], *, num_rows: int, width: int) -> None:
        """See `KVStore`; a sequence takes a block if its last one is full."""
        self._width, padding = width, [0] * (num_rows - len(lengths))
        for slot, length in enumerate(lengths):
            self.tables.cover(slot, length + 1)
        places = [self.tables.place(slot, length) for slot, length in enumerate(lengths)] + padding
        used = [length + 1 for length in lengths] + [1] * len(padding)
        # 32 bits: the kernel takes no others.
        self.next_plan = (
            torch.tensor(places, device=self._device),
            self._table(range(len(lengths)), width, num_rows=num_rows),
            torch.tensor(used, dtype=torch.int32, device=self._device),
            torch.arange(num_rows + 1, dtype=torch.int32, device=self._device),
        )
        self._grow()

    def write_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store [rows, kv heads, d] of the runs."""
        self._write(layer, self._places, key, value)

    def read_prompts(self, layer: int, run: Run) -> tuple[Tensor, Tensor]:
        """Keys and values [prompts, kv heads, end, d] of a run's prompts up to its end."""
        table = self._tables[run]
        return self._gather(self._keys[layer], table, run.end), self._gather(self._values[layer], table, run.end)

    def attend_next(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """See `KVStore`."""
        places, table, used, starts = self.next_plan
        self._write(layer, places, key, value)
        keys, values = self._keys[layer], self._values[layer]
        if self.reads_in_place:
            return attend_in_place(query, keys, values, table=table, used=used, starts=starts, width=self._width)
        return attend_masked(
            query, self._gather(keys, table, self._width), self._gather(values, table, self._width), bias
        )

    def end(self, slot: int, last: int, length: int) -> None:
        """See `KVStore`; nothing is copied."""
        self.tables.end(slot, last)

    def _write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        self._keys[layer].flatten(0, 1)[places] = key
        self._values[layer].flatten(0, 1)[places] = value

    def _table(self, slots: range, width: int, *, num_rows: int) -> Tensor:
        """[rows, blocks of `width` tokens] int32 numbers of blocks, filled up with block 0."""
        num = blocks_of(width, self.tables.block_tokens)
        rows = [self.tables.of(slot)[:num] for slot in slots]
        rows = [row + [0] * (num - len(row)) for row in rows] + [[0] * num] * (num_rows - len(slots))
        return torch.tensor(rows, dtype=torch.int32, device=self._device)

    def _gather(self, pool: Tensor, table: Tensor, width: int) -> Tensor:
        """[rows, blocks] numbers -> [rows, kv heads, width, d]."""
        found = pool.index_select(0, table.flatten()).unflatten(0, table.shape)
        return found.flatten(1, 2)[:, :width].transpose(1, 2)

    def _grow(self) -> None:
        """Have all blocks that tables name."""
        size = len(self._keys[0])
        if self.tables.num_blocks > size:
            size = min(max(self.tables.num_blocks, size + size // 4), self._most)
            for pools in (self._keys, self._values):
                for layer, old in enumerate(pools):
                    pools[layer] = self._zeros(size)
                    pools[layer][: len(old)] = old
            self.generation += 1

    def _zeros(self, num_blocks: int) -> Tensor:
        shape = self._shape
        size = num_blocks, self.tables.block_tokens, shape.num_kv_heads, shape.head_dim
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)  # as in `Slots`


def has_paged_kernel(shape: CacheShape, block_tokens: int) -> bool:
    """Whether torch's FlashAttention can read the blocks of such a pool."""
    fits = block_tokens % KERNEL_BLOCK == 0 and shape.head_dim % 8 == 0 and shape.head_dim <= 256
    return fits and has_flash_attention(shape.device, shape.dtype)


def attend_in_place(
    query: Tensor, keys: Tensor, values: Tensor, *, table: Tensor, used: Tensor, starts: Tensor, width: int
) -> Tensor:
    """As `attend_masked`, from whole pools; see `Pool` for the plan. `width`: places of the row that has most."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, 30 MB of each rank

    out = varlen_attn(
        query.flatten(1, 2),
        keys,
        values,
        starts,
        starts * width,  # not read, as `used` says more; must be there
        1,
        width,
        enable_gqa=query.shape[2] > 1,
        seqused_k=used,
        block_table=table,
        # With more, torch 2.13 leaves rows unwritten (pytorch/pytorch#194167); and bits would depend on batch mates.
        num_splits=1,
    )
    assert isinstance(out, Tensor), "nothing else was asked for"
    return out.flatten(1)
