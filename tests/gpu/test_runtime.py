"""The same trainer on a GPU: NCCL, no adapter, and the losses that the CPU gave."""

import pytest
import torch

from rto_megatron.distributed import cpu
from rto_megatron.distributed.collectives import barrier, gather_objects
from rto_megatron.distributed.runtime import Recording, start_runtime
from tests.distributed.tiny import tiny_trainer
from tests.gpu.device import TIMEOUT, needs
from tests.ranks import run_ranks

pytestmark = [*needs(), pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

LOSSES_ON_CPU = [3.4733598, 3.4553959]


def train_on_gpu():
    runtime = start_runtime(threads=1)
    trainer = tiny_trainer()
    barrier()
    return {
        "where": (runtime.device.type, runtime.backend, cpu.is_installed()),
        "objects": gather_objects("here"),
        "losses": trainer.train(2),
    }


def test_megatron_runs_unpatched_and_trains_as_on_cpu():
    (result,) = run_ranks(train_on_gpu, 1, timeout=TIMEOUT)
    assert result["where"] == ("cuda", "nccl", False)
    assert result["objects"] == ["here"]
    assert result["losses"] == pytest.approx(LOSSES_ON_CPU, abs=1e-4)


def record():
    device = start_runtime(threads=1).device
    held = torch.tensor([1.0, 2.0], device=device)
    recording = Recording(lambda: held * 2, device)
    held.copy_(torch.tensor([3.0, 4.0]))
    return recording.again().tolist()


def test_a_recorded_graph_reads_its_tensors_anew():
    assert run_ranks(record, 1, timeout=TIMEOUT) == [[6.0, 8.0]]
