"""The adapter, name by name: Megatron still needs it there, it does its job, and without it the job fails."""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from rto_megatron.distributed import cpu
from rto_megatron.distributed.cpu_patches import PATCHES
from rto_megatron.distributed.cpu_stand_ins import CPU
from tests.distributed.tiny import tiny_trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the adapter is not installed")

MEGATRON = Path(importlib.util.find_spec("megatron.core").origin).parent
PINNED = "0.16.1"
"""The version whose lines the table names."""

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


@each_patch
def test_megatron_still_has_what_the_patch_is_for(patch):
    file, _, line = patch.site.rpartition(":")
    lines = (MEGATRON / file).read_text().splitlines()
    if importlib.metadata.version("megatron-core") == PINNED:
        lines = [lines[int(line) - 1]]
    found = any(patch.text in each for each in lines)
    assert found, f"{patch.name} is for {patch.text!r} in {patch.site}, which is gone; see if the patch may go"


# --- one job a name, each in the words of Megatron ------------------------------------------------------------------


def device_of_a_new_tensor():
    assert torch.empty(1, device=torch.cuda.current_device()).device == CPU


def timer():
    from megatron.core.timers import Timer

    watch = Timer("step")
    watch.start()
    watch.stop()


def wait_for_a_stream():
    torch.cuda.Stream(device=torch.cuda.current_device()).wait_stream(torch.cuda.default_stream())


def wait_for_an_event():
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream())
    event.wait(torch.cuda.current_stream())
    assert event.query()


def wait_for_the_current_stream():
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())


def named_streams_follow_their_seeds():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    before = torch.get_rng_state()
    tracker.add("seven", 7)
    assert torch.equal(torch.get_rng_state(), before)
    with tracker.fork("seven"):
        forked = torch.rand(2)
    assert torch.equal(forked, torch.rand(2, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), before)


def state_is_put_back():
    state = torch.cuda.get_rng_state()
    first = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def tensor_to_the_device():
    weight = torch.ones(2)
    assert weight.data.cuda().device == CPU


