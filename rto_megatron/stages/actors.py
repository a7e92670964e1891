"""The five roles of RTO, and what they say about a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rto_megatron.algorithms.reward_model import sequence_scores, state_values
from rto_megatron.algorithms.rewards import normalise_scores
from rto_megatron.batch import Rollout, Signals
from rto_megatron.config.parallel import Cut
from rto_megatron.config.run import EvaluateRun, RTORun
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.distributed.offload import HostWeights
from rto_megatron.distributed.optimizer import Trainable, make_trainable
from rto_megatron.distributed.step import (
    Forward,
    head_outputs_at_end,
    head_outputs_before_response,
    score,
    score_all,
    token_log_probs,
)
from rto_megatron.models.gpt import Kind, PolicyModel
from rto_megatron.models.heads import ScalarModel
from rto_megatron.stages.roles import Trunks, load_role, tokenizer_of
from rto_megatron.stages.rules import check_run, roles_of


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
    host: HostWeights | None = None
    """Where their weights are between passes; None leaves them on the device."""

    def stay_for(self, *learning: Any) -> None:
        """Leave on the device what models that learn have in common with these."""
        for model in learning:
            if self.host is not None and model is not None:
                self.host.give_back(model)


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
    """Load every role that the run needs, once all that can be told without weights has been checked.

    Raises:
        ConfigError, CheckpointError: as `check_run` and `load_role`.
    """
    parents = check_run(config, mesh.data.size)
    cut = {"parallel": config.parallel, "compute": config.compute, "temperature": config.rollout.log_prob_temperature}
    starts = {role.name: role.path for role in roles_of(config)}
    trunks = Trunks.of_run(config, parents)
    judges = load_judges(config, mesh, trunks)
    learns = {"frozen": False, "seed": config.seed, "trunks": trunks, **cut}
    policy, _ = load_role(starts["policy"], "policy", mesh, lora=config.lora, **learns)
    critic = None
    if "critic" in starts:
        critic, _ = load_role(starts["critic"], "value", mesh, lora=config.critic_lora, **learns)
    judges.stay_for(policy, critic)
    return Actors(
        policy=make_trainable("policy", policy, config.optimizer, mesh),
        critic=make_trainable("critic", critic, config.critic_optimizer, mesh) if critic is not None else None,
        judges=judges,
        tokenizer=tokenizer_of(parents["policy"]),
        parents=parents,
    )


def load_judges(config: RTORun | EvaluateRun, mesh: Mesh | None, trunks: Trunks | None = None) -> Judges:
    """Load the frozen roles whose coefficient is not 0; all ranks call, and where `mesh` is None they get no models.

    Args:
        trunks: as in `load_role`.

    Raises:
        CheckpointError: as `load_role`.
    """
    cut: dict[str, Any] = {"parallel": config.parallel, "compute": config.compute, "trunks": trunks}
    cut["temperature"] = config.rollout.log_prob_temperature
    host = HostWeights(mesh.device) if mesh is not None and config.compute.offload_frozen else None
    starts, dpo, reward = {role.name: role.path for role in roles_of(config)}, None, None

    def load(name: str, kind: Kind) -> tuple[Any, Checkpoint]:
        model, parent = load_role(starts[name], kind, mesh, frozen=True, **cut)
        if host is not None:  # before the next one is loaded
            host.take(model)
        return model, parent

    reference, _ = load("reference", "policy")
    if "dpo" in starts:
        dpo, _ = load("dpo", "policy")
    if "reward_model" in starts:
        model, parent = load("reward_model", "value")
        reward = RewardModel(model=model, mean=parent.manifest.score_mean, std=parent.manifest.score_std)
    return Judges(reference=reference, dpo=dpo, reward=reward, host=host)


def score_rollout(
    rollout: Rollout,
    *,
    policy: PolicyModel,
    critic: ScalarModel | None,
    judges: Judges,
    config: RTORun | EvaluateRun,
    mesh: Mesh,
    checked: Sequence[int] | None = None,
) -> Signals:
    """Ask every role about this replica's rollout; an absent role gives what makes its term 0.

    Args:
        checked: the only rows that the policy is asked about, the log-probs of decoding being its answer to all; None
            asks it about all rows, and takes that answer.
    """
    asks: dict[str, tuple[PolicyModel | ScalarModel, Forward]] = {}
    if checked is None:
        asks["policy"] = policy, token_log_probs
    asks["reference"] = judges.reference, token_log_probs
    if judges.dpo:
        asks["dpo"] = judges.dpo, token_log_probs
    if critic is not None:
        asks["critic"] = critic, head_outputs_before_response
    if judges.reward:
        asks["reward_model"] = judges.reward.model, head_outputs_at_end
    outputs = score_all(list(asks.values()), rollout, mesh, cut=config.compute.score_cut, host=judges.host)
    said = dict(zip(asks, outputs, strict=True))
    ref_log_probs = said["reference"][..., 0]
    if checked is None:
        policy_log_probs = forward_log_probs = said["policy"][..., 0]
    else:
        policy_log_probs = rollout.decode_log_probs
        forward_log_probs = _log_probs_of(rollout, checked, policy, mesh, cut=config.compute.score_cut)
    values = torch.zeros_like(ref_log_probs)
    if "critic" in said:
        values = state_values(said["critic"]).where(rollout.response_mask, 0.0)
    scores = raw_scores = torch.zeros(len(rollout), device=mesh.device)
    if judges.reward:
        raw_scores = sequence_scores(said["reward_model"], rollout.num_tokens)
        scores = normalise_scores(
            raw_scores, mean=judges.reward.mean, std=judges.reward.std, clip=config.rto.score_clip
        )
    return Signals(
        tokens=rollout.tokens,
        num_tokens=rollout.num_tokens,
        policy_log_probs=policy_log_probs,
        forward_log_probs=forward_log_probs,
        checked=_mark(len(rollout), checked, mesh),
        ref_log_probs=ref_log_probs,
        dpo_log_probs=said["dpo"][..., 0] if "dpo" in said else ref_log_probs,
        values=values,
        raw_scores=raw_scores,
        scores=scores,
    )


def _log_probs_of(rollout: Rollout, index: Sequence[int], policy: PolicyModel, mesh: Mesh, *, cut: Cut) -> Tensor:
    """[B, T] nats under the policy of some rows, 0 in the others."""
    log_probs = torch.zeros(rollout.tokens.shape, device=mesh.device)
    if index:
        rows = rollout.rows(index)
        said = score(policy, rows, token_log_probs, mesh, cut=cut)[..., 0]
        log_probs[list(index), : said.shape[1]] = said[:, : log_probs.shape[1]]
    return log_probs


def _mark(num_rows: int, index: Sequence[int] | None, mesh: Mesh) -> Tensor:
    """[B] bool: True at `index`, or everywhere where it is None."""
    marked = torch.full((num_rows,), index is None, device=mesh.device)
    if index:
        marked[list(index)] = True
    return marked
