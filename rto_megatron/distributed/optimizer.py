"""A model made trainable: Megatron's DDP and optimizer around it, and a step that refuses NaN."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.module import MegatronModule
from torch.distributed import all_gather_object

from rto_megatron.config.optimizer import OptimizerConfig
from rto_megatron.distributed.chunks import model_chunks
from rto_megatron.distributed.mesh import Mesh
from rto_megatron.errors import UserError

Model = TypeVar("Model", bound=MegatronModule)


@dataclass(frozen=True)
class Trainable(Generic[Model]):
    """A model with gradients and an optimizer; frozen roles are plain models."""

    name: str
    """Role, for messages."""
    model: Model
    """The model itself, for scoring, generation and checkpoints."""
    ddps: list[DistributedDataParallel]
    """The same model, a part for each of its chunks, its gradients summed over data-parallel ranks."""
    optimizer: MegatronOptimizer

    @property
    def optimizers(self) -> list[Any]:
        """Megatron's optimizers of its parts; one, where it chains none."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def zero_grad(self) -> None:
        """Forget gradients: both calls, or those of the plain float32 optimizer double."""
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def sum_gradients(self, mesh: Mesh) -> None:
        """Add up over ranks what each replica has accumulated: once a step, before it.

        Megatron's reductions without its division: our losses are divided by their count beforehand.
        """
        finalize_model_grads([*self.ddps], None, pg_collection=mesh.groups)

    def step(self, lr: float) -> float:
        """Clip, update with this learning rate, and return the gradient norm over all ranks.

        Raises:
            UserError: the gradient is not finite. Megatron's own step would write NaN into the weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.optimizer.config.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())  # global, so all ranks take the same way from here
        if not math.isfinite(norm):
            raise UserError(
                f"{self.name}: the gradient norm is {norm}, so no step was taken; "
                "lower the learning rate, or look at the rewards and values of this step"
            )
        for part in self.optimizers:
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return norm


def make_trainable(name: str, model: Model, config: OptimizerConfig, mesh: Mesh) -> Trainable[Model]:
    """Wrap a model for training; its weights must be loaded before, for the optimizer copies them."""
    megatron = model.config
    settings = DistributedDataParallelConfig(use_distributed_optimizer=config.distributed, grad_reduce_in_fp32=True)
    ddps = [
        DistributedDataParallel(megatron, settings, chunk, pg_collection=mesh.groups) for chunk in model_chunks(model)
    ]
    adam = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=config.distributed,
        bf16=megatron.bf16,
        params_dtype=megatron.params_dtype,
    )
    # 0.16 asks the whole world which parameter groups there are; the rest of it may be building another role, or none
    with _replaced(dist, "all_gather_object", partial(_gather_in_mesh, mesh)):
        optimizer = get_megatron_optimizer(adam, [*ddps], use_gloo_process_groups=False, pg_collection=mesh.groups)
    # no finalize_model_grads_func: a schedule leaves the gradients on this replica, `sum_gradients` adds them up
    megatron.no_sync_func = ddps[0].no_sync  # asked for where there is one stage, and so one chunk
    return Trainable(name, model, ddps, optimizer)


def sharded_weights(model: MegatronModule) -> dict[str, Any]:
    """Which piece of each weight this rank holds, as megatron-core's checkpoints describe it."""
    groups: Any = model.pg_collection
    # for the output layer's copy of tied embeddings 0.16 asks the global state for this rank, and for nothing else
    with _replaced(parallel_state, "get_data_parallel_rank", lambda **_: groups.dp_cp.rank()):
        return model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})


def optimizer_state(trainable: Trainable, *, loading: bool = False) -> dict[str, Any]:
    """The optimizer's state as megatron-core's checkpoints take it: any layout can read what another has written.

    Args:
        loading: it is to be read into, so it need not hold what the optimizer knows now.
    """
    # Megatron's default kind of sharding is broken in 0.16 and 0.19; the fast `dp_reshardable` keeps TP and PP fixed
    kind = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    weights = sharded_weights(trainable.model)
    return trainable.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=kind)


def load_optimizer_state(trainable: Trainable, state: Any) -> None:
    """Take up what `optimizer_state` describes, once it is read.

    Each library's Adam keeps settings of its own in its parameter groups (as `bias_correction`), and torch takes groups
    over as they were written: what this library's had and another's did not write stays.
    """
    optimizers = [part.optimizer for part in trainable.optimizers if part.optimizer is not None]  # nothing to train
    before = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    trainable.optimizer.load_state_dict(state)
    for optimizer, groups in zip(optimizers, before, strict=True):
        for group, had in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in had.items() if name not in group})


def _gather_in_mesh(mesh: Mesh, found: list[Any], mine: Any, group: dist.ProcessGroup | None = None) -> None:
    """`all_gather_object` over the ranks of the mesh, where Megatron means the world."""
    assert group is None
    everyone = mesh.groups.intra_dist_opt
    within: list[Any] = [None] * everyone.size()
    all_gather_object(within, mine, group=everyone)
    found[:] = within + [[]] * (len(found) - len(within))


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a name of Megatron or torch means another function."""
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)
