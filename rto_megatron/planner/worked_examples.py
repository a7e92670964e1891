"""Three runs that were worked out by hand before there was a simulator, and what the simulator says of them.

The published table gives seconds per step and, in a few words, what changed from row to row. Everything else was
inferred once for each case, and holds for all of its rows:

    A  8 H100, 8 billion parameters. 1024 responses: the recipe's 256 + 240 tokens, window 1024.
    B  64 H100, 8 billion. 1024 samples of 1024 tokens (21 MB of 20 bytes a token), window 2048, 2.5 times the mean.
    C  512 H100, 70 billion. As B, which is what the bounds of B and C and the latency of 2048 steps ask for.

    all  8 minibatches, microbatches of 4096 tokens, 2 samples where they are padded; old log-probs are the fifth model
         that scores; decoding on 1 rank until row 3 (C: 8 throughout, nothing less has room), 8 from then on;
         untuned decoding reaches 0.65 of the bandwidth, tuned 0.8, with 2 and 0.4 ms of the host a step

The table was made with a fluid model: scoring and data parallelism split perfectly. So here a pool of ranks is one
group; but in 8b, and in 8c and 9 of C, the ranks that write are several groups, of which the last writes the longest
responses, as consolidation would have it, and the others, which drain before it, score too.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from rto_megatron.planner.consolidation import tail_gain
from rto_megatron.schedule.limits import resource_bound
from rto_megatron.schedule.placement import RoleMap, colocated, split
from rto_megatron.schedule.rooflines import GPUS, MODELS, Efficiency, Layout, Roles, Roofline
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload, padding, seconds_per_step

SAMPLES, MINIBATCH, SLICE = 1024, 128, 32
PADDED_ROWS = 2
"""Samples of a padded microbatch."""
UNTUNED = Efficiency(memory=0.65, host_seconds=2e-3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all rows of a letter share."""

    model: str
    num_gpus: int
    workload: Workload
    train_tensor: int
    pipeline: int = 1


LARGE = Workload(prompt_tokens=205, max_new_tokens=2048)
CASES = {
    "A": Case(
        model="llama3-8b",
        num_gpus=8,
        workload=Workload(prompt_tokens=256, max_new_tokens=1024, mean_tokens=240),
        train_tensor=1,
    ),
    "B": Case(model="llama3-8b", num_gpus=64, workload=LARGE, train_tensor=2),
    "C": Case(model="llama3-70b", num_gpus=512, workload=LARGE, train_tensor=8, pipeline=4),
}


