"""What a message between two ranks is, and what collectives ask of whoever carries it.

`group.py` sends over a process group, `shared.py` through memory that ranks of one host share, and
`shaped.py` as if over a slower link.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], object]  # (what is there, what came): adds to what is there

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
        """What travels ahead of the content: the label and the content's size, or nothing."""
        if self.label is None:
            return b""
        size = f", {self.content.nbytes} bytes".encode()
        return self.label.encode()[: LABEL_BYTES - len(size)] + size

    def check(self, rank: int, theirs: bytes) -> None:
        """Compare the head that came, padded with zeros, with one's own.

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
        """A tensor that this transport sends from without a copy, if it can; all ranks ask for the same."""

    def exchange(self, send: Message | None, receive: Message | None, combine: Combine | None) -> None:
        """Send one message and receive one, both at once; either may be None. Returns when both are done.

        Args:
            send, receive: the messages.
            combine: adds what comes to what is there; None to take it over.

        Raises:
            CollectiveMismatch: if the label or the size of what comes is another.
            CollectiveFailed: if nothing comes within the timeout, or the other rank is lost.
        """

    def close(self) -> None:
        """Give back what the transport holds."""


def take(into: Tensor, arrived: Tensor, combine: Combine | None) -> None:
    """Take over what came, or combine it with what is there.

    Args:
        into: (n,) of any dtype.
        arrived: uint8, the bytes of as many values or more.
    """
    values = arrived[: into.nbytes].view(into.dtype)
    if combine is None:
        into.copy_(values)
    else:
        combine(into, values)


def _text(head: bytes) -> str:
    return head.decode(errors="replace")
