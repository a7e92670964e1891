"""The five roles of RTO, and what they say about a rollout."""

from dataclasses import dataclass

import torch

from rto_megatron.algorithms.reward_model import sequence_scores, state_values
from rto_megatron.algorithms.rewards import normalise_scores
from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.config.run import EvaluateRun, RTORun
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, open_checkpoint
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.optimizer import Trainable, make_trainable
from rto_megatron.distributed.step import Forward, head_outputs, score, token_log_probs
from rto_megatron.errors import CheckpointError, ConfigError
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.models.heads import ScalarModel
from rto_megatron.stages.roles import check_same_tokenizer, load_role, tokenizer_of


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A frozen sentence reward model and how its scores are normalised."""

    model: ScalarModel
    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The frozen roles; those that a coefficient of 0 turns off are absent."""

    reference: PolicyModel
    dpo: PolicyModel | None
    reward: RewardModel | None


@dataclass(frozen=True, kw_only=True)
class Actors:
    """The roles of a run: two that learn and up to three that judge."""

    policy: Trainable[PolicyModel]
    critic: Trainable[ScalarModel] | None
    judges: Judges
    tokenizer: Tokenizer
    parents: dict[str, Checkpoint]
    """Role -> the checkpoint it started from."""


def load_actors(config: RTORun, mesh: Mesh) -> Actors:
    """Load every role that the run needs, and refuse roles that do not belong together.

    Raises:
        CheckpointError: a checkpoint is missing or damaged, tokenizers differ, or the DPO run's
            reference is not the run's.
        ConfigError: the window does not fit the model.
    """
    cut = {"parallel": config.parallel, "compute": config.compute, "temperature": config.rollout.log_prob_temperature}
    judges, parents = load_judges(config, mesh)
    policy, parents["policy"] = load_role(config.policy, "policy", mesh, frozen=False, **cut)
    critic = None
    if config.advantage.estimator == "gae":
        start = config.critic or config.reward_model or config.policy
        critic, parents["critic"] = load_role(start, "value", mesh, frozen=False, seed=config.seed, **cut)
    check_same_tokenizer(*parents.values())
    check_window(config.rollout, parents)
    return Actors(
        policy=make_trainable("policy", policy, config.optimizer, mesh),
        critic=make_trainable("critic", critic, config.critic_optimizer, mesh) if critic is not None else None,
        judges=judges,
        tokenizer=tokenizer_of(parents["policy"]),
        parents=parents,
    )


def load_judges(config: RTORun | EvaluateRun, mesh: Mesh) -> tuple[Judges, dict[str, Checkpoint]]:
    """Load the frozen roles whose coefficient is not 0, with the checkpoints they came from.

    Raises:
        CheckpointError: as `load_actors`.
    """
    cut = {"parallel": config.parallel, "compute": config.compute, "temperature": config.rollout.log_prob_temperature}
    reference, from_reference = load_role(config.reference, "policy", mesh, frozen=True, **cut)
    parents, dpo, reward = {"reference": from_reference}, None, None
    if config.rto.dpo_coef > 0 and config.dpo is not None:
        check_lineage(open_checkpoint(config.dpo), from_reference, allowed=config.allow_other_reference)
        dpo, parents["dpo"] = load_role(config.dpo, "policy", mesh, frozen=True, **cut)
    scored = config.rto.score_coef > 0 or isinstance(config, EvaluateRun)  # an evaluation always shows the score
    if scored and config.reward_model is not None:
        model, parent = load_role(config.reward_model, "value", mesh, frozen=True, **cut)
        if parent.manifest.stage != "reward":
            raise CheckpointError(
                f"{parent.folder}: `reward_model` must be a run of the stage reward, got one of "
                f"{parent.manifest.stage}; its head would score at random"
            )
        parents["reward_model"] = parent
        reward = RewardModel(model=model, mean=parent.manifest.score_mean, std=parent.manifest.score_std)
    check_same_tokenizer(*parents.values())
    return Judges(reference=reference, dpo=dpo, reward=reward), parents


def check_lineage(dpo: Checkpoint, reference: Checkpoint, *, allowed: bool) -> None:
    """Raise CheckpointError unless the DPO policy was trained from this reference.

    log pi_dpo - log pi_ref is a reward only for the reference that DPO was trained against.
    """
    parent = dpo.manifest.parents.get("reference")
    if parent != reference.id and not allowed:
        raise CheckpointError(
            f"{dpo.folder}: was trained from the reference {parent or '(none recorded)'}, but `reference` is "
            f"{reference.folder} with id {reference.id}; name the SFT run that DPO started from, train DPO again, "
            "or set allow_other_reference to true"
        )


def check_window(rollout: RolloutConfig, parents: dict[str, Checkpoint]) -> None:
    """Raise ConfigError if a prompt and its response may be longer than a role can see."""
    window = rollout.max_prompt_tokens + rollout.max_new_tokens
    for role, parent in parents.items():
        longest = min(model.max_length for model in parent.manifest.models.values())
        if window > longest:
            raise ConfigError(
                f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + rollout.max_new_tokens "
                f"{rollout.max_new_tokens} must be at most the {longest} tokens that the "
                f"{role} ({parent.folder}) can see, got {window}"
            )


def score_rollout(
    rollout: Rollout,
    *,
    policy: PolicyModel,
    critic: ScalarModel | None,
    judges: Judges,
    config: RTORun | EvaluateRun,
    mesh: Mesh,
) -> Signals:
    """Ask every role about this replica's rollout; an absent role gives what makes its term 0."""

    def ask(model: PolicyModel | ScalarModel, forward: Forward) -> torch.Tensor:
        return score(model, rollout, forward, mesh, micro_batch_size=config.compute.score_micro_batch_size)

    policy_log_probs = ask(policy, token_log_probs)[..., 0]
    ref_log_probs = ask(judges.reference, token_log_probs)[..., 0]
    dpo_log_probs = ask(judges.dpo, token_log_probs)[..., 0] if judges.dpo else ref_log_probs
    values = torch.zeros_like(ref_log_probs)
    if critic is not None:
        values = state_values(ask(critic, head_outputs)).where(rollout.response_mask, 0.0)
    scores = raw_scores = torch.zeros(len(rollout), device=mesh.device)
    if judges.reward:
        raw_scores = sequence_scores(ask(judges.reward.model, head_outputs), rollout.num_tokens)
        scores = normalise_scores(
            raw_scores, mean=judges.reward.mean, std=judges.reward.std, clip=config.rto.score_clip
        )
    return Signals(
        tokens=rollout.tokens,
        num_tokens=rollout.num_tokens,
        policy_log_probs=policy_log_probs,
        ref_log_probs=ref_log_probs,
        dpo_log_probs=dpo_log_probs,
        values=values,
        raw_scores=raw_scores,
        scores=scores,
    )
