"""An engine whose pages hold, in place of keys and values, what they are keys and values of: fast, and nothing is near
enough.

A slot holds a number that stands for its token, all tokens before it and the salt. Each step reads every slot of every
sequence through its table, as attention does, and compares it.
"""

import functools
import math

import numpy as np
import torch

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine

CONFIG = ModelConfig(13, 4, 4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, max_position=64)


@functools.cache
def model():
    return Decoder(CONFIG).double()


@functools.cache
def history(salt, tokens):
    """The number of each token's history: whole, and below 2⁵² so that a float64 holds it."""
    if not tokens:
        return ()
    before = history(salt, tokens[:-1])
    return (*before, hash((salt, before[-1:], tokens[-1])) % 2**52)


def engine(num_pages, page_size, num_swap_pages=0, **options):
    """An engine that computes nothing. Two tokens are equally likely behind each history."""
    served = Engine(model(), num_pages, page_size, num_swap_pages, **options)
    memory = served.cache.k[0, :, 0, :, 0].numpy()
    served.computed = 0
    allocate = served.cache.pool.allocate

    def poisoned():
        frame = allocate()
        memory[frame] = math.nan
        return frame

    def forward(work, interrupts):
        last, read = [], []
        for sequence, count in work:
            end = sequence.num_computed_tokens + count
            expected = history(sequence.params.cache_salt, tuple(sequence.token_ids[:end]))
            assert sequence.table.length == end
            served.computed += count
            page, place = np.divmod(np.arange(end - count, end), page_size)
            frames = np.array(sequence.table.frames)
            memory[frames[page], place] = expected[end - count :]
            read.append((frames, expected))
            if count == sequence.num_uncomputed_tokens:
                last.append(expected[-1])
        for frames, expected in read:  # when all have written
            found = memory[frames].ravel()[: len(expected)]
            assert found.tolist() == list(expected), "a sequence reads what it did not write"
        logits = np.full((len(last), CONFIG.vocab_size), -math.inf)
        for row, code in enumerate(last):
            logits[row, [code % CONFIG.vocab_size, code // 64 % CONFIG.vocab_size]] = 0.0
        return torch.from_numpy(logits)

    served.cache.pool.allocate, served._forward = poisoned, forward
    return served
