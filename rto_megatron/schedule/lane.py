"""A lane: one decode batch and its clock.

The clock counts passes of the model: a prefill is one, a decode step is one. It tells who ended before whom, so that
what is built on it - admission, packs, early minibatches - is a function of lengths alone, however long a pass takes.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from rto_megatron.rollout.blocks import num_beginning
from rto_megatron.schedule.work import Sizes


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Ended samples that are scored together."""

    step: int
    lane: int
    number: int
    samples: tuple[int, ...]
    """In the order in which they ended."""
    closed: int
    """The lane's clock."""

    @property
    def age(self) -> tuple[int, int, int]:
        """Which pack is scored first: steps, then clocks."""
        return self.step, self.closed, self.lane


@dataclass(frozen=True)
class Pass:
    """What a lane does next."""

    kind: Literal["prefill", "decode"]
    samples: tuple[int, ...]
    num_steps: int


class Lane:
    """The responses that one decode batch writes in a step."""

    def __init__(
        self, sizes: Sizes, prompt_tokens: Sequence[int] | Mapping[int, int], *, step: int, number: int
    ) -> None:
        """All of its samples wait; `prompt_tokens` is by sample."""
        self.clock, self.num_passes, self.num_packs = 0, 0, 0
        self.ended: list[tuple[int, int]] = []
        """(clock, sample), in this order."""
        self.tokens: dict[int, int] = {}
        """Of each sample that has ended: prompt and response."""
        self._sizes, self._prompts, self._step, self._number = sizes, prompt_tokens, step, number
        self._waiting = deque(sizes.rows(number))
        self._written: dict[int, int] = {}
        """Of each live sample: tokens of its response so far."""
        self._open: list[int] = []
        self._open_tokens = 0

    @property
    def drained(self) -> bool:
        """Whether all of its responses have ended."""
        return not self._waiting and not self._written

    def write_out(self, lengths: Mapping[int, int]) -> list[Pack]:
        """Make all passes that are left, of responses whose lengths are known; the packs that they closed."""
        packs: list[Pack] = []
        while (now := self.upcoming()) is not None:
            left = {sample: lengths[sample] - self._written.get(sample, 0) for sample in now.samples}
            packs += self.advance({sample: lengths[sample] for sample in now.samples if left[sample] <= now.num_steps})
        return packs

    def upcoming(self) -> Pass | None:
        """The pass that comes next: new prompts once a quarter of the slots is free, else a slice of decoding."""
        if new := self._admitted():
            return Pass("prefill", new, 1)
        if self._written:
            return Pass("decode", tuple(self._written), self._sizes.slice_steps)
        return None

    def advance(self, lengths: Mapping[int, int]) -> list[Pack]:
        """The upcoming pass was made; return the packs that it closed.

        Args:
            lengths: tokens of each response that ended in this pass, the closing EOS included.
        """
        now = self.upcoming()
        if now is None:
            raise ValueError(f"lane {self._number} of step {self._step} has written all of its responses")
        for sample in now.samples:
            if now.kind == "prefill":
                self._waiting.popleft()
                self._written[sample] = 0
        left = {sample: self._steps_to_end(now, sample, length) for sample, length in lengths.items()}
        ended = sorted((self.clock + steps, sample) for sample, steps in left.items())
        survivors = len(now.samples) > len(ended)
        taken = now.num_steps if survivors else ended[-1][0] - self.clock
        for sample in now.samples:
            self._written[sample] += taken
        for sample in lengths:
            del self._written[sample]
        closed: list[Pack] = []
        for clock, sample in ended:
            closed += self._put_in_pack(clock, sample, lengths[sample])
        self.clock, self.num_passes = self.clock + taken, self.num_passes + 1
        if self._open and (self.drained or self.clock >= self._window_end()):
            closed.append(self._close(min(self.clock, self._window_end())))
        return closed

    def _admitted(self) -> tuple[int, ...]:
        if not self._waiting:
            return ()
        sizes = self._sizes
        live, first = (
            [self._prompts[sample] + sizes.new_tokens for sample in samples]
            for samples in (self._written, islice(self._waiting, sizes.slots))
        )
        num = num_beginning(live, first, slots=sizes.slots, pool=sizes.pool)
        new: list[int] = []
        tokens = 0
        for sample in islice(self._waiting, num):
            tokens += self._prompts[sample]
            if new and tokens > sizes.prefill_tokens:
                break
            new.append(sample)
        return tuple(new)

    def _steps_to_end(self, now: Pass, sample: int, length: int) -> int:
        if sample not in now.samples:
            raise ValueError(f"sample {sample} of step {self._step} was told to have ended, and is not being written")
        steps = length - self._written[sample]
        if not 1 <= steps <= now.num_steps:
            raise ValueError(
                f"sample {sample} of step {self._step} was told to have ended with {length} tokens; "
                f"it had {self._written[sample]} before a pass of {now.num_steps}"
            )
        return steps

    def _put_in_pack(self, clock: int, sample: int, length: int) -> list[Pack]:
        tokens, closed = self._prompts[sample] + length, []
        too_many = self._open_tokens + tokens > self._sizes.pack_tokens
        if self._open and (too_many or clock > self._window_end()):
            closed.append(self._close(min(clock, self._window_end())))
        self._open.append(sample)
        self._open_tokens += tokens
        self.ended.append((clock, sample))
        self.tokens[sample] = tokens
        return closed

    def _window_end(self) -> int:
        """The clock at which the open pack closes, full or not: a multiple of `pack_steps`."""
        first = self.ended[-1][0]
        return -(-first // self._sizes.pack_steps) * self._sizes.pack_steps

    def _close(self, clock: int) -> Pack:
        pack = Pack(step=self._step, lane=self._number, number=self.num_packs, samples=tuple(self._open), closed=clock)
        self.num_packs, self._open, self._open_tokens = self.num_packs + 1, [], 0
        return pack


def written_out(
    sizes: Sizes,
    prompt_tokens: Sequence[int] | Mapping[int, int],
    lengths: Mapping[int, int],
    *,
    step: int,
    lanes: Iterable[int],
) -> tuple[list[Pack], list[int]]:
    """What follows of lanes whose responses have these lengths, both by sample.

    Returns:
        Their packs, lane by lane; and their samples in the order in which they ended, by clock.
    """
    packs: list[Pack] = []
    ended: list[tuple[int, int]] = []
    for number in lanes:
        lane = Lane(sizes, prompt_tokens, step=step, number=number)
        packs += lane.write_out(lengths)
        ended += lane.ended
    return packs, [sample for _, sample in sorted(ended)]
