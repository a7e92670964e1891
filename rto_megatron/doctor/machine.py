"""What is installed, what is missing, and what that turns off."""

import importlib
import os
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rto_megatron.config.parallel import ComputeConfig
from rto_megatron.distributed import cpu
from rto_megatron.distributed.runtime import (
    Hardware,
    check_gpus,
    check_transformer_engine,
    fp8_problem,
    has_nvidia_apex,
    prepare_imports,
)
from rto_megatron.doctor.findings import Section
from rto_megatron.errors import UserError

MEGATRON = (0, 16, 1)
"""The oldest megatron-core that this package knows, and the one that it was tried with."""

REQUIRED = {
    "torch": "everything",
    "megatron-core": "models, layouts, optimizers, checkpoints",
    "numpy": "megatron-core",
    "einops": "megatron-core",
    "psutil": "megatron-core's checkpoints, memory here",
    "transformers": "tokenizers and models of Hugging Face",
    "safetensors": "convert, parity",
    "sentencepiece": "tokenizers of the kind .model",
    "datasets": "data that is not .jsonl",
    "jinja2": "chat templates",
    "tensorboard": "event files",
    "tyro": "settings",
    "PyYAML": "run files",
    "rich": "tables and progress",
}
"""Distributions of setup.py, and what each is for."""

OPTIONAL = {
    "transformer-engine": "fused layers and Adam on GPUs; without it Megatron's local layers and torch's attention",
    "apex": "fused Adam on GPUs (NVIDIA's, built from source); without it Transformer Engine's",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the run would be started."""

    hardware: Hardware
    ranks: int
    ranks_here: int
    """Those of one machine."""
    memory: float | None = None
    """GiB that a rank can have, if the user said so."""


def check_machine(found: Section, compute: ComputeConfig, place: Place) -> bool:
    """Versions, libraries that break others, cores and GPUs; False where Megatron cannot be imported."""
    versions = {name: installed(name) for name in (*REQUIRED, *OPTIONAL)}
    found.table(
        "installed",
        ("library", "version", "what it is for"),
        [(name, versions[name] or "missing", purpose) for name, purpose in (REQUIRED | OPTIONAL).items()],
    )
    for name, purpose in REQUIRED.items():
        if not versions[name]:
            found.error(
                f"{name} is not installed",
                why=f"it is for: {purpose}",
                way_out=f"pip install {name}; `make venv` installs all, in the versions that were tried",
            )
    _check_apex(found)
    usable = _check_megatron(found, versions["megatron-core"], place.hardware)
    _check_hardware(found, compute, place)
    if usable and place.hardware.num_gpus:
        _check_fused(found)
    return usable


def installed(name: str) -> str:
    """Version of a distribution, empty where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _check_megatron(found: Section, megatron: str, hardware: Hardware) -> bool:
    breaks = "an installed library that cannot be imported breaks megatron-core, and so every stage"
    try:
        prepare_imports()
        importlib.import_module("megatron.core")
        importlib.import_module("rto_megatron.stages.rto")
    except (UserError, ImportError) as error:
        found.refused(error, why=breaks, way_out="install what it names; `make venv` installs all that is needed")
        return False
    if numbers(megatron) < MEGATRON:
        known = ".".join(map(str, MEGATRON))
        found.error(
            f"megatron-core must be {known} or newer, got {megatron}",
            why="names that this package uses moved in between",
            way_out=f"pip install 'megatron-core>={known}'",
        )
    absent = [] if hardware.num_gpus else cpu.missing()
    if absent:
        found.warning(
            f"megatron-core {megatron} lacks {len(absent)} names that are replaced without a GPU: {', '.join(absent)}",
            why="each stands for a call that would ask for a GPU; where it went, one may be made",
            way_out="rto_megatron/distributed/cpu_patches.py says what each is for; or install megatron-core 0.16.1",
        )
    else:
        found.ok(f"megatron-core {megatron} can be imported")
    return True


def _check_apex(found: Section) -> None:
    spec = find_spec("apex")
    if spec is not None and not has_nvidia_apex():
        places = ", ".join(spec.submodule_search_locations or [str(spec.origin)])
        found.warning(
            f"the installed apex is not NVIDIA's: {places}",
            why="PyPI's package of that name is another project, and megatron-core tries to import from it",
            way_out="pip uninstall apex; the Dockerfile builds NVIDIA's",
        )


def _check_fused(found: Section) -> None:
    if check_transformer_engine():
        found.ok("layers and Adam come from Transformer Engine")
    elif not has_nvidia_apex():
        found.warning(
            "there are GPUs, but neither Transformer Engine nor NVIDIA's apex",
            why="layers are then Megatron's local ones and Adam is torch's, which are slower",
            way_out="pip install --no-build-isolation 'transformer-engine[pytorch]'",
        )


def _check_hardware(found: Section, compute: ComputeConfig, place: Place) -> None:
    hardware, ranks = place.hardware, place.ranks_here
    found.ok(f"torch {installed('torch')} for {hardware.torch_build}; this machine: {hardware.device}")
    if not hardware.has_backend:
        found.error(
            f"torch was built without {hardware.backend}",
            why="ranks exchange tensors by it",
            way_out="install another build of torch",
        )
    has_engine = bool(installed("transformer-engine"))
    problem = fp8_problem(compute.fp8_recipe, hardware.capability, has_engine, adapted=False)
    if compute.fp8 != "none" and problem:
        found.error(
            f"compute.fp8 {compute.fp8} {problem}",
            why="products in 8 bits are Transformer Engine's, on GPUs that have them",
            way_out="set compute.fp8 to none, or run where it can be done",
        )
    if hardware.num_gpus:
        found.attempt(
            lambda: check_gpus(ranks, hardware.num_gpus), why="two ranks on one GPU wait for each other for ever"
        )
        return
    found.note(
        "there is no GPU here: memory is compared with this machine's",
        why="a run on CPU computes the same, slowly; one that is for other machines has their memory",
        way_out="for a run elsewhere, --memory=GIB_OF_ONE_RANK",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if ranks * compute.threads > cores:
        found.warning(
            f"{ranks} ranks x compute.threads {compute.threads} are more than the {cores} cores of this machine",
            why="ranks that wait for each other's cores are slower than fewer ranks",
            way_out=f"start fewer ranks, or set compute.threads to {max(1, cores // ranks)}",
        )


def numbers(text: str) -> tuple[int, ...]:
    """`0.16.1rc2` -> (0, 16, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[a-z+]", text)[0]))