def gradient_is_clipped():
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([param], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def makes(module: str, factory: str, *args: object) -> Callable[[], None]:
    """The job of a file that writes 'cuda' as a device: its factory makes a CPU tensor."""

    def job():
        made = getattr(importlib.import_module(f"megatron.core.{module}").torch, factory)(*args, device="cuda")
        assert made.device == CPU

    return job


def rotary_angles_of_a_context_rank():
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    class SecondOfTwo:
        def size(self):
            return 2

        def rank(self):
            return 1

    assert get_pos_emb_on_this_cp_rank(torch.arange(8), 0, SecondOfTwo()).tolist() == [2, 3, 4, 5]


def builds_adam():
    optimizer = tiny_trainer().optimizer
    assert type(optimizer.chained_optimizers[0].optimizer).__name__ == "FusedAdam"


def step_is_in_every_group():
    trainer = tiny_trainer()
    trainer.train(1)
    inner = trainer.optimizer.chained_optimizers[0]
    # A rank that owns nothing of a group: it steps nothing there, and still must write the same step as the others.
    empty = {**{key: value for key, value in inner.optimizer.param_groups[0].items() if key != "step"}, "params": []}
    inner.optimizer.param_groups.append(empty)
    assert [group["step"] for group in inner.state_dict()["optimizer"]["param_groups"]] == [1, 1, 1]


def optimizer_is_saved_and_loaded():
    from megatron.core import dist_checkpointing

    sharding = {"distrib_optim_sharding_type": "dp_reshardable"}
    trainer, other = tiny_trainer(), tiny_trainer()
    trainer.train(2)
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(trainer.optimizer_state(is_loading=False, metadata=sharding), folder)
        other.optimizer.load_state_dict(
            dist_checkpointing.load(other.optimizer_state(is_loading=True, metadata=sharding), folder)
        )
    saved, loaded = (each.optimizer.chained_optimizers[0].optimizer for each in (trainer, other))
    assert [group["step"] for group in loaded.param_groups] == [2, 2]
    for left, right in zip(saved.param_groups, loaded.param_groups, strict=True):
        for mine, theirs in zip(left["params"], right["params"], strict=True):
            assert torch.equal(saved.state[mine]["exp_avg"], loaded.state[theirs]["exp_avg"])


def refuses(collective: str) -> Callable[[], None]:
    """The job of the guards: strides that gloo would ignore raise, and say what to do."""

    def job():
        transposed = torch.arange(6.0).reshape(2, 3).T
        calls = {"all_reduce": {}, "broadcast": {"src": 0}, "scatter": {"scatter_list": [transposed], "src": 0}}
        with pytest.raises(
            RuntimeError, match=rf"{collective} got a non-contiguous tensor.*pass tensor.contiguous\(\)"
        ):
            getattr(torch.distributed, collective)(transposed.clone(), **calls[collective])

    return job


def writers_report_without_another_process():
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    before = psutil.Process().children()
    reports = filesystem_async._get_write_results_queue()
    for words in ("written", ["longer than a pipe holds" * 9999], "by the next writer"):
        writer = multiprocessing.get_context("fork").Process(target=reports.put, args=(words,))
        writer.start()
        writer.join()
        assert not reports.empty()
        assert reports.get_nowait() == words
    assert reports.empty()
    assert os.fstat(reports._file.fileno()).st_size == 0  # what was read takes no room: a run saves often
    with pytest.raises(queue.Empty):
        reports.get_nowait()
    assert psutil.Process().children() == before


JOBS: dict[str, Callable[[], None]] = {
    "torch.cuda.current_device": device_of_a_new_tensor,
    "torch.cuda.synchronize": timer,
    "torch.cuda.Stream": wait_for_a_stream,
    "torch.cuda.Event": wait_for_an_event,
    "torch.cuda.current_stream": wait_for_the_current_stream,
    "torch.cuda.default_stream": wait_for_the_current_stream,
    "torch.cuda.manual_seed": named_streams_follow_their_seeds,
    "torch.cuda.get_rng_state": named_streams_follow_their_seeds,
    "torch.cuda.set_rng_state": state_is_put_back,
    "torch.cuda.random.get_rng_state": named_streams_follow_their_seeds,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": named_streams_follow_their_seeds,
    "torch.Tensor.cuda": tensor_to_the_device,
    "torch.Tensor.type": gradient_is_clipped,
    "megatron.core.pipeline_parallel.schedules.torch": makes("pipeline_parallel.schedules", "zeros", []),
    "megatron.core.optimizer.optimizer.torch": makes("optimizer.optimizer", "tensor", [1.0]),
    "megatron.core.optimizer.clip_grads.torch": gradient_is_clipped,
    "megatron.core.utils.torch": makes("utils", "tensor", [1.0]),
    "megatron.core.transformer.utils.torch": makes("transformer.utils", "ones", 2, 2),
    "megatron.core.models.common.embeddings.rope_utils.torch": rotary_angles_of_a_context_rank,
    "megatron.core.dist_checkpointing.exchange_utils.torch": makes("dist_checkpointing.exchange_utils", "empty", 0),
    "megatron.core.dist_checkpointing.strategies.state_dict_saver.torch": makes(
        "dist_checkpointing.strategies.state_dict_saver", "tensor", [True]
    ),
    "megatron.core.optimizer.Adam": builds_adam,
    "megatron.core.optimizer.USING_PYTORCH_OPTIMIZER": builds_adam,
    "megatron.core.optimizer.distrib_optimizer.Adam": builds_adam,
    "megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE": step_is_in_every_group,
    "megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER": step_is_in_every_group,
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer.load_state_dict": optimizer_is_saved_and_loaded,
    "torch.distributed.all_reduce": refuses("all_reduce"),
    "torch.distributed.broadcast": refuses("broadcast"),
    "torch.distributed.scatter": refuses("scatter"),
    "megatron.core.dist_checkpointing.strategies.filesystem_async._get_write_results_queue": (
        writers_report_without_another_process
    ),
}


def outcome(job):
    """None where the job succeeds, else what it raised."""
    try:
        job()
    except BaseException:
        return traceback.format_exc()


def try_every_job_with_and_without_its_patch():
    from rto_megatron.config.parallel import ParallelConfig
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.distributed.runtime import start_runtime

    build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    outcomes = {}
    for patch in PATCHES:
        with_patch = outcome(JOBS[patch.name])
        owner, patched = patch.owner(), getattr(patch.owner(), patch.attribute)
        setattr(owner, patch.attribute, cpu._originals[patch.name])
        outcomes[patch.name] = (with_patch, outcome(JOBS[patch.name]))
        setattr(owner, patch.attribute, patched)
    return outcomes, cpu.missing()


@pytest.fixture(scope="module")
def outcomes():
    ((tried, missing),) = run_ranks(try_every_job_with_and_without_its_patch, 1)
    assert missing == [], f"the installed megatron-core has no {missing}"
    return tried


@each_patch
def test_with_the_patch_the_job_is_done_and_without_it_fails(patch, outcomes):
    with_patch, without = outcomes[patch.name]
    assert with_patch is None, f"{patch.name} does not do its job:\n{with_patch}"
    assert without is not None, f"{patch.name} is not needed: {patch.site} works without it, so it may go"


# --- what the adapter leaves alone ----------------------------------------------------------------------------------


def torch_after_installing():
    before = {name: getattr(torch, name) for name in ("tensor", "zeros", "ones", "empty", "empty_like", "compile")}
    cpu.install()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    return {
        "same factories": all(getattr(torch, name) is value for name, value in before.items()),
        "types": (torch.ones(1).type(), torch.ones(1).type(torch.int64).dtype),
        "compile": torch._dynamo.config.disable,
        "is_available": torch.cuda.is_available(),
    }


def test_other_code_in_the_process_keeps_torch_as_it_knows_it():
    assert run_ranks(torch_after_installing, 1) == [
        {"same factories": True, "types": ("torch.FloatTensor", torch.int64), "compile": False, "is_available": False}
    ]


def compiled_functions_left():
    from types import FunctionType

    cpu.install()
    from megatron.core.jit import jit_fuser

    return [
        f"{module_name}.{name}"
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("megatron.core")
        for name, value in list(vars(module).items())
        if isinstance(getattr(value, "_torchdynamo_orig_callable", None), FunctionType)
    ], jit_fuser(compiled_functions_left) is compiled_functions_left


def test_no_function_of_megatron_waits_for_a_compiler():
    assert run_ranks(compiled_functions_left, 1) == [([], True)]


def test_a_run_starts_without_the_compiler():
    """It would take 70 MB of each rank, and seconds."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from rto_megatron.distributed.runtime import import_megatron; import_megatron();"
            "import torch, rto_megatron.stages.rto; print('torch._dynamo' in sys.modules, torch.compile.__module__)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["False", "torch"]


def sum_without_the_guard():
    from rto_megatron.distributed.runtime import rank, start_runtime

    start_runtime(threads=1)
    mine = (torch.arange(6.0).reshape(2, 3) + 10 * rank()).T[1:]
    torch.distributed.all_reduce.__wrapped__(mine)
    return mine


def test_gloo_still_needs_the_guard():
    right = 2 * torch.arange(6.0).reshape(2, 3).T[1:] + 10
    wrong = run_ranks(sum_without_the_guard, 2)[0]
    assert not torch.equal(wrong, right), "gloo has learned strides: the contiguity guard may go"
