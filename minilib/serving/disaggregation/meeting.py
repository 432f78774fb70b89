"""How workers find each other: by an address, or as ranks that were started together."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import torch.distributed as dist

from minilib.ranks.transport.base import CollectiveFailed
from minilib.ranks.transport.shared_memory import Peer, meet
from minilib.serving.disaggregation.channel import ChannelClosed, PacketChannel, SharedMemoryChannel, StreamChannel

Address = tuple[str, int] | str  # host and port for TCP; a path for shared memory
TRANSPORTS = ("shared", "tcp")


class WorkersDidNotMeet(TimeoutError):
    """No worker came to an address, or answered there, in time."""


class ChannelListener:
    """Where workers come to; `with` closes it.

    Args:
        transport: "tcp", on this host's loopback unless `host` says otherwise, or "shared".
        host: the interface that TCP connections come in by.

    Attributes:
        address: for `connect_to_worker`.

    Raises:
        ValueError: for another transport.
    """

    def __init__(self, transport: str = "tcp", host: str = "127.0.0.1") -> None:
        check_transport(transport)
        self._folder = tempfile.TemporaryDirectory(prefix="workers-") if transport == "shared" else None
        if self._folder:
            self._door = socket.socket(socket.AF_UNIX)
            self._door.bind(str(Path(self._folder.name) / "door"))
        else:
            self._door = socket.create_server((host, 0))
        self._door.listen()
        name = self._door.getsockname()
        self.address: Address = name if self._folder else tuple(name[:2])

    def __enter__(self) -> ChannelListener:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def accept(self, timeout: float = 30.0, name: str = "the other worker") -> PacketChannel:
        """The channel to the next worker that comes.

        Raises:
            WorkersDidNotMeet: if none comes in time.
        """
        self._door.settimeout(timeout)
        try:
            connection, _ = self._door.accept()
        except TimeoutError as error:
            raise WorkersDidNotMeet(f"no worker came to {self.address} for {timeout:g} s") from error
        return _channel(connection, timeout, name)

    def close(self) -> None:
        """Let nobody in any more; channels stay."""
        self._door.close()
        if self._folder:
            self._folder.cleanup()


def connect_to_worker(address: Address, timeout: float = 30.0, name: str = "the other worker") -> PacketChannel:
    """The channel to a worker that listens.

    Args:
        address: of its `ChannelListener`.
        timeout: seconds to wait for an answer.
        name: what messages call that worker.

    Raises:
        WorkersDidNotMeet: if nobody answers there.
    """
    connection = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    connection.settimeout(timeout)
    try:
        connection.connect(address)
    except OSError as error:
        connection.close()
        raise WorkersDidNotMeet(f"nobody answers at {address}: {error}") from error
    return _channel(connection, timeout, name)


def meet_ranks(transport: str = "shared", timeout: float = 30.0) -> dict[int, PacketChannel]:
    """Channels to all other ranks of the default group, by rank. A collective: every rank calls it.

    Args:
        transport: "shared", for ranks of one host, or "tcp".
        timeout: seconds to wait for the others.

    Raises:
        ValueError: for another transport.
        WorkersDidNotMeet, CollectiveFailed: if a rank does not come.
    """
    check_transport(transport)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if transport == "shared":
        peers = meet(rank, world_size, None, timeout)
        return {other: SharedMemoryChannel(peer, f"rank {other}") for other, peer in peers.items()}
    channels: dict[int, PacketChannel] = {}
    with ChannelListener("tcp") as listener:
        addresses: list = [None] * world_size
        dist.all_gather_object(addresses, listener.address)
        for pair in ((low, high) for high in range(world_size) for low in range(high)):
            if rank == pair[1]:
                channels[pair[0]] = connect_to_worker(addresses[pair[0]], timeout, f"rank {pair[0]}")
            elif rank == pair[0]:
                channels[pair[1]] = listener.accept(timeout, f"rank {pair[1]}")
            dist.barrier()  # one pair at a time, so that each knows who comes
    return channels


def check_transport(transport: str) -> None:
    """Refuse what is no transport.

    Raises:
        ValueError: naming those there are.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport is one of {', '.join(TRANSPORTS)}; got {transport!r}")


def _channel(connection: socket.socket, timeout: float, name: str) -> PacketChannel:
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return StreamChannel(connection, name)
    try:
        return SharedMemoryChannel(Peer(0, connection, timeout), name)
    except CollectiveFailed as error:
        connection.close()
        raise ChannelClosed(f"{name} shared no memory: {error}") from error
