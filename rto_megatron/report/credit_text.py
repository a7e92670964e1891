"""Token credit of a text that no run has written: the roles of a checkpoint's run read it."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from rto_megatron.algorithms.sequences import join_rows
from rto_megatron.batch import Rollout
from rto_megatron.config.load import load_run
from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.config.schedule import ScheduleConfig
from rto_megatron.credit.record import Evaluation, describe
from rto_megatron.data.readers import PromptRow, SFTRow, read_prompts, read_sft
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, open_checkpoint
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import start_runtime, stop_runtime
from rto_megatron.errors import ConfigError, DataError
from rto_megatron.report.credit_options import Options
from rto_megatron.rollout.experience import sentence_ends_of
from rto_megatron.stages.actors import load_judges, score_rollout
from rto_megatron.stages.roles import load_role, tokenizer_of
from rto_megatron.stages.rules import check_run, roles_of

ROLES = ("reference", "dpo", "reward_model")
ANY_LENGTH = 1 << 30


def evaluate_text(options: Options) -> Evaluation:
    """What the roles say of the responses in `options.text`, as an evaluation; in one process.

    Raises:
        ConfigError, CheckpointError, DataError: roles are missing or do not belong together, or the file is wrong.
    """
    assert options.checkpoint is not None and options.text is not None
    checkpoint = open_checkpoint(options.checkpoint)
    tokenizer = tokenizer_of(checkpoint)
    rows, prompts = read_responses(options.text, options.prompt, tokenizer)
    critic = options.critic or (options.checkpoint if "critic" in checkpoint.manifest.models else None)
    config = config_for(options, checkpoint, critic, rows)
    check_lengths(options.text, rows, config)
    check_run(config, 1)
    mesh = build_mesh(config.parallel, start_runtime(threads=config.compute.threads), seed=config.seed)
    cut = {"parallel": config.parallel, "compute": config.compute, "temperature": config.rollout.log_prob_temperature}
    policy, _ = load_role(options.checkpoint, "policy", mesh, frozen=True, **cut)
    values = load_role(critic, "value", mesh, frozen=True, **cut)[0] if critic else None
    rollout = as_rollout(rows, tokenizer.pad_id).to(mesh.device)
    judges = load_judges(config, mesh)
    signals = score_rollout(rollout, policy=policy, critic=values, judges=judges, config=config, mesh=mesh)
    kl_coef = checkpoint.manifest.progress.get("kl_coef", config.rto.kl_coef)
    responses = describe(
        rollout,
        signals,
        [(prompt.index, prompt.text) for prompt in prompts],
        tokenizer,
        config.rto,
        config.advantage,
        kl_coef=kl_coef,
        has_critic=values is not None,
        sentence_ends=sentence_ends_of(config.rto, tokenizer),
    )
    stop_runtime()
    return Evaluation(
        name=f"{options.text.name} read by {checkpoint.manifest.stage} step {checkpoint.manifest.step}",
        step=checkpoint.manifest.step,
        coefs={"dpo_coef": config.rto.dpo_coef, "kl_coef": kl_coef, "score_coef": config.rto.score_coef},
        num_prompts=len(responses),
        sampled=False,
        responses=responses,
    )


def read_responses(path: Path, prompt: str | None, tokenizer: Tokenizer) -> tuple[list[SFTRow], list[PromptRow]]:
    """Rows of a JSONL file, or a plain text as one row; as ids and, for people, as text.

    Raises:
        ConfigError: `prompt` is missing for a text, or given for rows that have their own.
        DataError: the file or a row of it is wrong.
    """
    if path.suffix == ".jsonl":
        if prompt is not None:
            raise ConfigError(f"prompt must not be set with {path}, whose rows have their own; delete it")
        rows, _ = read_sft(str(path), tokenizer, max_length=ANY_LENGTH, too_long="error")
        return rows, read_prompts(str(path), tokenizer, max_prompt_tokens=ANY_LENGTH, too_long="error")[0]
    if prompt is None:
        raise ConfigError(f"prompt must say what the text in {path} answers, got null; or name a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be a readable UTF-8 text file, got: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / f"{path.name}.jsonl"
        row.write_text(json.dumps({"prompt": prompt, "response": text.removesuffix("\n")}) + "\n")
        return read_responses(row, None, tokenizer)


def config_for(options: Options, checkpoint: Checkpoint, critic: Path | None, rows: list[SFTRow]) -> RTORun:
    """An rto config for one process whose window takes the rows; its roles are the options', else those of the run.

    Raises:
        ConfigError: a role is missing.
    """
    given = {name: path for name in ROLES if (path := getattr(options, name)) is not None}
    words = [f"--{name}={path}" for name, path in given.items()]
    words += [f"--policy={options.checkpoint}", f"--run_dir={options.text}.credit", f"--data.train={options.text}"]
    longest = max(len(row.prompt_ids) + len(row.response_ids) for row in rows)
    longest_response = max(len(row.response_ids) for row in rows)
    words += [
        f"--rollout.max_prompt_tokens={longest - longest_response}",  # together what the longest row has
        f"--rollout.max_new_tokens={longest_response}",
        # nothing is decoded, and a cache of the run's may not fit this window
        "--rollout.kv_block_tokens=0",
        "--rollout.kv_blocks=null",
        # without a critic the credit of a token is all that comes from it on
        f"--advantage.estimator={'gae' if critic else 'reinforce_pp'}",
    ]
    words += [f"--critic={critic}"] if critic else []
    if checkpoint.manifest.stage in ("rto", "ppo"):
        config = load_run("rto", checkpoint.folder.parents[1] / "run.yaml", words)
        return replace(config, parallel=ParallelConfig(), schedule=ScheduleConfig())
    for name in ("reference", "dpo"):
        if name not in given:
            raise ConfigError(
                f"{name} must name a run, got null: {checkpoint.folder} is of the stage {checkpoint.manifest.stage}, "
                "and only an rto run knows its reference and DPO runs"
            )
    return load_run("rto", None, words if "reward_model" in given else [*words, "--rto.score_coef=0"])


def check_lengths(path: Path, rows: list[SFTRow], config: RTORun) -> None:
    """Raise DataError if a row is longer than one of the roles can see."""
    for role in roles_of(config):
        most = open_checkpoint(role.path).manifest.architecture_for(role.kind).max_length
        for number, row in enumerate(rows, 1):
            if len(row.prompt_ids) + len(row.response_ids) > most:
                raise DataError(
                    f"{path}: row {number} must have at most the {most} tokens that the {role.name} ({role.path}) can "
                    f"see, got {len(row.prompt_ids)} of the prompt and {len(row.response_ids)} of the response; cut it"
                )


def as_rollout(rows: list[SFTRow], pad_id: int) -> Rollout:
    """The rows as if they had been sampled; their log-probs in decoding are unknown, and 0."""
    tokens, num_tokens, mask = join_rows(
        [row.prompt_ids for row in rows], [row.response_ids for row in rows], pad_id=pad_id
    )
    return Rollout(
        tokens=tokens,
        num_tokens=num_tokens,
        response_mask=mask,
        decode_log_probs=torch.zeros(tokens.shape),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
    )
