"""Collectives at two ranks, each with numbers that can be added in the head."""

import torch

from rto_megatron.config.parallel import ParallelConfig
from rto_megatron.distributed import collectives
from rto_megatron.distributed.mesh import build_mesh
from rto_megatron.distributed.runtime import rank, start_runtime
from tests.ranks import run_ranks


def data_parallel_worker():
    mesh = build_mesh(ParallelConfig(), start_runtime(threads=1), seed=0)
    mine = torch.arange(6.0).reshape(2, 3) + 10 * rank()
    return {
        "unchanged": mine,
        "sum_in_order": collectives.sum_in_rank_order(mine.T, mesh),
        "gathered": collectives.gather_over_data(mine.T, mesh),
        "objects": collectives.gather_objects({"rank": rank()}),
        "from_rank_1": collectives.broadcast_object(f"rank {rank()}", src=1),
    }


def test_collectives_over_two_data_ranks():
    results = run_ranks(data_parallel_worker, 2)
    left = torch.arange(6.0).reshape(2, 3).T
    for own, got in enumerate(results):
        # rank 0 has 0..5, rank 1 has 10..15; all of them transposed, so not contiguous
        torch.testing.assert_close(got["sum_in_order"], 2 * left + 10)
        torch.testing.assert_close(got["gathered"], torch.cat([left, left + 10]))
        torch.testing.assert_close(got["unchanged"], left.T + 10 * own)
        assert got["objects"] == [{"rank": 0}, {"rank": 1}]
        assert got["from_rank_1"] == "rank 1"


def pipeline_worker():
    mesh = build_mesh(ParallelConfig(pipeline=2), start_runtime(threads=1), seed=0)
    computed = torch.arange(6).reshape(2, 3).T if mesh.is_last_stage else None
    received = collectives.from_last_stage(computed, mesh, shape=(3, 2), dtype=torch.int64)
    return mesh.is_first_stage, mesh.is_last_stage, received


def test_every_stage_gets_what_the_last_one_computed():
    first, last = run_ranks(pipeline_worker, 2)
    assert first[:2] == (True, False) and last[:2] == (False, True)
    for _, _, received in (first, last):
        assert received.tolist() == [[0, 3], [1, 4], [2, 5]]
