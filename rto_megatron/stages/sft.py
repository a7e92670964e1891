"""Supervised fine-tuning: raise the likelihood of the response tokens."""

from dataclasses import replace

import torch
from torch import Tensor

from rto_megatron.algorithms.masked import token_weights, weighted_sum
from rto_megatron.algorithms.sft import lm_loss
from rto_megatron.batch import SFTBatch
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.run import SFTRun
from rto_megatron.data.collate import collate_sft
from rto_megatron.data.readers import read_sft
from rto_megatron.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import Runtime
from rto_megatron.distributed.step import Loss, token_log_probs
from rto_megatron.errors import ConfigError
from rto_megatron.models.gpt import PolicyModel, build_model
from rto_megatron.stages.resume import Checkpoints, check_unchanged, is_finished, listening_for_stop, own_checkpoint
from rto_megatron.stages.roles import load_role, never_sampled, tokenizer_of
from rto_megatron.stages.rules import architecture_rules, check_run
from rto_megatron.stages.run import open_run
from rto_megatron.stages.supervised import Task, fit, manifest_of, read_rows, size_table


@listening_for_stop()
def run(config: SFTRun, runtime: Runtime) -> None:
    """Train a policy from scratch, or from another run, on (prompt, response) rows."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    check_run(config, mesh.data.size)
    own = own_checkpoint(config, "sft")
    model, tokenizer, architecture, parent = _start(config, mesh)
    rows, held_out, about_rows = read_rows(read_sft, config, tokenizer)
    parents = {"start": parent} if parent else {}
    manifest = manifest_of("sft", "policy", config, architecture, tokenizer, rows, held_out, parents)
    check_unchanged(own, manifest)
    if is_finished(own, manifest.step):
        return

    sizes = size_table(config, len(rows), len(held_out), mesh.data.size)
    with open_run(config, "sft", mesh, sizes, own=own) as running:
        running.console.say(about_rows)
        policy = make_trainable("policy", model, config.optimizer, mesh)
        checkpoints = Checkpoints(config, {"policy": policy}, lambda: manifest, tokenizer, manifest.step)
        task = make_task(tokenizer, mesh)
        fit(policy, task, rows, held_out, config, mesh, running, checkpoints=checkpoints, own=own)


def _start(config: SFTRun, mesh: Mesh) -> tuple[PolicyModel, Tokenizer, ModelConfig, Checkpoint | None]:
    if config.start is not None:
        cut = {"parallel": config.parallel, "compute": config.compute}
        model, parent = load_role(config.start, "policy", mesh, **cut, frozen=False, lora=config.lora, seed=config.seed)
        return model, tokenizer_of(parent), parent.manifest.architecture_for("policy"), parent
    tokenizer, architecture = from_scratch(config)
    for rule in architecture_rules(config, architecture, "the model"):
        rule.check()
    model = build_model(
        architecture,
        mesh,
        kind="policy",
        parallel=config.parallel,
        compute=config.compute,
        banned_ids=never_sampled(tokenizer, architecture.vocab_size),
        seed=config.seed,
    )
    return model, tokenizer, architecture, None


def from_scratch(config: SFTRun) -> tuple[Tokenizer, ModelConfig]:
    """What a model that starts from nothing is made of.

    Raises:
        ConfigError: there is no tokenizer, or it does not fit the model.
    """
    if config.tokenizer.path is None:
        raise ConfigError("tokenizer.path must be set for a model from scratch; or name a run to start from in `start`")
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.chat_template)
    if not config.model.vocab_size:
        return tokenizer, replace(config.model, vocab_size=tokenizer.vocab_size)
    check_vocabulary(tokenizer, config.model.vocab_size)
    return tokenizer, config.model


def make_task(tokenizer: Tokenizer, mesh: Mesh) -> Task:
    """Maximum likelihood: the mean over all response tokens of the minibatch."""

    def make_loss(whole: SFTBatch) -> Loss:
        count = int(whole.response_mask.sum())

        def loss(output: Tensor, batch: SFTBatch) -> tuple[Tensor, Tensor]:
            log_probs, entropies = output.unbind(-1)
            weights = token_weights(batch.response_mask, loss_mean="token", count=count)
            value = lm_loss(log_probs, weights)
            return value, torch.stack((value.detach(), weighted_sum(entropies, weights)))

        return loss

    return Task(
        group="sft",
        collate=lambda rows: collate_sft(rows, tokenizer.pad_id).to(mesh.device),
        forward=token_log_probs,
        make_loss=make_loss,
        num_sums=2,
        summarise=lambda sums: {"loss": sums[0].item(), "entropy": sums[1].item()},
    )
