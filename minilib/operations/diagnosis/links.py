"""How long messages take on each link between two ranks, from the clocks of both ends.

A rank that waits for a message cannot tell a slow link from a late sender. Both ends together can: a message is on its
way from when the later end is there until the first of the two is done.

    sender     │ at work ──────▶│ send ▒▒▒▒│                 the link took ▒▒▒▒
    receiver   │ receive ·······│·····▒▒▒▒│                 and the receiver waited ····▒▒▒▒
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from minilib.ranks.transport.base import Transport


class MessageEnd(NamedTuple):
    """One end of a message, as the rank there saw it.

    Args:
        src, dst: ranks; each end has the messages of a link in the same order.
        bytes: of content.
        begun_ns, ended_ns: when that rank began to send or receive, and was done; by time.monotonic_ns.
    """

    src: int
    dst: int
    bytes: int
    begun_ns: int
    ended_ns: int


class TimedTransport:
    """Another transport, and when each message began and ended.

    Args:
        transport: carries the messages; it belongs to this one from now on.

    Attributes:
        sent, received: ends of all messages so far.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.rank, self.world_size = transport.rank, transport.world_size
        self.sent: list[MessageEnd] = []
        self.received: list[MessageEnd] = []

    def empty(self, numel, dtype=torch.float32):
        return self.transport.empty(numel, dtype)

    def exchange(self, send, receive, combine):
        begun = time.monotonic_ns()
        self.transport.exchange(send, receive, combine)
        ended = time.monotonic_ns()
        if send is not None:
            self.sent.append(MessageEnd(self.rank, send.peer, send.content.nbytes, begun, ended))
        if receive is not None:
            self.received.append(MessageEnd(receive.peer, self.rank, receive.content.nbytes, begun, ended))

    def close(self):
        self.transport.close()


def link_times(
    sent: Sequence[Sequence[MessageEnd]], received: Sequence[Sequence[MessageEnd]]
) -> Mapping[tuple[int, int], list[tuple[int, int]]]:
    """For each link (src, dst) the bytes and ns of its messages, in order.

    Args:
        sent, received: of ranks 0, 1, …; what one end alone has seen at the end of a run is left out.

    Raises:
        ValueError: if two ends of a message disagree about its size.
    """
    ends: dict[tuple[int, int], tuple[list[MessageEnd], list[MessageEnd]]] = defaultdict(lambda: ([], []))
    for side, of_ranks in enumerate((sent, received)):
        for end in (end for of_rank in of_ranks for end in of_rank):
            ends[end.src, end.dst][side].append(end)
    return {link: [_on_its_way(*both) for both in zip(*sides, strict=False)] for link, sides in sorted(ends.items())}


def _on_its_way(sent: MessageEnd, received: MessageEnd) -> tuple[int, int]:
    if sent.bytes != received.bytes:
        raise ValueError(f"rank {sent.src} sent {sent.bytes} bytes where rank {sent.dst} received {received.bytes}: "
                         "these are not the two ends of one run")  # fmt: skip
    ended = min(sent.ended_ns, received.ended_ns)
    return sent.bytes, max(0, ended - max(sent.begun_ns, received.begun_ns))
