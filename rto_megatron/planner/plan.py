"""`python -m rto_megatron plan --model=llama3-8b --nodes=8 --gpu=h100`: the fastest maps and layouts, by simulation."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rto_megatron.config.load import print_options, split_options
from rto_megatron.errors import ConfigError
from rto_megatron.metrics import Console
from rto_megatron.planner.search import REUSED, SCORED, Planned, Saving, plan
from rto_megatron.planner.told import show_bounds, show_memory, show_phases
from rto_megatron.schedule.limits import longest_chain, resource_bound
from rto_megatron.schedule.rooflines import GPUS, GPUS_PER_NODE, MODELS
from rto_megatron.schedule.work import Sizes
from rto_megatron.schedule.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to plan for; all roles have one architecture, and lengths are lognormal."""

    model: Literal["llama3-1b", "llama3-8b", "llama3-70b"]
    """Architecture of all five roles."""
    nodes: int = 1
    """Of eight GPUs."""
    gpu: Literal["a100", "h100", "h200"] = "h100"
    """Whose rooflines to take."""
    samples: int = 1024
    """Responses of a step."""
    minibatch: int = 128
    """Responses of an optimizer step."""
    prompt_tokens: int = 256
    """Of every prompt."""
    max_new_tokens: int = 1024
    """Window of a response; the mean length is 0.4 of it."""
    max_staleness: Literal[0, 1] = 0
    """1 also tries responses that the weights of the step before have written."""
    reuse_log_probs: bool = False
    """Old log-probs are those of decoding: the policy is not asked to score."""
    lora_rank: int = 0
    """Policy, critic and DPO policy as adapters of this rank on the weights of the reference; 0 trains all weights."""
    offload_frozen: bool = False
    """Frozen roles in host memory while they do not score."""
    shown: int = 5
    """Of the fastest, in the table; the best of each other map follows."""

    def __post_init__(self) -> None:
        for name in ("nodes", "samples", "minibatch", "prompt_tokens", "max_new_tokens", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 or more, got {self.lora_rank}; 0 trains all weights")
        if self.samples % self.minibatch:
            raise ValueError(f"minibatch must divide samples {self.samples}, got {self.minibatch}")


def main(path: Path | None, words: list[str]) -> int:
    """Print the plan; 0."""
    if "-h" in words or "--help" in words:
        print_options(Options, "python -m rto_megatron plan")
    options, rest = split_options(Options, words)
    if path is not None or rest:
        raise ConfigError(f"plan takes no YAML file and no settings of a run, got {path or rest[0]}; see plan --help")
    workload = Workload(prompt_tokens=options.prompt_tokens, max_new_tokens=options.max_new_tokens)
    found = plan(
        MODELS[options.model],
        GPUS[options.gpu],
        num_gpus=options.nodes * GPUS_PER_NODE,
        workload=workload,
        samples=options.samples,
        minibatch=options.minibatch,
        max_staleness=options.max_staleness,
        roles=replace(REUSED if options.reuse_log_probs else SCORED, forwards=2.0 if options.lora_rank else 3.0),
        saving=Saving(lora_rank=options.lora_rank, offload_frozen=options.offload_frozen),
    )
    _show(Console(), options, found, workload)
    return 0


def _show(console: Console, options: Options, found: list[Planned], workload: Workload) -> None:
    num_gpus, best = options.nodes * GPUS_PER_NODE, found[0]
    lengths = workload.lengths(0, options.samples)
    console.say(
        f"A step: {options.samples} responses in minibatches of {options.minibatch}; prompts of "
        f"{options.prompt_tokens} tokens, responses of log-normal length, {sum(lengths) / len(lengths):.0f} on "
        f"average, {max(lengths)} at most."
    )
    console.say("Rooflines, nothing measured: seconds are good to about a quarter, ratios to about a tenth.\n")
    rows = [_row(planned, best) for planned in _shown(found, options.shown)]
    title = f"{options.model} on {num_gpus} {options.gpu}: seconds per step"
    console.table(title, list(rows[0]), [list(row.values()) for row in rows])
    console.say(f"best: {_described(best)}")
    others = [planned for planned in found if planned.candidate.placement.name != best.candidate.placement.name]
    for planned in others[:1]:
        console.say(f"next best map: {_described(planned)}, {_slower(planned, best):.0%} slower")
    console.say("")
    show_phases(console, best.timed)
    show_memory(console, best.memory, gpu=options.gpu)
    cost, sizes = best.cost, Sizes(num_steps=1, samples=options.samples, minibatch=options.minibatch, lanes=1, slots=1)
    known = workload.known(0, sizes)
    work = resource_bound(cost.model, cost.gpu, known, lengths, num_gpus=num_gpus, roles=cost.roles)
    alone = longest_chain(
        cost,
        best.candidate.placement,
        lengths,
        prompt_tokens=workload.prompt_tokens,
        minibatch=options.minibatch,
        staleness=best.candidate.staleness,
    )
    show_bounds(console, best.timed, work=work, alone=alone)


def _row(planned: Planned, best: Planned) -> dict[str, object]:
    """Of the table, by column."""
    layout, timed = planned.candidate.layout, planned.timed
    return {
        "map": planned.candidate.name,
        "engine TP": layout.engine_tensor,
        "train TP": layout.train_tensor,
        "train CP": layout.context,
        "train PP": _pipeline(planned),
        "slots": planned.slots,
        "seconds": timed.seconds,
        "idle": f"{timed.idle / timed.seconds:.1%}",
        "overlap": f"{timed.overlap:.1%}",
        "slower by": f"{_slower(planned, best):.1%}",
    }


def _slower(planned: Planned, best: Planned) -> float:
    return planned.timed.seconds / best.timed.seconds - 1


def _shown(found: list[Planned], count: int) -> list[Planned]:
    """The fastest, then the best of each map that is not among them, with and without staleness."""

    def kind(planned: Planned) -> tuple[str, int]:
        return planned.candidate.placement.name, planned.candidate.staleness

    best = {kind(planned): planned for planned in reversed(found)}
    shown = {kind(planned) for planned in found[:count]}
    others = (planned for planned in found[count:] if planned is best[kind(planned)])
    return found[:count] + [planned for planned in others if kind(planned) not in shown]


def _described(planned: Planned) -> str:
    layout = planned.candidate.layout
    context = f"CP {layout.context} x " if layout.context > 1 else ""
    return (
        f"{planned.candidate.name}; engines TP {layout.engine_tensor}, training TP {layout.train_tensor} x {context}PP "
        f"{_pipeline(planned)}: {planned.timed.seconds:.3g} s a step"
    )


def _pipeline(planned: Planned) -> str:
    layout = planned.candidate.layout
    return f"{layout.pipeline}" + (f" x {layout.virtual_stages} blocks" if layout.virtual_stages > 1 else "")
