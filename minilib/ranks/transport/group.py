"""Messages over the process group's send and receive."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from minilib.ranks.transport.base import LABEL_BYTES, CollectiveFailed, Combine, Message, take

FIRST_BYTES = 2**12  # of the first message, which has the label in it
SEGMENTS, SEGMENT_BYTES = 2, 2**22  # one is on its way while the one before is added

Coming = tuple[dist.Work, Tensor]  # a part of a message that was asked for, and where it goes
Arrival = tuple[dist.Work | None, list[Coming]]  # its label, if it has one, and its parts


@dataclass(frozen=True, eq=False)
class Leaving:
    """A part of a message that is being sent."""

    peer: int
    content: Tensor
    work: dist.Work
    span: tuple[int, int]


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
        self._free, self._next = SEGMENTS, 0  # places for what arrives, which are taken in turn
        self._early: list[Coming] = []  # parts of the message to come that have been asked for
        self._leaving: list[Leaving] = []

    def empty(self, numel, dtype=torch.float32):
        return torch.empty(numel, dtype=dtype)

    def exchange(self, send, receive, combine):
        if receive is not None:
            self._leave(self._sent_from(receive.content))
            arrival = self._ask_for(receive, combine)  # before sending: gloo sends at once what is asked for already
        before = list(self._leaving)
        if send is not None:
            self._send(send)
        if receive is not None:
            self._receive(receive, combine, arrival)
        self._leave(before)  # by now they have left, as good as always

    def flush(self):
        self._leave(self._leaving)

    def close(self) -> None:
        self._leaving = []
        if self._owned:
            self._owned = False
            self._hang_up()
            dist.destroy_process_group(self._group)

    def _send(self, message: Message) -> None:
        peer = message.peer
        try:
            for part in _parts(message):
                work = self._group.send([part.view(torch.uint8)], peer, 0)  # dist.isend, without its checks
                self._leaving.append(Leaving(peer, part, work, _span(part)))
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _ask_for(self, message: Message, combine: Combine | None) -> Arrival:
        """Ask for the label, if there is one, and for as much of the content as may come already."""
        first = None if message.label is None else self._irecv(self._first, message.peer)
        coming, self._early = self._early, []
        # Anything may come into the places for what is combined: no segment is larger. Into the tensor itself only what
        # the labels agree on may come: gloo aborts the process when a message is larger than its place.
        if combine is not None or first is None:
            self._ask(coming, _rest(message), message.peer, combine is not None)
        return first, coming

    def _receive(self, message: Message, combine: Combine | None, arrival: Arrival) -> None:
        first, coming = arrival
        peer, parts, combined = message.peer, _rest(message), combine is not None
        if first is not None:
            self._wait(first, peer)
            message.check(self.rank, self._first[:LABEL_BYTES].numpy().tobytes())
            if not parts:
                take(message.content, self._first[LABEL_BYTES:], combine)
            self._ask(coming, parts, peer, combined)
        for i, part in enumerate(parts):
            if message.ahead is not None and len(coming) == len(parts):
                self._ask_ahead(message)
            work, place = coming[i]
            self._wait(work, peer)
            if combined:
                take(part, place, combine)
                self._free += 1
                self._ask(coming, parts, peer, combined)

    def _ask(self, coming: list[Coming], parts: Sequence[Tensor], peer: int, combined: bool) -> None:
        """Ask for the parts that have not been asked for, as far as there are places."""
        for part in parts[len(coming) :]:
            if combined and not self._free:
                return
            place = self._arriving[self._next % SEGMENTS] if combined else part.view(torch.uint8)
            self._next, self._free = self._next + combined, self._free - combined
            coming.append((self._irecv(place, peer), place))

    def _ask_ahead(self, message: Message) -> None:
        """Ask for what comes after a message, unless that goes where something else still is."""
        content, combined = message.ahead.content, message.ahead.combined
        if combined or not (_overlap(_span(content), _span(message.content)) or self._sent_from(content)):
            self._ask(self._early, _segments(content), message.peer, combined)

    def _irecv(self, place: Tensor, src: int, tag: int = 0) -> dist.Work:
        try:
            return self._group.recv([place], src, tag)
        except RuntimeError as error:
            raise self._lost(src, error) from error

    def _sent_from(self, content: Tensor) -> list[Leaving]:
        """What is being sent from where a tensor lies."""
        span = _span(content)
        return [part for part in self._leaving if _overlap(part.span, span)]

    def _leave(self, going: list[Leaving]) -> None:
        """Wait until those parts are sent; each can be waited for once."""
        if going:
            self._leaving = [part for part in self._leaving if part not in going]
            for part in going:
                self._wait(part.work, part.peer)

    def _wait(self, work: dist.Work, peer: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: RuntimeError) -> CollectiveFailed:
        """Say of gloo's error whom it is about."""
        why = re.sub(r"^\[\S+\] ", "", str(error).strip().split(". ")[0])  # without its place in gloo's source
        return CollectiveFailed(f"rank {self.rank} has no answer from rank {peer}: {why}")

    def _hang_up(self) -> None:
        """Close the group's connections, so that whoever waits for this rank hears of it.

        Gloo does so when a wait times out, for which the peer must still be there; else only when nobody holds any of
        its works any more.
        """
        for peer in set(range(self.world_size)) - {self.rank}:
            with contextlib.suppress(RuntimeError):
                self._irecv(self._first, peer, tag=1).wait(timedelta(milliseconds=1))


def _parts(message: Message) -> Sequence[Tensor]:
    """What travels one after another: with a label, always FIRST_BYTES first."""
    if message.label is None:
        return _segments(message.content)
    first = torch.frombuffer(bytearray(message.head().ljust(FIRST_BYTES, b"\0")), dtype=torch.uint8)
    if _fits(message):
        first[LABEL_BYTES:][: message.content.nbytes] = message.content.view(torch.uint8)
    return first, *_rest(message)


def _rest(message: Message) -> Sequence[Tensor]:
    """What travels after the label."""
    return () if message.label is not None and _fits(message) else _segments(message.content)


def _fits(message: Message) -> bool:
    return message.content.nbytes <= FIRST_BYTES - LABEL_BYTES


def _segments(content: Tensor) -> tuple[Tensor, ...]:
    if content.nbytes <= SEGMENT_BYTES:
        return (content,)
    return content.split(SEGMENT_BYTES // content.element_size())


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of its first byte, and of the first one behind it."""
    start = x.data_ptr()
    return start, start + x.nbytes


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]
