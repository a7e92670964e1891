"""The table of every name that is replaced where there is no CUDA, and the line of Megatron that each is for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rto_megatron.distributed.adam import FusedAdam
from rto_megatron.distributed.cpu_stand_ins import (
    CPU,
    NO_STREAM,
    TORCH_FOR_MEGATRON,
    NoStream,
    contiguous_only,
    seed_cpu,
    type_for_megatron,
    writers_reports,
)


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One replaced name."""

    name: str
    """Dotted path of what is replaced."""
    site: str
    """file:line in megatron-core 0.16.1 that needs it (one of possibly many)."""
    text: str
    """What stands in that line; a test looks for it in the installed version."""
    why: str
    """What goes wrong without it."""
    make: Callable[[Any], Any]
    """The original -> its replacement."""

    def owner(self) -> Any:
        """The module or class that holds the name; imports it if need be."""
        return _resolve(self.name.rpartition(".")[0])

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def _resolve(path: str) -> Any:
    """The module, or the class inside a module, of that dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(_resolve(parent), name)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _nothing(*_: Any, **__: Any) -> None:
    return None


PATCHES: tuple[Patch, ...] = (
    Patch(
        name="torch.cuda.current_device",
        site="tensor_parallel/layers.py:261",
        text="torch.cuda.current_device()",
        why="the device of nearly every tensor Megatron makes (over 160 places)",
        make=_always(lambda: CPU),
    ),
    Patch(
        name="torch.cuda.synchronize",
        site="pipeline_parallel/p2p_communication.py:398",
        text="torch.cuda.synchronize()",
        why="after every exchange between pipeline stages, in timers and in checkpoints",
        make=_always(_nothing),
    ),
    Patch(
        name="torch.cuda.Stream",
        site="distributed/distributed_data_parallel.py:230",
        text="torch.cuda.Stream(",
        why="a stream for gradient reduction",
        make=_always(NoStream),
    ),
    Patch(
        name="torch.cuda.Event",
        site="pipeline_parallel/fine_grained_activation_offload.py:339",
        text="torch.cuda.Event()",
        why="events for activation offload and combined schedules",
        make=_always(NoStream),
    ),
    Patch(
        name="torch.cuda.current_stream",
        site="pipeline_parallel/combined_1f1b.py:408",
        text="torch.cuda.current_stream()",
        why="the stream that others wait for",
        make=_always(lambda *_, **__: NO_STREAM),
    ),
    Patch(
        name="torch.cuda.default_stream",
        site="distributed/param_and_grad_buffer.py:422",
        text="torch.cuda.default_stream()",
        why="the stream that the gradient reduction waits for",
        make=_always(lambda *_, **__: NO_STREAM),
    ),
    Patch(
        name="torch.cuda.manual_seed",
        site="tensor_parallel/random.py:237",
        text="torch.cuda.manual_seed(seed)",
        why="seeds a random stream; without CUDA torch only queues the call",
        make=_always(seed_cpu),
    ),
    Patch(
        name="torch.cuda.get_rng_state",
        site="tensor_parallel/random.py:235",
        text="torch.cuda.get_rng_state()",
        why="a named random stream is kept as a generator state",
        make=_always(lambda *_, **__: torch.get_rng_state()),
    ),
    Patch(
        name="torch.cuda.set_rng_state",
        site="rerun_state_machine.py:970",
        text="torch.cuda.set_rng_state(",
        why="puts a random stream back",
        make=_always(lambda state, device=None: torch.set_rng_state(state)),
    ),
    Patch(
        name="torch.cuda.random.get_rng_state",
        site="tensor_parallel/random.py:55",
        text="torch.cuda.random.get_rng_state(device=device)",
        why="the same, as dropout and recomputation fork it",
        make=_always(lambda device=None: torch.get_rng_state()),
    ),
    Patch(
        name="megatron.core.tensor_parallel.random._set_cuda_rng_state",
        site="tensor_parallel/random.py:72",
        text="def _set_cuda_rng_state(",
        why="puts the state back by way of CUDA's generators",
        make=_always(lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)),
    ),
    Patch(
        name="torch.Tensor.cuda",
        site="models/common/language_module/language_module.py:244",
        text="weight.data.cuda()",
        why="tied embeddings over pipeline stages; loading an optimizer state",
        make=_always(lambda self, *_, **__: self),
    ),
    Patch(
        name="torch.Tensor.type",
        site="optimizer/clip_grads.py:167",
        text="param.grad.type() == 'torch.cuda.FloatTensor'",
        why="parameters are told apart by the names of CUDA types",
        make=type_for_megatron,
    ),
    *(
        Patch(
            name=f"megatron.core.{site.split('.py')[0].replace('/', '.')}.torch",
            site=site,
            text=text,
            why=why,
            make=_always(TORCH_FOR_MEGATRON),
        )
        for site, text, why in (
            ("pipeline_parallel/schedules.py:596", 'device="cuda"', "the schedules count tokens there"),
            ("optimizer/optimizer.py:485", "device='cuda'", "the loss scale"),
            ("utils.py:1207", 'device="cuda"', "the sum of squares in a gradient norm"),
            ("optimizer/clip_grads.py:90", "device='cuda'", "the gradient norm"),
            ("transformer/utils.py:35", 'device="cuda"', "the causal mask, where none is passed"),
            (
                "models/common/embeddings/rope_utils.py:62",
                "cp_idx = torch.tensor(",
                "which rotary angles a context rank has: pinned on the way to a GPU",
            ),
            ("dist_checkpointing/exchange_utils.py:110", 'device="cuda"', "a load that ranks share"),
            ("dist_checkpointing/strategies/state_dict_saver.py:204", "device='cuda'", "a save that reuses its plan"),
        )
    ),
    Patch(
        name="megatron.core.optimizer.Adam",
        site="optimizer/__init__.py:363",
        text="adam_cls = Adam",
        why="the optimizer that is built",
        make=_always(FusedAdam),
    ),
    Patch(
        name="megatron.core.optimizer.USING_PYTORCH_OPTIMIZER",
        site="optimizer/__init__.py:359",
        text="if USING_PYTORCH_OPTIMIZER:",
        why="True builds torch's AdamW, whose state DistributedOptimizer cannot write",
        make=_always(False),
    ),
    Patch(
        name="megatron.core.optimizer.distrib_optimizer.Adam",
        site="optimizer/distrib_optimizer.py:515",
        text="isinstance(optimizer, (Adam,",
        why="the one class it accepts",
        make=_always(FusedAdam),
    ),
    Patch(
        name="megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
        site="optimizer/distrib_optimizer.py:640",
        text="if not HAVE_APEX_OR_TE:",
        why="False reads 'step' per parameter: KeyError when loading",
        make=_always(True),
    ),
    Patch(
        name="megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
        site="optimizer/distrib_optimizer.py:654",
        text="elif USING_TE_OPTIMIZER or USING_APEX_OPTIMIZER:",
        why="True reads 'step' in the param group",
        make=_always(True),
    ),
    Patch(
        name="megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
        site="optimizer/distrib_optimizer.py:690",
        text="def load_state_dict(self, state_dict):",
        why="copies into views of float32 parameters, which autograd forbids while it records",
        make=torch.no_grad(),
    ),
    Patch(
        name="megatron.core.dist_checkpointing.strategies.filesystem_async._get_write_results_queue",
        site="dist_checkpointing/strategies/filesystem_async.py:54",
        text='ctx = mp.get_context("spawn")',
        why="spawns a process that imports torch and Megatron anew: ten seconds at the first save of every rank",
        make=_always(writers_reports),
    ),
    *(
        Patch(
            name=f"torch.distributed.{name}",
            site=site,
            text=f"torch.distributed.{name}(",
            why="gloo gives wrong numbers for a non-contiguous tensor, without an error",
            make=contiguous_only,
        )
        for name, site in (
            ("all_reduce", "tensor_parallel/mappings.py:31"),
            ("broadcast", "tensor_parallel/data.py:39"),
            ("scatter", "optimizer/distrib_optimizer.py:1937"),
        )
    ),
)
"""Every name that the adapter replaces."""

ADAM = {
    "megatron.core.optimizer.Adam",
    "megatron.core.optimizer.USING_PYTORCH_OPTIMIZER",
    "megatron.core.optimizer.distrib_optimizer.Adam",
    "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE",
    "megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict",
}
"""Those that bring Adam, which a GPU without Transformer Engine and apex lacks too."""
