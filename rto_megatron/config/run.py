"""One dataclass a stage: all that a run's YAML file may say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rto_megatron.config.algorithm import (
    AdvantageConfig,
    DPOConfig,
    DRTOConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RTOConfig,
)
from rto_megatron.config.checkpoint import CheckpointConfig
from rto_megatron.config.data import DataConfig, PromptsConfig, TokenizerConfig
from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.config.report import AlarmsConfig, CreditConfig
from rto_megatron.config.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of supervised training (sft, dpo, reward)."""

    batch_size: int = 32
    """Rows per optimizer step, over all ranks; a pair is one row."""
    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; null runs all epochs."""
    eval_every: int = 0
    """Optimizer steps between evaluations; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be 1 or more, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"train.max_steps must be 1 or more or null, got {self.max_steps}; null runs all epochs")
        if self.eval_every < 0:
            raise ValueError(f"train.eval_every must be 0 or more, got {self.eval_every}; 0 evaluates at the end only")


def _check_apart(run_dir: Path, **inputs: Path | None) -> None:
    """Raise ValueError if a run would be written over one that it reads: the fields of `inputs`."""
    for name, path in inputs.items():
        if path is not None and path.absolute() == run_dir.absolute():
            raise ValueError(f"run_dir must not be the run that {name} names, got {run_dir} for both")


def _check_no_context(parallel: ParallelConfig, why: str) -> None:
    """Raise ValueError where context ranks would have nothing to share."""
    if parallel.context > 1:
        raise ValueError(f"parallel.context must be 1 here, got {parallel.context}: {why}; give it more data ranks")


@dataclass(frozen=True, kw_only=True)
class SFTRun:
    """Supervised fine-tuning: the likelihood of the response tokens."""

    run_dir: Path
    """Where checkpoint, TensorBoard files and the resolved config go."""
    data: DataConfig
    start: Path | None = None
    """A run folder to start from; null starts from scratch with `model` and `tokenizer`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig | None = None
    """Train adapters on the frozen weights of `start`; null trains all weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    """Of weights, fresh adapters and data order."""

    def __post_init__(self) -> None:
        _check_apart(self.run_dir, start=self.start)
        if self.start is None and self.lora is not None:
            raise ValueError("lora must be null for a model from scratch: adapters correct a trained one; set `start`")
        if self.start is not None:
            for name, default in (("model", ModelConfig()), ("tokenizer", TokenizerConfig())):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} must not be set where `start` names a run, which brings its own; delete it"
                    )


