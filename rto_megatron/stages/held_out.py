"""How a policy does on prompts that nothing was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rto_megatron.algorithms.dpo import sequence_log_probs
from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.run import EvaluateRun, RTORun
from rto_megatron.data.collate import prompt_batch
from rto_megatron.data.readers import PromptRow, read_prompts
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.rows import gather_rows, share_of
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.rollout.responses import generate
from rto_megatron.stages.actors import Judges, score_rollout

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
) -> Answers:
    """One response to each prompt, judged.

    The same seed gives every policy the same random streams, so policies differ by what they learned.
    """
    local = generate(
        policy,
        prompt_batch([prompts[i] for i in share_of(len(prompts), mesh)]),
        config.rollout,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        seed=config.seed,
        step=EVALUATION,
    )
    signals = score_rollout(local, policy=policy, critic=None, judges=judges, config=config, mesh=mesh)
    count = range(len(prompts))
    return Answers(rollout=gather_rows(local, mesh).rows(count), signals=gather_rows(signals, mesh).rows(count))


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of an RTO run, and when to answer them."""

    prompts: list[PromptRow]
    config: RTORun

    @classmethod
    def of_run(cls, config: RTORun, tokenizer: Tokenizer) -> "HeldOut":
        """Read data.eval; without it nothing is measured."""
        if config.data.eval is None:
            return cls([], config)
        limit = config.rollout.max_prompt_tokens
        prompts, _ = read_prompts(config.data.eval, tokenizer, max_prompt_tokens=limit, too_long=config.data.too_long)
        return cls(prompts, config)

    def is_due(self, step: int) -> bool:
        """Whether to measure before `step`."""
        every = self.config.eval_every
        return bool(self.prompts) and (step in (0, self.config.num_steps) or (every > 0 and step % every == 0))

    def measure(self, policy: PolicyModel, judges: Judges, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, float]:
        """`eval/*`, on ranks that hold all of these."""
        return answer(policy, self.prompts, self.config, judges, tokenizer, mesh).metrics()
