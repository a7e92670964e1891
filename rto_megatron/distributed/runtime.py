"""Where the process runs: CPU with gloo, or CUDA with NCCL; decided here and nowhere else.

Importing this module starts nothing. A command calls `prepare_imports` before it imports anything of Megatron, then
`start_runtime`, then builds its mesh.
"""

import importlib
import importlib.util
import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rto_megatron.config.parallel import ComputeConfig
from rto_megatron.distributed import cpu
from rto_megatron.distributed.children import LAUNCHER
from rto_megatron.errors import ConfigError, UserError

HOST_BACKEND = "gloo"
"""Of torch.distributed, for tensors in host memory, whatever the device."""

DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
"""What cuBLAS and Transformer Engine want to be told for kernels that add in one order."""

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up; a checkpoint on a slow disk takes minutes."""

QUIET_WARNINGS = (
    ("Transformer Engine and Apex are not installed", "our Adam stands in for theirs"),
    ("Apex is not installed", "we bring our own norm"),
    ("The 'megatron.core.transformer.custom_layers", "Megatron imports a name of its own that it deprecated"),
    ("The following imports from `dynamic_context.py`", "likewise"),
    ("`torch.jit.script", "Megatron scripts its fused kernels at import"),
    ("Warning: tp_group is None", "Megatron's linear layers ask for the group that they were given"),
    ("full scope is deprecated", "Megatron's default of an option that we do not set"),
    ("The .grad attribute of a Tensor that is not a leaf", "Megatron clears gradients of the slices it optimizes"),
    ("`torch.distributed.reduce_scatter_tensor` is deprecated", "Megatron calls it by the name that older torch has"),
    ("`torch.distributed.all_gather_into_tensor` is deprecated", "likewise"),
    ("`load_state_dict` is deprecated", "Megatron reads checkpoints through torch's older function"),
    ("MLP requires ffn_hidden_size, but it was not provided", "Megatron takes it from the config, as it should"),
    ("Please use DTensor instead", "Megatron writes checkpoints with torch's older class"),
    ("Using deprecated internal API from Transformer Engine", "Megatron takes names from where older ones have them"),
)
"""(start of a third party's warning, why a user need not read it)."""


@dataclass(frozen=True)
class Runtime:
    """The device of this rank and the libraries that it may use."""

    device: torch.device
    backend: str
    """Of torch.distributed: gloo or nccl."""
    has_transformer_engine: bool
    """Whether Transformer Engine is there, and a GPU for it."""
    has_fused_gradients: bool = False
    """Whether NVIDIA's apex is there, whose kernel adds a weight's gradient to the float32 sum as it computes it."""

    def has_fused_layers(self, dtype: str) -> bool:
        """Whether layers come from Transformer Engine; else from Megatron's own and torch.

        Not in float32: its attention has no float32 kernel for packed rows, and its products would be TF32.
        """
        return self.has_transformer_engine and dtype == "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What a rank on this machine would run on; found out without starting anything."""

    device: str
    """The CPU, or the name of the first GPU."""
    num_gpus: int
    gpu_bytes: int
    """Memory of one GPU; 0 without."""
    driver: str = ""
    """Version of the GPU's driver; empty where none is known."""
    capability: tuple[int, int] | None = None
    """The GPU's compute capability; None without."""
    torch_build: str
    """What torch was built for."""
    backend: str
    """Of torch.distributed: gloo or nccl."""
    has_backend: bool


def inspect_hardware() -> Hardware:
    """Look at this machine as `start_runtime` would."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if not torch.cuda.is_available():
        return Hardware(
            device="CPU",
            num_gpus=0,
            gpu_bytes=0,
            torch_build=build,
            backend="gloo",
            has_backend=dist.is_available() and dist.is_gloo_available(),
        )
    first = torch.cuda.get_device_properties(0)
    return Hardware(
        device=f"{torch.cuda.device_count()} x {first.name}",
        num_gpus=torch.cuda.device_count(),
        gpu_bytes=first.total_memory,
        driver=_driver(),
        capability=(first.major, first.minor),
        torch_build=build,
        backend="nccl",
        has_backend=dist.is_nccl_available(),
    )


def _driver() -> str:
    with suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else ""
    return ""


def rank() -> int:
    """Global rank of this process; 0 without torchrun. Known before `start_runtime`."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that torchrun started; 1 without it. Known before `start_runtime`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the rank that talks to the user and writes the shared files."""
    return rank() == 0


def is_main_of_node() -> bool:
    """Whether this is the rank that tells the user what is wrong on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def environment_alone() -> dict[str, str]:
    """This process's environment without what torchrun put into it: for a child that is no rank of this world."""
    ours = ("RANK", LAUNCHER, "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def prepare_imports() -> None:
    """Make `import megatron.core` safe and quiet: no broken Transformer Engine, no warnings about absent extras.

    A rank of torchrun takes its GPU here.
    """
    # Megatron asks for it with tensor parallelism: kernels then start in the order in which they overlap. Before
    # Transformer Engine comes, which looks at the GPU where flash-attn is there: each rank's at its own
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if torch.cuda.is_available() and 0 <= local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    check_transformer_engine()
    for start, _why in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(start))


def import_megatron() -> None:
    """Before whatever imports parts of it: without a GPU it then takes less memory and time."""
    prepare_imports()
    if not torch.cuda.is_available():
        cpu.import_megatron()


def start_runtime(*, threads: int, deterministic: bool = False, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Runtime:
    """Choose the device, join the other ranks, and make Megatron ready for both; a second call returns the same.

    Args:
        threads: CPU threads of this rank.
        deterministic: kernels and sums over ranks take one order.
        timeout: how long a collective waits for the other ranks before it raises.
    """
    global _running
    if _running is not None:
        return _running
    prepare_imports()
    if deterministic:  # before the first call to a GPU library: they read the environment once
        os.environ.update(DETERMINISTIC)
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        # newer torch prefers it on Hopper, and cuDNN builds a plan for each new shape: rows have any length here, and
        # each decode step is one token wider
        torch.backends.cuda.enable_cudnn_sdp(False)
        has_engine = check_transformer_engine()
        runtime = Runtime(_take_gpu(), "nccl", has_engine, has_fused_gradients=has_nvidia_apex())
        if not has_engine and not has_nvidia_apex():
            cpu.install_adam()
    else:
        cpu.install()
        runtime = Runtime(torch.device("cpu"), HOST_BACKEND, False)
    _join(runtime, timeout)
    _running = runtime
    return runtime


def wait_for_device() -> None:
    """Until what was launched on the GPU is done; nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's FlashAttention can run there, on numbers of this type."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


class HostCopies:
    """Copies between host and device, beside what the device computes.

    On a GPU: pinned memory and a stream of its own. On a CPU both are the same memory, and a copy is over when the call
    returns; the same calls in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory; on a CPU the tensor itself."""
        if self._stream is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor)

    def start(self, host: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy tensors to the device; who computes with them calls `wait` before."""
        if self._stream is None:
            return [tensor.clone() for tensor in host]
        # of the computing stream's memory: it may go back there as soon as what uses it has been launched
        copies = [torch.empty_like(tensor, device=self._device) for tensor in host]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for copy, tensor in zip(copies, host, strict=True):
                copy.copy_(tensor, non_blocking=True)
        return copies

    def wait(self) -> None:
        """What is launched from here on runs after all copies that were begun."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Recording:
    """A function of tensors that stay where they are, recorded as a CUDA graph; on a CPU it is called again instead."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        """Run it, and record it."""
        self._function, self._graph = function, None
        if device.type == "cuda":
            side: Any = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):  # what libraries set up on a first call is no part of the recording
                for _ in range(2):
                    function()
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = function()

    def again(self) -> Tensor:
        """What it gives with what its tensors hold now; overwritten by the next call."""
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._output


def peak_bytes() -> int:
    """Most memory that this process has had: of its GPU as torch has given it out; on a CPU all that was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stop_runtime() -> None:
    """Leave the other ranks; call it where a run ends well, not on the way out of an error."""
    global _running
    if _running is not None:
        _running = None
        dist.destroy_process_group()


_running: Runtime | None = None


def _take_gpu() -> torch.device:
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # Not the local rank against the GPUs: only rank 0 is heard, and it always has one.
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    check_gpus(num_ranks, num_gpus)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_gpus(num_ranks: int, num_gpus: int) -> None:
    """Raise ConfigError unless each rank of this machine has a GPU of its own."""
    if num_ranks > num_gpus:
        raise ConfigError(
            f"each rank needs a GPU of its own, got {num_ranks} ranks on a machine with {num_gpus}; "
            f"start with torchrun --nproc-per-node={num_gpus}, or set CUDA_VISIBLE_DEVICES= to run on CPU"
        )


def _join(runtime: Runtime, timeout: timedelta) -> None:
    options: dict[str, Any] = {"backend": runtime.backend, "timeout": timeout}
    if runtime.device.type != "cpu":
        # NCCL connects at once: a rank on the wrong GPU is told now, and a message in pairs may be a group's first
        options["device_id"] = runtime.device
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[reportPrivateImportUsage]
    dist.init_process_group(**options)


FP8_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""compute.fp8_recipe -> the oldest GPU that has it: Ada, Hopper, Blackwell."""


def check_fp8(compute: ComputeConfig, runtime: Runtime, *, adapted: bool = False) -> None:
    """Raise ConfigError unless this rank can multiply in 8 bits.

    Args:
        adapted: the model has adapters, or shares weights with one that has.
    """
    on_gpu = runtime.device.type == "cuda"
    capability = torch.cuda.get_device_capability(runtime.device) if on_gpu else None
    if problem := fp8_problem(compute.fp8_recipe, capability, runtime.has_transformer_engine, adapted=adapted):
        raise ConfigError(f"compute.fp8 {compute.fp8} {problem}; set compute.fp8 to none")


def fp8_problem(
    recipe: str, capability: tuple[int, int] | None, has_transformer_engine: bool, *, adapted: bool
) -> str | None:
    """What keeps a rank from multiplying in 8 bits, to follow the field's name; None where nothing does.

    Args:
        capability: compute capability of its GPU; None on a CPU.
    """
    if capability is None:
        return "needs an NVIDIA GPU, and this rank runs on a CPU"
    if capability < (least := FP8_CAPABILITY[recipe]):
        return (
            f"with compute.fp8_recipe {recipe} needs a GPU of compute capability {least[0]}.{least[1]} or more, got "
            f"{capability[0]}.{capability[1]}"
        )
    if not has_transformer_engine:
        return (
            "needs Transformer Engine, which is not installed; pip install --no-build-isolation "
            "'transformer-engine[pytorch]'"
        )
    if adapted:
        return "needs Transformer Engine's layers, and adapters (lora, critic_lora) take Megatron's own"
    return None


@cache
def has_nvidia_apex() -> bool:
    """Whether NVIDIA's apex is there, with its kernels; PyPI's package of that name is another project."""
    return all(importlib.util.find_spec(kernel) for kernel in ("amp_C", "fused_weight_gradient_mlp_cuda"))


@cache
def check_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported; UserError where it is installed but cannot.

    A broken one, or the folder that uninstalling left behind, breaks `import megatron.core` itself.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        places = ", ".join(spec.submodule_search_locations or [str(spec.origin)])
        raise UserError(
            f"{places}: transformer-engine is installed but cannot be imported, which breaks megatron-core too "
            f"({type(error).__name__}: {error}); run 'pip uninstall transformer-engine transformer-engine-torch "
            f"transformer-engine-cu12 transformer-engine-cu13' and delete that folder, or install a build for this "
            f"torch ({torch.__version__})"
        ) from error
    return True
