"""Who computes how many tokens in the next step. There is no prefill phase and no decode phase: each sequence has
tokens that are not computed yet, and catches up as far as the step's token budget and the free pages allow.

    running ──(pages run out)── last first ─→ waiting (its pages dropped, to be recomputed) or swapped (moved to host)
       ↑                                            │
       ↑└────────────── first first ─────────────────┘
       └──(all are there)── arriving ←──(its keys and values come from another process)── waiting

Who is first and who is last is up to a scheduling policy, the same object that schedules processes
(classic/process_queue.py). Under every policy the first that waits is admitted next, and nobody before it; a sequence
that runs gives way to others that run, never to one that waits; and among those that run, the first always gets on. So
no work is lost for ever, and nobody starves whom the policy does not starve.

Source: vLLM's v1 scheduler (`num_computed_tokens` catching up); Kwon et al. 2023, section 4.5 (recompute and swap).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from minilib.mechanisms.basics.arithmetic import ceil_div
from minilib.mechanisms.paging import OutOfFrames, PageTable
from minilib.mechanisms.scheduling import SchedulingPolicy, make_policy
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.prefix import PrefixCache
from minilib.serving.cache.prefix_order import count_overtaken, longest_prefix_first
from minilib.serving.sequence import OUTPUT_UNITS, PROMPT_UNITS, Sequence, Status

PREEMPTIONS = ("recompute", "swap")


class Scheduler:
    """The first in the order of a policy is served first, and the last gives way.

    Args:
        cache: whose pages are handed out.
        max_batch_tokens: most tokens in one step.
        max_sequences: most sequences that run at once.
        preemption: what becomes of a sequence's pages when it has to give way: "recompute" or "swap".
        policy: whose order it is: a name of `minilib.mechanisms.scheduling.POLICIES`, or a policy of its own.
        prefix: pages that are kept for whoever needs the same tokens, if there are any.
        most_overtakes: how often a sequence is overtaken by one with a longer kept prefix, see `longest_prefix_first`.

    Raises:
        ValueError: if a limit is below 1, the preemption unknown, the policy in use, or most_overtakes below 0, or more
            than 0 without kept pages.
        UnknownPolicy: if there is no such policy.
    """

    def __init__(
        self,
        cache: PagedCache,
        max_batch_tokens: int,
        max_sequences: int,
        preemption: str,
        policy: str | SchedulingPolicy = "fcfs",
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
        self.policy = make_policy(policy)
        self.num_preemptions = 0  # so far
        self.running: list[Sequence] = []  # in the policy's order at the end of the last step
        self.arriving: list[Sequence] = []  # first expected first; those with pages take part in `width`

    @property
    def waiting(self) -> list[Sequence]:
        """WAITING without pages, or SWAPPED; in the policy's order. Cost: O(n log n)."""
        return list(self.policy)

    @property
    def width(self) -> int:
        """Samples that run, or will as soon as their keys and values have arrived."""
        expected = [sequence for sequence in self.arriving if sequence.table.frames]
        return sum(len(sequence.samples_due) for sequence in (*self.running, *expected))

    def add(self, sequence: Sequence, parent: Sequence | None = None) -> None:
        """Queue a new sequence, or let a fork of a running one run beside its parent.

        Raises:
            InvalidTask: if the policy cannot schedule it.
        """
        if parent is None:
            self.policy.arrive(sequence)
        else:
            self.policy.fork(parent, sequence)
            insort(self.running, sequence, key=self.policy.place)

    def remove(self, sequence: Sequence, keep: bool = True) -> None:
        """Take a sequence out, wherever it is, and free its pages; if not `keep`, nobody is to find them."""
        self._leave(sequence)
        self.policy.remove(sequence)
        sequence.table.release()
        sequence.status = Status.FINISHED
        if self.prefix and not keep:
            self.prefix.discard(sequence)

    def expect(self, sequence: Sequence) -> None:
        """Take a new sequence out of the line: its keys and values will arrive from another process."""
        self.policy.admit(sequence)
        sequence.status = Status.ARRIVING
        self.arriving.append(sequence)

    def reserve(self, sequence: Sequence) -> int | None:
        """Give an expected sequence the pages of all its tokens but the last, which computes its logits here.

        Returns:
            The page from which on they are missing, as the others are kept here; None if there is no room now, or
            somebody who comes first waits for it.
        """
        too_wide = self.width + len(sequence.samples_due) > self.max_sequences
        if too_wide or not self._is_next(sequence) or not self._has_room_for_all_of(sequence):
            return None
        first, table = len(sequence.table.frames), sequence.table
        self.cache.copy(table.append(len(sequence.token_ids) - 1 - table.length))
        return first

    def arrive(self, sequence: Sequence) -> None:
        """Let an expected sequence run, as if it had computed here what is in its pages by now."""
        self._leave(sequence)
        sequence.num_computed_tokens, sequence.status = sequence.table.length, Status.RUNNING
        insort(self.running, sequence, key=self.policy.place)
        if self.prefix:
            self.prefix.store(sequence)

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

    def advance(self, work: list[tuple[Sequence, int]]) -> None:
        """This work has been computed. Prompts are charged for it, each token once, and none that was cached."""
        for sequence, count in work:
            known = max(sequence.num_charged_tokens, sequence.num_computed_tokens)
            sequence.num_computed_tokens += count
            if sequence.num_charged_tokens < sequence.num_prompt_tokens:
                computed = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
                if computed > known:
                    sequence.num_charged_tokens = computed
                    self.policy.serve(sequence, PROMPT_UNITS * (computed - known))

    def charge(self, members: list[Sequence]) -> None:
        """Each of these running sequences gets a new token: the end of a step, at which the order may change."""
        for sequence in members:
            self.policy.serve(sequence, OUTPUT_UNITS)
        if self.policy.reorders:
            self.running = self.policy.order(self.running)

    def preempt(self, sequence: Sequence) -> None:
        """Make a running sequence give its pages back; it goes on when there is room again."""
        self.num_preemptions += 1
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
        """Make a running or arriving sequence forget its keys and values; it will compute them here."""
        sequence.table.release()
        sequence.table = self.cache.new_table()  # if swapping failed, the old one belongs to the other pool
        sequence.num_computed_tokens = 0
        self._to_waiting(sequence, Status.WAITING)

    def check_invariants(self, others: Iterable[PageTable] = ()) -> None:
        """Pages balance over all sequences, tables hold what was computed, and nobody wastes a whole page.

        Args:
            others: further tables that hold pages of the pool.
        """
        waiting = self.waiting
        everybody = [*self.running, *waiting]
        tables = [*others, *(sequence.table for sequence in (*everybody, *self.arriving))]
        self.cache.pool.check_invariants(tables)
        self.cache.swap_pool.check_invariants(tables)
        self.policy.check_invariants()
        assert self.policy.num_tasks == len(everybody) + len(self.arriving), "the policy has another sequence"
        assert self.policy.reorders or self.running == self.policy.order(self.running), "sequences are out of order"
        assert all(sequence.status is Status.RUNNING for sequence in self.running)
        assert all(sequence.status in (Status.WAITING, Status.SWAPPED) for sequence in waiting)
        for sequence in self.arriving:
            assert sequence.status is Status.ARRIVING and not sequence.num_output_tokens
            assert sequence.table.length in (0, len(sequence.token_ids) - 1), "pages for a part of what arrives"
        for sequence in everybody:
            table = sequence.table
            pool = self.cache.swap_pool if sequence.status is Status.SWAPPED else self.cache.pool
            assert table.pool is pool, f"{sequence.request_id} is {sequence.status.value}, its pages are elsewhere"
            assert table.length == sequence.num_computed_tokens, f"{sequence.request_id}: slots and tokens differ"
            assert 0 <= len(table.frames) * table.page_size - table.length < table.page_size, "a page is wasted"
            assert sequence.num_uncomputed_tokens > 0, f"{sequence.request_id} has nothing left to compute"
        if self.prefix:
            self.prefix.check_invariants(everybody)

    def _has_room(self, sequence: Sequence, count: int) -> bool:
        return sequence.table.frames_needed(count) <= self.cache.pool.num_free

    def _has_room_for_all_of(self, sequence: Sequence) -> bool:
        """Whether all tokens of a waiting sequence have room; if so, it takes over the pages that are kept for it."""
        if self.prefix and sequence.status is not Status.SWAPPED:
            return self.prefix.attach(sequence)
        return ceil_div(len(sequence.token_ids), self.cache.page_size) <= self.cache.pool.num_free

    def _is_next(self, sequence: Sequence) -> bool:
        """Whether nobody before it waits for room, in the line or for keys and values to come."""
        line = self.policy.first()
        others = [other for other in self.arriving if not other.table.frames] + ([line] if line else [])
        return all(self.policy.place(sequence) <= self.policy.place(other) for other in others)

    def _take(self, work: list[tuple[Sequence, int]], sequence: Sequence, count: int) -> int:
        self.cache.copy(sequence.table.append(count))
        work.append((sequence, count))
        return count

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the list that it is in, with pages as old as now; others are in the policy's line."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.ARRIVING:
            self.arriving.remove(sequence)
        if self.prefix:
            self.prefix.renew(sequence)

    def _to_waiting(self, sequence: Sequence, status: Status) -> None:
        self._leave(sequence)
        sequence.status, sequence.stored = status, None
        self.policy.preempt(sequence)

    def _admit_next(self) -> Sequence | None:
        """Let the first in the queue run, if there is room for all of its tokens.

        Room for the next step's tokens is what vLLM asks for: sequences then start earlier, and more of them have to
        give way half-computed (115 preemptions against 47 on the same trace).
        """
        sequence, width = self.policy.first(), self.width
        if sequence is None or width >= self.max_sequences or not self._is_next(sequence):
            return None
        queue = [sequence]
        if self.most_overtakes:
            queue = self.waiting
            sequence = longest_prefix_first(queue, self.prefix, self.most_overtakes)
        if width + len(sequence.samples_due) > self.max_sequences or not self._has_room_for_all_of(sequence):
            return None
        count_overtaken(queue, sequence)
        self.policy.admit(sequence)
        swapped, sequence.status = sequence.status is Status.SWAPPED, Status.RUNNING
        insort(self.running, sequence, key=self.policy.place)
        if swapped:  # last: if it fails, the engine drops the sequence like all that run
            self.cache.swap_in(sequence.table)
        return sequence
