"""The grid of ranks, as each rank sees it."""

import pytest
import torch

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.distributed.mesh import build_mesh, role_mesh
from rto_megatron.distributed.runtime import start_runtime
from rto_megatron.errors import ConfigError
from tests.ranks import run_ranks


def place(tensor, pipeline, context):
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context)
    mesh = build_mesh(parallel, start_runtime(threads=1), seed=0)
    axes = (mesh.tensor, mesh.pipeline, mesh.context, mesh.data)
    return [(axis.rank, axis.size) for axis in axes], mesh.is_first_stage, mesh.is_last_stage


@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "second_rank"),
    [
        (2, 1, 1, ([(1, 2), (0, 1), (0, 1), (0, 1)], True, True)),
        (1, 2, 1, ([(0, 1), (1, 2), (0, 1), (0, 1)], False, True)),
        (1, 1, 2, ([(0, 1), (0, 1), (1, 2), (0, 1)], True, True)),
        (1, 1, 1, ([(0, 1), (0, 1), (0, 1), (1, 2)], True, True)),
    ],
)
def test_the_second_of_two_ranks_lies_on_the_axis_that_was_asked_for(tensor, pipeline, context, second_rank):
    assert run_ranks(place, 2, tensor, pipeline, context)[1] == second_rank


def message_of_a_mesh_that_does_not_fit():
    with pytest.raises(ConfigError) as error:
        build_mesh(ParallelConfig(tensor=2, pipeline=2), start_runtime(threads=1), seed=0)
    return str(error.value)


def test_sizes_that_do_not_divide_the_world_are_the_users_mistake():
    for message in run_ranks(message_of_a_mesh_that_does_not_fit, 2):
        assert "parallel.tensor 2 x parallel.pipeline 2 does not divide the 2 ranks" in message
        assert "start a multiple of 4" in message


def build_twice():
    runtime = start_runtime(threads=1)
    assert start_runtime(threads=1) is runtime
    first = build_mesh(ParallelConfig(tensor=2), runtime, seed=0)
    again = build_mesh(ParallelConfig(tensor=2), runtime, seed=0)
    other = build_mesh(ParallelConfig(pipeline=2), runtime, seed=0)
    return first.groups is again.groups, first.tensor.size, other.pipeline.size


def test_a_mesh_is_made_once_and_others_may_lie_beside_it():
    assert run_ranks(build_twice, 2) == [(True, 2, 2)] * 2


def places_of_two_roles():
    runtime = start_runtime(threads=1)
    policy = role_mesh(ParallelConfig(tensor=2), runtime, ranks=range(2))
    engine = role_mesh(ParallelConfig(), runtime, ranks=range(2, 3))
    return [mesh and (mesh.tensor.rank, mesh.tensor.size, mesh.data.size) for mesh in (policy, engine)]


def test_roles_on_ranks_of_their_own_have_a_mesh_there_and_none_elsewhere():
    assert run_ranks(places_of_two_roles, 3) == [[(0, 2, 1), None], [(1, 2, 1), None], [None, (0, 1, 1)]]


def ask_megatron_after_a_step():
    from megatron.core import parallel_state

    from tests.distributed.tiny import tiny_trainer

    tiny_trainer(tensor=2).train(1)
    return parallel_state.model_parallel_is_initialized()


def test_training_sets_up_no_global_parallel_state():
    assert run_ranks(ask_megatron_after_a_step, 2) == [False, False]


def draw():
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    build_mesh(ParallelConfig(tensor=2), start_runtime(threads=1), seed=5)
    shared = torch.rand(3)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(3)
    return shared, own, torch.rand(3)


def test_tensor_ranks_share_the_default_stream_and_differ_in_megatrons():
    (shared_0, own_0, after_0), (shared_1, own_1, after_1) = run_ranks(draw, 2)
    assert torch.equal(shared_0, shared_1) and torch.equal(after_0, after_1)
    assert not torch.equal(own_0, own_1)


def message_of_a_seed(seed):
    with pytest.raises(ConfigError) as error:
        build_mesh(ParallelConfig(), start_runtime(threads=1), seed=seed)
    return str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_cannot_take_is_the_users_mistake(seed):
    assert run_ranks(message_of_a_seed, 1, seed) == [
        f"seed must be 0 or more and below 2^63, got {seed}; torch takes no more bits"
    ]
