"""Lets unmodified megatron-core run where there is no CUDA; on a machine with CUDA nothing here is used.

Megatron asks for CUDA in five ways: `torch.cuda` calls, 'cuda' written as a device, types compared with CUDA's names,
CUDA random states, and an Adam that only CUDA libraries bring. `PATCHES` lists every name that is replaced, the line of
megatron-core 0.16.1 that it is for, and why. Where a name is torch's and everybody's, the replacement either stands for
a call that could only raise here, or answers Megatron alone: other code in the process keeps torch as it knows it.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from rto_megatron.distributed.adam import FusedAdam

CPU = torch.device("cpu")


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


def install() -> None:
    """Apply every patch, once; does nothing where CUDA is present."""
    if torch.cuda.is_available() or _originals:
        return
    for patch in PATCHES:
        owner = patch.owner()
        if not hasattr(owner, patch.attribute):
            _missing.append(patch.name)  # another Megatron version; tests/distributed/test_cpu.py names what moved
            continue
        original = owner.__dict__.get(patch.attribute, getattr(owner, patch.attribute))
        _originals[patch.name] = original
        setattr(owner, patch.attribute, patch.make(original))
    # On CUDA a fork that moves the CPU's generator is a mistake; here the CPU's generator is the one that is forked.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _undo_compilation()


def is_installed() -> bool:
    """Whether this process runs on the adapter."""
    return bool(_originals)


def missing() -> list[str]:
    """Names of `PATCHES` that the installed Megatron does not have, after `install`."""
    return list(_missing)


_originals: dict[str, Any] = {}
_missing: list[str] = []


def _resolve(path: str) -> Any:
    """The module, or the class inside a module, of that dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(_resolve(parent), name)


# --- torch.cuda: calls that could only raise here ------------------------------------------------------------------


class _NoStream:
    """Stands for a CUDA stream or event: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True


_NO_STREAM = _NoStream()


def _seed_cpu(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed.
    torch.default_generator.manual_seed(int(seed))


# --- 'cuda' written as a device ------------------------------------------------------------------------------------


class _TorchForMegatron(ModuleType):
    """The torch module as some Megatron files see it: its factories make CPU tensors where 'cuda' is asked for.

    Put into those files' globals, so that `torch.zeros` of everybody else stays torch's own.
    """

    def __init__(self, factories: Iterable[str]) -> None:
        super().__init__("torch", "torch, with 'cuda' read as 'cpu'")
        for name in factories:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


_TORCH_FOR_MEGATRON = _TorchForMegatron(("empty", "empty_like", "ones", "tensor", "zeros"))


def _type_for_megatron(torch_type: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type that gives the CUDA name of a CPU type to Megatron's optimizer, and to nobody else."""

    @functools.wraps(torch_type)
    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = torch_type(self, *args, **kwargs)
        asked_for_name = not args and not kwargs
        if asked_for_name and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


# --- gloo ----------------------------------------------------------------------------------------------------------


def _contiguous_only(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what gloo (torch 2.13) computes wrongly without an error: it reads raw memory, whatever the strides."""

    @functools.wraps(collective)
    def guarded(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        scattered = kwargs.get("scatter_list") or next((arg for arg in args if isinstance(arg, list)), [])
        for each in (tensor, *scattered):
            if not each.is_contiguous():
                raise RuntimeError(
                    f"torch.distributed.{collective.__name__} got a non-contiguous tensor, shape {tuple(each.shape)} "
                    f"and strides {each.stride()}; gloo would give wrong numbers: pass tensor.contiguous()"
                )
        return collective(tensor, *args, **kwargs)

    return guarded


# --- checkpoints ---------------------------------------------------------------------------------------------------


@functools.cache
def _forked_results_queue() -> Any:
    """The queue by which a checkpoint's writers report. Megatron spawns its process because CUDA forbids forking."""
    return torch.multiprocessing.get_context("fork").Manager().Queue()


# --- torch.compile -------------------------------------------------------------------------------------------------


def _undo_compilation() -> None:
    """Put back the plain functions that Megatron wrapped in torch.compile: a laptop may have no compiler.

    Not by torch._dynamo.config.disable: that would switch off the user's own torch.compile too.
    """
    importlib.import_module("megatron.core.jit").disable_jit_fuser()  # for modules imported later
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.core"):
            continue
        for name, value in list(vars(module).items()):
            plain = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(plain, FunctionType):  # absent libraries are mocks, which have every attribute
                setattr(module, name, plain)


# --- the table -----------------------------------------------------------------------------------------------------


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
        make=_always(_NoStream),
    ),
    Patch(
        name="torch.cuda.Event",
        site="pipeline_parallel/fine_grained_activation_offload.py:339",
        text="torch.cuda.Event()",
        why="events for activation offload and combined schedules",
        make=_always(_NoStream),
    ),
    Patch(
        name="torch.cuda.current_stream",
        site="pipeline_parallel/combined_1f1b.py:408",
        text="torch.cuda.current_stream()",
        why="the stream that others wait for",
        make=_always(lambda *_, **__: _NO_STREAM),
    ),
    Patch(
        name="torch.cuda.default_stream",
        site="distributed/param_and_grad_buffer.py:422",
        text="torch.cuda.default_stream()",
        why="the stream that the gradient reduction waits for",
        make=_always(lambda *_, **__: _NO_STREAM),
    ),
    Patch(
        name="torch.cuda.manual_seed",
        site="tensor_parallel/random.py:237",
        text="torch.cuda.manual_seed(seed)",
        why="seeds a random stream; without CUDA torch only queues the call",
        make=_always(_seed_cpu),
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
        make=_type_for_megatron,
    ),
    *(
        Patch(
            name=f"megatron.core.{site.split('.py')[0].replace('/', '.')}.torch",
            site=site,
            text=text,
            why=why,
            make=_always(_TORCH_FOR_MEGATRON),
        )
        for site, text, why in (
            ("pipeline_parallel/schedules.py:596", 'device="cuda"', "the schedules count tokens there"),
            ("optimizer/optimizer.py:485", "device='cuda'", "the loss scale"),
            ("utils.py:1207", 'device="cuda"', "the sum of squares in a gradient norm"),
            ("optimizer/clip_grads.py:90", "device='cuda'", "the gradient norm"),
            ("transformer/utils.py:35", 'device="cuda"', "the causal mask, where none is passed"),
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
        make=_always(_forked_results_queue),
    ),
    *(
        Patch(
            name=f"torch.distributed.{name}",
            site=site,
            text=f"torch.distributed.{name}(",
            why="gloo gives wrong numbers for a non-contiguous tensor, without an error",
            make=_contiguous_only,
        )
        for name, site in (
            ("all_reduce", "tensor_parallel/mappings.py:31"),
            ("broadcast", "tensor_parallel/data.py:39"),
            ("scatter", "optimizer/distrib_optimizer.py:1937"),
        )
    ),
)
"""Every name that the adapter replaces."""
