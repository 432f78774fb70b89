"""Who computes how many tokens in the next step. There is no prefill phase and no decode phase: each sequence has
tokens that are not computed yet, and catches up as far as the step's token budget and the free pages allow.

    running ──(pages run out)── newest first ─→ waiting (its pages dropped, to be recomputed) or swapped (moved to host)
       ↑                                            │
       └────────────── oldest first ────────────────┘

Source: vLLM's v1 scheduler (`num_computed_tokens` catching up); Kwon et al. 2023, section 4.5 (recompute and swap).
"""

from __future__ import annotations

from bisect import insort

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.paging import OutOfFrames
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.prefix import PrefixCache
from minilib.serving.cache.prefix_order import count_overtaken, longest_prefix_first
from minilib.serving.request import Sequence, Status

PREEMPTIONS = ("recompute", "swap")


class Scheduler:
    """First come, first served; the newest gives way.

    Args:
        cache: whose pages are handed out.
        max_batch_tokens: most tokens in one step.
        max_sequences: most sequences that run at once.
        preemption: what becomes of a sequence's pages when it has to give way: "recompute" or "swap".
        prefix: pages that are kept for whoever needs the same tokens, if there are any.
        most_overtakes: how often a sequence is overtaken by one with a longer kept prefix, see `longest_prefix_first`.

    Raises:
        ValueError: if a limit is below 1, the preemption unknown, or most_overtakes below 0 or without kept pages.
    """

    def __init__(
        self,
        cache: PagedCache,
        max_batch_tokens: int,
        max_sequences: int,
        preemption: str,
        prefix: PrefixCache | None = None,
        most_overtakes: int = 0,
    ) -> None:
        if max_batch_tokens < 1 or max_sequences < 1:
            raise ValueError(
                f"max_batch_tokens and max_sequences must be at least 1, got {max_batch_tokens!r} and {max_sequences!r}"
            )
        if preemption not in PREEMPTIONS:
            raise ValueError(f"preemption is one of {', '.join(PREEMPTIONS)}; got {preemption!r}")
        if most_overtakes < 0 or (most_overtakes and not prefix):
            raise ValueError(f"most_overtakes is 0, or more where a prefix_cache keeps pages; got {most_overtakes!r}")
        self.cache, self.prefix, self.most_overtakes = cache, prefix, most_overtakes
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.preemption = preemption
        self.running: list[Sequence] = []  # both lists in order of priority
        self.waiting: list[Sequence] = []  # WAITING without pages, or SWAPPED

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, or let a fork of a running one run beside it."""
        insort(self._list_of(sequence), sequence, key=_priority)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        self._list_of(sequence).remove(sequence)
        sequence.table.release()
        sequence.status = Status.FINISHED

    def schedule(self) -> list[tuple[Sequence, int]]:
        """What the next forward pass computes, (sequence, number of its tokens), its pages taken."""
        work: list[tuple[Sequence, int]] = []
        budget = self.max_batch_tokens
        nobody_gave_way = True
        for sequence in list(self.running):
            if not budget or sequence.status is not Status.RUNNING:
                break  # this one gave way to an older one, and so did all behind it
            count = min(sequence.num_uncomputed_tokens, budget)
            while sequence.status is Status.RUNNING and not self._has_room(sequence, count):
                self.preempt(self.running[-1])
                nobody_gave_way = False
            if sequence.status is Status.RUNNING:
                budget -= self._take(work, sequence, count)
        while budget and nobody_gave_way and (sequence := self._admit_next()):
            budget -= self._take(work, sequence, min(sequence.num_uncomputed_tokens, budget))
        return work

    def preempt(self, sequence: Sequence) -> None:
        """Make a running sequence give its pages back; it goes on when there is room again."""
        if self.preemption == "swap":
            try:
                self.cache.swap_out(sequence.table)
            except OutOfFrames:
                self.drop(sequence)  # no room in host memory either
            else:
                self._to_waiting(sequence, Status.SWAPPED)
        else:
            self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Make a running sequence forget its keys and values; it will recompute them."""
        sequence.table.release()
        sequence.table = self.cache.new_table()  # if swapping failed, the old one belongs to the other pool
        sequence.num_computed_tokens = 0
        self._to_waiting(sequence, Status.WAITING)

    def check_invariants(self) -> None:
        """Pages balance over all sequences, tables hold what was computed, and nobody wastes a whole page."""
        tables = [sequence.table for sequence in (*self.running, *self.waiting)]
        self.cache.pool.check_invariants(tables)
        self.cache.swap_pool.check_invariants(tables)
        for line in (self.running, self.waiting):
            assert line == sorted(line, key=_priority), "sequences are out of order"
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        assert all(sequence.status in (Status.WAITING, Status.SWAPPED) for sequence in self.waiting)
        for sequence in (*self.running, *self.waiting):
            table = sequence.table
            pool = self.cache.swap_pool if sequence.status is Status.SWAPPED else self.cache.pool
            assert table.pool is pool, f"{sequence.request_id} is {sequence.status.value}, its pages are elsewhere"
            assert table.length == sequence.num_computed_tokens, f"{sequence.request_id}: slots and tokens differ"
            assert 0 <= len(table.frames) * table.page_size - table.length < table.page_size, "a page is wasted"
            assert sequence.num_uncomputed_tokens > 0, f"{sequence.request_id} has nothing left to compute"
        if self.prefix:
            self.prefix.check_invariants([*self.running, *self.waiting])

    def _list_of(self, sequence: Sequence) -> list[Sequence]:
        return self.running if sequence.status is Status.RUNNING else self.waiting

    def _has_room(self, sequence: Sequence, count: int) -> bool:
        return sequence.table.frames_needed(count) <= self.cache.pool.num_free

    def _has_room_for_all_of(self, sequence: Sequence) -> bool:
        """Whether all tokens of a waiting sequence have room; if so, it takes over the pages that are kept for it."""
        if self.prefix and sequence.status is Status.WAITING:
            return self.prefix.attach(sequence)
        return ceil_div(len(sequence.token_ids), self.cache.page_size) <= self.cache.pool.num_free

    def _take(self, work: list[tuple[Sequence, int]], sequence: Sequence, count: int) -> int:
        self.cache.copy(sequence.table.append(count))
        work.append((sequence, count))
        return count

    def _to_waiting(self, sequence: Sequence, status: Status) -> None:
        self.running.remove(sequence)
        sequence.status, sequence.stored = status, None
        insort(self.waiting, sequence, key=_priority)

    def _admit_next(self) -> Sequence | None:
        """Let the first in the queue run, if there is room for all of its tokens.

        Room for the next step's tokens is what vLLM asks for: sequences then start earlier, and more of them have to
        give way half-computed (115 preemptions against 47 on the same trace).
        """
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        if self.most_overtakes:
            sequence = longest_prefix_first(self.waiting, self.prefix, self.most_overtakes)
        width = sum(len(other.samples_due) for other in self.running) + len(sequence.samples_due)
        if width > self.max_sequences or not self._has_room_for_all_of(sequence):
            return None
        count_overtaken(self.waiting, sequence)
        self.waiting.remove(sequence)
        swapped, sequence.status = sequence.status is Status.SWAPPED, Status.RUNNING
        insort(self.running, sequence, key=_priority)
        if swapped:  # last: if it fails, the engine drops the sequence like all that run
            self.cache.swap_in(sequence.table)
        return sequence


def _priority(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority
