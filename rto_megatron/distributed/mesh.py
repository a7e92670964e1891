"""The grid of ranks: who shares a matrix, who shares the layers, who holds another part of the batch.

Everybody reads the mesh. Megatron's global parallel state knows one grid a process and is never set up: models, DDP,
optimizers and schedules are given their groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.distributed.runtime import Runtime, world_size
from rto_megatron.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One direction of the grid, as this rank sees it."""

    rank: int
    size: int
    group: dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This rank's place in the grid."""

    groups: ProcessGroupCollection
    """The same groups as Megatron's models, schedules and optimizers take them."""
    tensor: Axis
    """Ranks that share each matrix."""
    pipeline: Axis
    """Ranks that share the layers, first stage first."""
    context: Axis
    """Ranks that hold the same weights and different columns of the same rows."""
    data: Axis
    """Ranks that hold the same weights and different rows."""
    runtime: Runtime

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        return self.runtime.device

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, and so has the loss."""
        return self.pipeline.rank == self.pipeline.size - 1


def build_mesh(parallel: ParallelConfig, runtime: Runtime, *, seed: int) -> Mesh:
    """Cut the whole world into tensor x context x data x pipeline ranks and seed Megatron's random streams.

    Raises:
        ConfigError: a replica's ranks do not divide the world, or the seed is out of range.
    """
    check_seed(seed)
    num_data = parallel.data(world_size())
    mesh = role_mesh(parallel, runtime, ranks=range(world_size()))
    assert mesh is not None and mesh.data.size == num_data
    seed_streams(seed, mesh)
    return mesh


def role_mesh(parallel: ParallelConfig, runtime: Runtime, *, ranks: range) -> Mesh | None:
    """Cut some ranks of the world into tensor x context x data x pipeline ranks; None on the others.

    Roles on ranks of their own get a mesh each. All ranks of the world must ask for the same meshes in the same
    order. Who asks for one again gets the same groups: every gloo group keeps threads until the process ends.

    Raises:
        ConfigError: a replica's ranks do not divide their number.
    """
    key = parallel.tensor, parallel.context, parallel.pipeline, ranks
    if key not in _made:
        _made[key] = _make_groups(parallel, ranks)
    groups = _made[key]
    if groups is None:
        return None
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # sequence parallelism gathers into it, whatever the groups
        parallel_state._set_global_memory_buffer()
    return Mesh(
        groups=groups,
        tensor=_axis(groups.tp),
        pipeline=_axis(groups.pp),
        context=_axis(groups.cp),
        data=_axis(groups.dp),
        runtime=runtime,
    )


_made: dict[tuple[int, int, int, range], ProcessGroupCollection | None] = {}
"""(tensor, context, pipeline, ranks) -> this rank's groups of that grid."""


def _make_groups(parallel: ParallelConfig, ranks: range) -> ProcessGroupCollection | None:
    """Every group that Megatron's models, DDP, optimizer and schedules ask a collection for.

    In its default order: tensor ranks are neighbours, then context ranks, pipeline stages farthest apart.
    """
    shape = [1, parallel.tensor, parallel.context, parallel.data(len(ranks)), parallel.pipeline]
    names = ["alone", "tp", "cp", "dp", "pp"]  # the first for ranks that have an axis to themselves
    grid = HyperCommGrid(shape, names, rank_offset=ranks.start)
    made: dict[tuple[str, ...], Any] = {}

    def over(*axes: str) -> dist.ProcessGroup | None:
        wide = tuple(name for name, size in zip(names, shape, strict=True) if size > 1 and name in axes)
        if wide not in made:
            made[wide] = grid.create_pg(list(wide) or ["alone"])
        return made[wide]

    alone, tensor, context, pipeline, data = over(), over("tp"), over("cp"), over("pp"), over("dp")
    model, copies, whole = over("tp", "pp"), over("cp", "dp"), over("tp", "cp", "dp", "pp")
    stages = grid.get_rank_enum("pp")
    ends = alone
    if parallel.pipeline > 1:  # first and last stage share the embedding's gradient
        ends, _ = dist.new_subgroups_by_enumeration([[line[0], line[-1]] for line in stages])
    if dist.get_rank() not in ranks:
        return None
    return ProcessGroupCollection(
        tp=tensor,
        pp=pipeline,
        dp=data,
        cp=context,
        mp=model,
        embd=ends,
        pos_embd=alone if dist.get_rank() in {line[0] for line in stages} else None,
        tp_cp=over("tp", "cp"),
        dp_cp=copies,
        intra_dp_cp=copies,
        tp_dp_cp=over("tp", "cp", "dp"),
        intra_dist_opt=whole,
        inter_dist_opt=None,
        # there are no experts: each of their axes is one rank wide, and what is left of it is data parallel
        ep=alone,
        expt_tp=tensor,
        tp_ep=tensor,
        tp_ep_pp=model,
        expt_dp=copies,
        intra_expt_dp=copies,
    )


def check_seed(seed: int) -> None:
    """Raise ConfigError unless torch can take the seed, to which each stage adds."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be 0 or more and below 2^63, got {seed}; torch takes no more bits")


def seed_streams(seed: int, mesh: Mesh) -> None:
    """Seed the generators of dropout and of weights that Megatron draws itself.

    Data ranks agree and stages differ; tensor ranks agree in the default stream and differ in the model-parallel one.
    """
    # As Megatron's own training does it: the stride keeps stages clear of the tensor ranks' offsets.
    stage_seed = seed + 100 * mesh.pipeline.rank
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, tp_rank=mesh.tensor.rank, ep_rank=0, etp_rank=0, force_reset_rng=True)


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=group.rank(), size=group.size(), group=group)
