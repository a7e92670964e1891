"""A run of RTO seen from its step boundaries: numbers, evaluations, checkpoints, KL controller, requests to stop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rto_megatron.algorithms.alarms import FIRST_ENTROPY, Heard, hear
from rto_megatron.algorithms.kl import adapt_kl_coef
from rto_megatron.config.run import RTORun, stage_of
from rto_megatron.data.readers import Dropped, PromptRow, read_prompts
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, Manifest
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.optimizer import Trainable
from rto_megatron.distributed.runtime import world_size
from rto_megatron.errors import DataError
from rto_megatron.metrics import Steps
from rto_megatron.rollout.experience import sentence_ends_of
from rto_megatron.schedule.cast import cast_of
from rto_megatron.stages.memory import MemoryReport
from rto_megatron.stages.resume import Checkpoints, Progress, check_unchanged
from rto_megatron.stages.roles import base_of, bases_of
from rto_megatron.stages.run import Clock, Run, open_run
from rto_megatron.stages.update import plan_updates

SHOWN = {
    "reward": "reward/total_sum",
    "score": "reward/score_sum",
    "kl": "kl/sequence",
    "length": "length/response_mean",
    "clipped": "ppo/clip_frac",
    "seconds": "time/step_seconds",
}
"""Beside the progress bar: label -> metric."""


@dataclass(kw_only=True)
class Course:
    """Where a run is; every method is called by all ranks of the world."""

    config: RTORun
    running: Run
    checkpoints: Checkpoints
    measure: Callable[[Progress], dict[str, float]]
    """Where a run is -> `eval/*` where they are due before its next step, the same on all ranks."""
    at: Progress
    shown: Steps
    clock: Clock
    memory: MemoryReport | None = None
    """Tells at the start and the end what each role takes."""
    _extra: dict[str, float] | None = None
    """Numbers of the boundary before the step that is going on."""

    @property
    def kl_coef(self) -> float:
        """Of the step that is going on."""
        assert self.at.kl_coef is not None, "an RTO run begins with one"
        return self.at.kl_coef

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.at.step == self.config.num_steps

    def watch_memory(self, report: MemoryReport) -> None:
        """Tell what each role takes now, again after the first step of this start, and at the end."""
        self.memory = report
        report.show(self.running.console, "start")

    def begin_step(self, hand_over: Callable[[Path], None] | None = None) -> None:
        """Between two steps, and before the first and after the last: evaluate and save if it is time.

        Args:
            hand_over: writes what the next step has got already into the folder of a checkpoint.

        Raises:
            StoppedToContinue: the run was asked to stop; its state is saved.
        """
        with self.clock.phase("evaluate"):
            self._extra = self.measure(self.at)
        with self.clock.phase("save"):
            self._extra |= self.checkpoints.after(self.at, held_out=self._extra, hand_over=hand_over)
        if self.is_over:
            self.running.log.write(self.config.num_steps, self._extra | self.clock.take())
            self.running.console.say(f"checkpoint: {self.checkpoints.last_folder}")
            if self.memory is not None:
                self.memory.show(self.running.console, "end")

    def end_step(self, numbers: dict[str, float]) -> None:
        """Write a step's numbers, the same on all ranks, and go to the next."""
        assert self._extra is not None, "begin_step comes first"
        numbers = self._extra | numbers | {"kl/coef": self.kl_coef}
        heard = self._hear(numbers)
        numbers |= heard.metrics()
        if self.memory is not None and (self.memory.is_counting or self.at.step + 1 == self.config.num_steps):
            numbers |= self.memory.numbers()
        self.running.log.write(self.at.step, numbers)
        self.shown.done(self.at.step, {label: numbers[metric] for label, metric in SHOWN.items()})
        for line in heard.lines:  # below the step that they are about
            self.running.console.say(line)
        self.at.kl_coef = adapt_kl_coef(
            self.kl_coef,
            observed_kl=numbers["kl/sequence"],
            target=self.config.rto.kl_target,
            horizon=self.config.rto.kl_horizon,
            num_samples=self.config.prompts_per_step * self.config.samples_per_prompt,
        )
        self.at.step += 1

    def _hear(self, numbers: dict[str, float]) -> Heard:
        """Which health alarms ring, begin and end."""
        if self.at.first_entropy is None:
            self.at.first_entropy = numbers["ppo/entropy"]
        known = numbers | {FIRST_ENTROPY: self.at.first_entropy}
        heard = hear(known, self.config, self.at.alarms, step=self.at.step)
        self.at.alarms = heard.states
        return heard


