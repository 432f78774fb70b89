"""What the caches of whole sequences share: whose state they hold, how long a row may grow, attention of one sequence.

A cache has rows, one a sequence. The tokens of a step stand flat, those of row 0 first; no padding token is computed.
"""

from __future__ import annotations

from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn import functional as F

from minilib.mechanisms.basics.checks import check_whole, is_whole
from minilib.model.config import ModelConfig
from minilib.model.decoder import Attention


class SequenceTooLong(ValueError):
    """A sequence would outgrow the model's positions or the cache's length; the message has the numbers."""


class NotAnExtension(ValueError):
    """The cache holds the state of another text than the one to be continued."""


class SequenceCache:
    """The state of a batch of sequences, to be continued.

    Args:
        config: of the model whose keys and values are kept.
        batch_size: rows.
        max_length: most tokens a row may come to; the model's max_position if left out.
        slots: of each row, for a start.
        dtype: of keys and values.
        device: where they are.

    Attributes:
        token_ids: row by row, the tokens whose state is here.
        kv: keys and values, (2, num_layers, batch_size, num_kv_heads, slots, head_dim).

    Raises:
        ValueError: if batch_size or max_length is no whole number ≥ 1, or max_length above the model's positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int | None,
        slots: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        max_length = config.max_position if max_length is None else max_length
        check_whole("batch_size", batch_size, 1)
        if not is_whole(max_length, 1) or max_length > config.max_position:
            raise ValueError(f"max_length from 1 to the model's {config.max_position} positions is needed, got "
                             f"{max_length!r}")  # fmt: skip
        self.max_length = max_length
        self.token_ids: list[list[int]] = [[] for _ in range(batch_size)]
        shape = (2, config.num_layers, batch_size, config.num_kv_heads, slots, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has come to."""
        return [len(ids) for ids in self.token_ids]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, those that hold no token included."""
        return self.kv.nbytes

    def attention(self, counts: list[int]) -> Attention:
        """Attention for one step that computes so many new tokens of each row, at least one in all.

        It stores their keys and values, layer by layer; `commit` makes them count.

        Raises:
            SequenceTooLong: as `check_room` does; nothing was changed.
        """
        raise NotImplementedError

    def commit(self, new: list[list[int]]) -> None:
        """Note the tokens of a step that succeeded, row by row."""
        for ids, more in zip(self.token_ids, new, strict=True):
            ids.extend(more)

    def check_room(self, counts: list[int]) -> None:
        """Refuse more tokens than rows may hold.

        Raises:
            SequenceTooLong: if a row would exceed max_length.
        """
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + count > self.max_length:
                raise SequenceTooLong(
                    f"row {row} holds {length} tokens and would get {count} more, and max_length is {self.max_length}; "
                    "ask for fewer tokens, or give the cache a larger max_length"
                )

    def check_extension(self, sequences: list[list[int]]) -> None:
        """Refuse sequences that the rows do not begin: state is good for one exact prefix only.

        Raises:
            NotAnExtension: for another number of sequences, or if a row holds no proper prefix of its sequence.
        """
        if len(self.token_ids) != len(sequences):
            raise NotAnExtension(f"the cache has {len(self.token_ids)} rows, and {len(sequences)} prompts came")
        for row, (held, ids) in enumerate(zip(self.token_ids, sequences, strict=True)):
            if len(held) >= len(ids) or ids[: len(held)] != held:
                same = sum(accumulate((a == b for a, b in zip(held, ids, strict=False)), min))
                raise NotAnExtension(
                    f"row {row} of the cache holds {len(held)} tokens, of which {same} begin the prompt of {len(ids)}; "
                    "give a prompt that begins with all of them and goes on, or a new cache"
                )


def token_slices(counts: list[int]) -> list[slice]:
    """Where each row's tokens stand among those of a step."""
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]


def flat_rows(rows: list[list[int]], firsts: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Rows of tokens one after another.

    Args:
        rows: tokens of each.
        firsts: position of the first token of each.

    Returns:
        Token ids, their positions, and where each row ends.
    """
    tokens = list(chain.from_iterable(rows))
    spans = (range(first, first + len(ids)) for ids, first in zip(rows, firsts, strict=True))
    return tokens, list(chain.from_iterable(spans)), list(accumulate(map(len, rows)))


def attend_row(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the last tokens of one sequence.

    Args:
        q: (tokens, num_heads, head_dim).
        keys: (num_kv_heads, length, head_dim).
        values: the same shape.
        mask: (tokens, length), True where a query sees a key; every query sees all if left out.

    Returns:
        (tokens, num_heads, head_dim).
    """
    heads = (x[None] for x in (q.transpose(0, 1), keys, values))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
