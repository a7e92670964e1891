"""Which of these tests can run here. With GPU_TESTS_ON_CPU=N their bodies run on N ranks of a CPU instead.

That is how they are tried without a GPU: `GPU_TESTS_ON_CPU=4 python -m pytest -m gpu tests/gpu`. What asks for
Transformer Engine, 8 bits, apex or a GPU's memory is skipped then.
"""

import os
from importlib.util import find_spec

import pytest
import torch

ON_CPU = int(os.environ.get("GPU_TESTS_ON_CPU", "0"))
NUM = ON_CPU or torch.cuda.device_count()
TIMEOUT = 120 if ON_CPU else 600
"""Seconds of a leg: on a machine with GPUs every rank imports all libraries anew."""


def needs(num_gpus=1, *, engine=False, capability=(0, 0), apex=False):
    """Marks of a test: GPUs, Transformer Engine, compute capability, NVIDIA's apex."""
    reason = ""
    if num_gpus > NUM:
        reason = f"needs {num_gpus} NVIDIA GPU{'s' if num_gpus > 1 else ''}, found {NUM}"
    elif (engine or apex or capability > (0, 0)) and ON_CPU:
        reason = "needs an NVIDIA GPU, and runs on a CPU"
    elif engine and find_spec("transformer_engine") is None:
        reason = "needs Transformer Engine: pip install --no-build-isolation 'transformer-engine[pytorch]'"
    elif capability > (0, 0) and torch.cuda.get_device_capability() < capability:
        reason = f"needs compute capability {capability}, found {torch.cuda.get_device_capability()}"
    elif apex and find_spec("fused_weight_gradient_mlp_cuda") is None:
        reason = "needs NVIDIA's apex, built from source"
    return [pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)]


def layout(num_gpus, words, name, **more):
    """A parameter: a layout that needs so many GPUs."""
    return pytest.param(num_gpus, words, id=name, marks=needs(num_gpus, **more)[1:])