@dataclass(frozen=True, kw_only=True)
class How:
    """What a row changes."""

    engine_tensor: int
    padded: bool = False
    tuned: bool = True
    """Decoding: CUDA graphs and kernels."""
    forwards: int = 3
    """Of training; 4 computes all activations again."""
    scored: int = 4
    """Models; 5 where old log-probs are not those of decoding."""
    tail: bool = False
    """Scoring on engines that consolidation has freed."""
    one_stream: bool = False
    """Both models' microbatches fill and drain the pipeline together."""
    pools: tuple[int, int] | None = None
    """Ranks that write and ranks that train; null has all do both."""
    drained_score: int = 0
    """Parts that the writing pool is cut into: the last writes the longest responses, and who has drained scores."""
    early: bool = False
    staleness: Literal[0, 1] = 0
    fp8: bool = False
    """Of the engines' weights, and of the three frozen models that score."""
    gpu: str = "h100"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row of the table."""

    case: str
    row: str
    what: str
    published: float
    """Seconds."""
    how: How | None
    """None is the bound of any schedule."""

    @property
    def measure(self) -> str:
        """The row that its ratio is to: the tuned sequential run, or the same row on the other GPU."""
        return self.row.removesuffix(", H200") if self.row.endswith(", H200") else "5"


_FIRST = How(engine_tensor=1, padded=True, tuned=False, forwards=4, scored=5)
_STEPS: list[tuple[str, str, dict[str, Any]]] = [
    ("0", "padded, full recompute, smallest decode TP, 2 ms a step", {}),
    ("1", "packed scoring and training", {"padded": False}),
    ("2", "captured graphs, tuned decode kernels", {"tuned": True}),
    ("3", "decode TP chosen", {"engine_tensor": 8}),
    ("4", "selective recompute", {"forwards": 3}),
    ("5", "old log-probs from decoding", {"scored": 4}),
    ("6", "scoring in the tail, consolidation", {"tail": True}),
    ("7", "both models in one pipeline stream", {"one_stream": True}),
]
_SPLIT = {"tail": False, "one_stream": True}


def examples() -> list[Example]:
    """All rows, by case."""
    published = {
        "A": [56.6, 47.3, 43.8, 40.5, 35.9, 32.0, 32.0],
        "B": [33.4, 29.6, 23.4, 14.2, 12.8, 12.1, 11.4],
        "C": [47.8, 42.9, 36.5, 36.5, 33.2, 32.4, 30.3, 27.1],
    }
    found: list[Example] = []
    for case, seconds in published.items():
        how = _FIRST if case != "C" else replace(_FIRST, engine_tensor=8)
        for (row, what, change), each in zip(_STEPS, seconds, strict=False):
            how = replace(how, **change)
            found.append(Example(case=case, row=row, what=what, published=each, how=how))
        found += _others(case, how)
    return found


def _others(case: str, tuned: How) -> list[Example]:
    def example(row: str, what: str, published: float, **change: Any) -> Example:
        how = replace(tuned, **(_SPLIT | change)) if change else None
        return Example(case=case, row=row, what=what, published=published, how=how)

    if case == "A":
        return [example("bound", "resources", 28.0)]
    if case == "B":
        even: dict[str, Any] = {"pools": (24, 40)}
        off: dict[str, Any] = {"pools": (16, 48), "staleness": 1}
        return [
            example("8a", "split 24 + 40, streamed scoring", 14.8, **even),
            example("8b", "8a, early minibatches", 11.3, **even, early=True, drained_score=3),
            example("8c", "split 16 + 48, one step off", 9.2, **off),
            example("9", "8c, FP8", 7.8, **off, fp8=True),
            example("bound", "resources", 7.6),
            example("6, H200", "as 6", 10.8, tail=True, one_stream=False, gpu="h200"),
            example("8c, H200", "as 8c", 8.8, **off, gpu="h200"),
        ]
    even: dict[str, Any] = {"pools": (192, 320)}
    off: dict[str, Any] = {"pools": (288, 224), "staleness": 1, "drained_score": 4}
    return [
        example("8a", "split 192 + 320, streamed scoring", 30.0, **even),
        example("8b", "8a, early minibatches", 22.1, **even, early=True, drained_score=4),
        example("8c", "split 288 + 224, one step off", 19.2, **off),
        example("9", "8c, FP8, split 192 + 320", 13.1, **off | even, fp8=True),
        example("bound", "resources", 8.7),
        example("7, H200", "as 7", 23.2, tail=True, one_stream=True, gpu="h200"),
        example("8b, H200", "as 8b", 17.9, **even, early=True, drained_score=4, gpu="h200"),
        example("8c, H200", "as 8c", 15.5, **off, gpu="h200"),
    ]


@lru_cache(maxsize=128)
def seconds_of(case_name: str, how: How | None) -> float:
    """What the simulator says of a row."""
    case = CASES[case_name]
    model, gpu = MODELS[case.model], GPUS[how.gpu if how else "h100"]
    if how is None:
        known = case.workload.known(0, _sizes(1, 1))
        return resource_bound(model, gpu, known, case.workload.lengths(0, SAMPLES), num_gpus=case.num_gpus)
    placement, layout, workload = _placed(case, how)
    roles = Roles(
        scored=how.scored,
        scored_fp8=3 if how.fp8 else 0,
        forwards=how.forwards,
        padding=padding(case.workload, SAMPLES, rows=PADDED_ROWS) if how.padded else 1.0,
        one_stream=how.one_stream,
        proximal=0,
    )
    cost = Roofline(model, gpu, placement, layout, roles=roles, efficiency=Efficiency() if how.tuned else UNTUNED)
    sizes = _sizes(6 if how.staleness else 3, len(placement.engines))
    rows = workload.run(cost, sizes, placement, staleness=how.staleness, early=how.early)
    found = seconds_per_step(rows, staleness=how.staleness)
    return found - (tail_gain(rows, cost, workload, samples=SAMPLES) if how.tail else 0.0)


def _sizes(num_steps: int, lanes: int) -> Sizes:
    return Sizes(
        num_steps=num_steps,
        samples=SAMPLES,
        minibatch=MINIBATCH,
        lanes=lanes,
        slots=SAMPLES,
        slice_steps=SLICE,
        prefill_tokens=1 << 20,
        waiting_packs=SAMPLES,
    )


def _placed(case: Case, how: How) -> tuple[RoleMap, Layout, Workload]:
    """A pool is a group; the copies of a model are side by side in it."""
    writing, training = how.pools or (case.num_gpus, case.num_gpus)
    placement, workload = (split(1, 1) if how.pools else colocated(1)), case.workload
    if parts := how.drained_score:
        placement = split(parts, 1, score="all")
        workload, writing = replace(workload, long_last=1 / parts), writing // parts
    layout = Layout(
        engine_ranks=writing,
        train_ranks=training,
        engine_tensor=how.engine_tensor,
        train_tensor=case.train_tensor,
        pipeline=case.pipeline,
        engine_fp8=how.fp8,
    )
    return placement, layout, workload


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row beside what the simulator says of it."""

    example: Example
    seconds: float
    ratio: float
    """Ours to published."""
    to_measure: float
    """Ratio of the row to the one that it is measured by: ours to published."""

    @property
    def within(self) -> bool:
        """Whether the number is within a quarter of the published one, and the ratio within a tenth."""
        return abs(self.ratio - 1) <= 0.25 and abs(self.to_measure - 1) <= 0.1


