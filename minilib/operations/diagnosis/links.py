"""How long messages take on each link between two ranks, from the clocks of both ends.

A rank that waits for a message cannot tell a slow link from a late sender, and in a ring every rank waits for the slow
link in the end. Two bounds together can tell:

    both ends      a message takes no longer than the end that was busy with it for the shorter time
    the quickest   of many messages waits for nobody, and shows what the link takes at least

The second is how TCP's congestion control BBR finds the round-trip time of a path whose queues come and go.
Source: Cardwell et al. 2016, "BBR: Congestion-Based Congestion Control".
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from minilib.mechanisms.telemetry import outliers
from minilib.operations.diagnosis.finding import Finding
from minilib.ranks.transport.base import Transport

LINK_FLOOR = 2_000_000  # ns by which a link has to be slower than others to matter
LINK_FACTOR = 3.0  # robust standard deviations: behind a slow link other links seem slower, too, and so does the spread


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
) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For each link (src, dst) the bytes of its messages, and the ns that each can have taken at most, in order.

    Args:
        sent, received: of ranks 0, 1, …; what one end alone has seen at the end of a run is left out.

    Raises:
        ValueError: if two ends of a message disagree about its size.
    """
    ends: dict[tuple[int, int], tuple[list[MessageEnd], list[MessageEnd]]] = defaultdict(lambda: ([], []))
    for side, of_ranks in enumerate((sent, received)):
        for end in (end for of_rank in of_ranks for end in of_rank):
            ends[end.src, end.dst][side].append(end)
    return {link: [_at_most(*both) for both in zip(*sides, strict=False)] for link, sides in sorted(ends.items())}


def slow_links(times: Mapping[tuple[int, int], Sequence[tuple[int, int]]], newest: int = 36) -> list[Finding]:
    """Links whose quickest message of late takes longer than that of other links.

    Args:
        times: see `link_times`.
        newest: messages of each link to look at, of twice as many those that have at least half the bytes of the
            largest one. Links with fewer are left out.
    """
    quickest = {}
    for link, messages in times.items():
        recent = messages[-2 * newest :]
        largest = max((size for size, _ in recent), default=0)
        large = [ns for size, ns in recent if size >= largest / 2][-newest:]
        if len(large) == newest:
            quickest[link] = min(large)
    links, values = list(quickest), list(quickest.values())
    found = []
    for position in outliers(values, LINK_FACTOR, LINK_FLOOR, "above"):
        src, dst = links[position]
        evidence = f"the quickest of {newest} messages took {values[position] / 1e6:.2f} ms"
        usual = f"on the median link {statistics.median(values) / 1e6:.2f} ms"
        found.append(Finding("slow_link", src, f"{evidence}, {usual}", dst))
    return found


def _at_most(sent: MessageEnd, received: MessageEnd) -> tuple[int, int]:
    if sent.bytes != received.bytes:
        raise ValueError(f"rank {sent.src} sent {sent.bytes} bytes where rank {sent.dst} received {received.bytes}: "
                         "these are not the two ends of one run")  # fmt: skip
    return sent.bytes, min(end.ended_ns - end.begun_ns for end in (sent, received))
