"""Decode steps that are recorded once and replayed: the way past Python where a step is short."""

from __future__ import annotations

import torch
from torch import Tensor

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.paging import PageTable
from minilib.model.decoder import Decoder, RMSNorm
from minilib.model.moe import MoE
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import PagedAttention, Work, new_slots
from minilib.serving.cpu.machine_code import follow_threads_of_torch
from minilib.serving.cpu.packing import RoundedLinear
from minilib.serving.cpu.tape import recording

MOST_SEQUENCES = 32  # a step of more spends too little time in Python
MOST_TAPES = 4


class _Recorded:
    """A step of so many sequences: its tape, and where it reads and writes."""

    def __init__(self, model: Decoder, cache: PagedCache, tables: list[PageTable], inputs: tuple) -> None:
        x, rope = inputs
        self.inputs = (x.clone(), *(angle.clone() for angle in rope))
        most_pages = ceil_div(model.config.max_position, cache.page_size)
        self.attention = PagedAttention(cache, _decoding(tables), compiled=True, most_pages=most_pages)
        self.norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
        self.norms_at = self._norms_at()
        with recording() as self.tape:
            x, *rope = self.inputs
            self.logits = model.logits(model.through_layers(x, tuple(rope), self.attention))

    @property
    def usable(self) -> bool:
        """Whether the weights that are not packed are where they were."""
        return self.norms_at == self._norms_at()

    def _norms_at(self) -> list[int]:
        return [norm.weight.data_ptr() for norm in self.norms]

    def again(self, tables: list[PageTable], inputs: tuple) -> Tensor:
        x, rope = inputs
        for old, new in zip(self.inputs, (x, *rope), strict=True):
            old.copy_(new)
        (decode,) = self.attention.parts
        decode.fill(list(enumerate(tables)))
        self.attention.store.slots.copy_(new_slots(_decoding(tables)))
        self.tape.replay()
        return self.logits


class RecordedSteps:
    """The steps of one packed model over one cache in which every sequence computes one token.

    Args:
        model: packed.
        cache: where its keys and values are.
    """

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.possible = not any(isinstance(module, MoE | RoundedLinear) for module in model.modules())
        self.recorded: dict[int, _Recorded] = {}  # by number of sequences, the one used last at the end

    def __getstate__(self) -> dict:
        """A copy records anew: tapes hold addresses."""
        return {**self.__dict__, "recorded": {}}

    def suit(self, num_sequences: int) -> bool:
        """Whether a step of so many sequences should be recorded."""
        return self.possible and num_sequences <= MOST_SEQUENCES

    def logits(self, token_ids: list[int], tables: list[PageTable]) -> Tensor:
        """(sequences, vocab_size), which the next step overwrites; each table has grown by its token."""
        follow_threads_of_torch()
        positions = torch.tensor([table.length - 1 for table in tables])
        inputs = self.model.inputs(torch.tensor(token_ids), positions)
        step = self.recorded.pop(len(tables), None)
        if step is None or not step.usable:
            step = _Recorded(self.model, self.cache, tables, inputs)
            logits = step.logits
        else:
            logits = step.again(tables, inputs)
        self.recorded[len(tables)] = step
        while len(self.recorded) > MOST_TAPES:
            del self.recorded[next(iter(self.recorded))]
        return logits


def _decoding(tables: list[PageTable]) -> list[Work]:
    return [Work(table, 1) for table in tables]
