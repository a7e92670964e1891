"""Direct preference optimization (arXiv 2305.18290): a policy whose log-ratio to the reference is a reward."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rto_megatron.algorithms.dpo import DPOLoss, dpo_loss, sequence_log_probs
from rto_megatron.algorithms.masked import masked_sum
from rto_megatron.algorithms.pairs import pair_metrics, pair_sums, split_pairs
from rto_megatron.algorithms.preference_losses import rdpo_loss, simpo_loss, tdpo_loss, thumbs_loss
from rto_megatron.batch import DPOBatch
from rto_megatron.config.algorithm import DPOConfig
from rto_megatron.config.run import DPORun
from rto_megatron.data.collate import collate_preferences
from rto_megatron.data.readers import PreferenceRow, read_preferences
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import Runtime
from rto_megatron.distributed.step import Loss, log_probs_and_kl, token_log_probs
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.stages.resume import Checkpoints, check_unchanged, is_finished, listening_for_stop, own_checkpoint
from rto_megatron.stages.roles import load_role, tokenizer_of
from rto_megatron.stages.rules import check_run
from rto_megatron.stages.run import open_run
from rto_megatron.stages.supervised import Task, fit, manifest_of, read_rows, score_rows, size_table

ScoredRow = tuple[PreferenceRow, Tensor]
"""A pair and the reference's log-prob of its chosen and its rejected response, [2] nats."""


@listening_for_stop()
def run(config: DPORun, runtime: Runtime) -> None:
    """Train the DPO policy from the SFT run, which is its reference."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    check_run(config, mesh.data.size)
    own = own_checkpoint(config, "dpo")
    cut = {"parallel": config.parallel, "compute": config.compute}
    model, parent = load_role(config.start, "policy", mesh, **cut, frozen=False, lora=config.lora, seed=config.seed)
    tokenizer, architecture = tokenizer_of(parent), parent.manifest.architecture_for("policy")
    rows, held_out, about_rows = read_rows(read_preferences, config, tokenizer)
    parents = {"reference": parent}
    manifest = manifest_of("dpo", "policy", config, architecture, tokenizer, rows, held_out, parents)
    check_unchanged(own, manifest)
    if is_finished(own, manifest.step):
        return

    sizes = size_table(config, len(rows), len(held_out), mesh.data.size)
    with open_run(config, "dpo", mesh, sizes, own=own) as running:
        running.console.say(about_rows)
        # the policy has not moved yet, so it is the reference: no second model is needed
        scored = with_reference(model, rows, config, tokenizer, mesh)
        scored_held_out = with_reference(model, held_out, config, tokenizer, mesh)
        policy = make_trainable("policy", model, config.optimizer, mesh)
        checkpoints = Checkpoints(config, {"policy": policy}, lambda: manifest, tokenizer, manifest.step)
        reference = None
        if config.dpo.reads_distributions:
            reference, _ = load_role(config.start, "policy", mesh, **cut, frozen=True)
            reference.gives_hidden = True
        task = make_task(config, tokenizer, mesh, reference)
        fit(policy, task, scored, scored_held_out, config, mesh, running, checkpoints=checkpoints, own=own)


def with_reference(
    model: PolicyModel, rows: list[PreferenceRow], config: DPORun, tokenizer: Tokenizer, mesh: Mesh
) -> list[ScoredRow]:
    """Pairs with the log-probs that `model` gives their responses."""
    if not rows:
        return []
    batch = collate_preferences(rows, tokenizer.pad_id).to(mesh.device)
    log_probs = score_rows(model, batch, token_log_probs, config, mesh, unit=2)[..., 0]
    totals = sequence_log_probs(log_probs, batch.response_mask).cpu().view(-1, 2)
    return list(zip(rows, totals, strict=True))


def pair_loss(output: Tensor, batch: DPOBatch, config: DPOConfig, num_pairs: int) -> DPOLoss:
    """The loss that the config names; `output` [2P, T, 2 or 3] of the policy, chosen and rejected responses in turn."""
    chosen, rejected = split_pairs(sequence_log_probs(output[..., 0], batch.response_mask))
    policy = {"policy_chosen": chosen, "policy_rejected": rejected}
    of_ref, of_tokens = split_pairs(batch.ref_log_probs), split_pairs(batch.response_mask.sum(-1))
    ref = {"ref_chosen": of_ref[0], "ref_rejected": of_ref[1]}
    tokens = {"chosen_tokens": of_tokens[0], "rejected_tokens": of_tokens[1]}
    shared = {"beta": config.beta, "num_pairs": num_pairs}
    match config.loss:
        case "rdpo":
            return rdpo_loss(**policy, **ref, **tokens, length_coef=config.length_coef, **shared)
        case "simpo":
            return simpo_loss(**policy, **tokens, margin=config.margin, **shared)
        case "tdpo1" | "tdpo2":
            of_kl = split_pairs(masked_sum(output[..., 2], batch.response_mask, -1))
            kl = {"chosen_kl": of_kl[0], "rejected_kl": of_kl[1]}
            kl_coef = config.drift_coef if config.loss == "tdpo2" else None
            return tdpo_loss(**policy, **ref, **kl, kl_coef=kl_coef, **shared)
        case "una":
            return thumbs_loss(**policy, **ref, **shared)
    return dpo_loss(**policy, **ref, label_smoothing=config.label_smoothing, loss=config.loss, **shared)


def make_task(config: DPORun, tokenizer: Tokenizer, mesh: Mesh, reference: PolicyModel | None = None) -> Task:
    """The DPO loss, averaged over the pairs of the minibatch.

    Args:
        reference: where the loss reads whole distributions.
    """

    def collate(rows: Sequence[ScoredRow]) -> DPOBatch:
        pairs = collate_preferences([row for row, _ in rows], tokenizer.pad_id)
        return DPOBatch(
            tokens=pairs.tokens,
            num_tokens=pairs.num_tokens,
            response_mask=pairs.response_mask,
            ref_log_probs=torch.cat([totals for _, totals in rows]),
        ).to(mesh.device)

    def make_loss(whole: DPOBatch) -> Loss:
        num_pairs = len(whole) // 2

        def loss(output: Tensor, batch: DPOBatch) -> tuple[Tensor, Tensor]:
            result = pair_loss(output, batch, config.dpo, num_pairs)
            better, worse = result.chosen_rewards, result.rejected_rewards
            return result.loss, pair_sums(result.loss, chosen=better, rejected=worse, num_pairs=num_pairs)

        return loss

    return Task(
        group="dpo",
        collate=collate,
        forward=token_log_probs if reference is None else log_probs_and_kl(reference),
        make_loss=make_loss,
        num_sums=4,
        summarise=partial(pair_metrics, side="reward"),
        rows_per_item=2,
    )
