"""The grid of ranks: who shares a matrix, who shares the layers, who holds another part of the batch.

Everybody reads the mesh; only this module touches Megatron's global parallel state.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
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
    """Cut the world into tensor x pipeline x data ranks and seed Megatron's random streams.

    A second call in one process must ask for the same sizes and gets the same groups: every gloo group keeps threads
    until the process ends, so groups are never torn down and rebuilt.

    Raises:
        ConfigError: tensor x pipeline does not divide the world, or the seed is out of range.
    """
    check_seed(seed)
    num_data = parallel.data(world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(parallel.tensor, parallel.pipeline, create_gloo_process_groups=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mesh = Mesh(
        groups=groups, tensor=_axis(groups.tp), pipeline=_axis(groups.pp), data=_axis(groups.dp), runtime=runtime
    )
    built = (mesh.tensor.size, mesh.pipeline.size, mesh.data.size)
    assert built == (parallel.tensor, parallel.pipeline, num_data), f"this process already has the mesh {built}"
    seed_streams(seed, mesh)
    return mesh


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
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(rank=group.rank(), size=group.size(), group=group)
