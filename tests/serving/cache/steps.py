"""One step over a cache of whole sequences, for the tests beside this file."""

import torch

from tests.model import oracle
from tests.serving.served import models


def step(cache, new):
    """The logits of one step that computes these tokens of each row: (tokens, vocab_size)."""
    positions = [length + place for length, ids in zip(cache.lengths, new, strict=True) for place in range(len(ids))]
    flat = torch.tensor([token for ids in new for token in ids])
    with torch.inference_mode():
        logits = models()[1](flat, torch.tensor(positions), cache.attention([len(ids) for ids in new]))
    cache.commit(new)
    return logits


def steps(cache, texts, schedule):
    """Logits of every text, (tokens, vocab_size) each, computed by so many tokens of each row, step by step."""
    found = [[] for _ in texts]
    for counts in schedule:
        new = [ids[length : length + count] for ids, length, count in zip(texts, cache.lengths, counts, strict=True)]
        for row, part in zip(found, step(cache, new).split(list(counts)), strict=True):
            row.append(part)
    return [torch.cat(parts) for parts in found]


def text(length, seed=0):
    """Random tokens."""
    return oracle.tokens(length, 1, seed=seed)[0].tolist()
