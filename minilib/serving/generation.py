"""Generation in one loop, with a cache or without: what the engine does, before paging, scheduling and sampling.

Tokens computed for n new tokens behind a prompt of p; the last new token is never computed:

    without a cache         p + (p + 1) + … + (p + n − 1) = n · p + n · (n − 1) / 2
    with an empty cache     p + n − 1
    with c tokens cached    p + n − 1 − c
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

import torch
from torch import Tensor

from minilib.model.decoder import Attention, Decoder
from minilib.serving.cache.sequences import SequenceCache, SequenceTooLong, flat_rows, token_slices
from minilib.serving.request import InvalidRequest, SamplingParams, token_ids_of
from minilib.serving.sampling import sample


@dataclass(frozen=True)
class Generation:
    """What `generate` made, and what it took.

    Args:
        token_ids: the new tokens of every prompt.
        computed: tokens that went through the decoder, step by step.
    """

    token_ids: list[list[int]]
    computed: list[int]

    @property
    def tokens_computed(self) -> int:
        """Tokens that went through the decoder in all steps."""
        return sum(self.computed)


@torch.inference_mode()
def generate(model: Decoder, prompts: Row[Row[int]], max_tokens: int, cache: SequenceCache | None = None) -> Generation:
    """Continue every prompt by `max_tokens` tokens, each the likeliest; no end token ends a sequence earlier.

    Args:
        model: the decoder.
        prompts: rows of token ids, of any lengths ≥ 1; with a cache, one for each of its rows.
        max_tokens: new tokens of each prompt.
        cache: where state stays. A row may hold some already, as after an earlier turn: then its prompt must begin with
            those tokens, and only the others are computed. Without a cache, every step computes all tokens.

    Raises:
        InvalidRequest: if a prompt is empty or holds what is no token, or for max_tokens below 1.
        SequenceTooLong: if a sequence would outgrow the model or the cache; nothing was computed.
        NotAnExtension: if a row of the cache holds no proper prefix of its prompt; nothing was computed.
        FloatingPointError: if logits hold NaN or +inf, or −inf alone.
    """
    sequences = _sequences(model, prompts, max_tokens)
    if cache is not None:
        cache.check_extension(sequences)
        new = [len(ids) + max_tokens - 1 - held for ids, held in zip(sequences, cache.lengths, strict=True)]
        cache.check_room(new)
    computed = []
    for _ in range(max_tokens):
        held = [0] * len(sequences) if cache is None else cache.lengths
        new = [ids[length:] for ids, length in zip(sequences, held, strict=True)]
        counts = [len(ids) for ids in new]
        attention = _row_by_row(model.ops.causal_attention, counts) if cache is None else cache.attention(counts)
        tokens = _next_tokens(model, new, held, attention)
        if cache is not None:
            cache.commit(new)
        computed.append(sum(counts))
        for ids, token in zip(sequences, tokens, strict=True):
            ids.append(token)
    return Generation([ids[-max_tokens:] for ids in sequences], computed)


def tokens_without_cache(prompt: int, new: int) -> int:
    """Tokens that `generate` computes without a cache for one prompt: n · p + n · (n − 1) / 2."""
    return new * prompt + new * (new - 1) // 2


def tokens_with_cache(prompt: int, new: int, cached: int = 0) -> int:
    """Tokens that `generate` computes for one prompt of whose tokens so many are cached: p + n − 1 − c."""
    return prompt + new - 1 - cached


def _row_by_row(attention: Attention, counts: list[int]) -> Attention:
    """Attention of a batch, for sequences of so many tokens that stand one behind another."""
    rows = token_slices(counts)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attention(layer, q[None, at], k[None, at], v[None, at])[0] for at in rows])

    return attend


def _sequences(model: Decoder, prompts: Row[Row[int]], max_tokens: int) -> list[list[int]]:
    """The prompts, checked, as lists that may grow."""
    config, most = model.config, SamplingParams(max_tokens=max_tokens).max_tokens
    sequences = [token_ids_of(prompt, config.vocab_size, "a prompt") for prompt in prompts]
    if not all(sequences) or not sequences:
        raise InvalidRequest("there is no prompt, or one is empty; give at least one token id each")
    longest = max(len(ids) for ids in sequences)
    if longest + most > config.max_position:
        raise SequenceTooLong(
            f"a prompt of {longest} tokens and {most} new ones make {longest + most}, and the model takes at most "
            f"{config.max_position}; ask for fewer tokens"
        )
    return sequences


def _next_tokens(model: Decoder, new: list[list[int]], held: list[int], attention: Attention) -> list[int]:
    """Compute the new tokens, each row's behind the `held` ones, and choose who follows each row."""
    flat, positions, ends = (torch.tensor(row, device=model.norm.weight.device) for row in flat_rows(new, held))
    logits = model(flat, positions, attention, logits_indices=ends - 1)
    tokens = sample(logits, [SamplingParams(temperature=0)] * len(new), [0.0] * len(new))
    if None in tokens:
        row = tokens.index(None)
        raise FloatingPointError(f"no token to choose: the logits of row {row} hold NaN, +inf, or −inf alone")
    return tokens
