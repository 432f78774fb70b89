"""The prefill worker: computes prompts, and sends each layer's pages away while it computes the next layer.

    step     layer 0 ──→ layer 1 ──→ layer 2 ──→ …          computing
                 └─ pages ─→ └─ pages ─→ └─ pages ─→ …      travelling to the decode worker

A prompt that is computed before the decode worker has pages for it is held under a lease. The decode worker renews its
leases as long as it wants the pages, and releases each when all pages are there. A lease that nobody renews expires,
and its pages are free; whoever asks for them then is refused by name, as the number of a handover is never used twice.

Sources: Zhong et al., "DistServe", OSDI 2024; Qin et al., "Mooncake", FAST 2025, section 5.2 (layer-wise prefill); the
leases are those of vLLM's NIXL connector.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

import torch

from minilib.model.decoder import Attention
from minilib.serving.asynchronous.fault_isolation import FaultIsolation
from minilib.serving.disaggregation.channel import ChannelClosed, Packet, PacketChannel, wait_for_packets
from minilib.serving.disaggregation.handover import BEATS, Handover
from minilib.serving.disaggregation.page_format import PageFormat, PagesRefused
from minilib.serving.engine import Engine
from minilib.serving.request import InvalidRequest, SamplingParams
from minilib.serving.sequence import Sequence

logger = logging.getLogger(__name__)


class PrefillEngine(Engine):
    """An engine whose requests come from decode workers, and whose pages go to them.

    Args:
        arguments, options: of `Engine`.
        lease: seconds that computed pages are held without a sign that they are wanted still.

    Attributes:
        handovers: prompts that are computed, or held under a lease, by the engine's name for them.
        expired: leases that have ended unused.

    Raises:
        ValueError: if the lease is not positive; as `Engine` in all else.
    """

    def __init__(self, *arguments, lease: float = 30.0, **options) -> None:
        super().__init__(*arguments, **options)
        if not lease > 0:
            raise ValueError(f"a lease lasts longer than 0 seconds, got {lease!r}")
        self.steps = None  # a recorded step passes no layer on
        self.lease, self.epoch = lease, secrets.randbits(62)
        self.format = PageFormat.of(self.model, self.cache)
        self.channels: dict[PacketChannel, float | None] = {}  # → patience of the decode worker, None before its hello
        self.handovers: dict[str, Handover] = {}
        self.expired = 0
        self._beaten = self.clock()
        self._isolation = FaultIsolation(self)  # a prompt that makes the model raise ends alone

    def attach(self, channel: PacketChannel) -> None:
        """Serve a decode worker, too.

        Raises:
            ChannelClosed: if it is gone already.
        """
        hello = {"epoch": self.epoch, "patience": self.lease, "format": self.format.to_dict()}
        channel.post(Packet("hello", hello))
        self.channels[channel] = None

    def serve(self, until: Callable[[], bool] = lambda: False, patience: float = 0.05) -> None:
        """Take turns until every decode worker has gone, or until somebody says so.

        Args:
            until: asked after each turn.
            patience: seconds to sleep at most where there is nothing to do.
        """
        while self.channels and not until():
            if not self.turn():
                wait_for_packets(self.channels, patience)

    def turn(self) -> bool:
        """Hear what decode workers want, compute one step, and end leases that have expired.

        Returns:
            Whether prompts are being computed.
        """
        for channel in list(self.channels):
            try:
                for packet in channel.receive():
                    self._take(channel, packet)
            except (ChannelClosed, PagesRefused) as error:
                self._lose(channel, error)
        for handover in [each for each in self.handovers.values() if each.lease and each.expires <= self.clock()]:
            self.expired += 1
            self._forget(handover)
        self._beat()
        for output in self._isolation.step():
            if output.finish_reason == "error":
                handover = self.handovers[output.request_id]
                self._refuse(handover.channel, handover.number, output.error)
                self._forget(handover)
        return bool(self.scheduler.running)

    def check_invariants(self) -> None:
        """As `Engine.check_invariants`; pages under a lease are held, and every prompt is computed or leased."""
        leases = {name: each.lease for name, each in self.handovers.items() if each.lease}
        super().check_invariants(leases.values())
        assert self.handovers.keys() - leases.keys() == self.requests.keys(), "a prompt is lost, or nobody wants it"
        assert {each.channel for each in self.handovers.values()} <= self.channels.keys(), "pages for who has gone"

    def _attention(self, work: list[tuple[Sequence, int]]) -> Attention:
        """Attention that sends the pages which this step fills, layer by layer, to those that wait for them."""
        attention = super()._attention(work)
        leaving = []
        for sequence, count in work:
            handover = self.handovers[sequence.request_id]
            if handover.pulled:
                stop = self._full_pages(handover, sequence.num_computed_tokens + count)
                leaving.append((handover, sequence.table.frames, stop))

        def attend_and_send(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            out = attention(layer, *qkv)  # stores the step's keys and values in their pages
            for handover, frames, stop in leaving:
                self._send(handover, layer, frames, stop)  # returns at once: the next layer is computed meanwhile
            return out

        return attend_and_send

    def _send(self, handover: Handover, layer: int, frames: list[int], stop: int) -> None:
        """Post one layer's pages, from the first that was not sent up to page `stop`."""
        first = handover.next_page
        if first < stop:
            index = torch.tensor(frames[first:stop], device=self.device)
            pages = torch.stack((self.cache.k[layer][index], self.cache.v[layer][index]))
            place = {"number": handover.number, "layer": layer, "first": first, "stop": stop}
            self._post(handover.channel, Packet("pages", place, pages.cpu().view(torch.uint8).reshape(-1)))
            if layer == self.cache.config.num_layers - 1:
                handover.next_page = stop

    def _full_pages(self, handover: Handover, num_computed: int) -> int:
        """Pages that nothing more is written to, once so many tokens are computed."""
        size = self.cache.page_size
        return -(-num_computed // size) if num_computed == handover.num_tokens else num_computed // size

    def _remove(self, sequence: Sequence, keep: bool) -> None:
        """A prompt has been computed: hold its pages, as the engine gives them back."""
        handover = self.handovers[sequence.request_id]
        if keep:
            handover.lease, handover.expires = sequence.table.fork(), self.clock() + self.lease
            self._finish(handover)
        super()._remove(sequence, keep)

    def _finish(self, handover: Handover) -> None:
        """Send what was not sent of a prompt that has been computed, and say that it is all."""
        if handover.pulled:
            frames = handover.lease.frames
            for layer in range(self.cache.config.num_layers):
                self._send(handover, layer, frames, len(frames))
            self._post(handover.channel, Packet("done", {"number": handover.number}))

    def _take(self, channel: PacketChannel, packet: Packet) -> None:
        """Do what a decode worker asks for."""
        if packet.kind == "hello":
            self.format.check(packet.field("format", dict), channel.name)
            self.channels[channel] = packet.field("patience", float)
            return
        if self.channels[channel] is None or packet.fields.get("epoch") != self.epoch:
            raise PagesRefused(f"{channel.name} asks for pages of another worker, which ran here before; connect anew")
        if packet.kind == "compute":
            self._compute(channel, packet)
            return
        if packet.kind not in ("pull", "renew", "release"):
            raise PagesRefused(f"{channel.name} asks for {packet.kind!r}, which this worker does not know")
        for number in packet.field("numbers", list):
            handover = self.handovers.get(self._name(channel, number))
            if handover is None:
                if packet.kind == "pull":
                    self._refuse(channel, number, "LeaseExpired: its pages were given up, and others may have them now")
            elif packet.kind == "pull":
                handover.pulled, handover.next_page = True, packet.field("first", int)
                if handover.lease:
                    self._finish(handover)
            elif packet.kind == "renew":
                handover.expires = self.clock() + self.lease
            elif packet.kind == "release":
                self._forget(handover)

    def _compute(self, channel: PacketChannel, packet: Packet) -> None:
        """Begin a prompt; one token behind it ends the request, and is thrown away."""
        number, salt, size = packet.field("number", int), packet.field("salt", str), len(packet.content)
        if size % torch.int64.itemsize:
            raise PagesRefused(f"{channel.name} sent a prompt of {size} bytes, and a token id takes 8")
        tokens, request_id = packet.content.view(torch.int64).tolist(), self._name(channel, number)
        params = SamplingParams(1, temperature=0, ignore_eos=True, cache_salt=salt)
        try:
            self.add_request(request_id, tokens, params)
        except InvalidRequest as error:
            self._refuse(channel, number, str(error))
        else:
            self.handovers[request_id] = Handover(channel, number, request_id, len(tokens))

    def _name(self, channel: PacketChannel, number: int) -> str:
        return f"{id(channel)}/{number}"

    def _refuse(self, channel: PacketChannel, number: int, why: str) -> None:
        self._post(channel, Packet("failed", {"number": number, "why": why}))

    def _forget(self, handover: Handover) -> None:
        """Free what is held for a prompt, whatever has become of it."""
        del self.handovers[handover.request_id]
        self.abort(handover.request_id)
        if handover.lease:
            handover.lease.release()

    def _post(self, channel: PacketChannel, packet: Packet) -> None:
        """Post to a worker that may be gone: `turn` notices when it reads from it next."""
        try:
            channel.post(packet)
        except ChannelClosed as error:
            logger.info("%s was not sent: %s", packet.kind, error)

    def _lose(self, channel: PacketChannel, error: Exception) -> None:
        """Free everything that is held for a decode worker."""
        lost = [each for each in self.handovers.values() if each.channel is channel]
        normal = isinstance(error, ChannelClosed) and not lost
        logger.log(logging.INFO if normal else logging.WARNING, "%d prompts are given up: %s", len(lost), error)
        del self.channels[channel]
        for handover in lost:
            self._forget(handover)
        channel.close()

    def _beat(self) -> None:
        """Tell those who wait that this worker lives, often enough for the least patient."""
        patience = min((seconds for seconds in self.channels.values() if seconds), default=0.0)
        if patience and self.clock() - self._beaten > patience / BEATS:
            self._beaten = self.clock()
            for channel in self.channels:
                self._post(channel, Packet("alive"))
