"""Messages as if over a slower link: another transport, and then a wait. It is how a laptop gets two hosts.

The bytes travel at once; who sends and who receives sleeps until they would have travelled. A core that sleeps is free
to compute, as it is while a network card works.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from minilib.numbers.machine import Link
from minilib.ranks.transport.base import Message, Transport


class ShapedTransport:
    """At most as fast as given links.

    Args:
        transport: carries the messages; it belongs to this one from now on.
        link: α and bandwidth of every way, or a function of (src, dst).

    Cost: of a message, that of `transport` or the link's α + bytes / bandwidth, whichever is longer.
    """

    def __init__(self, transport: Transport, link: Link | Callable[[int, int], Link]) -> None:
        self.transport = transport
        self.rank, self.world_size = transport.rank, transport.world_size
        self._link = link if callable(link) else lambda src, dst: link

    def empty(self, numel, dtype=torch.float32):
        return self.transport.empty(numel, dtype)

    def exchange(self, send, receive, combine):
        started = time.perf_counter()
        self.transport.exchange(send, receive, combine)
        ways = [(self.rank, send.peer, send)] if send else []
        ways += [(receive.peer, self.rank, receive)] if receive else []
        until = started + max((self._seconds(*way) for way in ways), default=0.0)
        time.sleep(max(0.0, until - time.perf_counter()))

    def close(self):
        self.transport.close()

    def _seconds(self, src: int, dst: int, message: Message) -> float:
        link = self._link(src, dst)
        return link.latency + message.content.nbytes / link.bandwidth
