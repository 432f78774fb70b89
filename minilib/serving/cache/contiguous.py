"""Keys and values side by side, one block of memory a row: the KV cache before paging.

    k, v of one layer    (batch_size, num_kv_heads, capacity, head_dim); token t of a row is in slot t
    capacity             grows by doubling, up to max_length, and is the same for every row

Rows of different lengths are padded in memory alone, up to the capacity. Slots that no token was written to hold zeros
and are masked; zeros, since a masked slot has the weight 0, and 0 · NaN is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.cache.sequences import SequenceCache, attend_row, token_slices


class ContiguousCache(SequenceCache):
    """Keys and values of a batch of sequences, each row with as many slots as the longest needs.

    Args:
        config: of the model whose keys and values are kept.
        batch_size: rows.
        max_length: most tokens a row holds; the model's max_position if left out.
        dtype: of keys and values.
        device: where they are.

    Attributes:
        slots_copied: slots that growing has copied so far; fewer than twice those of the batch.

    Raises:
        ValueError: if batch_size or max_length is below 1, or max_length above the model's positions.

    Cost: batch_size · capacity · 2 · num_layers · num_kv_heads · head_dim numbers, whatever the rows hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(config, batch_size, max_length, 0, dtype, device)
        self.slots_copied = 0

    @classmethod
    def for_model(cls, model: Decoder, batch_size: int = 1, max_length: int | None = None) -> ContiguousCache:
        """A cache in the dtype and on the device of a model's weights."""
        weight = model.norm.weight
        return cls(model.config, batch_size, max_length, weight.dtype, weight.device)

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.kv.shape[-2]

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that hold tokens."""
        return self.nbytes * sum(self.lengths) // max(1, self.capacity * len(self.token_ids))

    def attention(self, counts: list[int]) -> ContiguousAttention:
        """See `SequenceCache.attention`; all rows grow where the capacity of one does not suffice."""
        self.check_room(counts)
        self._grow(max(length + count for length, count in zip(self.lengths, counts, strict=True)))
        return ContiguousAttention(self.kv, self.lengths, counts)

    def check_invariants(self) -> None:
        """What must hold between steps."""
        assert max(self.lengths) <= self.capacity <= self.max_length, "rows outgrew their slots"
        assert self.slots_copied <= 2 * len(self.token_ids) * self.capacity, "growing copied too often"

    def _grow(self, needed: int) -> None:
        """Room for so many slots a row; at least twice the capacity, so that copies stay few."""
        if needed <= self.capacity:
            return
        shape, held = list(self.kv.shape), max(self.lengths)
        shape[-2] = min(max(needed, 2 * self.capacity), self.max_length)
        kv = self.kv.new_zeros(shape)
        kv[..., :held, :] = self.kv[..., :held, :]
        self.kv = kv
        self.slots_copied += held * len(self.token_ids)


class ContiguousAttention:
    """Attention for one step: stores the new keys and values, then reads each row up to its end.

    Args:
        kv: keys and values, (2, num_layers, batch_size, num_kv_heads, capacity, head_dim).
        lengths: tokens of each row before the step.
        counts: new tokens of each row.
    """

    def __init__(self, kv: Tensor, lengths: list[int], counts: list[int]) -> None:
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        self.kv = kv
        self.longest, self.mask = max(ends), None
        self.rows = list(zip(token_slices(counts), lengths, ends, strict=True))
        if set(counts) == {1}:  # every row decodes: one product over the batch
            place = torch.arange(self.longest, device=kv.device)
            self.mask = (place < torch.tensor(ends, device=kv.device)[:, None])[:, None, None]
        else:
            self.masks = [_causal(count, end, kv.device) for count, end in zip(counts, ends, strict=True)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.kv[:, layer]
        for row, (at, start, end) in enumerate(self.rows):
            keys[row, :, start:end] = k[at].transpose(0, 1)
            values[row, :, start:end] = v[at].transpose(0, 1)
        if self.mask is not None:
            keys, values = keys[:, :, : self.longest], values[:, :, : self.longest]
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, self.mask, enable_gqa=True)[:, :, 0]
        out = torch.empty_like(q)
        for row, ((at, _, end), mask) in enumerate(zip(self.rows, self.masks, strict=True)):
            if at.start < at.stop:
                out[at] = attend_row(q[at], keys[row, :, :end], values[row, :, :end], mask)
        return out


def _causal(count: int, length: int, device: torch.device) -> Tensor:
    """Which of a row's tokens its last ones see, themselves included: (count, length) bool."""
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)
