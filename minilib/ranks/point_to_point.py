"""Send and receive between two ranks, outside collectives. A send never waits for its receiver.

    mail = PointToPoint(comm)
    mail.send(x, 1, "x of step 3")             on rank 0; returns at once
    mail.receive(buffer, 0, "x of step 3")     on rank 1; returns when it is there

Two ranks that both send first and receive after deadlock if sends wait for receivers, as plain sends do once messages
are too large for the buffers in between. Here what does not fit waits on the sending rank, and goes on when that rank
receives something or settles.

In production: torch.distributed's isend and irecv, NCCL's grouped send and receive.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from minilib.ranks.collectives import Communicator
from minilib.ranks.combine import check_contiguous, check_tensor
from minilib.ranks.transport.base import Message, PostingTransport


class PointToPoint:
    """Messages between the ranks of a communicator, none of whose collectives runs in the background meanwhile.

    Args:
        comm: its traffic counts these messages, too; its transport has to be able to post: shared memory or a group.

    Raises:
        TypeError: if the transport cannot.
    """

    def __init__(self, comm: Communicator) -> None:
        transport = getattr(comm, "transport", None)
        if not hasattr(transport, "post"):
            raise TypeError(
                f"point-to-point messages need a Communicator over a SharedMemoryTransport or a GroupTransport, "
                f"got a {type(comm).__name__} over a {type(transport).__name__}"
            )
        self.comm, self._transport = comm, cast(PostingTransport, transport)

    def send(self, tensor: Tensor, peer: int, label: str) -> None:
        """Send a tensor; it must not change before `settle`.

        Args:
            tensor: contiguous.
            peer: the rank that receives it; messages arrive in the order in which they are sent.
            label: what it is; sender and receiver say the same.

        Raises:
            ValueError: if the tensor is none that a transport carries, or the peer no other rank.
            CollectiveFailed: if a rank is gone.
        """
        message = self._message(tensor, peer, label)
        self.comm.traffic.messages += 1
        self.comm.traffic.bytes += message.content.nbytes
        self.comm.guarded(lambda: self._transport.post(message), label)

    def receive(self, tensor: Tensor, peer: int, label: str) -> Tensor:
        """Receive the next message of a rank into a tensor of its shape and dtype, and return the tensor.

        Raises:
            CollectiveMismatch: if the message has another label, shape or dtype.
            CollectiveFailed: if it does not come in time, or a rank is gone.
        """
        message = self._message(tensor, peer, label)
        self.comm.guarded(lambda: self._transport.receive(message), label)
        return tensor

    def settle(self) -> None:
        """Return when everything is sent: tensors may change again, and collectives may follow.

        Raises:
            CollectiveFailed: if a rank does not take what is for it in time, or is gone.
        """
        self.comm.guarded(self._transport.settle, "settle")

    def _message(self, tensor: Tensor, peer: int, label: str) -> Message:
        if not 0 <= peer < self.comm.world_size or peer == self.comm.rank:
            raise ValueError(f"rank {self.comm.rank} sends to and receives from another of "
                             f"{self.comm.world_size} ranks, got {peer!r}")  # fmt: skip
        check_tensor(tensor, None)
        check_contiguous(tensor)
        return Message(peer, tensor.detach().view(-1), f"{label}, {tensor.dtype} {tuple(tensor.shape)}")
