"""What is asked of a GPU, where there is none: refused with its reason, or the same code as far as it goes."""

import os
from types import SimpleNamespace

import pytest
import torch

from rto_megatron.config.model import ModelConfig
from rto_megatron.config.parallel import ComputeConfig, ParallelConfig
from rto_megatron.distributed import runtime
from rto_megatron.distributed.context import column_multiple
from rto_megatron.distributed.runtime import DETERMINISTIC, Runtime, fp8_problem, start_runtime
from rto_megatron.errors import ConfigError
from tests.ranks import run_ranks


def test_8_bits_need_bfloat16():
    with pytest.raises(
        ValueError, match=r"compute\.fp8 hybrid needs compute\.dtype bfloat16, got float32; set compute"
    ):
        ComputeConfig(fp8="hybrid")


@pytest.mark.parametrize(
    ("recipe", "capability", "engine", "adapted", "said"),
    [
        ("tensorwise", None, True, False, "needs an NVIDIA GPU, and this rank runs on a CPU"),
        ("tensorwise", (8, 0), True, False, "with compute.fp8_recipe tensorwise needs .* 8.9 or more, got 8.0"),
        ("blockwise", (8, 9), True, False, "with compute.fp8_recipe blockwise needs .* 9.0 or more, got 8.9"),
        ("mxfp8", (9, 0), True, False, "with compute.fp8_recipe mxfp8 needs .* 10.0 or more, got 9.0"),
        ("tensorwise", (9, 0), False, False, r"needs Transformer Engine, which is not installed; pip install"),
        ("tensorwise", (9, 0), True, True, r"adapters \(lora, critic_lora\) take Megatron's own"),
        ("tensorwise", (8, 9), True, False, None),
        ("mxfp8", (10, 0), True, False, None),
    ],
)
def test_8_bits_are_refused_with_what_is_missing(recipe, capability, engine, adapted, said):
    problem = fp8_problem(recipe, capability, engine, adapted=adapted)
    if said is None:
        assert problem is None
    else:
        with pytest.raises(ConfigError, match=said):
            raise ConfigError(problem)


def build_in_8_bits(sizes):
    from rto_megatron.distributed.mesh import build_mesh
    from rto_megatron.models.gpt import build_model, check_fp8_sizes

    said = []
    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    compute = ComputeConfig(dtype="bfloat16", fp8="hybrid")
    for attempt in (
        lambda: build_model(
            ModelConfig(vocab_size=64), mesh, kind="policy", parallel=ParallelConfig(), compute=compute
        ),
        lambda: check_fp8_sizes(ModelConfig(vocab_size=64, **sizes), 2),
    ):
        try:
            attempt()
        except ConfigError as error:
            said.append(str(error))
    check_fp8_sizes(ModelConfig(vocab_size=64), 2)
    return said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_a_model_in_8_bits_says_what_is_wrong():
    (said,) = run_ranks(build_in_8_bits, 1, {"ffn_hidden_size": 400})
    assert said == [
        "compute.fp8 hybrid needs an NVIDIA GPU, and this rank runs on a CPU; set compute.fp8 to none",
        "compute.fp8 needs model sizes of a tensor rank that are multiples of 16, got model.ffn_hidden_size 200; "
        "set compute.fp8 to none, or parallel.tensor smaller",
    ]


@pytest.mark.parametrize(
    ("fp8", "recipe", "tensor", "context", "expected"),
    [
        (None, "delayed", 2, 1, 2),
        ("hybrid", "tensorwise", 1, 1, 16),
        ("hybrid", "tensorwise", 2, 2, 2 * 2 * 2 * 16),
        ("e4m3", "blockwise", 1, 1, 128),
        ("e4m3", "mxfp8", 4, 1, 128),
    ],
)
def test_rows_are_as_wide_as_products_in_8_bits_want_them(fp8, recipe, tensor, context, expected):
    config = SimpleNamespace(
        fp8=fp8, fp8_recipe=recipe, tensor_model_parallel_size=tensor, context_parallel_size=context,
        sequence_parallel=tensor > 1,
    )  # fmt: skip
    assert column_multiple(config) == expected


def test_layers_are_transformer_engines_in_bfloat16_alone():
    with_engine, without = (Runtime(torch.device("cpu"), "gloo", has) for has in (True, False))
    assert [with_engine.has_fused_layers(dtype) for dtype in ("bfloat16", "float32")] == [True, False]
    assert not without.has_fused_layers("bfloat16")


def train_deterministically(deterministic):
    from tests.gpu.legs import train

    found = train(compute={"deterministic": deterministic}, steps=1)
    told = {name: os.environ.get(name) for name in (*DETERMINISTIC, "NCCL_ALGO")}
    return found, told, torch.are_deterministic_algorithms_enabled()


def test_the_deterministic_mode_tells_torch_and_libraries_and_changes_no_bit_on_a_cpu():
    (on,), (off,) = (run_ranks(train_deterministically, 1, on) for on in (True, False))
    assert on[1:] == (DETERMINISTIC | {"NCCL_ALGO": "Ring"}, True)
    assert not off[2]
    assert all(torch.equal(x, off[0][name]) for name, x in on[0].items())


def test_apex_is_nvidias_only_with_its_kernels(monkeypatch, tmp_path):
    for name, is_there in (("apex", False), ("amp_C", False), ("fused_weight_gradient_mlp_cuda", True)):
        (tmp_path / f"{name}.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        runtime.has_nvidia_apex.cache_clear()
        assert runtime.has_nvidia_apex() == is_there
    runtime.has_nvidia_apex.cache_clear()


def adam_alone():
    import importlib

    from rto_megatron.distributed import cpu
    from rto_megatron.distributed.adam import FusedAdam

    start_runtime(threads=1)
    before = cpu.is_installed()
    cpu._originals.clear()
    owners = [importlib.import_module(f"megatron.core.optimizer{name}") for name in ("", ".distrib_optimizer")]
    for owner in owners:
        owner.Adam = None
    cpu.install_adam()
    return before, cpu.is_installed(), [owner.Adam is FusedAdam for owner in owners], sorted(cpu._adams)


def test_a_gpu_without_a_library_that_has_adam_takes_ours_and_nothing_else():
    from rto_megatron.distributed.cpu_patches import ADAM, PATCHES

    (found,) = run_ranks(adam_alone, 1)
    assert found == (True, False, [True, True], sorted(ADAM))
    assert {patch.name for patch in PATCHES} >= ADAM


def numbers_of_host_memory():
    from rto_megatron.distributed.collectives import meetings

    start_runtime(threads=1)
    meet = meetings([(0, 1)])
    group = torch.distributed.distributed_c10d._world.pg_map
    return meet((0, 1), float(runtime.rank())), {backend for backend, _ in group.values()}


def test_ranks_meet_in_host_memory():
    for largest, backends in run_ranks(numbers_of_host_memory, 2):
        assert largest == 1.0
        assert "gloo" in backends
