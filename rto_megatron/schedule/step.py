"""What a schedule knows of a step that is not over."""

from collections import ChainMap
from collections.abc import Mapping
from itertools import chain

from rto_megatron.data.shares import deal
from rto_megatron.schedule.lane import Lane
from rto_megatron.schedule.work import Sizes, StepInput

INFINITY = float("inf")


class Step:
    """Its lanes, which of its samples are scored, and who has which of a minibatch."""

    def __init__(self, known: StepInput, sizes: Sizes, number: int) -> None:
        """Nothing of it is written."""
        self.minibatches = known.minibatches
        self.lanes = [Lane(sizes, known.prompt_tokens, step=number, number=lane) for lane in range(sizes.lanes)]
        self.scored: set[int] = set()
        self.tokens = ChainMap(*(lane.tokens for lane in self.lanes))
        """Of each sample that has ended: prompt and response."""
        self._shares: dict[tuple[tuple[int, ...], int], list[tuple[int, ...]]] = {}

    def shares(self, samples: tuple[int, ...], hands: int) -> list[tuple[int, ...]]:
        """Samples of a minibatch for each of some groups; each of them asks, often more than once."""
        if (samples, hands) not in self._shares:
            dealt = deal([self.tokens[sample] for sample in samples], hands)
            self._shares[samples, hands] = [tuple(samples[row] for row in rows) for rows in dealt]
        return self._shares[samples, hands]

    def take_over(self, lengths: Mapping[int, int]) -> None:
        """Its responses, of these lengths, are written and scored."""
        for lane in self.lanes:
            lane.write_out(lengths)
        self.scored.update(lengths)

    @property
    def drained(self) -> bool:
        """Whether all of its responses have ended."""
        return all(lane.drained for lane in self.lanes)

    def in_order_of_ending(self) -> tuple[int, ...]:
        """Samples by clock, as far as none can come between them any more: to the clock that all lanes have passed."""
        passed = min((lane.clock for lane in self.lanes if not lane.drained), default=INFINITY)
        ended = sorted(chain.from_iterable(lane.ended for lane in self.lanes))
        return tuple(sample for clock, sample in ended if clock <= passed)
