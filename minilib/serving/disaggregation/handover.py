"""What each side knows about a prompt that moves, and a decode worker about who computes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from minilib.mechanisms.paging import PageTable
from minilib.serving.disaggregation.channel import PacketChannel
from minilib.serving.sequence import Sequence

BEATS = 3  # signs of life within the time after which silence counts as death


@dataclass(eq=False)
class Handover:
    """One prompt on its way to a decode worker.

    Args:
        channel: to the decode worker.
        number: what that worker calls it, never used twice on a channel.
        request_id: what the engine calls it.
        num_tokens: tokens to be computed here.
        pulled: whether the decode worker has pages for it.
        next_page: the first page that was not sent in all layers.
        lease: the pages, once all are computed.
        expires: when the lease ends, unless it is renewed.
    """

    channel: PacketChannel
    number: int
    request_id: str
    num_tokens: int
    pulled: bool = False
    next_page: int = 0
    lease: PageTable | None = None
    expires: float = 0.0


@dataclass(eq=False)
class PrefillPeer:
    """A prefill worker, as a decode worker knows it.

    Args:
        channel: to it.
        epoch: of its life; requests name it, so that a worker that was restarted refuses them.
        lease: seconds that it holds pages without a sign of life.
        heard: when it was heard of last.
    """

    channel: PacketChannel
    epoch: int
    lease: float
    heard: float


@dataclass(eq=False)
class Delivery:
    """One prompt on its way here.

    Args:
        number: what both workers call it.
        peer: who computes it.
        sequence: whose prompt it is; it has pages once it is pulled.
        pulled: whether the pages were asked for.
        next_pages: the next page that is missing, by layer.
    """

    number: int
    peer: PrefillPeer
    sequence: Sequence
    pulled: bool = False
    next_pages: list[int] = field(default_factory=list)
