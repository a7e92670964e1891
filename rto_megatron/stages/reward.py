"""The sentence reward model: a score for a whole response, learned from pairs."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from rto_megatron.algorithms.pairs import pair_metrics, pair_sums, split_pairs
from rto_megatron.algorithms.reward_model import pairwise_loss, sequence_scores
from rto_megatron.batch import PreferenceBatch
from rto_megatron.config.run import ConvertRun, RewardRun
from rto_megatron.data.collate import collate_preferences
from rto_megatron.data.readers import PreferenceRow, read_preferences
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Manifest
from rto_megatron.distributed.mesh import Mesh, build_mesh
from rto_megatron.distributed.optimizer import make_trainable
from rto_megatron.distributed.runtime import Runtime
from rto_megatron.distributed.step import Loss, head_outputs_at_end
from rto_megatron.models.heads import ScalarModel
from rto_megatron.stages.resume import Checkpoints, check_unchanged, is_finished, listening_for_stop, own_checkpoint
from rto_megatron.stages.roles import load_role, tokenizer_of
from rto_megatron.stages.rules import check_run
from rto_megatron.stages.run import open_run
from rto_megatron.stages.supervised import Task, fit, manifest_of, read_rows, score_rows, size_table


@listening_for_stop()
def run(config: RewardRun, runtime: Runtime) -> None:
    """Train a scalar head and its backbone; store mean and std of the scores with the weights."""
    mesh = build_mesh(config.parallel, runtime, seed=config.seed)
    check_run(config, mesh.data.size)
    own = own_checkpoint(config, "reward")
    model, parent = load_role(
        config.start,
        "value",
        mesh,
        parallel=config.parallel,
        compute=config.compute,
        frozen=False,
        seed=config.seed,
        lora=config.lora,
    )
    tokenizer, architecture = tokenizer_of(parent), parent.manifest.architecture_for("value")
    rows, held_out, about_rows = read_rows(read_preferences, config, tokenizer)
    parents = {"start": parent}
    manifest = manifest_of("reward", "value", config, architecture, tokenizer, rows, held_out, parents)
    check_unchanged(own, manifest)
    if is_finished(own, manifest.step):
        return

    sizes = size_table(config, len(rows), len(held_out), mesh.data.size)
    with open_run(config, "reward", mesh, sizes, own=own) as running:
        running.console.say(about_rows)
        trainable = make_trainable("reward model", model, config.optimizer, mesh)

        def with_moments() -> Manifest:
            mean, std = score_moments(model, held_out or rows, config, tokenizer, mesh)
            running.console.say(f"scores: mean {mean:.4g}, std {std:.4g}")
            return replace(manifest, score_mean=mean, score_std=std)

        checkpoints = Checkpoints(config, {"value": trainable}, with_moments, tokenizer, manifest.step)
        task = make_task(config, tokenizer, mesh)
        fit(trainable, task, rows, held_out, config, mesh, running, checkpoints=checkpoints, own=own)


def score_moments(
    model: ScalarModel, rows: list[PreferenceRow], config: RewardRun | ConvertRun, tokenizer: Tokenizer, mesh: Mesh
) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores of all responses, chosen and rejected.

    On held-out rows where there are some: scores of rows it was trained on are spread too far.
    """
    batch = collate_preferences(rows, tokenizer.pad_id).to(mesh.device)
    outputs = score_rows(model, batch, head_outputs_at_end, config, mesh, unit=2)
    scores = sequence_scores(outputs, batch.num_tokens).double()
    return scores.mean().item(), max(scores.std(correction=0).item(), 1e-6)


def make_task(config: RewardRun, tokenizer: Tokenizer, mesh: Mesh) -> Task:
    """The Bradley-Terry loss, averaged over the pairs of the minibatch."""

    def make_loss(whole: PreferenceBatch) -> Loss:
        num_pairs = len(whole) // 2

        def loss(output: Tensor, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
            chosen, rejected = split_pairs(sequence_scores(output, batch.num_tokens))
            value = pairwise_loss(chosen=chosen, rejected=rejected, loss=config.reward.loss, num_pairs=num_pairs)
            return value, pair_sums(value, chosen=chosen, rejected=rejected, num_pairs=num_pairs)

        return loss

    return Task(
        group="reward_model",
        collate=lambda rows: collate_preferences(rows, tokenizer.pad_id).to(mesh.device),
        forward=head_outputs_at_end,
        make_loss=make_loss,
        num_sums=4,
        summarise=partial(pair_metrics, side="score"),
        rows_per_item=2,
    )
