"""Which blocks of a pool hold the tokens of which sequence, and when a pool of fixed size has room for another."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rto_megatron.config.algorithm import RolloutConfig


class BlockTables:
    """Blocks of so many tokens, taken one by one as sequences grow and given back when these end.

    Block 0 is nobody's: rows that stand for no sequence write there, and tables are filled up with it. The others are
    numbered in the order in which they are first needed, so that the largest number is the most that were ever taken
    at a time.
    """

    def __init__(self, block_tokens: int) -> None:
        """No slot holds a sequence."""
        self.block_tokens = block_tokens
        self.num_blocks = 1
        """Of the pool that is needed so far, block 0 included."""
        self._free: list[int] = []
        self._of: dict[int, list[int]] = {}

    def of(self, slot: int) -> list[int]:
        """The blocks of a slot's tokens, in the order of these."""
        return self._of[slot]

    def cover(self, slot: int, num_tokens: int) -> None:
        """Take blocks until so many tokens of a slot have their place."""
        own = self._of.setdefault(slot, [])
        while len(own) * self.block_tokens < num_tokens:
            own.append(self._free.pop() if self._free else self._next())

    def place(self, slot: int, position: int) -> int:
        """Of a token in the pool: its block's number times tokens of a block, and the token's number in there."""
        number, offset = divmod(position, self.block_tokens)
        return self._of[slot][number] * self.block_tokens + offset

    def end(self, slot: int, last: int) -> None:
        """Give the blocks of a slot back; the sequence of slot `last` has that slot from now on."""
        self._free += reversed(self._of.pop(slot))
        if last != slot:
            self._of[slot] = self._of.pop(last)

    def _next(self) -> int:
        self.num_blocks += 1
        return self.num_blocks - 1


def blocks_of(num_tokens: int, block_tokens: int) -> int:
    """Blocks that a sequence of so many tokens takes."""
    return -(-num_tokens // block_tokens)


@dataclass(frozen=True, kw_only=True)
class FixedPool:
    """A pool that does not grow: sequences begin only while it holds all of them at their full length."""

    blocks: int
    """Nobody's block 0 not among them."""
    block_tokens: int
    longest: int
    """Tokens of the longest sequence."""

    @classmethod
    def of(cls, config: RolloutConfig) -> "FixedPool | None":
        """What a decode batch has; None where the config fixes no size."""
        if config.kv_blocks is None:
            return None
        return cls(blocks=config.kv_blocks, block_tokens=config.kv_block_tokens, longest=config.longest)

    def fitting(self, live: Collection[int], waiting: Sequence[int]) -> int:
        """How many of the first that wait have room beside those that live; all by the tokens they may come to."""
        left = self.blocks - sum(blocks_of(tokens, self.block_tokens) for tokens in live)
        for number, tokens in enumerate(waiting):
            left -= blocks_of(tokens, self.block_tokens)
            if left < 0:
                return number
        return len(waiting)


def num_beginning(live: Collection[int], waiting: Sequence[int], *, slots: int, pool: FixedPool | None) -> int:
    """How many of the first that wait begin now: those that have room, once this is a quarter of it; else none.

    A prefill for many costs less than one for each, so nobody begins beside others before.

    Args:
        live, waiting: tokens that each may come to; more than `slots` that wait need not be told.
    """
    room, together = min(slots - len(live), len(waiting)), slots
    if pool is not None:
        room = min(room, pool.fitting(live, waiting))
        together = min(slots, pool.blocks // blocks_of(pool.longest, pool.block_tokens))
    return 0 if live and room < min(len(waiting), max(1, together // 4)) else room
