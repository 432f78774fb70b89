"""From logits to tokens and their log-probabilities: greedy, temperature, top-k, top-p, for many sequences at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minilib.serving.request import SamplingParams

Logprobs = tuple[float | None, tuple[tuple[int, float], ...]]  # of the token, and of the likeliest ones
NO_LOGPROBS: Logprobs = (None, ())


def sample(logits: Tensor, params: list[SamplingParams], uniform: list[float]) -> list[int | None]:
    """Choose one token per row; no row sees another.

    Args:
        logits: (rows, vocab_size).
        params: one per row.
        uniform: one number in [0, 1) per row, the row's own chance; greedy rows ignore theirs.

    Returns:
        Token ids, one per row; None for a row without a highest number, that is with a NaN, with +inf, or with -inf
        alone. A token of -inf beside finite ones is never chosen.
    """
    highest, tokens = logits.max(-1)  # on a CPU three times as fast as argmax
    usable = highest.isfinite()
    if not all(p.greedy for p in params):
        tokens = _draw(logits.where(usable[:, None], 0.0), params, uniform)
    return [token if good else None for token, good in zip(tokens.tolist(), usable.tolist(), strict=True)]


def log_probabilities(logits: Tensor, params: list[SamplingParams], tokens: list[int | None]) -> list[Logprobs]:
    """Log-probabilities under the model's own distribution, whatever the token was drawn from.

    Args:
        logits: (rows, vocab_size), as `sample` had them.
        params: one per row; a row that does not ask for logprobs is not computed.
        tokens: what `sample` chose.

    Returns:
        For each row that of its token, and the `logprobs` likeliest tokens with theirs, in descending order, without
        tokens that are impossible; `NO_LOGPROBS` for a row that did not ask, or has no token. Rows are computed in fp32
        or wider.
    """
    found = [NO_LOGPROBS] * len(params)
    asking = [row for row, p in enumerate(params) if p.logprobs is not None and tokens[row] is not None]
    if not asking:
        return found
    scores = logits[asking]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor([[tokens[row]] for row in asking], device=scores.device))[:, 0].tolist()
    values, ids = (part.tolist() for part in scores.topk(max(params[row].logprobs for row in asking)))
    for place, row in enumerate(asking):
        likeliest = list(zip(ids[place], values[place], strict=True))[: params[row].logprobs]
        found[row] = (chosen[place], tuple(pair for pair in likeliest if pair[1] > -math.inf))
    return found


def _draw(logits: Tensor, params: list[SamplingParams], uniform: list[float]) -> Tensor:
    """One token id per row, (rows,) int64, each row with a finite highest number."""
    probabilities, tokens = sorted_probabilities(logits, params)
    reached = probabilities.cumsum(-1)
    chance = torch.tensor(uniform, dtype=reached.dtype, device=reached.device)[:, None] * reached[:, -1:]
    place = torch.searchsorted(reached, chance, right=True).clamp(max=reached.shape[-1] - 1)
    # rounding must not carry a chance near 1 past the last token that may be chosen
    place = torch.minimum(place, (probabilities > 0).sum(-1, keepdim=True) - 1)
    return tokens.gather(-1, place)[:, 0]


def sorted_probabilities(logits: Tensor, params: list[SamplingParams]) -> tuple[Tensor, Tensor]:
    """What each row is drawn from: probabilities in descending order, 0 for tokens left out, and whose they are.

    Args:
        logits: (rows, vocab_size), without NaN and +inf, and with a finite number in each row.
        params: one per row; a greedy row has all probability on its first token.

    Returns:
        (rows, vocab_size) probabilities in fp32 or wider, and int64 token ids. Top-k is applied before top-p.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    vocab_size = logits.shape[-1]
    rank = torch.arange(vocab_size, device=logits.device)
    limits = torch.finfo(logits.dtype)
    heat = _column(logits, [p.temperature or 1.0 for p in params]).clamp(limits.tiny, limits.max)
    most = _column(logits, [1 if p.greedy else min(p.top_k or vocab_size, vocab_size) for p in params])
    share = _column(logits, [math.inf if p.top_p == 1 else p.top_p for p in params])  # a sum may round up to 1
    # the highest becomes 0, which no temperature carries beyond all numbers
    probabilities = ((ordered - ordered[:, :1]) / heat).masked_fill(rank >= most, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= share) & (rank > 0), 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), tokens


def _column(like: Tensor, values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
