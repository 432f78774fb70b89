"""A KV cache of a fixed size: the first tokens of a sequence, which stay, and a ring over its latest ones.

    slot of token t          t if t < num_sinks, else num_sinks + (t − num_sinks) % window
    token t sees token s     s ≤ t, and s > t − window or s < num_sinks

A new token takes the slot of the token that its query has just stopped seeing, so while decoding every slot in use is
visible, and attention needs no mask. A step of several tokens reads the ring and its own keys side by side and stores
only then, because its first queries still see what its last tokens replace.

Positions. The decoder turns queries and keys by their place in the whole text before attention gets them, so each key
is turned once, at its own position, and stays as it is while the ring moves on: a score depends on the difference of
two positions alone, and the order of keys in memory does not matter to a weighted sum. Hence the result is that of
full attention under the mask above, and distances to the sinks grow with the text. StreamingLLM turns keys anew in each
step, by their place in the cache, so that distances never exceed num_sinks + window; that is another function, and for
it keys would be stored before they are turned. The sinks of gpt-oss are no tokens but a learnt number per head.

Source: Beltagy et al. 2020, "Longformer", section 3.1 (window); Xiao et al. 2023, "Efficient Streaming Language Models
with Attention Sinks" (first tokens kept).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.mechanisms.basics.checks import check_whole
from minilib.model.config import ModelConfig
from minilib.serving.cache.sequences import SequenceCache, attend_row, token_slices


class RingCache(SequenceCache):
    """Keys and values of `num_sinks` first and `window` latest tokens of each sequence of a batch.

    Args:
        config: of the model whose keys and values are kept; every layer sees through the same window.
        window: latest tokens that a token sees, itself included.
        num_sinks: first tokens of the sequence that every token sees.
        batch_size: rows.
        dtype: of keys and values.
        device: where they are.

    Raises:
        ValueError: if window or batch_size is no whole number ≥ 1, or num_sinks none ≥ 0.

    A step of several tokens that fails midway has replaced what its first queries see: make a new cache then.

    Cost: batch_size · (num_sinks + window) · 2 · num_layers · num_kv_heads · head_dim numbers, however long rows are.
    """

    def __init__(
        self,
        config: ModelConfig,
        window: int,
        num_sinks: int = 0,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        check_whole("window", window, 1)
        check_whole("num_sinks", num_sinks)
        super().__init__(config, batch_size, None, num_sinks + window, dtype, device)
        self.window, self.num_sinks = window, num_sinks

    def attention(self, counts: list[int]) -> RingAttention:
        """See `SequenceCache.attention`."""
        self.check_room(counts)
        return RingAttention(self, counts)

    def slots(self, positions: Tensor) -> Tensor:
        """Where the tokens at these positions are kept: (...) int64 → the same."""
        ring = self.num_sinks + (positions - self.num_sinks) % self.window
        return torch.where(positions < self.num_sinks, positions, ring)

    def kept(self, length: int) -> Tensor:
        """Positions that a row of so many tokens still holds, in order: (min(length, slots),) int64.

        Raises:
            ValueError: if that is no number of tokens.
        """
        check_whole("length", length)
        positions = torch.arange(length, device=self.kv.device)
        return positions[(positions < self.num_sinks) | (positions >= length - self.window)]

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which tokens see which, by their positions: (m,) and (n,) → (m, n) bool."""
        distance = queries[:, None] - keys
        return (distance >= 0) & ((distance < self.window) | (keys < self.num_sinks))


class RingAttention:
    """Attention for one step over a `RingCache`.

    Args:
        cache: where keys and values are.
        counts: new tokens of each row.
    """

    def __init__(self, cache: RingCache, counts: list[int]) -> None:
        self.kv = cache.kv
        self.rows = [
            (at, row, _RowStep(cache, length, count))
            for row, (at, length, count) in enumerate(zip(token_slices(counts), cache.lengths, counts, strict=True))
            if count
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for at, row, step in self.rows:
            out[at] = step.attend(q[at], k[at].transpose(0, 1), v[at].transpose(0, 1), self.kv[:, layer, row])
        return out


class _RowStep:
    """What depends on positions alone when a row of `length` tokens gets `count` more."""

    def __init__(self, cache: RingCache, length: int, count: int) -> None:
        new = torch.arange(length, length + count, device=cache.kv.device)
        old = cache.kept(length)
        left = cache.kept(length + count)
        stored = left[left >= length]  # of the new tokens, those that the row still holds behind the step
        self.stored, self.targets = stored - length, cache.slots(stored)
        self.single = count == 1
        self.read = cache.slots(left if self.single else old)
        self.mask = None if self.single else cache.visible(new, torch.cat((old, new)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: Tensor) -> Tensor:
        """One layer: q (count, num_heads, head_dim), k and v (num_kv_heads, count, head_dim), kv the row's slots."""
        keys, values = kv
        if not self.single:
            seen = (torch.cat((held[:, self.read], fresh), 1) for held, fresh in ((keys, k), (values, v)))
            out = attend_row(q, *seen, self.mask)
        keys[:, self.targets], values[:, self.targets] = k[:, self.stored], v[:, self.stored]
        return attend_row(q, keys[:, self.read], values[:, self.read]) if self.single else out
