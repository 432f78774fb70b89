"""Messages between ranks of one host through memory that both map, as NCCL's shared-memory transport does.

Each pair of ranks has a socket and, in each direction, a few slots of memory. The sender copies a piece into a free
slot and notifies the receiver over the socket; the receiver adds the piece to its buffer straight from the slot, and
notifies the sender that the slot is free. All ranks map a tensor from `empty`: the sender sends only the offset of
the content, and the receiver adds from that tensor.

A socket, not a flag in memory: a rank that waits on a socket sleeps, and the socket is closed when the other rank dies.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from minilib.ranks.transport.base import CollectiveFailed, Combine, Message, take
from minilib.ranks.transport.shared_memory import SLOT_BYTES, SLOTS, Peer, map_memory, meet, new_memory, wait_for


@dataclass(frozen=True)
class _Region:
    """A tensor from `empty`: this rank's own, and the mappings of the other ranks' by rank."""

    mine: Tensor
    theirs: dict[int, Tensor]


class SharedMemoryTransport:
    """For CPU tensors and ranks of one host.

    Args:
        group: process group, over which ranks find each other; the default group if left out.
        timeout: seconds to wait for a notice from another rank.

    Raises:
        NotOneHost: if the group spans several hosts.
        CollectiveFailed: if ranks cannot connect.

    Cost: SLOTS · SLOT_BYTES for each pair of ranks and direction; 2 copies a byte, or 1 from `empty`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 60.0) -> None:
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        self._begin(rank, meet(rank, world_size, group, timeout), timeout)

    @classmethod
    def between(cls, rank: int, connections: Mapping[int, socket.socket], timeout: float = 60.0) -> Self:
        """The transport of ranks that are connected already and form no process group.

        Args:
            rank: this one.
            connections: a Unix socket to every other rank, each of which calls this, too; they are the transport's now.
            timeout: as above.

        Raises:
            CollectiveFailed: if a rank does not share its memory in time, or is lost.
        """
        peers = {other: Peer(other, connections[other], timeout) for other in sorted(connections)}
        transport = cls.__new__(cls)
        transport._begin(rank, peers, timeout)
        return transport

    def _begin(self, rank: int, peers: dict[int, Peer], timeout: float) -> None:
        self.rank, self.world_size, self._timeout = rank, len(peers) + 1, timeout
        self._peers = peers
        self._regions: list[_Region] = []
        self._posted: dict[int, deque[_Outgoing]] = {}  # by peer; a peer without any has no entry

    def empty(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor that all ranks map, for as long as the transport lives.

        All ranks ask for the same, in one order, and while no collective is on its way in the background.

        Raises:
            CollectiveMismatch: if another rank asks for more or fewer bytes.
            CollectiveFailed: if one does not ask in time, or is gone.
        """
        with new_memory(max(1, numel * dtype.itemsize)) as descriptor:
            theirs = {other: peer.trade(descriptor, self._timeout) for other, peer in self._peers.items()}
            region = _Region(map_memory(descriptor), theirs)
        self._regions.append(region)
        return region.mine[: numel * dtype.itemsize].view(dtype)

    def exchange(self, send, receive, combine):
        self.settle()
        ends: list[_Outgoing | _Incoming] = []
        if send is not None:
            ends.append(_Outgoing(self._peers[send.peer], send, *self._locate(send.content)))
        if receive is not None:
            ends.append(_Incoming(self._peers[receive.peer], self.rank, receive, combine, self._regions))
        while ends:
            moved = [end.step() for end in ends]
            ends = [end for end in ends if not end.done]
            if ends and not any(moved):
                self._sleep({end.peer for end in ends})

    def post(self, send):
        outgoing = _Outgoing(self._peers[send.peer], send, *self._locate(send.content))
        self._posted.setdefault(send.peer, deque()).append(outgoing)
        self._push()

    def receive(self, message):
        incoming = _Incoming(self._peers[message.peer], self.rank, message, None, self._regions)
        while not incoming.done:
            pushed = self._push()
            if not (incoming.step() or pushed):
                self._sleep({incoming.peer, *(self._peers[rank] for rank in self._posted)})

    def settle(self):
        while self._posted:
            if not self._push():
                self._sleep({self._peers[rank] for rank in self._posted})

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers, self._regions, self._posted = {}, [], {}

    def _push(self) -> bool:
        """Fill free slots with posted messages, those to one peer in order; True if any moved."""
        moved = False
        for rank, queue in list(self._posted.items()):
            while queue:
                if not self._peers[rank].free:
                    self._peers[rank].hear()  # of slots that are free by now
                if queue[0].step():
                    moved = True
                elif not queue[0].done:
                    break
                if queue[0].done:
                    queue.popleft()
            if not queue:
                del self._posted[rank]
        return moved

    def _locate(self, content: Tensor) -> tuple[int, int]:
        """Region and offset in bytes of a tensor from `empty`, or of a part of one; region -1 for any other."""
        for number, region in enumerate(self._regions):
            offset = content.data_ptr() - region.mine.data_ptr()
            if 0 <= offset < len(region.mine):
                return number, offset
        return -1, 0

    def _sleep(self, peers: set[Peer]) -> None:
        """Until one of them has something to say."""
        ready = wait_for([peer.socket for peer in peers], self._timeout)
        if not ready:
            who = " and ".join(sorted(str(peer.rank) for peer in peers))
            raise CollectiveFailed(f"rank {self.rank} has heard nothing from rank {who} for {self._timeout:g} s")
        for peer in peers:
            if peer.socket.fileno() in ready:
                peer.hear()


class _Outgoing:
    """A message on its way out. The first slot has the label, and says where to look instead, if it can."""

    def __init__(self, peer: Peer, message: Message, region: int, offset: int) -> None:
        self.peer, self._message = peer, message
        self._region, self._offset = region, offset
        content = message.content.view(torch.uint8)
        self._pieces = (content[:0],) if region >= 0 else content.split(SLOT_BYTES)
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether everything is out, and nobody still reads from the tensor itself."""
        return self._at == len(self._pieces) and (self._region < 0 or self.peer.free == SLOTS)

    def step(self) -> bool:
        """Fill a slot, if one is free; True if it did."""
        if self._at == len(self._pieces) or not self.peer.free:
            return False
        slot, piece = next(self.peer.to_fill), self._pieces[self._at]
        if self._at == 0:
            slot.write_head(self._message.head(), self._region, self._offset)
        slot.content[: len(piece)].copy_(piece)
        self._at += 1
        self.peer.say_filled()
        return True


class _Incoming:
    """A message on its way in."""

    def __init__(
        self, peer: Peer, rank: int, message: Message, combine: Combine | None, regions: list[_Region]
    ) -> None:
        self.peer, self._rank, self._message = peer, rank, message
        self._combine, self._regions = combine, regions
        self._pieces = message.content.split(SLOT_BYTES // message.content.element_size())
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether everything is here."""
        return self._at == len(self._pieces)

    def step(self) -> bool:
        """Empty a slot, if one is filled; True if it did."""
        if self.done or not self.peer.filled:
            return False
        slot, region, offset = next(self.peer.to_empty), -1, 0
        if self._at == 0:
            label, region, offset = slot.read_head()
            self._message.check(self._rank, label)
        if region < 0:
            take(self._pieces[self._at], slot.content, self._combine)
            self._at += 1
        else:
            take(self._message.content, self._regions[region].theirs[self.peer.rank][offset:], self._combine)
            self._at = len(self._pieces)
        self.peer.say_free()
        return True
