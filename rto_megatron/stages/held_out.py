"""How a policy does on prompts that nothing was trained on."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from rto_megatron.algorithms.dpo import sequence_log_probs
from rto_megatron.algorithms.rewards import dpo_token_rewards
from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.run import EvaluateRun, RTORun
from rto_megatron.credit.page import PAGE, draw_run
from rto_megatron.credit.record import Evaluation, describe, file_of, num_stored, write_evaluation
from rto_megatron.data.collate import collate_preferences, prompt_batch
from rto_megatron.data.readers import PreferenceRow, PromptRow, read_preferences, read_prompts
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.collectives import gather_over_data
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.rows import gather_rows, share_of
from rto_megatron.distributed.step import score_all, token_log_probs
from rto_megatron.errors import DataError, writing
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.models.heads import ScalarModel
from rto_megatron.rollout.responses import generate
from rto_megatron.stages.actors import Judges, score_rollout
from rto_megatron.stages.grader import Grader, load_grader, win_rate
from rto_megatron.stages.resume import Progress

EVALUATION = -1
"""The `step` of the random streams of held-out samples, so that no training step shares them."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A policy's responses to all held-out prompts and what the judges say, on every rank."""

    rollout: Rollout
    signals: Signals

    @property
    def kl(self) -> Tensor:
        """[B] nats: log pi - log pi_ref of each whole response."""
        ratio = self.signals.policy_log_probs - self.signals.ref_log_probs
        return sequence_log_probs(ratio, self.rollout.response_mask)

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The responses, in the order of the prompts."""
        rows = zip(self.rollout.tokens, self.rollout.response_mask, strict=True)
        return [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in rows]

    def metrics(self) -> dict[str, float]:
        """`eval/*`."""
        return {
            "eval/score": self.signals.scores.double().mean().item(),
            "eval/kl": self.kl.double().mean().item(),
            "eval/response_length": self.rollout.response_mask.sum(-1).double().mean().item(),
            "eval/truncated_frac": self.rollout.truncated.double().mean().item(),
        }


def answer(
    policy: PolicyModel,
    prompts: Sequence[PromptRow],
    config: RTORun | EvaluateRun,
    judges: Judges,
    tokenizer: Tokenizer,
    mesh: Mesh,
    critic: ScalarModel | None = None,
) -> Answers:
    """One response to each prompt, judged, by the critic too if there is one.

    The same seed gives every policy the same random streams, so policies differ by what they learned.
    """
    with judges.host.staying(policy) if judges.host else nullcontext():  # the reference answers too
        local = generate(
            policy,
            prompt_batch([prompts[i] for i in share_of(len(prompts), mesh)]),
            config.rollout,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            seed=config.seed,
            step=EVALUATION,
        )
    signals = score_rollout(local, policy=policy, critic=critic, judges=judges, config=config, mesh=mesh)
    count = range(len(prompts))
    return Answers(rollout=gather_rows(local, mesh).rows(count), signals=gather_rows(signals, mesh).rows(count))


MOST_PAIRS = 256
"""Held-out pairs on which the DPO reward is measured."""


def dpo_accuracy(
    pairs: Sequence[PreferenceRow], judges: Judges, config: RTORun, tokenizer: Tokenizer, mesh: Mesh
) -> float:
    """Share of pairs whose chosen side earns more DPO reward in all, clipped as in training; a tie counts half."""
    assert judges.dpo is not None
    batch = collate_preferences([pairs[i] for i in share_of(len(pairs), mesh)], tokenizer.pad_id)
    batch = batch.to(mesh.device)
    asks = [(judges.reference, token_log_probs), (judges.dpo, token_log_probs)]
    reference, dpo = score_all(asks, batch, mesh, cut=config.compute.score_cut, host=judges.host)
    rewards, _ = dpo_token_rewards(
        dpo_log_probs=dpo[..., 0],
        ref_log_probs=reference[..., 0],
        response_mask=batch.response_mask,
        dpo_coef=config.rto.dpo_coef,
        dpo_clip=config.rto.dpo_clip,
    )
    earned = gather_over_data(rewards.double().sum(-1).view(-1, 2), mesh)[: len(pairs)]
    return win_rate(*earned.T.tolist())


def _pairs_of(config: RTORun, tokenizer: Tokenizer) -> list[PreferenceRow]:
    """Held-out rows that are pairs and fit into the window; rows that are only prompts are passed over."""
    assert config.data.eval is not None
    window = config.rollout.longest
    try:
        pairs, _ = read_preferences(
            config.data.eval, tokenizer, max_length=window, too_long="drop", refuse=lambda _: None
        )
    except DataError:  # none is left: the prompts have been read without one
        return []
    return pairs[:MOST_PAIRS]


@dataclass(frozen=True, kw_only=True)
class Graded:
    """What is compared of a policy's answers to all held-out prompts."""

    scores: list[float]
    """Of the reward model."""
    grades: list[float]
    """Of the user's grader; none without one."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of an RTO run, and when to answer them."""

    prompts: list[PromptRow]
    config: RTORun
    sentence_ends: Tensor | None = None
    """[V] bool, ids that close a sentence; for `rto.shaping: sentence` only."""
    pairs: list[PreferenceRow] = field(default_factory=list)
    """Those of data.eval that are preference pairs: the DPO reward is held against them."""
    grader: Grader | None = None
    of_reference: list[Graded] = field(default_factory=list)
    """The reference's answers, once they are there: it is frozen."""

    @classmethod
    def of_run(cls, config: RTORun, tokenizer: Tokenizer, sentence_ends: Tensor | None = None) -> "HeldOut":
        """Read data.eval; without it nothing is measured."""
        if config.data.eval is None:
            return cls([], config)
        limit = config.rollout.max_prompt_tokens
        prompts, _ = read_prompts(config.data.eval, tokenizer, max_prompt_tokens=limit, too_long=config.data.too_long)
        pairs = _pairs_of(config, tokenizer) if config.rto.dpo_coef else []
        return cls(prompts, config, sentence_ends, pairs, load_grader(config.grader))

    def is_due(self, step: int) -> bool:
        """Whether to measure before `step`."""
        every = self.config.eval_every
        return bool(self.prompts) and (step in (0, self.config.num_steps) or (every > 0 and step % every == 0))

    def measure(
        self,
        at: Progress,
        policy: PolicyModel,
        critic: ScalarModel | None,
        judges: Judges,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        writes: bool,
    ) -> dict[str, float]:
        """`eval/*`, on ranks that hold all of these; the one that `writes` has all of them.

        It leaves the token credit on disk too, and alone asks the grader.
        """
        shows_credit = self.config.credit.responses > 0
        answers = answer(policy, self.prompts, self.config, judges, tokenizer, mesh, critic if shows_credit else None)
        if shows_credit and writes:
            self._write_credit(at, answers, tokenizer, has_critic=critic is not None)
        accuracy = {}
        if self.pairs and at.step == 0:  # the judges are frozen: it stays what it is
            accuracy = {"health/dpo_accuracy": dpo_accuracy(self.pairs, judges, self.config, tokenizer, mesh)}
        if not self.of_reference:
            of_reference = answer(judges.reference, self.prompts, self.config, judges, tokenizer, mesh)
            self.of_reference.append(self._graded(of_reference, tokenizer, writes=writes))
        compared = self._compare(self._graded(answers, tokenizer, writes=writes), has_scores=judges.reward is not None)
        return answers.metrics() | compared | accuracy

    def _graded(self, answers: Answers, tokenizer: Tokenizer, *, writes: bool) -> Graded:
        grades = []
        if self.grader and writes:
            grades = self.grader([prompt.text for prompt in self.prompts], answers.texts(tokenizer))
        return Graded(scores=answers.signals.scores.tolist(), grades=grades)

    def _compare(self, ours: Graded, *, has_scores: bool) -> dict[str, float]:
        [theirs], numbers = self.of_reference, {}
        if has_scores:
            numbers["eval/win_rate"] = win_rate(ours.scores, theirs.scores)
        if ours.grades:
            numbers["eval/grade"] = sum(ours.grades) / len(ours.grades)
            numbers["eval/grade_win_rate"] = win_rate(ours.grades, theirs.grades)
        return numbers

    def _write_credit(self, at: Progress, answers: Answers, tokenizer: Tokenizer, *, has_critic: bool) -> None:
        """Store the credit of each token, and draw the page of the run."""
        assert at.kl_coef is not None, "an RTO run begins with one"
        config, run_dir = self.config, self.config.run_dir
        stored = range(num_stored(len(self.prompts), config.credit.responses, config.rollout.max_new_tokens))
        responses = describe(
            answers.rollout.rows(stored),
            answers.signals.rows(stored),
            [(self.prompts[row].index, self.prompts[row].text) for row in stored],
            tokenizer,
            config.rto,
            config.advantage,
            kl_coef=at.kl_coef,
            has_critic=has_critic,
            sentence_ends=self.sentence_ends,
        )
        evaluation = Evaluation(
            name=f"step {at.step}",
            step=at.step,
            coefs={"dpo_coef": config.rto.dpo_coef, "kl_coef": at.kl_coef, "score_coef": config.rto.score_coef},
            num_prompts=len(self.prompts),
            responses=responses,
        )
        with writing("run_dir", run_dir):
            write_evaluation(file_of(run_dir, at.step), evaluation)
            (run_dir / PAGE).write_text(draw_run(run_dir, at.step), encoding="utf-8")
