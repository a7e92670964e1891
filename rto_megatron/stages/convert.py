"""Hugging Face folder -> run folder, and back."""

import shutil
from pathlib import Path
from typing import Any

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.run import ConvertRun
from rto_megatron.data.readers import read_preferences
from rto_megatron.data.tokenizer import TEMPLATE_FILE, Tokenizer, check_vocabulary, load_tokenizer
from rto_megatron.data.tokenizer_files import check_tokenizer_files
from rto_megatron.distributed.checkpoint import TRACKER, Manifest, open_checkpoint
from rto_megatron.distributed.collectives import barrier
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.runtime import Runtime, is_main
from rto_megatron.distributed.save import save_checkpoint
from rto_megatron.errors import CheckpointError, ConfigError
from rto_megatron.metrics import Console
from rto_megatron.models.gpt import Kind, build_model
from rto_megatron.models.hf_check import TEXTS, Agreement, check_hf
from rto_megatron.models.hf_config import Scoring, config_from_hf, scoring_from_hf
from rto_megatron.models.hf_export import attempt, save_hf
from rto_megatron.models.hf_weights import load_hf, raise_together
from rto_megatron.stages.reward import score_moments
from rto_megatron.stages.roles import load_role, tokenizer_of


def run(config: ConvertRun, runtime: Runtime) -> None:
    """Bring Hugging Face weights into a run folder, or write a run's model for transformers; `source` decides."""
    inward = is_hugging_face(config.source)
    mesh, console = build_mesh(config.parallel, runtime, seed=0), Console(is_main())
    check_out(config.out)
    check_direction(config, inward=inward)
    barrier()  # before any rank writes there
    (_bring_in if inward else _write_out)(config, mesh, console)
    console.say(f"{config.source} -> {config.out}")


def check_out(out: Path) -> None:
    """Raise ConfigError if something is there already, or a draft of it."""
    if out.exists():
        raise ConfigError(f"out {out}: must not exist, and does; name another folder or remove it")
    if draft_of(out).exists():
        raise ConfigError(
            f"out {out}: its draft {draft_of(out)} is left from a conversion that did not end well; look at it, then "
            "remove it"
        )


def draft_of(out: Path) -> Path:
    """Where a Hugging Face folder is written before it is found to be the model."""
    return out.with_name(out.name + ".draft")


def is_hugging_face(source: Path) -> bool:
    """Whether a folder is a Hugging Face one; False for a run folder or a step of one.

    Raises:
        ConfigError: it is neither.
    """
    if not source.exists():
        raise ConfigError(f"source {source}: there is no such folder; give a Hugging Face folder or a run folder")
    if any((source / name).exists() for name in ("checkpoints", TRACKER, "checkpoint.json")):
        return False
    if (source / "config.json").exists():
        return True
    found = ", ".join(sorted(path.name for path in source.iterdir())[:10]) if source.is_dir() else "a file"
    raise ConfigError(
        f"source {source}: must be a Hugging Face folder (config.json) or a run folder (checkpoints/), "
        f"found {found or 'an empty folder'}"
    )


def check_direction(config: ConvertRun, *, inward: bool) -> None:
    """Raise ConfigError where a field is set that is about the other direction."""
    for name in ("role",) if inward else ("chat_template", "tokenizer", "score_data"):
        value = getattr(config, name)
        if value is not None:
            why = "the class in config.json says what it holds" if inward else "it has its own"
            where = "a Hugging Face folder is brought in" if inward else "a run is written out"
            raise ConfigError(f"{name} must be null where {where} ({why}), got {value}; delete it")


def choose_tokenizer(config: ConvertRun) -> Tokenizer:
    """A Hugging Face folder's own, or that of the run `tokenizer`.

    Raises:
        ConfigError: the run's does not read texts as the folder's does.
    """
    if config.tokenizer is None:
        return load_tokenizer(config.source, config.chat_template)
    checkpoint = open_checkpoint(config.tokenizer)
    chosen = tokenizer_of(checkpoint)
    own = load_tokenizer(config.source, checkpoint.tokenizer_folder / TEMPLATE_FILE)
    for text in TEXTS:
        if own.encode(text) != chosen.encode(text):
            raise ConfigError(
                f"tokenizer {config.tokenizer}: must give the same ids as that of {config.source}, which differs on "
                f"{text[:30]!r}...; a model reads only the ids that it was trained with"
            )
    return chosen


