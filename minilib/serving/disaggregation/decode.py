"""The decode worker: an engine whose prompts are computed elsewhere.

    waiting ──expect──→ arriving ──reserve──→ (has pages, pulls) ──all are there──→ running
       ↑                   │                        │
       └───── recompute ───┴────────────────────────┘  or "fail": the request ends with an error

The engine asks a prefill worker for every prompt, gives it frames of its own pool when it has room, and puts the pages
that come into those frames, between two steps and without waiting for any. When all are there the sequence runs as if
its prompt had been computed here: its last token is computed here, so whatever chooses the first token is here, too.

What comes for a request that has ended is thrown away: its frames may be another's by then, and only the number of a
delivery that is open leads to frames.

Sources: vLLM's NIXL connector (`kv_load_failure_policy`); Zhong et al., "DistServe", OSDI 2024.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Row

import torch

from minilib.mechanisms.basics.interrupts import held
from minilib.serving.disaggregation.channel import ChannelClosed, Packet, PacketChannel, wait_for_packets
from minilib.serving.disaggregation.handover import BEATS, Delivery, PrefillPeer
from minilib.serving.disaggregation.page_format import PageFormat, PagesRefused, pages_to_move
from minilib.serving.engine import Engine
from minilib.serving.request import SamplingParams, SchedulingParams, TokenOutput
from minilib.serving.sequence import Sequence

logger = logging.getLogger(__name__)

ON_FAILURE = ("fail", "recompute")


class DecodeEngine(Engine):
    """Serves requests as `Engine` does, with prompts that prefill workers compute.

    Args:
        model: as of `Engine`, with the weights that the prefill workers have.
        channels: to the prefill workers, one or more.
        arguments, options: of `Engine`.
        timeout: seconds of silence after which a prefill worker counts as dead.
        on_failure: what becomes of a request whose pages do not come: "fail" ends it with an error, "recompute"
            computes its prompt here.
        least_tokens: prompts with fewer tokens to compute are computed here.
        patience: seconds that a step sleeps at most where there is nothing to compute.

    Attributes:
        deliveries: prompts on their way here, by number.
        num_late: packets of pages that came for requests that had ended, and were thrown away.
        failures: why deliveries failed, in their order.

    Raises:
        ValueError: for another policy, or a number that makes no sense; as `Engine` in all else.
        PagesRefused: if a prefill worker has another model, dtype, page size or shape.
        ChannelClosed: if a prefill worker is gone, or says nothing within the timeout.
    """

    def __init__(
        self,
        model,
        channels: Iterable[PacketChannel],
        *arguments,
        timeout: float = 30.0,
        on_failure: str = "fail",
        least_tokens: int = 1,
        patience: float = 0.005,
        **options,
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure is one of {', '.join(ON_FAILURE)}; got {on_failure!r}")
        if not timeout > 0 or least_tokens < 1 or patience < 0:
            raise ValueError(
                f"timeout > 0, least_tokens ≥ 1 and patience ≥ 0 are needed, got {timeout}, {least_tokens}, {patience}"
            )
        super().__init__(model, *arguments, **options)
        self.timeout, self.on_failure = timeout, on_failure
        self.least_tokens, self.patience = least_tokens, patience
        self.format = PageFormat.of(self.model, self.cache)
        self.peers = [self._meet(channel) for channel in channels]
        self.deliveries: dict[int, Delivery] = {}
        self.num_late, self.failures = 0, []
        self._numbers, self._beaten = itertools.count(), self.clock()

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Row[int],
        params: SamplingParams | None = None,
        scheduling: SchedulingParams | None = None,
    ) -> None:
        """As `Engine.add_request`; a prefill worker begins with the prompt at once."""
        with held():
            super().add_request(request_id, prompt_token_ids, params, scheduling)
            sequence = self.requests[request_id][0]
            missing = sequence.num_prompt_tokens - 1
            missing -= min(missing, self.prefix.num_matching(sequence)) if self.prefix else 0
            if missing < self.least_tokens:
                return
            self.scheduler.expect(sequence)
            if not self.peers:
                self._give_up(sequence, "no prefill worker is left")
                return
            load = [sum(delivery.peer is peer for delivery in self.deliveries.values()) for peer in self.peers]
            peer = self.peers[load.index(min(load))]
            delivery = Delivery(next(self._numbers), peer, sequence)
            self.deliveries[delivery.number] = delivery
            content = torch.tensor(sequence.token_ids[:-1], dtype=torch.int64).view(torch.uint8)
            salt = sequence.params.cache_salt
            self._post(peer, Packet("compute", {"number": delivery.number, "salt": salt}, content))
            self._pull()  # so that pages leave from the first layer on, if there is room for them

    def abort(self, request_id: str) -> bool:
        """As `Engine.abort`; the prefill worker frees what it has, and what is on its way is thrown away."""
        with held():
            for delivery in [each for each in self.deliveries.values() if each.sequence.request_id == request_id]:
                self._close(delivery)
            return super().abort(request_id)

    def step(self) -> list[TokenOutput]:
        """As `Engine.step`, after what has arrived was put into its pages; where nothing runs it waits for more."""
        with held():
            self._hear()
            self._pull()
        if self.deliveries and not (self._made or self.scheduler.running or len(self.scheduler.policy)):
            wait_for_packets([peer.channel for peer in self.peers], self.patience)
        return super().step()

    def close(self) -> None:
        """End all requests, and let the prefill workers go."""
        for request_id in list(self.requests):
            self.abort(request_id)
        for peer in self.peers:
            peer.channel.close()
        self.peers = []

    def check_invariants(self, others=()) -> None:
        """As `Engine.check_invariants`; whoever arrives has a delivery, and pages if it was pulled."""
        super().check_invariants(others)
        arriving = [delivery.sequence for delivery in self.deliveries.values()]
        assert set(arriving) == set(self.scheduler.arriving), "a sequence waits for pages that nobody sends"
        assert all(bool(each.sequence.table.frames) == each.pulled for each in self.deliveries.values())
        assert all(each.peer in self.peers for each in self.deliveries.values()), "a worker that is gone is awaited"

    def _pull(self) -> None:
        """Give prompts pages, in the policy's order, and ask for what belongs into them."""
        unpulled = {each.sequence: each for each in self.deliveries.values() if not each.pulled}
        for sequence in self.scheduler.policy.order(unpulled):
            first, delivery = self.scheduler.reserve(sequence), unpulled[sequence]
            if first is None:
                return
            delivery.pulled = True
            delivery.next_pages = [first] * self.cache.config.num_layers
            if first >= self._num_pages(delivery):  # kept here since the request came
                self._complete(delivery)
            else:
                self._post(delivery.peer, Packet("pull", {"numbers": [delivery.number], "first": first}))

    def _hear(self) -> None:
        """Take what has come from prefill workers, and give up those that are gone or silent."""
        now = self.clock()
        for peer in list(self.peers):
            try:
                for packet in peer.channel.receive():
                    peer.heard = now
                    self._take(peer, packet)
                waited = any(delivery.peer is peer for delivery in self.deliveries.values())
                if not waited:
                    peer.heard = now
                elif now - peer.heard > self.timeout:
                    raise ChannelClosed(f"{peer.channel.name} has said nothing for {self.timeout:g} s")
            except (ChannelClosed, PagesRefused) as error:
                self._lose(peer, str(error))
        if now - self._beaten > min((peer.lease for peer in self.peers), default=0.0) / BEATS:
            self._beaten = now
            for peer in self.peers:
                numbers = [delivery.number for delivery in self.deliveries.values() if delivery.peer is peer]
                self._post(peer, Packet("renew", {"numbers": numbers}))

    def _take(self, peer: PrefillPeer, packet: Packet) -> None:
        if packet.kind == "alive":
            return
        if packet.kind not in ("pages", "failed", "done"):
            raise PagesRefused(f"{peer.channel.name} sent {packet.kind!r}, which this worker does not know")
        delivery = self.deliveries.get(packet.field("number", int))
        if delivery is None or delivery.peer is not peer:
            self.num_late += packet.kind == "pages"
        elif packet.kind == "pages":
            self._put(delivery, packet)
        elif packet.kind == "failed":
            self._fail_delivery(delivery, f"{peer.channel.name}: {packet.field('why', str)}")
        elif packet.kind == "done":
            missing = [layer for layer, page in enumerate(delivery.next_pages) if page != self._num_pages(delivery)]
            if missing or not delivery.pulled:
                what = f"no pages of layer {missing[0]}" if missing else "pages that nobody has asked for"
                self._fail_delivery(delivery, f"{peer.channel.name} sent {what}, and no more will come")
            else:
                self._complete(delivery)

    def _put(self, delivery: Delivery, packet: Packet) -> None:
        """Put one layer's pages into the frames of the sequence that they belong to."""
        layer, first, stop = (packet.field(name, int) for name in ("layer", "first", "stop"))
        if layer >= self.cache.config.num_layers:
            raise PagesRefused(f"pages of layer {layer} came, and the model has {self.cache.config.num_layers} layers")
        k, v = self.cache.k[layer], self.cache.v[layer]
        expected = 2 * (stop - first) * k[0].nbytes
        if not delivery.pulled or not first <= delivery.next_pages[layer] <= stop <= self._num_pages(delivery):
            raise PagesRefused(f"pages {first} … {stop} of layer {layer} came, and nobody has asked for them")
        if len(packet.content) != expected:
            raise PagesRefused(f"{stop - first} pages came in {len(packet.content)} bytes, and take {expected}")
        frames = torch.tensor(delivery.sequence.table.frames[first:stop], device=k.device)
        k[frames], v[frames] = packet.content.view(k.dtype).view(2, stop - first, *k.shape[1:]).to(k.device)
        delivery.next_pages[layer] = stop

    def _complete(self, delivery: Delivery) -> None:
        """All pages are there: the sequence runs, and the prefill worker may forget them."""
        self._close(delivery)
        self.scheduler.arrive(delivery.sequence)

    def _close(self, delivery: Delivery) -> None:
        """Forget a delivery at both ends."""
        del self.deliveries[delivery.number]
        self._post(delivery.peer, Packet("release", {"numbers": [delivery.number]}))

    def _fail_delivery(self, delivery: Delivery, why: str) -> None:
        self._close(delivery)
        self._give_up(delivery.sequence, why)

    def _give_up(self, sequence: Sequence, why: str) -> None:
        """A prompt will not come: end its request, or compute it here."""
        self.failures.append(why)
        if self.on_failure == "recompute":
            self.scheduler.drop(sequence)
        else:
            self._made += self.fail(sequence.request_id, f"its prompt did not arrive: {why}")

    def _lose(self, peer: PrefillPeer, why: str) -> None:
        """Go on without a prefill worker."""
        self.peers.remove(peer)
        lost = [delivery for delivery in self.deliveries.values() if delivery.peer is peer]
        for delivery in lost:
            del self.deliveries[delivery.number]
            self._give_up(delivery.sequence, why)
        peer.channel.close()

    def _num_pages(self, delivery: Delivery) -> int:
        return pages_to_move(delivery.sequence.num_prompt_tokens, self.cache.page_size)

    def _post(self, peer: PrefillPeer, packet: Packet) -> None:
        """Post to a worker that may be gone: `_hear` notices when it reads from it next."""
        packet.fields["epoch"] = peer.epoch
        try:
            peer.channel.post(packet)
        except ChannelClosed as error:
            logger.info("%s was not sent: %s", packet.kind, error)

    def _meet(self, channel: PacketChannel) -> PrefillPeer:
        """Exchange formats with a prefill worker, before anything else.

        Raises:
            PagesRefused, ChannelClosed: see the class.
        """
        ours = Packet("hello", {"patience": self.timeout, "format": self.format.to_dict()})
        deadline = time.monotonic() + self.timeout
        try:
            channel.post(ours)
            while not (packets := channel.receive()):
                if time.monotonic() >= deadline:
                    raise ChannelClosed(f"{channel.name} has said nothing for {self.timeout:g} s")
                wait_for_packets([channel], self.patience)
            hello = packets[0]
            self.format.check(hello.field("format", dict), channel.name)
            peer = PrefillPeer(channel, hello.field("epoch", int), hello.field("patience", float), self.clock())
        except BaseException:
            channel.close()
            raise
        return peer
