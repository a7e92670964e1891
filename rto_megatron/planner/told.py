"""What `plan` and `simulate` say of a run: seconds by phase, memory by phase and kind of rank, bounds, what binds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rto_megatron.metrics import Console, in_units
from rto_megatron.planner.memory import Phase
from rto_megatron.schedule.rooflines import GPUS
from rto_megatron.schedule.trace import Row, summarise
from rto_megatron.schedule.work import KINDS
from rto_megatron.schedule.workload import seconds_per_step, steady

Memory = Mapping[str, Mapping[Phase, Mapping[str, float]]]
"""Kind of rank -> phase -> part -> bytes of the fullest such rank."""

COUNTED = ("prefill", "decode", "score", "train")
"""Kinds of item whose work the bound counts."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A step of a run that is under way; means are over ranks."""

    seconds: float
    phases: dict[str, float]
    """Kind of item -> seconds of a step."""
    overlap: float
    """Share of the time in which ranks ran different kinds."""

    @property
    def idle(self) -> float:
        """Seconds of a step in which a rank runs nothing."""
        return max(0.0, self.seconds - sum(self.phases.values()))


def timed(rows: Sequence[Row], ranks: Sequence[int], *, staleness: int) -> Timed:
    """Add up the steps between the first and the last: they have all that a step has.

    Args:
        ranks: of each group.
    """
    inside, num_steps = steady(rows, staleness=staleness)
    phases: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for row in inside:
        phases[row.kind] += row.seconds * ranks[row.group] / sum(ranks) / num_steps
    found = summarise(inside, range(len(ranks)))
    return Timed(seconds=seconds_per_step(rows, staleness=staleness), phases=phases, overlap=found.overlap)


def show_phases(console: Console, found: Timed) -> None:
    """A line a phase."""
    told = {kind: seconds for kind, seconds in found.phases.items() if seconds > 0}
    told |= {"idle": found.idle, "sum": found.seconds}
    console.table(
        "a step by phase, mean of all ranks",
        ["phase", "seconds", "share"],
        [(phase, seconds, f"{seconds / found.seconds:.1%}") for phase, seconds in told.items()],
    )
    console.say(f"ranks run different phases at once in {found.overlap:.0%} of the time\n")


def show_memory(console: Console, memory: Memory, *, gpu: str) -> None:
    """A table a kind of rank: a line a part, a column a phase. All is as it would be on GPUs of this name."""
    for rank, phases in memory.items():
        parts = dict.fromkeys(part for of_phase in phases.values() for part in of_phase)
        rows = [(part, *(in_units(held[part]) if part in held else "" for held in phases.values())) for part in parts]
        sums = [sum(held.values()) for held in phases.values()]
        console.table(
            f"memory of the fullest rank that {rank}",
            ["part", *phases],
            [*rows, ("sum", *map(in_units, sums))],
        )
    fullest = max(sum(held.values()) for phases in memory.values() for held in phases.values())
    limit = GPUS[gpu].memory
    verdict = "fits into" if fullest <= limit else "DOES NOT FIT into"
    console.say(
        f"the fullest rank needs {in_units(fullest)}, which {verdict} the {in_units(limit)} of one {gpu} (--gpu)\n"
    )


def show_bounds(console: Console, found: Timed, *, work: float, alone: float) -> None:
    """What no order of the items can beat.

    Args:
        work: seconds of all work of a step without a gap.
        alone: seconds of the longest response by itself.
    """
    console.say(
        f"bound of any schedule: {max(work, alone):.3g} s (all work without a gap {work:.3g} s, the longest response "
        f"alone {alone:.3g} s); this one takes {found.seconds / max(work, alone):.2f} times that"
    )
    counted = sum(found.phases[kind] for kind in COUNTED)
    console.say(
        f"of its {found.seconds:.3g} s, {counted:.3g} s are the work that the bound counts, in layouts and batches as "
        f"they are (communication, pipeline bubbles, few responses at once); {found.idle:.3g} s are waiting; "
        f"{found.seconds - counted - found.idle:.3g} s are what the bound leaves out: {', '.join(_left_out(found))}"
    )
    console.say(f"what binds: {what_binds(found, alone)}")


def _left_out(found: Timed) -> list[str]:
    left = {kind: seconds for kind, seconds in found.phases.items() if seconds > 0 and kind not in COUNTED}
    return [f"{kind} {seconds:.2g}" for kind, seconds in left.items()] or ["nothing"]


def what_binds(found: Timed, alone: float) -> str:
    """In words, what the step's time goes to."""
    phases = found.phases
    shares = {
        "writing responses": phases["prefill"] + phases["decode"],
        "scoring": phases["score"] + phases["proximal"],
        "training": phases["train"],
        "communication of gradients and weights": phases["optimizer"] + phases["refit"],
        "step boundaries: evaluation, checkpoints, swaps": phases["boundary"],
        "waiting": found.idle,
    }
    largest = max(shares, key=lambda name: shares[name])
    share = shares[largest] / found.seconds
    if largest in ("writing responses", "waiting") and alone > 0.5 * found.seconds:
        return f"the latency of the longest responses: {alone:.3g} of {found.seconds:.3g} s"
    return f"{largest}, {share:.0%} of all ranks' time"