def check_scoring(config: ConvertRun, scoring: Scoring | None, tokenizer: Tokenizer) -> None:
    """Raise UserError if scores are wanted of a policy, or are read elsewhere than here."""
    if scoring is None and config.score_data is not None:
        raise ConfigError(
            f"score_data must be null where a policy is brought in (it has no scores), got {config.score_data}; "
            "delete it"
        )
    if scoring is not None and scoring.pad_id == tokenizer.eos_id:
        raise CheckpointError(
            f"{config.source}/config.json: pad_token_id must not be the tokenizer's EOS, got {scoring.pad_id} for "
            "both: transformers then reads the score before the EOS, and here it is read at it; if that is where the "
            "model was trained to be read, set pad_token_id to an id that texts do not hold"
        )


def role_to_write(config: ConvertRun, manifest: Manifest) -> str:
    """The role of a run that is written out.

    Raises:
        CheckpointError: the run has none of the name.
    """
    role = config.role or next(role for role in ("policy", "value", "critic") if role in manifest.models)
    if role not in manifest.models:
        raise CheckpointError(
            f"{config.source}: must hold the role {role} to write it out, holds {', '.join(manifest.models)}; "
            "name one of these"
        )
    return role


def _bring_in(config: ConvertRun, mesh: Mesh, console: Console) -> None:
    architecture, scoring = config_from_hf(config.source), scoring_from_hf(config.source)
    tokenizer = choose_tokenizer(config)
    check_vocabulary(tokenizer, architecture.vocab_size)
    check_scoring(config, scoring, tokenizer)
    kind: Kind = "policy" if scoring is None else "value"
    model = build_model(architecture, mesh, kind=kind, parallel=config.parallel, compute=config.compute, seed=None)
    model.eval().requires_grad_(False)
    load_hf(model, config.source, architecture)
    if config.verify:
        console.say(str(_check(model, architecture, config.source, tokenizer, config, mesh)))
    mean, std = _moments(model, scoring, tokenizer, architecture.max_length, config, mesh) if scoring else (0.0, 1.0)
    if scoring:
        console.say(f"scores: mean {mean:.4g}, std {std:.4g}")
    manifest = Manifest(
        stage="convert",
        step=0,
        models={kind: architecture},
        tokenizer=tokenizer.digest(),
        score_mean=mean,
        score_std=std,
    )
    try:
        save_checkpoint(config.out, manifest, {kind: model}, tokenizer.save)
    except CheckpointError:
        if is_main():
            shutil.rmtree(config.out, ignore_errors=True)
        raise


def _moments(
    model: Any, scoring: Scoring, tokenizer: Tokenizer, max_length: int, config: ConvertRun, mesh: Mesh
) -> tuple[float, float]:
    """Mean and standard deviation by which a reward model's scores are normalised."""
    if config.score_data is None:
        return scoring.mean, scoring.std
    rows, _ = read_preferences(config.score_data, tokenizer, max_length=max_length, too_long="drop")
    return score_moments(model, rows, config, tokenizer, mesh)


def _write_out(config: ConvertRun, mesh: Mesh, console: Console) -> None:
    manifest = open_checkpoint(config.source).manifest
    role = role_to_write(config, manifest)
    kind: Kind = "policy" if role == "policy" else "value"
    model, checkpoint = load_role(
        config.source, kind, mesh, parallel=config.parallel, compute=config.compute, frozen=True
    )
    assert manifest.role_for(kind) == role, f"a value model is loaded from {manifest.role_for(kind)}, not from {role}"
    architecture, tokenizer, scoring = manifest.models[role], tokenizer_of(checkpoint), None
    if kind == "value":  # a critic's values are normalised by nothing
        scoring = Scoring(mean=manifest.score_mean, std=manifest.score_std) if role == "value" else Scoring()
    draft = draft_of(config.out)
    save_hf(model, architecture, draft, tokenizer, scoring=scoring)
    if config.verify:
        try:
            agreement = _check(model, architecture, draft, tokenizer, config, mesh)
            raise_together(attempt(lambda: check_tokenizer_files(tokenizer, draft, TEXTS, names_pad=kind == "value")))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; out {config.out} is not written, its draft is left") from None
        console.say(str(agreement))
    raise_together(attempt(lambda: draft.rename(config.out)))
    if kind == "value" and is_main():
        _say_bias(config.out, console)


def _check(
    model: Any, architecture: ModelConfig, folder: Path, tokenizer: Tokenizer, config: ConvertRun, mesh: Mesh
) -> Agreement:
    return check_hf(model, architecture, folder, tokenizer, mesh, cut=config.compute.score_cut)


def _say_bias(folder: Path, console: Console) -> None:
    scoring = scoring_from_hf(folder)
    if scoring is not None and scoring.bias != 0:
        console.say(
            f"the head's bias {scoring.bias:.6g} is score_bias in config.json: transformers' classes have none, so add "
            "it to their scores"
        )
