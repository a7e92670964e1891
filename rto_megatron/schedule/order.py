"""Letters between leaders that are read in an order that makes sense: none before those that it followed from.

Leaders write to each other directly, so what A told B and C, and what B then told C, may reach C the wrong way round.
Each letter says how many of everybody's letters its sender had read (a vector clock); one that comes too soon waits.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Letter:
    """What a leader tells all others."""

    sender: int
    read: tuple[int, ...]
    """Letters of each leader that the sender had read when it wrote this one; of its own: written before."""
    content: Any


class Inbox:
    """What one leader has read, and what has come too soon."""

    def __init__(self, me: int, num_leaders: int) -> None:
        self._me = me
        self._read = [0] * num_leaders
        self._early: list[Letter] = []

    def letter(self, content: Any) -> Letter:
        """Write one, to be brought to every other leader."""
        letter = Letter(self._me, tuple(self._read), content)
        self._read[self._me] += 1
        return letter

    def arrive(self, letter: Letter) -> list[Letter]:
        """A letter has come: those that can be read now, in order."""
        self._early.append(letter)
        ready: list[Letter] = []
        while (next_one := next((waiting for waiting in self._early if self._follows(waiting)), None)) is not None:
            self._early.remove(next_one)
            self._read[next_one.sender] += 1
            ready.append(next_one)
        return ready

    def _follows(self, letter: Letter) -> bool:
        """Whether it is the next of its sender, and what that one had read of others has been read here."""
        is_next = self._read[letter.sender] == letter.read[letter.sender]
        return is_next and all(have >= need for have, need in zip(self._read, letter.read, strict=True))
