"""Which blocks of a pool hold the tokens of which sequence."""


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

    @property
    def num_taken(self) -> int:
        """Blocks that sequences have now."""
        return sum(map(len, self._of.values()))

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
