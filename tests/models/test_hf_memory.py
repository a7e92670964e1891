"""Conversion holds a few tensors at a time, whatever the size of the model."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import is_main, start_runtime
from rto_megatron.models.gpt import build_model
from rto_megatron.models.hf_export import hf_tensors, save_hf
from rto_megatron.models.hf_weights import load_hf
from tests.models.test_hf import NoTokenizer
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")

MODEL = ModelConfig(
    num_layers=24, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4, vocab_size=512, max_length=64
)
MIB = 1 << 20
LARGEST = 2 * 1024 * 256 * 4
"""Bytes: gate and up projection of one layer. All 24 layers are 94 MiB, in one file."""


def peak_growth(action):
    """Bytes by which this process's memory goes beyond where it is now while `action` runs, mapped files included."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def memory(name):
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[name].split()[0]) << 10


def conversions(folder, world):
    """Peak growth on rank 0 of an export, of an import, and of two that hold all tensors."""
    parallel = ParallelConfig(pipeline=world)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    model = build_model(MODEL, mesh, kind="policy", parallel=parallel, compute=ComputeConfig(), seed=0)
    model.requires_grad_(False)
    save_hf(model, MODEL, folder / f"warm{world}", NoTokenizer())  # imports, buffers of the process group

    def hold_all_and_write():
        tensors = dict(hf_tensors(model, MODEL))
        if is_main():
            save_file(tensors, folder / f"all{world}.safetensors")

    return {
        "export": peak_growth(lambda: save_hf(model, MODEL, folder / f"hf{world}", NoTokenizer())),
        "import": peak_growth(lambda: load_hf(model, folder / f"warm{world}", MODEL)),
        "all at once": peak_growth(hold_all_and_write),
    }


@pytest.mark.parametrize("world", [1, 2])
def test_an_export_and_an_import_hold_a_few_tensors(tmp_path, world):
    growth = run_ranks(conversions, world, tmp_path, world)[0]
    assert growth["all at once"] > 80 * MIB / world, f"the measure sees nothing: {growth}"
    # the weight, the piece of another rank or the tensors it is made of, and what the interpreter takes
    assert growth["export"] < 4 * LARGEST + 4 * MIB, growth
    assert growth["import"] < 4 * LARGEST + 4 * MIB, growth
