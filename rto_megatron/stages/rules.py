"""What a run's config and the checkpoints that it names must obey, told before any model is built.

A stage checks every rule with `check_run`, which stops at the first that is broken; `doctor` lists them all.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rto_megatron.config.algorithm import RolloutConfig
from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.run import DPORun, EvaluateRun, GenerateRun, RewardRun, RTORun, SFTRun
from rto_megatron.data.tokenizer import TEMPLATE_FILE
from rto_megatron.distributed.checkpoint import Checkpoint, open_base, open_checkpoint
from rto_megatron.errors import CheckpointError, ConfigError
from rto_megatron.models.gpt import Kind
from rto_megatron.stages.grader import load_grader


@dataclass(frozen=True, kw_only=True)
class Role:
    """A model of a run, and the run that it comes from."""

    name: str
    path: Path
    kind: Kind
    optimizer: OptimizerConfig | None = None
    """Of a role that learns; None where it is frozen."""
    lora: LoRAConfig | None = None
    """Of a role that learns by adapters alone."""


@dataclass(frozen=True)
class Rule:
    """One thing that must hold."""

    check: Callable[[], object]
    """Raises UserError where it does not."""
    why: str
    """What would go wrong otherwise."""


def roles_of(config: Any) -> list[Role]:
    """The roles that come from checkpoints; those that a coefficient of 0 turns off are not among them."""
    match config:
        case SFTRun():
            start = config.start
            learns = {"optimizer": config.optimizer, "lora": config.lora}
            return [Role(name="start", path=start, kind="policy", **learns)] if start else []
        case DPORun() | RewardRun():
            kind: Kind = "policy" if isinstance(config, DPORun) else "value"
            learns = {"optimizer": config.optimizer, "lora": config.lora}
            roles = [Role(name="start", path=config.start, kind=kind, **learns)]
            if isinstance(config, DPORun) and config.dpo.reads_distributions:
                roles.append(Role(name="reference", path=config.start, kind="policy"))
            return roles
        case GenerateRun():
            return [Role(name="policy", path=config.checkpoint, kind="policy")]
        case RTORun():
            roles = [
                *_judges(config),
                Role(name="policy", path=config.policy, kind="policy", optimizer=config.optimizer, lora=config.lora),
            ]
            if config.advantage.estimator == "gae":
                start = config.critic or config.reward_model or config.policy
                learns = {"optimizer": config.critic_optimizer, "lora": config.critic_lora}
                roles.append(Role(name="critic", path=start, kind="value", **learns))
            return roles
        case EvaluateRun():
            return [*_judges(config), *(Role(name=str(p), path=p, kind="policy") for p in config.checkpoints)]
    return []


def _judges(config: RTORun | EvaluateRun) -> Iterator[Role]:
    yield Role(name="reference", path=config.reference, kind="policy")
    if config.rto.dpo_coef > 0 and config.dpo is not None:
        yield Role(name="dpo", path=config.dpo, kind="policy")
    scored = config.rto.score_coef > 0 or isinstance(config, EvaluateRun)  # an evaluation always shows the score
    if scored and config.reward_model is not None:
        yield Role(name="reward_model", path=config.reward_model, kind="value")


def check_run(config: Any, num_data: int) -> dict[str, Checkpoint]:
    """Check every rule; the checkpoints by role.

    Args:
        num_data: data-parallel size.

    Raises:
        ConfigError: the layout does not divide a batch or a model, or a sequence is longer than a model can see.
        CheckpointError: a checkpoint is missing or not complete, or the roles do not belong together.
    """
    for rule in size_rules(config, num_data):
        rule.check()
    opened = {role.name: open_checkpoint(role.path) for role in roles_of(config)}
    for rule in role_rules(config, opened):
        rule.check()
    return opened


def size_rules(config: Any, num_data: int) -> Iterator[Rule]:
    """That data-parallel ranks can share each batch equally, rows be packed where they must be, and answers graded."""
    yield Rule(partial(check_packing, config), "a context rank has two chunks of every row, which stand in columns")
    if isinstance(config, RTORun | EvaluateRun) and config.grader is not None:
        yield Rule(partial(load_grader, config.grader), "the first evaluation would end the run")
    sizes = {}
    if isinstance(config, SFTRun | DPORun | RewardRun):
        sizes = {"train.batch_size": config.train.batch_size}
    elif isinstance(config, RTORun):
        sizes = {
            "prompts_per_step x samples_per_prompt": config.prompts_per_step * config.samples_per_prompt,
            "samples_per_optimizer_step": config.samples_per_optimizer_step,
        }
    why = "rows are dealt out by their tokens, and of a few that do not divide one replica has less to do than others"
    for name, value in sizes.items():
        yield Rule(partial(check_divides, name, value, num_data), why)


def role_rules(config: Any, opened: Mapping[str, Checkpoint]) -> Iterator[Rule]:
    """All that must hold of the roles, each and together; of those among `opened`, which may lack some."""
    roles = [role for role in roles_of(config) if role.name in opened]
    for role in roles:
        checkpoint = opened[role.name]
        yield Rule(partial(check_kind, checkpoint, role.kind), "a model without an output layer cannot write")
        check = partial(check_adapters, checkpoint, role.kind, role.lora)
        yield Rule(check, "adapters mean nothing on other weights, and those of another size are other weights")
        if role.name == "reward_model":
            yield Rule(partial(check_holds_scores, checkpoint), "scores of an untrained head are noise")
        architecture = checkpoint.manifest.architecture_for(role.kind)
        yield from architecture_rules(config, architecture, f"the {role.name} ({checkpoint.folder})")
        if isinstance(config, RTORun):
            field = {"policy": "rollout", "critic": "critic"}.get(role.name, "")
            if own := getattr(config.schedule, field, None):
                check = partial(own.check_model, architecture, f"schedule.{field}")
                yield Rule(check, "every rank holds an equal part of each matrix")
    for role in roles[1:]:
        yield Rule(
            partial(check_same_tokenizer, opened[roles[0].name], opened[role.name]),
            "log-probs and scores of one role would be of other tokens than those of the next",
        )
    if "dpo" in opened and "reference" in opened:
        yield Rule(
            partial(check_lineage, opened["dpo"], opened["reference"], allowed=config.allow_other_reference),
            "log pi_dpo - log pi_ref is a reward only for the reference that DPO was trained against",
        )


def architecture_rules(config: Any, architecture: ModelConfig, name: str) -> Iterator[Rule]:
    """That a model can be cut as the config says, and can see its longest sequence."""
    yield Rule(partial(config.parallel.check_model, architecture), "every rank holds an equal part of each matrix")
    beyond = "positions beyond those that it was trained on give garbage"
    if isinstance(config, SFTRun | DPORun | RewardRun):
        yield Rule(partial(check_length, config.data.max_length, architecture), beyond)
    elif isinstance(config, RTORun | GenerateRun | EvaluateRun):
        yield Rule(partial(check_window, config.rollout, architecture, name), beyond)


def check_divides(name: str, value: int, num_data: int) -> None:
    """Raise ConfigError unless a batch size can be shared equally by the data-parallel ranks."""
    if value % num_data:
        raise ConfigError(
            f"{name} must be a multiple of the {num_data} data-parallel ranks, got {value}; "
            f"use {-(-value // num_data) * num_data}"
        )


def check_packing(config: Any) -> None:
    """Raise ConfigError if rows are to be packed where context ranks share each row's tokens."""
    layouts = {"parallel": config.parallel}
    if isinstance(config, RTORun) and config.schedule.critic is not None:
        layouts["schedule.critic"] = config.schedule.critic
    for name, layout in layouts.items():
        if config.compute.packing and layout.context > 1:
            raise ConfigError(
                f"compute.packing must be null or false with {name}.context > 1, got true with {name}.context "
                f"{layout.context}; null pads the rows of such models"
            )


