"""What stands in for CUDA where there is none: streams, seeds, devices, type names, and a queue between processes.

Where a name is torch's and everybody's, its stand-in is either for a call that could only raise here, or answers
Megatron alone: other code in the process keeps torch as it knows it.
"""

import contextlib
import functools
import os
import pickle
import queue
import sys
import tempfile
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")

# --- torch.cuda: calls that could only raise here ------------------------------------------------------------------


class NoStream:
    """Stands for a CUDA stream or event: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "NoStream":
        return self

    def query(self) -> bool:
        return True


NO_STREAM = NoStream()


def seed_cpu(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed.
    torch.default_generator.manual_seed(int(seed))


# --- 'cuda' written as a device ------------------------------------------------------------------------------------


class TorchForMegatron(ModuleType):
    """The torch module as some Megatron files see it: its factories make CPU tensors where 'cuda' is asked for, or
    memory that a GPU reads from.

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
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


TORCH_FOR_MEGATRON = TorchForMegatron(("empty", "empty_like", "ones", "tensor", "zeros"))


def type_for_megatron(torch_type: Callable[..., Any]) -> Callable[..., Any]:
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


def contiguous_only(collective: Callable[..., Any]) -> Callable[..., Any]:
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


class WritersReports:
    """The queue by which a checkpoint's writers report: a file without a name, shared by who is forked from here.

    Megatron's is held by a process, which it spawns because CUDA forbids forking. Forked from a rank, with its threads
    of gloo and of the watchdog, that process came up but for once, when the rank waited for it for ever. A file needs
    none. One writer reports at a time.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # open as long as the rank lives
        self._read = 0

    def put(self, report: Any) -> None:
        # where the file ends, not where it was left off: that position is shared with the rank that reads
        words, end = pickle.dumps(report), os.fstat(self._file.fileno()).st_size
        written = 0
        with contextlib.suppress(OSError):
            written = os.pwrite(self._file.fileno(), words, end)
        if written < len(words):
            os.ftruncate(self._file.fileno(), end)
            raise OSError(
                f"no room for the report of a checkpoint's writer in the folder of temporary files, "
                f"{tempfile.gettempdir()}; make room, or set TMPDIR to another one"
            )

    def get_nowait(self) -> Any:
        if self.empty():
            raise queue.Empty
        self._file.seek(self._read)
        report = pickle.load(self._file)
        self._read = self._file.tell()
        if self.empty():  # else all reports of a run would stay, in memory where that is a tmpfs
            self._file.truncate(0)
            self._read = 0
        return report

    def empty(self) -> bool:
        return self._read >= os.fstat(self._file.fileno()).st_size


@functools.cache
def writers_reports() -> WritersReports:
    """The one of this rank."""
    return WritersReports()