@dataclass(frozen=True, kw_only=True)
class DPORun:
    """Direct preference optimization from the SFT model."""

    run_dir: Path
    """Where checkpoint, TensorBoard files and the resolved config go."""
    start: Path
    """The SFT run: it is the reference too, and is recorded as this checkpoint's parent."""
    data: DataConfig
    dpo: DPOConfig = field(default_factory=DPOConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig | None = None
    """Train adapters on the frozen weights of `start`; null trains all weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    """Of fresh adapters and data order."""

    def __post_init__(self) -> None:
        _check_apart(self.run_dir, start=self.start)
        if self.dpo.reads_distributions and self.parallel.pipeline > 1:
            raise ValueError(
                f"parallel.pipeline must be 1 with dpo.loss {self.dpo.loss}, which needs the reference's distribution "
                f"where the policy's is, got {self.parallel.pipeline}"
            )


@dataclass(frozen=True, kw_only=True)
class RewardRun:
    """A sentence reward model from pairs; its score's mean and std are stored with it."""

    run_dir: Path
    """Where checkpoint, TensorBoard files and the resolved config go."""
    start: Path
    """The run whose backbone the reward model starts from; the critic's where it has one."""
    data: DataConfig
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoRAConfig | None = None
    """Train adapters on the frozen weights of `start`; null trains all weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    """Of the fresh head, fresh adapters and the data order."""

    def __post_init__(self) -> None:
        _check_apart(self.run_dir, start=self.start)


@dataclass(frozen=True, kw_only=True)
class RTORun:
    """Reinforced token optimization: rollouts, token rewards, PPO."""

    run_dir: Path
    """Where checkpoint, TensorBoard files and the resolved config go."""
    policy: Path
    """The run that the policy starts from: the DPO or the SFT run."""
    reference: Path
    """The SFT run: pi_ref of the DPO term and of the KL penalty."""
    dpo: Path | None = None
    """The DPO run: pi_dpo. Needed unless rto.dpo_coef is 0."""
    reward_model: Path | None = None
    """The reward run. Needed unless rto.score_coef is 0."""
    critic: Path | None = None
    """The run that the critic starts from; null takes the reward run, else the policy's."""
    data: PromptsConfig
    num_steps: int = 20
    """Rounds of rollout and update."""
    prompts_per_step: int = 32
    """Prompts of one rollout, over all ranks."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    samples_per_optimizer_step: int = 16
    """Responses of one PPO minibatch, over all ranks; divides prompts_per_step x samples_per_prompt."""
    eval_every: int = 0
    """Steps between evaluations on data.eval; 0 evaluates at start and end only."""
    grader: str | None = None
    """`module:function` of yours that grades held-out answers: function(prompts, responses), two lists of texts -> a
    number for each response, the higher the better. Imported from where the command is started; null asks nobody."""
    allow_other_reference: bool = False
    """Go on although the DPO run's recorded parent is not `reference`."""
    rto: RTOConfig = field(default_factory=RTOConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    drto: DRTOConfig = field(default_factory=DRTOConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The policy's."""
    critic_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The critic's."""
    lora: LoRAConfig | None = None
    """Train adapters on the frozen weights of `policy`; null trains all weights of the policy."""
    critic_lora: LoRAConfig | None = None
    """The same for the critic, whose scalar head is trained beside them."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Of all roles but those that `schedule` names on ranks of their own."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    """Of prompts, samples, minibatches, a fresh critic head and fresh adapters."""

    def __post_init__(self) -> None:
        inputs = ("policy", "reference", "dpo", "reward_model", "critic")
        _check_apart(self.run_dir, **{name: getattr(self, name) for name in inputs})
        for name in ("num_steps", "prompts_per_step", "samples_per_prompt", "samples_per_optimizer_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be 0 or more, got {self.eval_every}; 0 evaluates at start and end only")
        samples = self.prompts_per_step * self.samples_per_prompt
        if samples % self.samples_per_optimizer_step:
            raise ValueError(
                f"samples_per_optimizer_step must divide the {samples} samples of a step "
                f"(prompts_per_step {self.prompts_per_step} x samples_per_prompt {self.samples_per_prompt}), "
                f"got {self.samples_per_optimizer_step}"
            )
        if self.rto.dpo_coef > 0 and self.dpo is None:
            raise ValueError("dpo must name the DPO run, got null; or set rto.dpo_coef to 0, which is plain PPO")
        if self.rto.score_coef > 0 and self.reward_model is None:
            raise ValueError("reward_model must name the reward run, got null; or set rto.score_coef to 0")
        if self.rto.dpo_coef == 0 and self.rto.score_coef == 0:
            raise ValueError("rto.dpo_coef and rto.score_coef are both 0: there is nothing to learn; set one of them")
        if self.schedule.critic_ranks and self.advantage.estimator != "gae":
            raise ValueError(
                f"schedule.critic_ranks must be 0 without a critic (advantage.estimator {self.advantage.estimator}), "
                f"got {self.schedule.critic_ranks}"
            )
        if self.critic_lora is not None and self.advantage.estimator != "gae":
            raise ValueError(
                f"critic_lora must be null without a critic (advantage.estimator {self.advantage.estimator}); delete it"
            )
        for name in ("lora", "critic_lora"):
            lora = getattr(self, name)
            if lora is not None and self.schedule.map == "split":
                raise ValueError(
                    f"{name} must be null with schedule.map split, got rank {lora.rank}: its ranks hold copies of what "
                    "is trained; take another map, or set it to null"
                )
        if self.rollout.temperature == 0:
            raise ValueError(
                "rollout.temperature must be positive in training, got 0 (greedy samples have no log-probs)"
            )
        if self.rollout.top_k or self.rollout.top_p < 1:
            raise ValueError(
                "rollout.top_k and rollout.top_p must be 0 and 1 in training, got "
                f"{self.rollout.top_k} and {self.rollout.top_p}: log-probs are of the full distribution"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateRun:
    """Responses of a checkpoint to a file of prompts, as JSON lines."""

    checkpoint: Path
    """The run whose policy answers."""
    prompts: str
    """JSONL path or data-set name."""
    out: Path
    """The JSONL file to write: prompt, response, tokens, log_probs, truncated."""
    too_long: Literal["drop", "error"] = "drop"
    """A prompt over rollout.max_prompt_tokens is dropped and counted, or an error."""
    max_prompts: int | None = None
    """Answer only the first so many; null answers all."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts must be 1 or more or null, got {self.max_prompts}; null takes all")
        _check_no_context(self.parallel, "a response is written token by token")


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """Held-out score, KL and reward terms of one or more policies, as a table."""

    run_dir: Path
    """Where the table (Markdown and JSON) and the responses go."""
    checkpoints: tuple[Path, ...]
    """The runs whose policies are compared; the others' win rates are against the first."""
    reference: Path
    """The SFT run, for the KL."""
    dpo: Path | None = None
    """The DPO run, for the DPO term; null leaves it out."""
    reward_model: Path
    """The reward run, for the score."""
    prompts: str
    """Held-out prompts: JSONL path or data-set name."""
    too_long: Literal["drop", "error"] = "drop"
    """A prompt over rollout.max_prompt_tokens is dropped and counted, or an error."""
    max_prompts: int | None = None
    """Evaluate on the first so many; null takes all."""
    grader: str | None = None
    """`module:function` of yours that grades held-out answers: function(prompts, responses), two lists of texts -> a
    number for each response, the higher the better. Imported from where the command is started; null asks nobody."""
    num_shown: int = 3
    """Prompts whose responses are printed."""
    allow_other_reference: bool = False
    """Go on although the DPO run's recorded parent is not `reference`."""
    rto: RTOConfig = field(default_factory=RTOConfig)
    """The coefficients by which the terms of the return are compared."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("checkpoints must name at least one run, got none")
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise ValueError(f"checkpoints must name each run once, got {', '.join(map(str, self.checkpoints))}")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"max_prompts must be 1 or more or null, got {self.max_prompts}; null takes all")


@dataclass(frozen=True, kw_only=True)
class ConvertRun:
    """Hugging Face folder -> run folder, or back."""

    source: Path
    """A Hugging Face folder or one of our run folders; what it is decides the direction."""
    out: Path
    """The folder to write; must not exist."""
    role: Literal["policy", "value", "critic"] | None = None
    """Of a run: which model to write; null takes its policy, else its reward model (value), else its critic."""
    chat_template: Path | None = None
    """Of a Hugging Face folder: a Jinja file to store with the tokenizer; null keeps the folder's."""
    tokenizer: Path | None = None
    """Of a Hugging Face folder: a run whose tokenizer and chat template to store instead of the folder's, so that the
    models can be roles of one run; null keeps the folder's. Both must give the same ids."""
    score_data: str | None = None
    """Of a Hugging Face reward model: pairs (JSONL path or data-set name) on whose responses the mean and standard
    deviation of its scores are taken; null takes config.json's score_mean and score_std, else 0 and 1."""
    verify: bool = True
    """End with a comparison of every tensor, and of logits or scores of a few texts, with the model in transformers.
    It needs room for the whole model in float32 on the main rank's machine; false where there is none."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.chat_template is not None:
            raise ValueError(
                f"chat_template must be null where `tokenizer` names a run, which brings its own, "
                f"got {self.chat_template}"
            )
        _check_no_context(self.parallel, "there are no long rows in a conversion")


STAGES = {
    "sft": SFTRun,
    "dpo": DPORun,
    "reward": RewardRun,
    "rto": RTORun,
    "ppo": RTORun,
    "generate": GenerateRun,
    "evaluate": EvaluateRun,
    "convert": ConvertRun,
}
"""Stage name on the command line -> the config it takes."""


def stage_of(config: object) -> str:
    """The stage that a config is for; PPO is RTO whose DPO coefficient is 0."""
    if isinstance(config, RTORun) and config.rto.dpo_coef == 0:
        return "ppo"
    return next(stage for stage, config_class in STAGES.items() if config_class is type(config))