def check_length(max_length: int, architecture: ModelConfig) -> None:
    """Raise ConfigError if rows may be longer than the model can see."""
    if max_length > architecture.max_length:
        raise ConfigError(
            f"data.max_length must be at most the model's {architecture.max_length} tokens (model.max_length), "
            f"got {max_length}"
        )


def check_window(rollout: RolloutConfig, architecture: ModelConfig, name: str) -> None:
    """Raise ConfigError if a prompt and its response may be longer than a role can see."""
    window = rollout.longest
    if window > architecture.max_length:
        raise ConfigError(
            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + rollout.max_new_tokens "
            f"{rollout.max_new_tokens} must be at most the {architecture.max_length} tokens that {name} can see, "
            f"got {window}"
        )


def check_kind(checkpoint: Checkpoint, kind: Kind) -> None:
    """Raise CheckpointError where a policy is wanted of a run that has none."""
    # With tied embeddings a reward model has all the weights of a policy, but it has unlearned to write.
    if kind == "policy" and "policy" not in checkpoint.manifest.models:
        raise CheckpointError(
            f"{checkpoint.folder}: a policy must start from a run of sft, dpo, rto, ppo or convert, got one of "
            f"{checkpoint.manifest.stage}, which holds none; name such a run"
        )


def check_adapters(checkpoint: Checkpoint, kind: Kind, lora: LoRAConfig | None) -> None:
    """Raise UserError unless the weights that a run's adapters belong to are there, and `lora` can go on with them."""
    base = checkpoint.manifest.bases.get(checkpoint.manifest.role_for(kind))
    if base is None:
        return
    open_base(checkpoint, base)
    if lora is not None and lora != base.lora:
        raise ConfigError(
            f"lora must be as that of {checkpoint.folder}, whose adapters are trained on: rank {base.lora.rank}, alpha "
            f"{base.lora.alpha:g}, targets {', '.join(base.lora.targets)}; got rank {lora.rank}, alpha {lora.alpha:g}, "
            f"targets {', '.join(lora.targets)}; or convert that run and its adapters are part of its weights"
        )


def check_holds_scores(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint holds a reward model: a trained one, or one that was converted."""
    if "value" not in checkpoint.manifest.models:
        raise CheckpointError(
            f"{checkpoint.folder}: `reward_model` must be a run of the stage reward, or convert of a reward model, got "
            f"one of {checkpoint.manifest.stage}, whose head would score at random; name a reward run"
        )


def check_same_tokenizer(first: Checkpoint, other: Checkpoint) -> None:
    """Raise CheckpointError unless both read and write the same tokens."""
    if other.manifest.tokenizer == first.manifest.tokenizer:
        return
    templates = [
        path.read_bytes() if (path := checkpoint.tokenizer_folder / TEMPLATE_FILE).is_file() else b""
        for checkpoint in (first, other)
    ]
    what = "tokenizer" if templates[0] == templates[1] else "chat template"
    raise CheckpointError(
        f"{other.folder}: its {what} differs from that of {first.folder}; all roles of a run must share both, "
        "so train them from one start"
    )


def check_lineage(dpo: Checkpoint, reference: Checkpoint, *, allowed: bool) -> None:
    """Raise CheckpointError unless the DPO policy was trained from this reference."""
    parent = dpo.manifest.parents.get("reference")
    if parent != reference.id and not allowed:
        raise CheckpointError(
            f"{dpo.folder}: was trained from the reference {parent or '(none recorded)'}, but `reference` is "
            f"{reference.folder} with id {reference.id}; name the SFT run that DPO started from, train DPO again, "
            "or set allow_other_reference to true"
        )
