"""Connections between ranks: everybody reaches whom it must, and who is gone is noticed."""

import os
import signal
import time
from typing import Any

import pytest

from tests.ranks import RanksFailed, run_ranks

GROUPS = ((0, 1), (2,), (3,))


def open_links() -> Any:
    from rto_megatron.distributed.collectives import gather_objects
    from rto_megatron.distributed.runtime import rank, start_runtime
    from rto_megatron.schedule.links import connect

    start_runtime(threads=1)
    return connect(rank(), GROUPS, gather_objects)


def greet() -> tuple[list[int], dict[int, Any]]:
    links = open_links()
    for peer in links.peers:
        links.send(peer, f"from {links.rank}")
    heard = dict(links.receive(block=True) for _ in links.peers)
    links.close()
    return sorted(links.peers), heard


def test_leaders_reach_each_other_and_their_members_and_members_their_leader_alone():
    expected = {0: [1, 2, 3], 1: [0], 2: [0, 3], 3: [0, 2]}
    for rank, (peers, heard) in enumerate(run_ranks(greet, 4)):
        assert peers == expected[rank]
        assert heard == {peer: f"from {peer}" for peer in peers}


def leave_early() -> Any:
    """Leader 3 leaves first; 0 and 2 still have something to say to each other."""
    links = open_links()
    if links.rank == 3:
        links.close()
        return None
    time.sleep(0.5)
    if links.rank == 2:
        links.send(0, "late")
    heard = links.receive(block=True) if links.rank == 0 else None
    links.close()
    return heard


def test_who_says_good_bye_is_not_lost():
    assert run_ranks(leave_early, 4)[0] == (2, "late")


def die() -> None:
    from rto_megatron.schedule.links import PeerLost

    links = open_links()
    if links.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if links.rank == 1:
        links.close()
        return
    with pytest.raises(PeerLost, match="rank 3 has closed its connection"):
        links.receive(block=True)
    print(f"rank {links.rank} noticed")


def test_who_dies_is_noticed_by_all_that_talk_to_it():
    with pytest.raises(RanksFailed) as failed:
        run_ranks(die, 4)
    assert "rank 0 noticed" in str(failed.value) and "rank 2 noticed" in str(failed.value)


def send_much() -> int:
    """Both send more than any buffer holds before they read."""
    links = open_links()
    if links.rank in (0, 2):
        other = 2 - links.rank
        for _ in range(8):
            links.send(other, bytes(1 << 22))
        size = sum(len(links.receive(block=True)[1]) for _ in range(8))
        links.send(other, "done")
        assert links.receive(block=True) == (other, "done")
        return size
    links.close()
    return 0


def test_two_that_send_much_do_not_wait_for_each_other():
    assert run_ranks(send_much, 4)[0] == 8 << 22
