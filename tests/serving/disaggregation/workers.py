"""Two workers in one process, in lockstep: what one posts the other receives at its next turn."""

import contextlib
import functools
import threading

import torch

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.disaggregation.decode import DecodeEngine
from minilib.serving.disaggregation.meeting import ChannelListener, connect_to_worker
from minilib.serving.disaggregation.prefill import PrefillEngine
from minilib.serving.engine import Engine
from tests.model.random_weights import randomize
from tests.serving.served import Results, assert_idle

CONFIG = ModelConfig(31, 16, 24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_position=64)
PAGE = 4
LAYER_PAGE_BYTES = 2 * CONFIG.num_kv_heads * PAGE * CONFIG.head_dim * 4  # keys and values in fp32


@functools.cache
def model(seed=5):
    """Weights so large that no rounding decides which token is likeliest."""
    return randomize(Decoder(CONFIG), seed=seed, scale=2)


class FakeClock:
    """Time that a test lets pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@contextlib.contextmanager
def channels(transport="shared"):
    """Both ends of a channel; the handshake of shared memory needs both at once."""
    with ChannelListener(transport) as listener:
        far = []
        thread = threading.Thread(
            target=lambda: far.append(connect_to_worker(listener.address, 10, "the prefill worker"))
        )
        thread.start()
        near = listener.accept(10, "the decode worker")
        thread.join(10)
    try:
        yield near, far[0]
    finally:
        near.close()
        far[0].close()


class Pair:
    """A prefill worker and a decode worker, and both ends of the channel between them."""

    def __init__(self, near, far, prefill=None, decode=None, **both):
        options = {"num_pages": 64, "page_size": PAGE} | both
        self.near, self.far = near, far
        self.prefill = PrefillEngine(model(), **options | (prefill or {}))
        self.prefill.attach(near)
        self.decode = DecodeEngine(model(), [far], patience=0.0, **options | (decode or {}))
        self.results = Results()

    def turn(self):
        self.prefill.turn()
        self.prefill.check_invariants()
        self.decode_turn()

    def decode_turn(self):
        self.results.take(self.decode.step())
        self.decode.check_invariants()

    def finish(self, limit=2000):
        """Take turns until all is finished; both workers must be empty then."""
        for _ in range(limit):
            if not self.decode.has_unfinished:
                break
            self.turn()
        assert not self.decode.has_unfinished, f"still unfinished after {limit} turns"
        self.prefill.turn()
        self.assert_empty()
        return self.results

    def assert_empty(self):
        assert not self.decode.deliveries and not self.prefill.handovers
        assert_idle(self.decode)
        assert_idle(self.prefill)


@contextlib.contextmanager
def pair(transport="shared", **options):
    with channels(transport) as ends:
        yield Pair(*ends, **options)


def one_engine(requests, **options):
    """What one engine makes of the same requests: tokens by (request id, sample)."""
    engine, results = Engine(model(), **{"num_pages": 64, "page_size": PAGE} | options), Results()
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    while engine.has_unfinished:
        results.take(engine.step())
    return results.tokens


def prompt(length, seed=0):
    draws = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(CONFIG.vocab_size, (length,), generator=draws).tolist()
