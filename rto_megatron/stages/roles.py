"""The models of a run, loaded from the checkpoints that the config names."""

from pathlib import Path
from typing import Any

from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, load_weights, open_checkpoint
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.errors import CheckpointError
from rto_megatron.models.gpt import Kind, build_model
from rto_megatron.models.weights import initialize
from rto_megatron.stages.rules import check_kind


def load_role(
    path: Path,
    kind: Kind,
    mesh: Mesh | None,
    *,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    frozen: bool,
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[Any, Checkpoint]:
    """A model with the weights of a run, and the checkpoint it came from.

    A value model takes the run's reward model or critic; where there is none, its policy under a fresh head
    (from `seed`). A frozen role has no gradients. All ranks of the world call; where `mesh` is None the model is too.

    Raises:
        CheckpointError: as `open_checkpoint` and `load_weights`; or a policy is wanted of a run that has none.
    """
    checkpoint = open_checkpoint(path)
    check_kind(checkpoint, kind)
    role = checkpoint.manifest.role_for(kind)
    architecture = checkpoint.manifest.models[role]
    if mesh is None:
        load_weights(None, checkpoint, role)
        return None, checkpoint
    model = build_model(
        architecture,
        mesh,
        kind=kind,
        parallel=parallel,
        compute=compute,
        temperature=temperature,
        banned_ids=never_sampled(tokenizer_of(checkpoint), architecture.vocab_size),
        seed=None,
    )
    if kind == "value":
        initialize(model, architecture, seed=seed, only="value_head")
    load_weights(model, checkpoint, role)
    if frozen:
        model.eval().requires_grad_(False)
    return model, checkpoint


def never_sampled(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """Ids of probability 0: the pad id, and rows of the embedding that stand for no token."""
    return tokenizer.pad_id, *range(tokenizer.vocab_size, vocab_size)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Raises:
        CheckpointError: the folder holds another one than the manifest says.
        ConfigError: it has more tokens than the model.
    """
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    if tokenizer.digest() != checkpoint.manifest.tokenizer:
        raise CheckpointError(f"{checkpoint.tokenizer_folder}: is not the tokenizer that the checkpoint was saved with")
    for architecture in checkpoint.manifest.models.values():
        check_vocabulary(tokenizer, architecture.vocab_size)
    return tokenizer