@contextmanager
def on_course(
    config: RTORun,
    own: Checkpoint | None,
    mesh: Mesh,
    trained: Mapping[str, Trainable | None],
    manifest: Manifest,
    tokenizer: Tokenizer,
    measure: Callable[[Progress], dict[str, float]],
    sizes: list[tuple[str, object]],
    dropped: Dropped,
) -> Iterator[Course]:
    """Open the run folder, take up what an earlier start has left, and show the way.

    Args:
        mesh: of the policy; the start table tells its layout.
        trained: role -> what this rank holds of it.
    """
    name = stage_of(config)
    check_unchanged(own, manifest)
    with open_run(config, name, mesh, sizes, own=own) as running:
        running.console.say(f"prompts: {dropped}")
        checkpoints = Checkpoints(config, trained, lambda: manifest, tokenizer, config.num_steps)
        lanes = cast_of(config, world_size()).lanes if config.schedule.minibatches == "logical" else None
        at, clock = checkpoints.take_up(own, Progress(kl_coef=config.rto.kl_coef, lanes=lanes)), Clock()
        with running.console.progress(name, total=config.num_steps, start=at.step) as shown:
            yield Course(
                config=config,
                running=running,
                checkpoints=checkpoints,
                measure=measure,
                at=at,
                shown=shown,
                clock=clock,
            )


def prompts_of(config: RTORun, tokenizer: Tokenizer) -> tuple[list[PromptRow], Dropped, Tensor | None]:
    """The training prompts, what was dropped, and [V] bool ids that close a sentence where rewards need them."""
    limit = config.rollout.max_prompt_tokens
    prompts, dropped = read_prompts(
        config.data.train, tokenizer, max_prompt_tokens=limit, too_long=config.data.too_long
    )
    check_enough(prompts, config)
    return prompts, dropped, sentence_ends_of(config.rto, tokenizer)


def manifest_of(config: RTORun, parents: Mapping[str, Checkpoint], data: dict[str, str]) -> Manifest:
    """What the run's checkpoints say of themselves."""
    models = {"policy": parents["policy"].manifest.architecture_for("policy")}
    if "critic" in parents:
        models["critic"] = parents["critic"].manifest.architecture_for("value")
    bases = {"policy": base_of(parents["policy"], "policy", config.lora, config.run_dir)}
    if "critic" in parents:
        bases["critic"] = base_of(parents["critic"], "value", config.critic_lora, config.run_dir)
    return Manifest(
        stage=stage_of(config),
        step=config.num_steps,
        models=models,
        bases=bases_of(*bases.items()),
        tokenizer=parents["policy"].manifest.tokenizer,
        parents={role: parent.id for role, parent in parents.items()},
        data=data,
    )


def check_enough(prompts: list[PromptRow], config: RTORun) -> None:
    """Raise DataError if there are fewer prompts than a step takes."""
    if len(prompts) < config.prompts_per_step:
        raise DataError(
            f"data.train {config.data.train}: {len(prompts)} prompts are left, fewer than prompts_per_step "
            f"{config.prompts_per_step}; bring more prompts, or take more samples_per_prompt of fewer"
        )


def size_table(config: RTORun, num_prompts: int, num_data: int) -> list[tuple[str, object]]:
    """The start table: what follows from the three batch numbers."""
    samples, plan = config.prompts_per_step * config.samples_per_prompt, plan_updates(config)
    return [
        ("prompts", num_prompts),
        ("prompts per step", config.prompts_per_step),
        ("samples per step", samples),
        ("of these per replica", samples // num_data),
        ("samples per optimizer step", config.samples_per_optimizer_step),
        ("optimizer steps per step", plan.minibatches_per_step),
        ("steps", config.num_steps),
        ("samples in all", samples * config.num_steps),
        ("passes over the prompts", round(config.num_steps * config.prompts_per_step / num_prompts, 2)),
    ]
