"""The work of a step, cut into items; how large they are; what is known of a step before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from rto_megatron.rollout.blocks import FixedPool

Kind = Literal["prefill", "decode", "give", "score", "proximal", "advantage", "train", "optimizer", "refit", "boundary"]
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "give")
"""Those that take time and leave a trace row, in the order in which a sample meets them."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a group is told to do.

    | kind      | what the group does                                                   | number    | role            |
    |-----------|-----------------------------------------------------------------------|-----------|-----------------|
    | prefill   | reads the prompts of `samples` and draws their first tokens           | of lane   |                 |
    | decode    | draws `num_steps` tokens of each of `samples`; fewer if all have ended | of lane   |                 |
    | give      | leaves the scoring of `samples` to the group `to`                     | of lane   |                 |
    | score     | asks every role about `samples`                                       | of lane   |                 |
    | proximal  | asks the policy, as it is before its update, about `samples` too      |           |                 |
    | advantage | token rewards, advantages and returns of `samples`, once all are there | minibatch |                 |
    | train     | forward and backward over `samples`, its share of a minibatch         | minibatch | who is trained  |
    | optimizer | sums gradients over `groups`, and steps                               | minibatch | policy, critic  |
    | refit     | takes `version` of what was trained from those who train              | version   | engine, scorer  |
    | boundary  | all meet: the step is over, its numbers and a checkpoint are written   |           |                 |

    Who is trained: `policy`, `critic`, or `both` where they share their groups.
    """

    kind: Kind
    step: int
    groups: tuple[int, ...]
    """Who does it. Several do it together: none can end before all have begun."""
    number: int
    """Counts the lane's passes, the lane's packs, the step's minibatches, or versions, each from 0."""
    lane: int = -1
    """Whose samples these are (prefill, decode, give, score)."""
    role: str = ""
    samples: tuple[int, ...] = ()
    """Rows of the step."""
    num_steps: int = 0
    """Tokens that each sample may get."""
    version: int = 0
    """Of the weights that it uses, or brings (refit): how many steps they have been trained for."""
    to: int = -1
    """The group that is given a pack."""

    @property
    def key(self) -> tuple:
        """Its name, which needs no samples: one in a run for each of `groups`."""
        return self.kind, self.step, self.lane, self.number, self.role


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers that the cut into items follows from; with the lengths they decide every pack and minibatch."""

    num_steps: int
    """Rounds of the algorithm."""
    samples: int
    """Responses of a step."""
    minibatch: int
    """Responses of an optimizer step."""
    lanes: int
    """Decode batches; each has its own clock and an even share of the samples."""
    slots: int
    """Responses that a lane writes together."""
    slice_steps: int = 16
    """Decode steps between two questions; new prompts are admitted between slices."""
    prefill_tokens: int = 8192
    """Prompt tokens of one prefill."""
    pack_tokens: int = 8192
    """Tokens of one score pack: prompts and responses; a longer sample is a pack of its own."""
    pack_steps: int = 256
    """Decode steps after which a pack closes though it is not full: it waits no longer than this."""
    waiting_packs: int = 64
    """Packs of a lane that may wait for scoring before its decoding has to."""
    new_tokens: int = 1
    """Most tokens of a response; asked for with a pool alone."""
    pool: FixedPool | None = None
    """Of a lane's keys and values, where its size is fixed."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "pool" and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be 1 or more, got {getattr(self, field.name)}")
        if self.samples % self.minibatch:
            raise ValueError(f"minibatch must divide the {self.samples} samples of a step, got {self.minibatch}")
        if self.lanes > self.samples:
            raise ValueError(f"lanes must be at most the {self.samples} samples of a step, got {self.lanes}")

    @property
    def minibatches(self) -> int:
        """Optimizer steps of one pass over the samples."""
        return self.samples // self.minibatch

    def rows(self, lane: int) -> range:
        """The samples of a lane: next to each other."""
        return share(self.samples, lane, self.lanes)


def share(num: int, part: int, parts: int) -> range:
    """Part `part` of `num` things dealt out evenly: the numbers of its things; sizes differ by one at most."""
    return range(part * num // parts, (part + 1) * num // parts)


@dataclass(frozen=True)
class StepInput:
    """What is known of a step before any of it has run."""

    prompt_tokens: Sequence[int]
    """Tokens of each sample's prompt."""
    minibatches: Sequence[Sequence[int]]
    """Samples of each optimizer step, all epochs after one another: drawn from seed and step alone."""

    def check(self, sizes: Sizes, *, step: int) -> None:
        """Raise ValueError unless it fits the sizes."""
        if len(self.prompt_tokens) != sizes.samples:
            raise ValueError(f"step {step} needs {sizes.samples} prompt lengths, got {len(self.prompt_tokens)}")
        once = list(range(sizes.samples))
        each = sizes.minibatches
        epochs = [self.minibatches[i : i + each] for i in range(0, len(self.minibatches), each)]
        if not epochs or any(sorted(row for rows in epoch for row in rows) != once for epoch in epochs):
            raise ValueError(f"step {step}: an epoch of minibatches must hold each of {sizes.samples} samples once")
        if any(len(rows) != sizes.minibatch for rows in self.minibatches):
            raise ValueError(f"step {step}: every minibatch must hold {sizes.minibatch} samples")
