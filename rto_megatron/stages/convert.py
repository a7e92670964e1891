"""Hugging Face folder -> run folder, and back."""

import shutil
from pathlib import Path

from rto_megatron.config.run import ConvertRun
from rto_megatron.data.tokenizer import check_vocabulary, load_tokenizer
from rto_megatron.distributed.checkpoint import TRACKER, Manifest, open_checkpoint
from rto_megatron.distributed.collectives import barrier
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.runtime import Runtime, is_main
from rto_megatron.distributed.save import save_checkpoint
from rto_megatron.errors import CheckpointError, ConfigError
from rto_megatron.metrics import Console
from rto_megatron.models.gpt import build_model
from rto_megatron.models.hf_config import config_from_hf
from rto_megatron.models.hf_export import save_hf
from rto_megatron.models.hf_weights import load_hf
from rto_megatron.stages.roles import load_role, tokenizer_of


def run(config: ConvertRun, runtime: Runtime) -> None:
    """Bring Hugging Face weights into a run folder, or write a run's policy for transformers; `source` decides."""
    inward = is_hugging_face(config.source)
    mesh = build_mesh(config.parallel, runtime, seed=0)
    if config.out.exists():
        raise ConfigError(f"out {config.out}: must not exist, and does; name another folder or remove it")
    barrier()  # before any rank writes there
    try:
        (_bring_in if inward else _write_out)(config, mesh)
    except Exception:
        if is_main():
            shutil.rmtree(config.out, ignore_errors=True)
        raise
    Console(is_main()).say(f"{config.source} -> {config.out}")


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


def _bring_in(config: ConvertRun, mesh: Mesh) -> None:
    model_config = config_from_hf(config.source)
    tokenizer = load_tokenizer(config.source, config.chat_template)
    check_vocabulary(tokenizer, model_config.vocab_size)
    model = build_model(model_config, mesh, kind="policy", parallel=config.parallel, compute=config.compute, seed=None)
    load_hf(model, config.source, model_config)
    manifest = Manifest(stage="convert", step=0, models={"policy": model_config}, tokenizer=tokenizer.digest())
    save_checkpoint(config.out, manifest, {"policy": model}, tokenizer.save)


def _write_out(config: ConvertRun, mesh: Mesh) -> None:
    if config.chat_template is not None:
        raise ConfigError(
            f"chat_template must be null where a run is written out: it has its own; got {config.chat_template}"
        )
    checkpoint = open_checkpoint(config.source)
    if "policy" not in checkpoint.manifest.models:
        raise CheckpointError(
            f"{checkpoint.folder}: must hold a policy to be written out, holds {', '.join(checkpoint.manifest.models)}"
        )
    tokenizer = tokenizer_of(checkpoint)
    model, _ = load_role(config.source, "policy", mesh, parallel=config.parallel, compute=config.compute, frozen=True)
    save_hf(model, checkpoint.manifest.models["policy"], config.out, tokenizer)
