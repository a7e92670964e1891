"""The models of a run, loaded from the checkpoints that the config names."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rto_megatron.config.lora import LoRAConfig
from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, FrozenWeights, load_weights, open_base, open_checkpoint
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.errors import CheckpointError
from rto_megatron.models.footprint import Model
from rto_megatron.models.gpt import Kind, build_model
from rto_megatron.models.lora import merge_into, share_base
from rto_megatron.models.weights import initialize
from rto_megatron.stages.rules import Role, check_adapters, check_kind, roles_of


@dataclass(frozen=True)
class Trunks:
    """Frozen weights of a run that several roles have in common: each is held once."""

    held: dict[tuple[str, str], Any] = field(default_factory=dict)
    """(id of a checkpoint, its folder of weights) -> a model that has these weights and never moves them."""

    @classmethod
    def of_run(cls, config: Any, opened: Mapping[str, Checkpoint]) -> "Trunks | None":
        """None where no role of the run has adapters."""
        return cls() if _have_adapters(roles_of(config), opened) else None

    def share(self, model: Any, checkpoint_id: str, role: str) -> None:
        """Give a model the frozen weights that are held already, or hold its own for those to come."""
        held = self.held.setdefault((checkpoint_id, role), model)
        if held is not model:
            share_base(model, held)


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
    lora: LoRAConfig | None = None,
    trunks: Trunks | None = None,
) -> tuple[Any, Checkpoint]:
    """A model with the weights of a run, and the checkpoint it came from.

    A value model takes the run's reward model or critic; where there is none, its policy under a fresh head
    (from `seed`). A frozen role has no gradients. All ranks of the world call; where `mesh` is None the model is too.

    Args:
        lora: train adapters of this kind: those of the run where it has some, else fresh ones (from `seed`). Without,
            a run's adapters are added to its weights.
        trunks: share frozen weights with the roles that were loaded with it before, all in one layout; a frozen role's
            adapters then stay apart.

    Raises:
        CheckpointError: as `open_checkpoint` and `load_weights`; or a policy is wanted of a run that has none.
        ConfigError: the run's adapters are of another kind than `lora`.
    """
    checkpoint = open_checkpoint(path)
    check_kind(checkpoint, kind)
    check_adapters(checkpoint, kind, lora)
    role = checkpoint.manifest.role_for(kind)
    base = checkpoint.manifest.bases.get(role)
    loader = _Loader(checkpoint.manifest.models[role], kind, mesh, parallel, compute, temperature, seed, checkpoint)
    if lora is None and base is not None and trunks is not None and frozen:
        lora = base.lora
    if lora is not None:
        model = loader.adapted(role, base, lora, trunks)
    elif base is not None:
        model = loader.merged(role, base)
    else:
        model = loader.plain(role, trunks if frozen else None, local=trunks is not None and frozen)
    if frozen and model is not None:
        model.eval().requires_grad_(False)
    return model, checkpoint


def base_of(checkpoint: Checkpoint, kind: Kind, lora: LoRAConfig | None, run_dir: Path) -> FrozenWeights | None:
    """What a checkpoint of `run_dir` says of the adapters that are trained on a role of `checkpoint`, if any are."""
    if lora is None:
        return None
    role = checkpoint.manifest.role_for(kind)
    base, steps = checkpoint.manifest.bases.get(role), run_dir.resolve() / "checkpoints"
    owner = checkpoint if base is None else open_base(checkpoint, base)
    folder = os.path.relpath(owner.folder.resolve(), steps / "step")
    return FrozenWeights(id=owner.id, folder=folder, role=base.role if base else role, lora=lora)


def bases_of(*told: tuple[str, FrozenWeights | None]) -> dict[str, FrozenWeights]:
    """(role, its base) -> a manifest's `bases`."""
    return {role: base for role, base in told if base is not None}


def models_of(roles: Sequence[Role], opened: Mapping[str, Checkpoint]) -> list[Model]:
    """What is loaded for the roles of a run, in their order: who has adapters, and who shares whose frozen weights."""
    made: list[Model] = []
    held: dict[tuple[str, str], int] = {}
    for role in roles:
        manifest = opened[role.name].manifest
        stored = manifest.role_for(role.kind)
        base, lora, trunk = manifest.bases.get(stored), role.lora, None
        if _have_adapters(roles, opened) and any(other.optimizer for other in roles):  # else they are merged
            lora = base.lora if lora is None and base is not None and role.optimizer is None else lora
            if lora is not None or (role.optimizer is None and base is None):
                trunk = (base.id, base.role) if base else (opened[role.name].id, stored)
        model = Model(
            name=role.name,
            architecture=manifest.models[stored],
            kind=role.kind,
            optimizer=role.optimizer,
            lora=lora,
            shared=trunk in held,
        )
        if trunk is not None:
            owner = held.setdefault(trunk, len(made))
            if role.optimizer is not None and owner < len(made):
                made[owner] = replace(made[owner], stays=made[owner].optimizer is None)
        made.append(model)
    return made


def _have_adapters(roles: Sequence[Role], opened: Mapping[str, Checkpoint]) -> bool:
    manifests = [(role, opened[role.name].manifest) for role in roles]
    return any(role.lora is not None or told.role_for(role.kind) in told.bases for role, told in manifests)


@dataclass(frozen=True)
class _Loader:
    """Builds the model of one role and fills it."""

    architecture: ModelConfig
    kind: Kind
    mesh: Mesh | None
    parallel: ParallelConfig
    compute: ComputeConfig
    temperature: float
    seed: int
    checkpoint: Checkpoint

    def build(self, *, lora: LoRAConfig | None = None, local: bool = False) -> Any:
        """With unknown weights, a fresh head where there is one, and fresh adapters; None where there is no mesh."""
        if self.mesh is None:
            return None
        model = build_model(
            self.architecture,
            self.mesh,
            kind=self.kind,
            parallel=self.parallel,
            compute=self.compute,
            temperature=self.temperature,
            banned_ids=never_sampled(tokenizer_of(self.checkpoint), self.architecture.vocab_size),
            seed=None,
            lora=lora,
            local=local,
        )
        for fresh in ("value_head",) * (self.kind == "value") + (".lora_",) * (lora is not None):
            initialize(model, self.architecture, seed=self.seed, only=fresh)
        return model

    def plain(self, role: str, trunks: Trunks | None, *, local: bool) -> Any:
        """All weights from the role's own folder."""
        model = self.build(local=local)
        load_weights(model, self.checkpoint, role)
        if trunks is not None and model is not None:
            trunks.share(model, self.checkpoint.id, role)
        return model

    def adapted(self, role: str, base: FrozenWeights | None, lora: LoRAConfig, trunks: Trunks | None) -> Any:
        """Adapters on frozen weights, which are shared if they are there already."""
        owner = self.checkpoint if base is None else open_base(self.checkpoint, base)
        key = owner.id, role if base is None else base.role
        model = self.build(lora=lora)
        load_weights(model, owner, key[1], base=True)
        if base is not None:
            load_weights(model, self.checkpoint, role)
        if trunks is not None and model is not None:
            trunks.share(model, *key)
        return model

    def merged(self, role: str, base: FrozenWeights) -> Any:
        """A model without adapters, whose weights hold what those of the run add."""
        adapted, plain = self.adapted(role, base, base.lora, None), self.build()
        if plain is not None:
            merge_into(plain, adapted)
        return plain


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
