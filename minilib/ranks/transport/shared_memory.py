"""Memory that two ranks of one host both map, and the socket over which they exchange notices about it.

Once the ranks are connected, neither the memory nor the socket has a name in the file system, so nothing is left behind
however a rank ends.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import select
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import round_up
from minilib.ranks.transport.base import LABEL_BYTES, CollectiveFailed, CollectiveMismatch

SLOTS, SLOT_BYTES = 4, 2**20  # smaller slots stay in a core's own cache, but wake the other rank more often
_HEAD = struct.Struct(f"{LABEL_BYTES}sqq")
_HEAD_BYTES = round_up(_HEAD.size, 64)  # content begins with a cache line
_SLOT = _HEAD_BYTES + SLOT_BYTES
_FILLED, _FREE, _MEMORY = b"f", b"e", b"m"


class NotOneHost(CollectiveFailed):
    """Ranks on different hosts share no memory."""


class Slot:
    """A buffer for a piece of content, after a head with the label and the place of the content.

    Args:
        memory: _SLOT bytes of uint8.
    """

    def __init__(self, memory: Tensor) -> None:
        self._head, self.content = memoryview(memory[:_HEAD_BYTES].numpy()), memory[_HEAD_BYTES:]

    def write_head(self, label: bytes, region: int, offset: int) -> None:
        """Write a label, the number of a region (-1 if the content is in slots), and the offset in the region."""
        _HEAD.pack_into(self._head, 0, label, region, offset)

    def read_head(self) -> tuple[bytes, int, int]:
        """The label, the region and the offset."""
        return _HEAD.unpack_from(self._head)


class Peer:
    """Another rank: the socket to that rank, the slots that this rank fills, and the slots that this rank empties.

    Args:
        rank: number of the other rank.
        connection: Unix socket connected to the other rank, which begins the same handshake.
        timeout: seconds to wait for the handshake.

    Attributes:
        free, filled: slots that this rank can fill and empty now.
        to_fill, to_empty: the slots in turn; whoever takes one calls `say_filled` or `say_free` afterwards.
    """

    def __init__(self, rank: int, connection: socket.socket, timeout: float) -> None:
        self.rank, self.socket = rank, connection
        self.socket.setblocking(False)
        self.free, self.filled = SLOTS, 0
        self._descriptors: list[int] = []  # received, not yet mapped
        with new_memory(SLOTS * _SLOT) as descriptor:
            mine, theirs = map_memory(descriptor), self.trade(descriptor, timeout)
        self.to_fill = itertools.cycle([Slot(memory) for memory in mine.view(SLOTS, _SLOT)])
        self.to_empty = itertools.cycle([Slot(memory) for memory in theirs.view(SLOTS, _SLOT)])

    def trade(self, descriptor: int, timeout: float) -> Tensor:
        """Send the other rank a descriptor of memory, receive a descriptor from it, and map that.

        Args:
            descriptor: memory of this rank, for the other rank to map.
            timeout: seconds to wait for the other rank's descriptor.

        Returns:
            The other rank's memory, uint8, as many bytes as this rank's.

        Raises:
            CollectiveMismatch: if the other rank's memory has another size.
            CollectiveFailed: if no descriptor is received in time, or the other rank is gone.
        """
        try:
            socket.send_fds(self.socket, [_MEMORY], [descriptor])
        except OSError as error:
            raise CollectiveFailed(f"rank {self.rank} is gone: {error}") from error
        while not self._descriptors:
            if not wait_for([self.socket], timeout):
                raise CollectiveFailed(f"rank {self.rank} has shared no memory for {timeout:g} s")
            self.hear()
        other = self._descriptors.pop(0)
        try:
            size, wanted = os.fstat(other).st_size, os.fstat(descriptor).st_size
            if size != wanted:
                raise CollectiveMismatch(
                    f"rank {self.rank} shares {size} bytes, this rank {wanted}: all ranks must ask for the same"
                )
            return map_memory(other)
        finally:
            os.close(other)

    def say_filled(self) -> None:
        """Notify the other rank that the next slot is filled.

        Raises:
            CollectiveFailed: if the other rank is gone.
        """
        self.free -= 1
        try:
            self.socket.send(_FILLED)  # always fits: at most SLOTS of each kind are on their way
        except OSError as error:
            raise CollectiveFailed(f"rank {self.rank} is gone: {error}") from error

    def say_free(self) -> None:
        """Notify the other rank that the next slot is empty, unless that rank has sent everything and is gone."""
        self.filled -= 1
        with contextlib.suppress(OSError):
            self.socket.send(_FREE)

    def hear(self) -> None:
        """Receive the notices and descriptors that the other rank has sent.

        Raises:
            CollectiveFailed: if the other rank is gone.
        """
        try:
            heard, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 1)
        except BlockingIOError:
            return
        except OSError:
            heard, descriptors = b"", []
        if not heard:
            raise CollectiveFailed(f"rank {self.rank} is gone")
        self._descriptors += descriptors
        self.filled += heard.count(_FILLED)
        self.free += heard.count(_FREE)

    def close(self) -> None:
        """Close the socket, which the other rank notices; memory is freed with the last tensor that maps it."""
        self.socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


def meet(rank: int, world_size: int, group: dist.ProcessGroup | None, timeout: float) -> dict[int, Peer]:
    """Connect every pair of ranks, and remove the names of the sockets from the file system.

    Raises:
        NotOneHost: if the ranks are on several hosts.
        CollectiveFailed: if a rank does not connect in time, or is lost.
    """
    hosts: list = [None] * world_size
    dist.all_gather_object(hosts, (socket.gethostname(), _boot()), group=group)
    if len(set(hosts)) > 1:
        raise NotOneHost(f"shared memory needs ranks of one host; these are on {len(set(hosts))}")
    folder = [tempfile.mkdtemp(prefix="ranks-") if rank == 0 else None]
    dist.broadcast_object_list(folder, dist.get_global_rank(group or dist.group.WORLD, 0), group=group)
    try:
        connections = _connect(Path(folder[0]), rank, world_size, group, timeout)
        peers = {other: Peer(other, connection, timeout) for other, connection in sorted(connections.items())}
        dist.barrier(group)  # nobody needs the folder any more
        return peers
    except OSError as error:
        raise CollectiveFailed(f"rank {rank} could not meet the others: {error}") from error
    finally:
        if rank == 0:
            shutil.rmtree(folder[0], ignore_errors=True)


def _connect(
    place: Path, rank: int, world_size: int, group: dist.ProcessGroup | None, timeout: float
) -> dict[int, socket.socket]:
    """A socket to every other rank: this rank connects to lower ranks, and accepts connections from higher ranks."""
    connections: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(timeout)
        door.bind(str(place / str(rank)))
        door.listen(world_size)
        dist.barrier(group)
        for other in range(rank):
            connections[other] = socket.socket(socket.AF_UNIX)
            connections[other].settimeout(timeout)
            connections[other].connect(str(place / str(other)))
            connections[other].sendall(rank.to_bytes(4, "little"))
        for _ in range(rank + 1, world_size):
            connection, _ = door.accept()
            connection.settimeout(timeout)
            connections[int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")] = connection
    return connections


def wait_for(sockets: list[socket.socket], timeout: float) -> set[int]:
    """Sleep until sockets can be read or are closed by the peer; their descriptors, none after `timeout` seconds."""
    poll = select.poll()  # not select, which knows no descriptor beyond 1023
    for each in sockets:
        poll.register(each, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(timeout * 1000)}


@contextlib.contextmanager
def new_memory(size: int) -> Iterator[int]:
    """A descriptor of `size` bytes of zeroed memory without a name, closed at the end of the with block."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("shared")
    else:
        descriptor, name = tempfile.mkstemp()
        Path(name).unlink()
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


def map_memory(descriptor: int) -> Tensor:
    """Such memory as bytes, (size,) uint8."""
    return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)


def _boot() -> str:
    """Tells hosts of one name apart."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text() if file.exists() else ""
