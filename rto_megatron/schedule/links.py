"""Messages of the schedule: between the leaders of groups, and from each leader to the other ranks of its group.

Plain sockets, apart from the collectives of the models: a leader can wait for whoever speaks next, and a peer that dies
closes its end. One thread reads everything, so a sender never waits for a busy receiver. Rows of samples are small
(about 30 bytes a token); weights and activations do not go this way.
"""

import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

LOST = object()
"""What is read from a rank that has gone without a word."""

GOOD_BYE = "good-bye"
"""The last message of a rank that has all it needs; others may still wait for each other."""


class PeerLost(RuntimeError):
    """A rank that this one talks to has gone."""


@dataclass(frozen=True)
class Links:
    """Open connections of one rank."""

    rank: int
    peers: dict[int, Connection]
    """Rank -> connection: a leader's to the other leaders and to its members, a member's to its leader."""
    _inbox: "queue.SimpleQueue[tuple[int, Any]]"

    def send(self, rank: int, message: Any) -> None:
        """Bring a picklable message to a rank.

        Raises:
            PeerLost: it has gone.
        """
        try:
            self.peers[rank].send(message)
        except OSError as error:
            raise PeerLost(f"rank {rank} has closed its connection ({error})") from None

    def receive(self, *, block: bool) -> tuple[int, Any] | None:
        """The next message and who sent it; None if there is none and it is not to wait.

        Raises:
            PeerLost: a rank has gone.
        """
        try:
            rank, message = self._inbox.get(block)
        except queue.Empty:
            return None
        if message is LOST:
            raise PeerLost(f"rank {rank} has closed its connection")
        return rank, message

    def close(self) -> None:
        """Say good-bye; messages that this rank has not read are lost."""
        for connection in self.peers.values():
            with suppress(OSError):  # it may have left before
                connection.send(GOOD_BYE)
            connection.close()


def connect(rank: int, groups: Sequence[Sequence[int]], gather: Callable[[Any], list[Any]]) -> Links:
    """Connect all leaders with each other, and each with its members. Every rank must call.

    Args:
        groups: ranks of each group; the first leads.
        gather: tells every rank's object to every rank (`collectives.gather_objects`).
    """
    leaders = [ranks[0] for ranks in groups]
    mine = next(ranks for ranks in groups if rank in ranks)
    # of two leaders the later group calls, and a leader calls its members: so each waits for who comes before it
    called_by = [r for r in leaders if leaders.index(r) > leaders.index(rank)] if rank in leaders else [mine[0]]
    calls = [r for r in leaders if leaders.index(r) < leaders.index(rank)] + list(mine[1:]) if rank in leaders else []
    key = gather(os.urandom(16) if rank == 0 else None)[0]
    peers: dict[int, Connection] = {}
    with Listener((_own_address(gather), 0), backlog=max(1, len(called_by)), authkey=key) as listener:

        def accept() -> None:
            for _ in called_by:
                connection = _accept(listener)
                peers[connection.recv()] = connection

        door = threading.Thread(target=accept, daemon=True)
        door.start()
        addresses = gather(listener.address)
        for other in calls:
            connection = Client(addresses[other], authkey=key)
            connection.send(rank)
            peers[other] = connection
        door.join()
    inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(peers, inbox), daemon=True).start()
    return Links(rank, peers, inbox)


def _accept(listener: Listener) -> Connection:
    """The next caller who knows the key: a stray one is sent away."""
    while True:
        try:
            return listener.accept()
        except (AuthenticationError, EOFError, ConnectionResetError):
            continue


def _own_address(gather: Callable[[Any], list[Any]]) -> str:
    """The address by which the other ranks reach this one: that from which it reaches their meeting point."""
    own = _source_address(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    elsewhere = [address for address in gather(own) if not ip_address(address).is_loopback]
    # the machine where they meet may know its own name as a loopback address
    return _source_address(elsewhere[0]) if elsewhere and ip_address(own).is_loopback else own


def _source_address(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # nothing is sent
        return probe.getsockname()[0]


def _read(peers: dict[int, Connection], inbox: "queue.SimpleQueue[tuple[int, Any]]") -> None:
    """Put whatever comes into the inbox, until every end is closed."""
    rank_of = {connection: rank for rank, connection in peers.items()}
    while rank_of:
        try:
            ready = wait(list(rank_of))
        except (OSError, ValueError):
            return  # we have closed them
        for connection in ready:
            try:
                message = connection.recv()  # type: ignore[union-attr]
                if message == GOOD_BYE:
                    del rank_of[connection]  # type: ignore[arg-type]
                else:
                    inbox.put((rank_of[connection], message))  # type: ignore[index]
            except (EOFError, OSError, TypeError):
                inbox.put((rank_of.pop(connection), LOST))  # type: ignore[arg-type]