def compared() -> list[Compared]:
    """All rows."""
    every = examples()
    ratios = {
        (example.case, example.row): seconds_of(example.case, example.how) / example.published for example in every
    }
    return [
        Compared(
            example=example,
            seconds=(ratio := ratios[example.case, example.row]) * example.published,
            ratio=ratio,
            to_measure=ratio / ratios[example.case, example.measure],
        )
        for example in every
    ]


def schedule_model_page() -> str:
    """docs/schedule-model.md."""
    lines = [
        "# What the simulator says of runs that were worked out by hand",
        "",
        "Written by `python tools/write_schedule_model_doc.py`; `tests/planner/test_worked_examples.py` holds it.",
        "Nothing here was measured on a GPU: both columns are computed, from the same rooflines.",
        "",
        "```",
        (__doc__ or "").strip(),
        "```",
        "",
        "Ratio is ours to published, and should be within 25 %. The last column compares ratios of rows, ours to",
        "published, and should be within 10 %: to row 5, or of H200 to H100. Step 6 is a fluid estimate on top of a",
        "simulated run; all others are runs of the schedule that training asks. One pipeline stream gains what running",
        "its order gains (`schedule/pipeline_time.py`), not the published factor of 1.4. Proximal log-probs cost",
        "nothing in rows 8c and 9, where the published ones are interpolated.",
        "",
        "In a config (see [schedule.md](schedule.md)): early minibatches are `schedule.minibatches: logical`, one step",
        "off is `schedule.staleness: 1`, and streamed scoring is what every split map does.",
        "",
        "| case | row | what | published, s | ours, s | ratio | of rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in compared():
        example = found.example
        lines.append(
            f"| {example.case} | {example.row} | {example.what} | {example.published:.1f} | {found.seconds:.1f} "
            f"| {found.ratio:.2f} | {found.to_measure:.2f} |"
        )
    return "\n".join([*lines, ""])
