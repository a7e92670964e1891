"""Lets unmodified megatron-core run where there is no CUDA; on a machine with CUDA nothing here is used.

Megatron asks for CUDA in five ways: `torch.cuda` calls, 'cuda' written as a device, types compared with CUDA's names,
CUDA random states, and an Adam that only CUDA libraries bring. `cpu_patches.py` lists every name that is replaced,
`cpu_stand_ins.py` has what takes its place.
"""

import importlib
import logging
import sys
from types import FunctionType
from typing import Any

import torch

from rto_megatron.distributed.cpu_patches import ADAM, PATCHES, Patch

_originals: dict[str, Any] = {}
_adams: dict[str, Any] = {}


def install() -> None:
    """Apply every patch, once; does nothing where CUDA is present."""
    if torch.cuda.is_available() or _originals:
        return
    import_megatron()
    for patch in PATCHES:
        _apply(patch, _originals)
    # On CUDA a fork that moves the CPU's generator is a mistake; here the CPU's generator is the one that is forked.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _undo_compilation()


def install_adam() -> None:
    """Apply those patches alone that bring Adam: for a GPU without a library that has one."""
    for patch in PATCHES:
        if patch.name in ADAM and patch.name not in _adams:
            _apply(patch, _adams)


def is_installed() -> bool:
    """Whether this process runs on the adapter."""
    return bool(_originals)


def missing() -> list[str]:
    """Names of `PATCHES` that the installed Megatron does not have; tests/distributed/test_cpu.py says what moved."""
    return [patch.name for patch in PATCHES if not hasattr(patch.owner(), patch.attribute)]


def _apply(patch: Patch, originals: dict[str, Any]) -> None:
    owner = patch.owner()
    if not hasattr(owner, patch.attribute):
        return  # another Megatron version; `missing` names it
    original = owner.__dict__.get(patch.attribute, getattr(owner, patch.attribute))
    originals[patch.name] = original
    setattr(owner, patch.attribute, patch.make(original))


def import_megatron() -> None:
    """Import Megatron while torch.compile gives functions back as they are.

    Wrapping one imports a compiler, which takes 70 MB of each process and seconds, and nothing is compiled here.
    """
    compiling = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compiling


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """torch.compile, called or as a decorator with options, that does nothing."""
    return _as_it_is if function is None else function


def _undo_compilation() -> None:
    """Put back the plain functions that Megatron wrapped in torch.compile where it was imported before.

    A laptop may have no compiler. Not by torch._dynamo.config.disable: that would switch off the user's own
    torch.compile too.
    """
    importlib.import_module("megatron.core.jit").disable_jit_fuser()  # for modules imported later
    for module_name, module in list(sys.modules.items()):
        if not module_name.startswith("megatron.core"):
            continue
        for name, value in list(vars(module).items()):
            plain = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(plain, FunctionType):  # absent libraries are mocks, which have every attribute
                setattr(module, name, plain)
