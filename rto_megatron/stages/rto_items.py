"""RTO as work items of a schedule: what a rank does with each kind.

The items of a step are those of the algorithm, in the order of `schedule/policy.py`; what they compute is what the
sequential run computes, from the same rows in the same order, so the weights have the same bits.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rto_megatron.batch import Experience, Rollout, Signals
from rto_megatron.config.run import RTORun
from rto_megatron.data.readers import PromptRow
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.collectives import gather_objects, sum_in_rank_order
from rto_megatron.distributed.runtime import is_main, rank, wait_for_device
from rto_megatron.distributed.step import accumulate, score, token_log_probs
from rto_megatron.errors import CheckpointError
from rto_megatron.metrics import Mergeable, merge, take
from rto_megatron.rollout.engine import DecodeBatch, Request
from rto_megatron.rollout.experience import Credit, for_newer_policy, make_experience
from rto_megatron.rollout.guard import check_decoding
from rto_megatron.rollout.responses import make_engine
from rto_megatron.schedule.cast import Cast
from rto_megatron.schedule.loop import Outcome
from rto_megatron.schedule.trace import Load
from rto_megatron.schedule.work import Item, Sizes
from rto_megatron.stages.actors import score_rollout
from rto_megatron.stages.course import Course
from rto_megatron.stages.players import Players
from rto_megatron.stages.rto_metrics import staleness_metrics, step_metrics
from rto_megatron.stages.samples import FILE, Found, Samples, checked_of, make_pass, said_of
from rto_megatron.stages.update import minibatch_rows, take_optimizer_step, tasks_of


@dataclass(kw_only=True)
class StepState:
    """A step that is going on, as this rank knows it."""

    samples: Samples
    requests: list[Request]
    batches: dict[int, DecodeBatch] = field(default_factory=dict)
    """By lane."""
    minibatches: dict[int, Experience] = field(default_factory=dict)
    """What is trained on, by number: those whose advantages are known."""
    whole: tuple[Experience, Credit] | None = None
    """Of all rows."""
    proximal: Tensor | None = None
    """[B, T] nats, of all rows; with staleness only."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Role -> what the minibatch under way reports."""
    reports: dict[int, dict[str, Mergeable]] = field(default_factory=dict)
    """By minibatch: of the roles that this rank trains."""


