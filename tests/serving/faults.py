"""What may go wrong: tokens that spoil numbers, tokens without text, pages of junk, failures and interrupts."""

import functools
import math
import signal
import sys
from contextlib import contextmanager

import torch

from minilib.mechanisms.paging import FramePool
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from tests.model.random_weights import randomize
from tests.serving.test_detokenizer import BYTES

CONFIG = ModelConfig(37, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
NAN, INF, HUGE, NOTHING, ONE_INF, ONE_NAN, NO_TEXT, PANIC = range(8)  # token ids; the rest does no harm


class Faulty(Decoder):
    """Some tokens spoil what is computed from them on: in the embedding, or in the logits behind them alone."""

    def forward(self, token_ids, positions, attention, logits_indices=None):
        logits = super().forward(token_ids, positions, attention, logits_indices)
        last = token_ids[logits_indices]
        logits[last == NOTHING] = -math.inf
        logits[last == ONE_INF, 20] = math.inf
        logits[last == ONE_NAN, 20] = math.nan
        logits[:, 21] = -math.inf  # never chosen, and no fault
        return logits


@functools.cache
def model():
    """Weights so large, in float64, that no rounding decides which token is likeliest."""
    decoder = Faulty(CONFIG).double()
    decoder.unembed.weight = torch.nn.Parameter(decoder.unembed.weight.detach().clone())
    randomize(decoder, seed=5, scale=2)
    with torch.no_grad():
        decoder.embed.weight[NAN] = math.nan
        decoder.embed.weight[INF] = math.inf
        decoder.embed.weight[HUGE] = 1e300  # finite, and its square is not
    return decoder


class Panic(BaseException):
    """What a panic of a tokenizer's Rust code is."""


class Tokenizer:
    """Bytes as text, but for two tokens."""

    def decode(self, ids):
        if NO_TEXT in ids:
            raise ValueError("no text")
        if PANIC in ids:
            raise Panic("no text")
        return BYTES.decode([70 + token for token in ids])

    def id_to_token(self, token):
        return BYTES.id_to_token(70 + token)


class PoisonedPool(FramePool):
    """What an owner has not written itself is NaN: pages when they are taken, and free ones before each forward pass.

    Not when they are freed: `PageTable.move` gives pages back before their content is copied.
    """

    @classmethod
    def watch(cls, engine, value=math.nan):
        """Poison the pages of an engine from now on."""
        pool, engine_forward = engine.cache.pool, engine._forward
        pool.__class__, pool.fill = cls, lambda pages: _fill(engine.cache, pages, value)
        pool.fill(slice(None))

        def forward(*inputs):
            pool.fill([page for page, count in enumerate(pool.ref_counts) if not count])
            return engine_forward(*inputs)

        engine._forward = forward

    def allocate(self):
        page = super().allocate()
        self.fill([page])
        return page


def _fill(cache, pages, value):
    cache.k[:, pages] = value
    cache.v[:, pages] = value


@contextmanager
def interrupt_at(count, skip=("step",)):
    """Ctrl-C when this many lines of the library have been run; yields a list that says how many were.

    Functions named in `skip` are interrupted within what they call alone: CPython looks for signals at calls and at
    jumps back, so that none comes between the last store of a function and its return.
    """
    seen = [0]

    def trace(frame, event, _):
        if "/minilib/" not in frame.f_code.co_filename:
            return None
        if event in ("call", "line") and (event == "call" or frame.f_code.co_name not in skip):
            seen[0] += 1
            if seen[0] == count:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


class Broken(Exception):
    """A failure of the model."""


def failing_step(engine, choices):
    """A step in which the model breaks down after its layers, if there is a batch; its outputs, and "failed" if so."""

    def broken(x):
        raise Broken

    engine.model.norm.forward = broken
    try:
        return engine.step(), ""
    except Broken:
        return [], "failed"
    finally:
        del engine.model.norm.forward


def interrupted_step(engine, choices):
    """A step with a Ctrl-C early or late in it or behind it; its outputs, and "interrupted …" if it was."""
    with interrupt_at(int(choices.uniform(1, 8) ** 3)):
        try:
            return engine.step(), ""
        except KeyboardInterrupt:
            return [], "interrupted with tokens made" if engine._made else "interrupted"
