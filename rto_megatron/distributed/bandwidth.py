"""How fast ranks reach their neighbours: for a check before a run."""

import time

import torch
import torch.distributed as dist

from rto_megatron.distributed.runtime import Runtime, rank, wait_for_device, world_size

NUM_BYTES = 32 * 2**20
NUM_TRIES = 3


def bytes_per_second_to_next(runtime: Runtime) -> float:
    """Rate at which all ranks at once send to the next one and receive from the one before; the best of a few tries.

    Every rank of the world calls. 0 where there is no other rank.
    """
    me, world = rank(), world_size()
    if world == 1:
        return 0.0
    mine = torch.full((NUM_BYTES // 4,), float(me), device=runtime.device)
    theirs = torch.empty_like(mine)
    seconds = []
    for _ in range(NUM_TRIES):
        dist.barrier()
        start = time.perf_counter()
        both = [dist.P2POp(dist.isend, mine, (me + 1) % world), dist.P2POp(dist.irecv, theirs, (me - 1) % world)]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    assert theirs[0] == theirs[-1] == (me - 1) % world, "what came is not what was sent"
    return NUM_BYTES / min(seconds)