class RTOWork:
    """What this rank does with items: the `Work` of `schedule/loop.py`."""

    def __init__(
        self,
        config: RTORun,
        cast: Cast,
        sizes: Sizes,
        players: Players,
        prompts: Sequence[PromptRow],
        sentence_ends: Tensor | None,
        course: Course,
    ) -> None:
        """Nothing is known of any step."""
        self.config, self.cast, self.sizes, self.players, self.course = config, cast, sizes, players, course
        self._prompts, self._sentence_ends = prompts, sentence_ends
        self._early = config.schedule.minibatches == "logical"
        self._steps: dict[int, StepState] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        """Of this step, by kind of item."""
        self._engine = None
        if players.writer is not None:
            self._engine = make_engine(players.writer, config.rollout, eos_id=players.tokenizer.eos_id)

    def step(self, number: int) -> StepState:
        """What is known of a step."""
        if number not in self._steps:
            samples = Samples(self.config, self._prompts, self.players.tokenizer, step=number)
            self._steps[number] = StepState(samples=samples, requests=samples.requests())
        return self._steps[number]

    def run(self, item: Item) -> Outcome:
        """Do this rank's part of an item."""
        start = time.perf_counter()
        outcome = getattr(self, f"_{item.kind}")(item, self.step(item.step))
        wait_for_device()  # an item is over when its work is, not when its kernels are launched
        self._seconds[item.kind] += time.perf_counter() - start
        return outcome

    def take(self, found: Found) -> None:
        """Learn what another group has found."""
        self.step(found.step).samples.take(found)

    def readers(self, item: Item) -> Iterable[int]:
        """Who trains needs all; who scores, what may be in its packs."""
        place = self.cast.placement
        everybody = {*place.trainers, *(place.scorers if item.kind in ("prefill", "decode") else ())}
        return everybody - {self.players.group}

    # Responses and what the roles say of them.

    def _prefill(self, item: Item, state: StepState) -> Outcome:
        assert self._engine is not None
        if item.lane not in state.batches:
            state.batches[item.lane] = self._engine.batch([state.requests[row] for row in self.sizes.rows(item.lane)])
        load = Load([len(state.samples.prompts.ids[row]) for row in item.samples])
        return self._pass(item, state, load)

    def _decode(self, item: Item, state: StepState) -> Outcome:
        batch, load = state.batches[item.lane], Load()
        before = batch.num_steps, batch.num_tokens, batch.num_attended
        outcome = self._pass(item, state, load)
        load.samples, load.num_steps = len(item.samples), batch.num_steps - before[0]
        load.tokens, load.context = batch.num_tokens - before[1], batch.num_attended - before[2]
        return outcome

    def _pass(self, item: Item, state: StepState, load: Load) -> Outcome:
        batch = state.batches[item.lane]
        ended = make_pass(batch, item, state.requests)
        found = Found(step=item.step, written=tuple(ended)) if ended else None
        if found:
            state.samples.take(found)
        if not batch.num_live and all(row in state.samples.written for row in self.sizes.rows(item.lane)):
            del state.batches[item.lane]  # scoring and training need its memory
        return Outcome(lengths={c.uid: len(c.tokens) for c in ended}, found=found, load=load)

    def _score(self, item: Item, state: StepState) -> Outcome:
        players = self.players
        assert players.judges is not None and players.old_policy is not None
        rollout = state.samples.rollout(item.samples).to(players.own_mesh.device)
        signals = score_rollout(
            rollout,
            policy=players.old_policy,
            critic=players.old_critic,
            judges=players.judges,
            config=self.config,
            mesh=players.own_mesh,
            checked=checked_of(item.samples, self.config, step=item.step),
        )
        found = Found(step=item.step, said=said_of(item.samples, rollout, signals))
        state.samples.take(found)
        return Outcome(found=found, load=Load(state.samples.contexts(item.samples)))

    # From samples to weights.

    def _proximal(self, item: Item, state: StepState) -> Outcome:
        """Log-probs of all rows under the policy as it is before its update: packs are shared out, then added up."""
        mesh, trained = self.players.policy_mesh, self.players.policy
        assert mesh is not None and trained is not None
        packs, _ = state.samples.written_out(self.sizes)
        mine = packs[mesh.data.rank :: mesh.data.size]
        whole = state.samples.rollout(range(self.sizes.samples)).to(mesh.device)
        log_probs = torch.zeros(whole.tokens.shape, device=mesh.device)
        for pack in mine:
            rows = whole.rows(pack.samples)
            said = score(trained.model, rows, token_log_probs, mesh, cut=self.config.compute.score_cut)[..., 0]
            log_probs[list(pack.samples), : said.shape[1]] = said[:, : log_probs.shape[1]]
        state.proximal = sum_in_rank_order(log_probs, mesh)  # disjoint rows: nothing is rounded
        return Outcome(load=Load(state.samples.contexts(row for pack in mine for row in pack.samples)))

    def _advantage(self, item: Item, state: StepState) -> Outcome:
        if self._early:
            state.minibatches[item.number] = self._experience(state, item.samples)[0]
        else:
            state.whole = self._experience(state, item.samples)
            for number, rows in enumerate(minibatch_rows(self.sizes.samples, self.config, step=item.step)):
                state.minibatches[number] = state.whole[0].rows(rows)
        return Outcome(load=Load(state.samples.contexts(item.samples)))

    def _experience(self, state: StepState, rows: Sequence[int]) -> tuple[Experience, Credit]:
        rollout, signals = self._records(state, rows)
        config, step = self.config, state.samples.step
        check_decoding(rollout, signals, config.rollout, dtype=config.compute.dtype, step=step)
        experience, credit = make_experience(
            rollout,
            signals,
            self.config.rto,
            self.config.advantage,
            kl_coef=self.course.kl_coef,
            sentence_ends=self._sentence_ends,
        )
        if state.proximal is not None:
            proximal = state.proximal[list(rows), : rollout.tokens.shape[1]]
            experience = for_newer_policy(experience, proximal, cap=self.config.ppo.importance_cap)
        return experience, credit

    def _records(self, state: StepState, rows: Sequence[int]) -> tuple[Rollout, Signals]:
        device = self.players.own_mesh.device
        return state.samples.rollout(rows).to(device), state.samples.signals(rows).to(device)

    def _train(self, item: Item, state: StepState) -> Outcome:
        whole = state.minibatches[item.number]
        players = self.players
        is_policy = item.role in ("policy", "both")
        mesh = players.policy_mesh if is_policy else players.critic_mesh
        assert mesh is not None
        tasks = tasks_of(
            players.policy if is_policy else None,
            players.critic if item.role in ("critic", "both") else None,
            whole,
            self.config,
            mesh,
        )
        contexts = state.samples.contexts(item.samples)
        assert contexts == tasks[0].batch.num_tokens.tolist(), "the schedule and the update deal the same rows"
        sums = accumulate(tasks, mesh, cut=self.config.compute.cut)
        state.sums = {task.trainable.name: own for task, own in zip(tasks, sums, strict=True)}
        return Outcome(load=Load(contexts))

    def _optimizer(self, item: Item, state: StepState) -> Outcome:
        players = self.players
        trained, mesh = {
            "policy": (players.policy, players.policy_mesh),
            "critic": (players.critic, players.critic_mesh),
        }[item.role]
        assert trained is not None and mesh is not None
        whole = state.minibatches[item.number]
        report = take_optimizer_step(
            trained, state.sums[item.role], whole, self.config, mesh, step=item.step, number=item.number
        )
        state.reports[item.number] = state.reports.get(item.number, {}) | report
        return Outcome(load=Load(state.samples.contexts(item.samples)))

    def _refit(self, item: Item, state: StepState) -> Outcome:
        return Outcome(load=Load(num_bytes=self.players.refit(item.role)))

    # Between steps.

    def _boundary(self, item: Item, state: StepState) -> Outcome:
        numbers = self._numbers(state) if is_main() else {}
        told = gather_objects((numbers, self._reports(state), dict(self._seconds)))
        numbers = told[0][0]
        for _, reports, _ in told:
            numbers |= take(merge(reports)) if reports else {}
        self._seconds.clear()
        self.course.end_step(numbers | self._speed(numbers, [seconds for _, _, seconds in told]))
        del self._steps[item.step]
        self.course.begin_step(self.hand_over(item.step + 1))
        return Outcome()

    def _numbers(self, state: StepState) -> dict[str, float]:
        """What the rows of the step say; on a rank that has them all."""
        rows = range(self.sizes.samples)
        rollout, signals = self._records(state, rows)
        experience, credit = state.whole or self._experience(state, rows)
        numbers = step_metrics(rollout, signals, experience, credit, self.config.rto)
        if state.proximal is not None:
            numbers |= staleness_metrics(rollout, signals, state.proximal, cap=self.config.ppo.importance_cap)
        return numbers

    def _reports(self, state: StepState) -> list[dict[str, Mergeable]]:
        """Of the minibatches in their order, from the first rank of a role."""
        is_first = rank() in (self.cast.policy.ranks.start, self.cast.critic.ranks.start)
        return [state.reports[number] for number in sorted(state.reports)] if is_first else []

    def _speed(self, numbers: dict[str, float], seconds: Sequence[dict[str, float]]) -> dict[str, float]:
        """Seconds of each phase on the rank that took longest, and tokens over seconds."""
        phases = {
            f"time/{name}_seconds": max(sum(own.get(kind, 0.0) for kind in kinds) for own in seconds)
            for name, kinds in PHASES.items()
        }
        phases |= self.course.clock.take()
        response, prompt = numbers["length/response_mean"], numbers["length/prompt_mean"]
        phases["speed/tokens_per_second"] = self.sizes.samples * (prompt + response) / phases["time/step_seconds"]
        if phases["time/generate_seconds"]:  # the last step's responses may have been written in the one before
            phases["speed/generated_tokens_per_second"] = (
                self.sizes.samples * response / phases["time/generate_seconds"]
            )
        return phases

    def hand_over(self, step: int) -> Callable[[Path], None] | None:
        """What writes the samples of the next step into a checkpoint, where they are there already."""
        if self.config.schedule.staleness == 0 or step == self.config.num_steps:
            return None
        return self.step(step).samples.save

    def take_over(self, own: Checkpoint | None) -> dict[int, int] | None:
        """The samples that an earlier start of the run has handed over: lengths of their responses, by row."""
        if self.config.schedule.staleness == 0 or own is None:
            return None
        samples = self.step(own.manifest.step).samples
        if not (own.folder / FILE).exists():
            raise CheckpointError(
                f"{own.folder}: holds no {FILE}: a run with schedule.staleness 1 that has ended cannot be made longer: "
                "its next samples were not written, and the weights for them are gone; set another run_dir"
            )
        samples.load(own.folder)
        return samples.lengths


PHASES = {
    "generate": ("prefill", "decode"),
    "score": ("score",),
    "advantage": ("proximal", "advantage"),
    "update": ("train", "optimizer"),
    "refit": ("refit",),
}
"""Name in metrics -> kinds of items."""
