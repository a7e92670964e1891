"""The roles of an interleaved run, as far as this rank holds them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.config.run import RTORun
from rto_megatron.data.tokenizer import Tokenizer
from rto_megatron.distributed.checkpoint import Checkpoint
from rto_megatron.distributed.mesh import Mesh, check_seed, role_mesh, seed_streams
from rto_megatron.distributed.optimizer import Trainable, make_trainable
from rto_megatron.distributed.refit import Refit
from rto_megatron.distributed.runtime import Runtime, rank
from rto_megatron.models.gpt import PolicyModel
from rto_megatron.models.heads import ScalarModel
from rto_megatron.schedule.cast import Cast
from rto_megatron.stages.actors import Judges, load_judges
from rto_megatron.stages.roles import Trunks, load_role, tokenizer_of
from rto_megatron.stages.rules import check_run, roles_of


@dataclass(frozen=True, kw_only=True)
class Players:
    """What this rank holds of each role; None of those that are elsewhere."""

    group: int
    """This rank's group of the schedule."""
    policy_mesh: Mesh | None
    critic_mesh: Mesh | None
    own_mesh: Mesh
    """Of its group: where it writes and scores."""
    policy: Trainable[PolicyModel] | None
    critic: Trainable[ScalarModel] | None
    writer: PolicyModel | None
    """The weights that write: the policy's own, or a copy in the layout of the rollout ranks."""
    judges: Judges | None
    """The frozen roles, where it scores."""
    old_policy: PolicyModel | None
    """What scores as the policy: the weights that it trains or writes with, or a copy of those that wrote."""
    old_critic: ScalarModel | None
    refits: dict[str, list[Refit]]
    """`engine`, `scorer` -> what a refit item of that role moves; the same on all ranks."""
    tokenizer: Tokenizer
    parents: dict[str, Checkpoint]

    def refit(self, role: str) -> int:
        """Take this rank's part in moving new weights to `engine` or `scorer`; bytes that it received."""
        return sum(refit.run() for refit in self.refits[role] if rank() in refit.ranks)


def load_players(config: RTORun, cast: Cast, runtime: Runtime, *, moves: bool) -> Players:
    """Load the roles that this rank has; all ranks of the world take part.

    Args:
        moves: whether weights may move while responses that they wrote are unscored.

    Raises:
        ConfigError, CheckpointError: as `check_run` and `load_role`.
    """
    check_seed(config.seed)
    parents = check_run(config, cast.policy.num_replicas)
    meshes = {
        name: role_mesh(troupe.parallel, runtime, ranks=troupe.ranks)
        for name, troupe in (("policy", cast.policy), ("engine", cast.engine), ("critic", cast.critic))
    }
    group, place = cast.group_of(rank()), cast.placement
    own = meshes["policy"] or meshes["engine"] or meshes["critic"]
    assert own is not None, "every rank has a role"
    seed_streams(config.seed, own)

    trunks, scores = Trunks.of_run(config, parents), group in place.scorers
    judges = load_judges(config, own if scores else None, trunks)
    load = partial(_load, config, trunks)
    policy = load("policy", meshes["policy"], cast.policy.parallel)
    critic = load("critic", meshes["critic"], cast.critic.parallel)
    writer, refits = policy, {"engine": [], "scorer": []}
    if not place.shares_weights:
        writer = load("policy", meshes["engine"], cast.engine.parallel)
        refits["engine"].append(Refit(policy, writer))
    copies: dict[str, Any] = {"policy": None, "critic": None}
    for role, trained in (("policy", policy), ("critic", critic)):
        takers = [number for number in place.groups if place.needs_copy(number, role, moves=moves)]
        if takers:
            copies[role] = load(role, own if group in takers else None, config.parallel)
            refits["scorer"].append(Refit(trained, copies[role]))
    judges.stay_for(policy, critic, writer, *copies.values())
    return Players(
        group=group,
        policy_mesh=meshes["policy"],
        critic_mesh=meshes["critic"] if critic is not None else None,
        own_mesh=own,
        policy=_trainable("policy", policy, config, meshes["policy"]),
        critic=_trainable("critic", critic, config, meshes["critic"]),
        writer=writer,
        judges=judges if scores else None,
        old_policy=copies["policy"] or policy or writer,
        old_critic=copies["critic"] or critic,
        refits=refits,
        tokenizer=tokenizer_of(parents["policy"]),
        parents=parents,
    )


def _load(config: RTORun, trunks: Trunks | None, role: str, mesh: Mesh | None, parallel: ParallelConfig) -> Any:
    """The policy or the critic as the run starts with it; None where the run has no such role, or the rank no mesh."""
    path = next((one.path for one in roles_of(config) if one.name == role), None)
    if path is None:
        return None
    kind, lora = ("policy", config.lora) if role == "policy" else ("value", config.critic_lora)
    model, _ = load_role(
        path,
        kind,
        mesh,
        parallel=parallel,
        compute=config.compute,
        frozen=False,  # copies neither: Megatron multiplies with frozen weights in another way, with other last bits
        temperature=config.rollout.log_prob_temperature,
        lora=lora,
        seed=config.seed,
        trunks=trunks,
    )
    return model


def _trainable(name: str, model: Any, config: RTORun, mesh: Mesh | None) -> Any:
    if model is None or mesh is None:
        return None
    return make_trainable(name, model, config.optimizer if name == "policy" else config.critic_optimizer, mesh)
