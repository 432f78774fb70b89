"""How a message gets from one rank to another: over the process group's send and receive.

`transport_shared.py` has the other way, through memory that ranks of one host share.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Combine = Callable[[Tensor, Tensor], object]  # (what is there, what came): adds to what is there

LABEL_BYTES, FIRST_BYTES = 128, 2**12
SEGMENTS, SEGMENT_BYTES = 2, 2**22  # one is on its way while the one before is added


class CollectiveFailed(RuntimeError):
    """A collective did not finish: a rank was lost, hangs, or ranks disagree; the message says which rank and where."""


class CollectiveMismatch(CollectiveFailed):
    """Two ranks are in different calls, or pass different shapes, dtypes or operations."""


@dataclass(frozen=True)
class Message:
    """One side of it: what a rank sends, or where it puts what comes.

    Args:
        peer: the rank at the other end.
        content: contiguous, of one dimension.
        label: what it belongs to, equal at both ends; None if the two have compared labels in this call.
    """

    peer: int
    content: Tensor
    label: str | None

    def head(self) -> bytes:
        """What travels ahead of the content: the label and the content's size, or nothing."""
        if self.label is None:
            return b""
        size = f", {num_bytes(self.content)} bytes".encode()
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
        """Send one message and receive one, both at once; either may be None.

        What is sent must not change before `flush`, unless by a later `exchange`.

        Args:
            send, receive: the messages.
            combine: adds what comes to what is there; None to take it over.

        Raises:
            CollectiveMismatch: if the label or the size of what comes is another.
            CollectiveFailed: if nothing comes within the timeout, or the other rank is lost.
        """

    def flush(self) -> None:
        """Return when everything that was sent has left its tensor."""

    def close(self) -> None:
        """Give back what the transport holds."""


class GroupTransport:
    """Over `torch.distributed`'s send and receive; for CPU tensors on gloo.

    Where there is a label, it comes first, with what content fits beside it; the rest follows in segments. Gloo does
    not wake whoever waits for the rest of a message when its sender dies: that takes until the timeout.

    Args:
        group: process group, for as long as the transport lives for its messages alone; a new one of all ranks, whose
            connections `close` takes down, if left out.
        timeout: seconds to wait for a message.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 60.0) -> None:
        self._timeout, self._owned = timedelta(seconds=timeout), group is None
        self._group = group or dist.new_group(backend="gloo", timeout=self._timeout)
        self.rank, self.world_size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._first = torch.empty(FIRST_BYTES, dtype=torch.uint8)
        self._arriving = torch.empty(SEGMENTS, SEGMENT_BYTES, dtype=torch.uint8)
        self._leaving: list[tuple[int, Tensor, dist.Work]] = []  # peer, what it gets, and the sending of it

    def empty(self, numel, dtype=torch.float32):
        return torch.empty(numel, dtype=dtype)

    def exchange(self, send, receive, combine):
        if send is not None:
            for part in _parts(send):
                with self._naming(send.peer):
                    work = dist.isend(part.view(torch.uint8), group=self._group, group_dst=send.peer)
                self._leaving.append((send.peer, part, work))
        if receive is not None:
            self._leave(partial(_overlap, receive.content))
            self._receive(receive, combine)

    def flush(self):
        self._leave(lambda part: True)

    def close(self) -> None:
        self._leaving = []
        if self._owned:
            self._owned = False
            self._hang_up()
            dist.destroy_process_group(self._group)

    def _receive(self, message: Message, combine: Combine | None) -> None:
        peer, content = message.peer, message.content
        first = None if message.label is None else self._irecv(self._first, peer)
        parts = () if first and _fits(message) else _segments(content)
        # Anything may come into these places: no segment is larger. Into the tensor itself only what the labels agree
        # on may come: gloo aborts the process when a message is larger than its place.
        coming = [self._irecv(place, peer) for place in self._arriving[: len(parts)]] if combine else []
        if first is not None:
            self._wait(first, peer)
            message.check(self.rank, self._first[:LABEL_BYTES].numpy().tobytes())
            if not parts:
                take(content, self._first[LABEL_BYTES:], combine)
        if combine is None:
            coming = [self._irecv(part.view(torch.uint8), peer) for part in parts]
        for i, part in enumerate(parts):
            self._wait(coming[i], peer)
            if combine is not None:
                take(part, self._arriving[i % SEGMENTS], combine)
                if i + SEGMENTS < len(parts):
                    coming.append(self._irecv(self._arriving[i % SEGMENTS], peer))

    def _irecv(self, place: Tensor, src: int, tag: int = 0) -> dist.Work:
        with self._naming(src):
            return dist.irecv(place, group=self._group, group_src=src, tag=tag)

    def _leave(self, wanted: Callable[[Tensor], bool]) -> None:
        """Wait until those parts are sent; each can be waited for once."""
        going = [(peer, work) for peer, part, work in self._leaving if wanted(part)]
        self._leaving = [entry for entry in self._leaving if not wanted(entry[1])]
        for peer, work in going:
            self._wait(work, peer)

    def _wait(self, work: dist.Work, peer: int) -> None:
        with self._naming(peer):
            work.wait(self._timeout)

    @contextlib.contextmanager
    def _naming(self, peer: int) -> Iterator[None]:
        """Say of gloo's errors whom they are about."""
        try:
            yield
        except RuntimeError as error:
            why = re.sub(r"^\[\S+\] ", "", str(error).strip().split(". ")[0])  # without its place in gloo's source
            raise CollectiveFailed(f"rank {self.rank} has no answer from rank {peer}: {why}") from error

    def _hang_up(self) -> None:
        """Close the group's connections, so that whoever waits for this rank hears of it.

        Gloo does so when a wait times out, for which the peer must still be there; else only when nobody holds any of
        its works any more.
        """
        for peer in set(range(self.world_size)) - {self.rank}:
            with contextlib.suppress(RuntimeError):
                self._irecv(self._first, peer, tag=1).wait(timedelta(milliseconds=1))


def take(into: Tensor, arrived: Tensor, combine: Combine | None) -> None:
    """Take over what came, or combine it with what is there.

    Args:
        into: (n,) of any dtype.
        arrived: uint8, the bytes of as many values or more.
    """
    values = arrived[: num_bytes(into)].view(into.dtype)
    if combine is None:
        into.copy_(values)
    else:
        combine(into, values)


def num_bytes(x: Tensor) -> int:
    """Bytes of its values."""
    return x.numel() * x.element_size()


def _text(head: bytes) -> str:
    return head.decode(errors="replace")


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + num_bytes(b) and b.data_ptr() < a.data_ptr() + num_bytes(a)


def _fits(message: Message) -> bool:
    return num_bytes(message.content) <= FIRST_BYTES - LABEL_BYTES


def _parts(message: Message) -> list[Tensor]:
    """What travels one after another: with a label, always FIRST_BYTES first."""
    if message.label is None:
        return list(_segments(message.content))
    first = torch.frombuffer(bytearray(message.head().ljust(FIRST_BYTES, b"\0")), dtype=torch.uint8)
    if not _fits(message):
        return [first, *_segments(message.content)]
    first[LABEL_BYTES:][: num_bytes(message.content)] = message.content.view(torch.uint8)
    return [first]


def _segments(content: Tensor) -> tuple[Tensor, ...]:
    return content.split(SEGMENT_BYTES // content.element_size())
