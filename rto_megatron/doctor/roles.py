"""Are the checkpoints whole, and do the roles belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rto_megatron.config.run import EvaluateRun, RTORun, SFTRun
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint, check_file, file_hash, open_checkpoint, written_hashes
from rto_megatron.doctor.findings import Section
from rto_megatron.metrics import in_units
from rto_megatron.models.footprint import Model
from rto_megatron.stages.roles import models_of, tokenizer_of
from rto_megatron.stages.rules import Role, architecture_rules, role_rules, roles_of
from rto_megatron.stages.sft import from_scratch

HASHED_UNASKED = 2 << 30
"""Bytes of checkpoints whose files are hashed without --hashes: seconds."""

FLAT = 0.1
"""A standard deviation of raw scores below which a reward model hardly tells responses apart: the log-odds of one
standard deviation apart are 0.52 to 0.48."""


@dataclass(frozen=True)
class Roles:
    """What a run would be made of, as far as it can be read."""

    models: list[Model]
    """Those that are in memory together."""
    tokenizer: Tokenizer | None
    opened: dict[str, Checkpoint]
    """By role."""
    missing: list[str]
    """Roles whose checkpoint cannot be opened."""


def check_roles(found: Section, config: Any, *, hashes: bool) -> Roles:
    """Open all checkpoints and check every rule between them.

    Args:
        hashes: compare all files with their hashes, however large they are.
    """
    opened = _open(found, roles_of(config))
    if _all_hold(found, config, opened) and len(opened) > 1:
        _look_at_vocabularies(found, config, opened)
    tokenizer = _check_files(found, opened, hashes=hashes)
    models = models_of([role for role in _held_at_once(config) if role.name in opened], opened)
    if isinstance(config, SFTRun) and config.start is None:
        tokenizer = _look_at_a_fresh_model(found, config, models)
    if isinstance(config, RTORun | EvaluateRun):
        _look_at_judges(found, config, opened)
    missing = [role.name for role in roles_of(config) if role.name not in opened]
    return Roles(models, tokenizer, opened, missing)


def _open(found: Section, roles: Sequence[Role]) -> dict[str, Checkpoint]:
    """The checkpoints by role; each run is opened once, however many roles come from it."""
    by_path: dict[Path, Checkpoint | None] = {}
    for role in roles:
        if role.path not in by_path:
            names = " and ".join(other.name for other in roles if other.path == role.path)
            by_path[role.path] = found.attempt(
                partial(open_checkpoint, role.path), why=f"its weights are those of {names}", way_out="train it first"
            )
    return {role.name: checkpoint for role in roles if (checkpoint := by_path[role.path]) is not None}


def _held_at_once(config: Any) -> list[Role]:
    """The roles that are in memory together: of compared policies one, and the next while it is loaded."""
    roles = roles_of(config)
    return roles[: len(roles) - max(0, len(config.checkpoints) - 2)] if isinstance(config, EvaluateRun) else roles


def _all_hold(found: Section, config: Any, opened: Mapping[str, Checkpoint]) -> bool:
    before = len(found.findings)
    for rule in role_rules(config, opened):
        found.attempt(rule.check, why=rule.why, way_out="set a value that fits")
    return len(found.findings) == before


def _look_at_vocabularies(found: Section, config: Any, opened: Mapping[str, Checkpoint]) -> None:
    digest = next(iter(opened.values())).manifest.tokenizer[:12]
    found.ok(f"{', '.join(opened)} share tokenizer and chat template (digest {digest})")
    kinds = {role.name: role.kind for role in roles_of(config)}
    sizes = {name: opened[name].manifest.architecture_for(kinds[name]).vocab_size for name in opened}
    if len(set(sizes.values())) > 1:
        found.note(
            f"their vocabularies differ: {', '.join(f'{name} {size}' for name, size in sizes.items())}",
            why="the tokenizer is one, so this is padding, which has probability 0 here",
        )


def _look_at_a_fresh_model(found: Section, config: SFTRun, models: list[Model]) -> Tokenizer | None:
    made = found.attempt(
        partial(from_scratch, config),
        why="a model from scratch is as wide as its tokenizer",
        way_out="give a .model file or a tokenizer folder",
    )
    if made is None:
        return None
    tokenizer, architecture = made
    for rule in architecture_rules(config, architecture, "the model"):
        found.attempt(rule.check, why=rule.why, way_out="set a value that fits")
    found.ok(f"the model is made from scratch, with the {tokenizer.vocab_size} tokens of {config.tokenizer.path}")
    models.append(Model(name="policy", architecture=architecture, kind="policy", optimizer=config.optimizer))
    return tokenizer


def _check_files(found: Section, opened: Mapping[str, Checkpoint], *, hashes: bool) -> Tokenizer | None:
    """Files against their hashes, tokenizers against their digests; a tokenizer that is whole."""
    tokenizer, folders = None, {checkpoint.folder: checkpoint for checkpoint in opened.values()}
    written = {folder: written_hashes(folder) for folder in folders}
    sizes = [(f / n).stat().st_size for f, names in written.items() for n in names if (f / n).is_file()]
    hashed = hashes or sum(sizes) <= HASHED_UNASKED
    for folder, checkpoint in folders.items():
        whole = found.attempt(
            partial(_compare, checkpoint, written[folder], hashed=hashed),
            why="a run refuses weights that are not those that were saved",
        )
        if whole:
            state = "as they were saved" if hashed else "there"
            found.ok(f"{folder}: step {checkpoint.manifest.step} of {checkpoint.manifest.stage}, all files are {state}")
        read = found.attempt(
            partial(tokenizer_of, checkpoint),
            why="ids would stand for other tokens than those that the weights were trained on",
            way_out="restore the checkpoint or train again",
        )
        tokenizer = tokenizer or read
    if folders and not hashed:
        found.note(
            f"the hashes of {in_units(sum(sizes))} were not compared, only that the files are there",
            why="that takes minutes; the run compares them when it loads",
            way_out="--hashes=true compares them now",
        )
    return tokenizer


def _compare(checkpoint: Checkpoint, written: Mapping[str, str], *, hashed: bool) -> bool:
    """True; raises CheckpointError at the first file that is missing or changed."""
    for name, digest in written.items():
        path = checkpoint.folder / name
        found = (file_hash(path) if hashed else digest) if path.is_file() else None
        check_file(path, found, digest)
    return True


def _look_at_judges(found: Section, config: RTORun | EvaluateRun, opened: Mapping[str, Checkpoint]) -> None:
    dpo, reference = opened.get("dpo"), opened.get("reference")
    if dpo and reference:
        if dpo.manifest.parents.get("reference") == reference.id:
            found.ok("the DPO policy was trained from this reference")
        elif config.allow_other_reference:
            found.warning(
                "the DPO policy was trained from another reference, and allow_other_reference lets it pass",
                why="log pi_dpo - log pi_ref then also holds how far the two references are apart",
                way_out="name the SFT run that DPO started from",
            )
        if dpo.id == reference.id:
            found.warning(
                "the DPO policy and the reference are the same checkpoint",
                why="the DPO term is 0 on every token",
                way_out="name the DPO run in `dpo`, or set rto.dpo_coef to 0",
            )
        temperature = config.rollout.log_prob_temperature
        if temperature != 1:
            found.note(
                f"rollout.temperature is {temperature:g}, and DPO was trained at 1",
                why="all log-probs of the run are taken at the rollout's temperature, so the DPO term is the log-ratio "
                "of two sharpened (below 1) or flattened policies, larger or smaller by about 1 / temperature",
            )
    reward = opened.get("reward_model")
    if reward and "value" in reward.manifest.models:
        mean, std = reward.manifest.score_mean, reward.manifest.score_std
        if reward.manifest.stage == "convert" and (mean, std) == (0, 1):
            found.warning(
                "the reward model was converted without score_data: its scores are not normalised",
                why="rto.score_coef and rto.score_clip mean standard deviations of the score, and this model's may be "
                "far from 1",
                way_out="convert it again with score_data, pairs like those of this run",
            )
        elif std < FLAT:
            found.warning(
                f"the reward model is nearly flat: its raw scores have a standard deviation of {std:.2g}",
                why=f"scores are divided by it, so differences of the size of its errors are made {1 / std:.0f} times "
                "as large and the policy learns them",
                way_out="train the reward model longer or on more pairs, and look at its held-out accuracy",
            )
        else:
            found.ok(f"scores are normalised by the reward run's mean {mean:.3g} and standard deviation {std:.3g}")
    if "critic" in opened and isinstance(config, RTORun) and config.critic is None:
        start = "reward_model" if config.reward_model else "policy"
        found.ok(f"the critic starts from the {start} (`critic` is null)")
