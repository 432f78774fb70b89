"""A message between two ranks, and the protocol of a transport, which sends and receives messages for collectives.

`group.py` sends over a process group, `shared.py` through memory that ranks of one host share, and
`shaped.py` as if over a slower link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], object]  # (buffer, received): adds the received values to the buffer

LABEL_BYTES = 128


class CollectiveFailed(RuntimeError):
    """A collective did not finish: a rank was lost, hangs, or ranks disagree; the message says which rank and where."""


class CollectiveMismatch(CollectiveFailed):
    """Two ranks are in different calls, or pass different shapes, dtypes or operations."""


@dataclass(frozen=True)
class Message:
    """One side of a message: what a rank sends, or the buffer into which a rank receives.

    Args:
        peer: the rank at the other end.
        content: the buffer, contiguous, of one dimension.
        label: the call that the message belongs to, equal at both ends; None if the two ranks have compared labels in
            this call.
    """

    peer: int
    content: Tensor
    label: str | None

    def head(self) -> bytes:
        """The bytes that are sent before the content: the label and the content's size; empty without a label."""
        if self.label is None:
            return b""
        size = f", {self.content.nbytes} bytes".encode()
        return self.label.encode()[: LABEL_BYTES - len(size)] + size

    def check(self, rank: int, theirs: bytes) -> None:
        """Compare the received head, padded with zeros, with the head of this message.

        Raises:
            CollectiveMismatch: if they differ.
        """
        mine, theirs = self.head(), theirs.rstrip(b"\0")
        if mine and mine != theirs:
            raise CollectiveMismatch(
                f"rank {rank} expects [{_text(mine)}] from rank {self.peer}, and got [{_text(theirs)}]: "
                "all ranks must make the same calls in the same order, with the same shapes and dtypes"
            )


class Transport(Protocol):
    """Point-to-point messages between the ranks of one group."""

    rank: int
    world_size: int

    def empty(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised buffer, (numel,), which this transport sends without a copy if it can.

        A collective: all ranks call it with the same arguments.
        """

    def exchange(self, send: Message | None, receive: Message | None, combine: Combine | None) -> None:
        """Send one message and receive one, both at once; either may be None. Returns when both are done.

        Args:
            send: the message to send, or None.
            receive: the message to receive, or None.
            combine: adds the received values to the buffer; None if they replace its content.

        Raises:
            CollectiveMismatch: if the label or the size of the received message differs.
            CollectiveFailed: if no message is received within the timeout, or the other rank is lost.
        """

    def close(self) -> None:
        """Release the connections and the memory of the transport."""


class PostingTransport(Transport, Protocol):
    """A transport whose sender need not wait for the receiver, for messages outside collectives."""

    def post(self, send: Message) -> None:
        """Send a message and return at once; its content must not change before `settle`.

        Messages to one rank arrive in the order in which they were posted.
        """

    def receive(self, message: Message) -> None:
        """Return when a message is received; posted ones go on meanwhile.

        Raises:
            CollectiveMismatch, CollectiveFailed: as `exchange`.
        """

    def settle(self) -> None:
        """Return when all posted messages are out.

        Raises:
            CollectiveFailed: as `exchange`.
        """


def take(into: Tensor, arrived: Tensor, combine: Combine | None) -> None:
    """Copy received values into a buffer, or combine them with its content.

    Args:
        into: the buffer, (n,) of any dtype.
        arrived: uint8, the bytes of at least n received values.
        combine: adds the received values to the buffer; None if they replace its content.
    """
    values = arrived[: into.nbytes].view(into.dtype)
    if combine is None:
        into.copy_(values)
    else:
        combine(into, values)


def _text(head: bytes) -> str:
    return head.decode(errors="replace")
