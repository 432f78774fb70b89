"""The engine: requests come and go at every step, and their tokens come out as they are made.

Nothing that one request does reaches another: not its numbers (paged_attention.py, sampling.py), not its text
(detokenizer.py). A step that fails or is interrupted loses no token: what ran is computed anew, and tokens that had
been chosen are handed out by the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Row

import tokenizers
import torch

from minilib.mechanisms.basics.interrupts import held
from minilib.mechanisms.caching import EvictionPolicy
from minilib.mechanisms.paging import FramePool, PageTable
from minilib.mechanisms.scheduling import InvalidTask, SchedulingPolicy
from minilib.model.decoder import Attention, Decoder
from minilib.serving.admission import check_independence, check_request, end_tokens
from minilib.serving.cache.keeping_pool import KeepingPool
from minilib.serving.cache.paged import PagedCache, default_num_pages
from minilib.serving.cache.paged_attention import PagedAttention, Work
from minilib.serving.cache.prefix import prefix_cache_as_asked
from minilib.serving.cache.tiers import SecondTier
from minilib.serving.cpu import pack_as_asked
from minilib.serving.detokenizer import TextStream
from minilib.serving.request import InvalidRequest, SamplingParams, SchedulingParams, TokenOutput, token_ids_of
from minilib.serving.sampling import NO_LOGPROBS, Logprobs, log_probabilities, sample
from minilib.serving.scheduler import Scheduler
from minilib.serving.sequence import Sequence, flat_batch


class Engine:
    """Serves one model: `add_request`, then `step` until nothing is unfinished.

    Args:
        model: the decoder, used as it is at each step; its dtype and device are those of the cache.
        num_pages: pages of the KV cache; as `default_num_pages` has it if left out.
        page_size: tokens in a page.
        num_swap_pages: pages in host memory, for preemption by swap.
        max_batch_tokens: most tokens in one step.
        max_sequences: most sequences that run at once.
        preemption: "recompute" or "swap".
        tokenizer: for text in the outputs and for stop strings; None to deal in token ids alone.
        eos_token_id: token, or tokens, that end a sequence unless a request ignores them.
        pack: move the model's weights into the form that is fast on a CPU, see `minilib.serving.cpu.packing.pack`;
            torch.bfloat16 to multiply in it as well.
        policy: who is served first: "fcfs", "priority", "srpt", "fair_share", "deadline", … or a policy (`Scheduler`).
        clock: the time that arrivals and deadlines are on, in seconds unless it counts something else.
        prefix_cache: keep full pages for requests that begin alike, found by a "hash" chain or in a "radix" tree, see
            `minilib.serving.cache.prefix`; None keeps nothing.
        eviction: chooses which kept page leaves; the one used longest ago if left out.
        second_tier: where kept pages go that leave, see `minilib.serving.cache.tiers`; None to forget them.
        most_overtakes: how often a waiting request is overtaken by one with a longer kept prefix; 0 is never.

    Raises:
        ValueError: if a size, the preemption or an end token makes no sense, or for a mixture of experts that drops
            tokens or whose experts choose: what a request gets would depend on who else is in the batch.
        CacheTooLarge: if the KV cache does not fit into memory.
    """

    new_cache = PagedCache  # makes the pages; ranks that share a model make those of their heads

    def __init__(
        self,
        model: Decoder,
        num_pages: int | None = None,
        page_size: int = 16,
        num_swap_pages: int = 0,
        max_batch_tokens: int = 2048,
        max_sequences: int = 256,
        preemption: str = "recompute",
        tokenizer: tokenizers.Tokenizer | None = None,
        eos_token_id: int | Row[int] | None = None,
        pack: bool | torch.dtype = False,
        policy: str | SchedulingPolicy = "fcfs",
        clock: Callable[[], float] = time.monotonic,
        prefix_cache: str | None = None,
        eviction: EvictionPolicy | None = None,
        second_tier: SecondTier | None = None,
        most_overtakes: int = 0,
    ) -> None:
        check_independence(model.config)
        self.eos_token_ids = end_tokens(eos_token_id, model.config.vocab_size)
        self.tokenizer, weight = tokenizer, model.norm.weight
        self.device, kind = weight.device, (weight.dtype, weight.device)
        pack_as_asked(model, pack)
        self.model = model.eval()
        if num_pages is None:
            num_pages = default_num_pages(model.config, page_size, max_sequences, *kind)
        pool_type = KeepingPool if prefix_cache else FramePool
        self.cache = self.new_cache(model.config, num_pages, page_size, num_swap_pages, *kind, pool_type)
        self.prefix = prefix_cache_as_asked(self.cache, model, prefix_cache, eviction, second_tier)
        self.steps = None
        if model.ops.compiled:
            from minilib.serving.cpu.steps import RecordedSteps

            self.steps = RecordedSteps(model, self.cache)
        limits = max_batch_tokens, max_sequences, preemption, policy
        self.scheduler = Scheduler(self.cache, *limits, self.prefix, most_overtakes)
        self.clock = clock
        self.requests: dict[str, list[Sequence]] = {}  # the unfinished samples of every unfinished request
        self._texts: dict[Sequence, TextStream] = {}
        self._made: list[TokenOutput] = []  # not handed out yet
        self.failed_batch: frozenset[str] = frozenset()  # requests that ran in the step that failed last

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence: the model's positions, or one more than slots, as the last is never computed."""
        return min(self.model.config.max_position, self.cache.num_slots + 1)

    @property
    def has_unfinished(self) -> bool:
        """True while `step` has something to do."""
        return bool(self.requests or self._made)

    @property
    def unseen(self) -> set[str]:
        """Requests with outputs that nobody has seen, since the step that made them was interrupted."""
        return {output.request_id for output in self._made}

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Row[int],
        params: SamplingParams | None = None,
        scheduling: SchedulingParams | None = None,
    ) -> None:
        """Queue a request; it joins at the next step that has room.

        Args:
            request_id: the client's name for it, not one of an unfinished request.
            prompt_token_ids: at least one token; a list, an array or a tensor.
            params: how to choose tokens and when to stop; the defaults of `SamplingParams` if left out.
            scheduling: what the policy may look at; the defaults of `SchedulingParams` if left out.

        Raises:
            InvalidRequest: if it cannot be served; the engine goes on serving the others.
        """
        params, scheduling = params or SamplingParams(), scheduling or SchedulingParams()
        prompt = token_ids_of(prompt_token_ids, self.model.config.vocab_size, "prompt")
        if request_id in self.requests or request_id in self.unseen:
            raise InvalidRequest(f"request {request_id!r} is being served already; choose another id")
        limits = self.model.config, self.cache.num_slots, self.scheduler.max_sequences
        check_request(prompt, params, *limits, text=self.tokenizer is not None)
        with held():
            try:
                sequence = Sequence.of(request_id, prompt, params, scheduling, self.cache.new_table(), self.clock())
                self.scheduler.add(sequence)
            except InvalidTask as error:
                raise InvalidRequest(str(error)) from error
            self.requests[request_id] = [sequence]

    def abort(self, request_id: str) -> bool:
        """Drop a request in whatever state it is, free its pages and forget outputs that nobody has seen.

        Returns:
            False if it is unknown or finished already.
        """
        with held():
            sequences = self.requests.pop(request_id, [])
            for sequence in sequences:
                self.scheduler.remove(sequence)
                self._texts.pop(sequence, None)
            unseen = request_id in self.unseen
            self._made = [output for output in self._made if output.request_id != request_id]
        return bool(sequences) or unseen

    def fail(self, request_id: str, error: str) -> list[TokenOutput]:
        """End what is unfinished of a request by an error and free its pages; unknown requests have nothing to end.

        Returns:
            The last output of each of its samples, with the text that was held back.
        """
        with held():
            sequences, ended = list(self.requests.get(request_id, ())), []
            for sequence in sequences:
                text = self._texts[sequence].finish()[0] if sequence in self._texts else ""
                cached = sequence.num_cached_tokens or 0
                for number in sequence.samples_due:
                    ended.append(TokenOutput(request_id, number, None, text, "error", error, cached))
            self.abort(request_id)
        return ended

    def step(self) -> list[TokenOutput]:
        """Compute one batch and return the tokens that it made; none while prompts are only partly computed.

        A sequence whose logits hold NaN or +inf, or −inf alone, ends with an error; the others go on. If the model
        raises, or the user interrupts it, the running sequences are recomputed by later steps. If the interrupt comes
        when the tokens are chosen, the next step returns them.
        """
        if not self._made:
            with held() as interrupts:
                self._advance(interrupts)
        outputs, self._made = self._made, []
        return outputs

    def check_invariants(self, others: Iterable[PageTable] = ()) -> None:
        """What must hold between steps: pages balance over sequences and further tables; requests own all sequences."""
        self.scheduler.check_invariants(others)
        owned = {sequence for sequences in self.requests.values() for sequence in sequences}
        known = {*self.scheduler.running, *self.scheduler.arriving, *self.scheduler.waiting}
        assert owned == known, "a sequence was lost or left behind"
        assert self._texts.keys() <= owned, "text of a finished sequence was kept"
        assert all(self.requests.values()), "a finished request was kept"

    @torch.inference_mode()
    def _advance(self, interrupts: list[int]) -> None:
        """One step, its outputs into `_made`: all that can fail comes first, and then all that changes sequences."""
        self.failed_batch = frozenset()
        try:
            work = self.scheduler.schedule()
            if not work:
                return
            logits = self._forward(work, interrupts)
            self.scheduler.advance(work)
            if self.prefix:
                for sequence, _ in work:
                    self.prefix.store(sequence)
            caught_up = [sequence for sequence, _ in work if not sequence.num_uncomputed_tokens]
            due = [(row, sequence, k) for row, sequence in enumerate(caught_up) for k in sequence.samples_due]
            tokens, scores = self._choose(logits, due)
            members = self._members(due)
        except BaseException:
            self.failed_batch = frozenset(sequence.request_id for sequence in self.scheduler.running)
            for sequence in list(self.scheduler.running):
                self.scheduler.drop(sequence)
            raise
        for (_, sequence, _), member in zip(due, members, strict=True):
            if member is not sequence:
                self.requests[member.request_id].append(member)
                self.scheduler.add(member, sequence)
        self.scheduler.charge(members)
        for member, token, score in zip(members, tokens, scores, strict=True):
            self._made.append(self._append(member, token, score))

    def _forward(self, work: list[tuple[Sequence, int]], interrupts: list[int]) -> torch.Tensor:
        """Logits (rows, vocab_size) of the sequences that this batch brings up to date, in their order."""
        if self.steps and self.steps.suit(len(work)) and all(s.num_uncomputed_tokens == 1 for s, _ in work):
            return self.steps.logits([s.token_ids[-1] for s, _ in work], [s.table for s, _ in work])
        paged = self._attention(work)

        def attention(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            if interrupts:  # a step may be long, and between layers it can be given up
                raise KeyboardInterrupt
            return paged(layer, *qkv)

        tokens, positions, last = flat_batch(work)
        inputs = (torch.tensor(row, device=self.device) for row in (tokens, positions))
        indices = torch.tensor(last, dtype=torch.int64, device=self.device)
        return self.model(*inputs, attention, logits_indices=indices)

    def _attention(self, work: list[tuple[Sequence, int]]) -> Attention:
        """What stores and reads the keys and values of a step."""
        return PagedAttention(self.cache, [Work(s.table, count) for s, count in work], self.model.ops.compiled)

    @staticmethod
    def _choose(logits: torch.Tensor, due: list[tuple[int, Sequence, int]]) -> tuple[list[int | None], list[Logprobs]]:
        """A token for each sample that is due, and log-probabilities for those that ask for them."""
        if not due:
            return [], []
        logits, params = logits[[row for row, _, _ in due]], [sequence.params for _, sequence, _ in due]
        tokens = sample(logits, params, [0.0 if s.params.greedy else s.chance(k) for _, s, k in due])
        if all(p.logprobs is None for p in params):
            return tokens, [NO_LOGPROBS] * len(due)
        return tokens, log_probabilities(logits, params, tokens)

    @staticmethod
    def _members(due: list[tuple[int, Sequence, int]]) -> list[Sequence]:
        """Whose the chosen tokens are: forks, for the further samples of a prompt that has just been computed."""
        members: list[Sequence] = []
        try:
            for _, sequence, k in due:
                members.append(sequence if k == sequence.sample else sequence.fork(k))
        except BaseException:
            for fork in set(members).difference(sequence for _, sequence, _ in due):
                fork.table.release()
            raise
        return members

    def _append(self, sequence: Sequence, token: int | None, score: Logprobs) -> TokenOutput:
        """Give a sequence its new token, and free it if that was the last one, or if there is none."""
        stream = self._texts.get(sequence)
        if stream is None:
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            stream = self._texts[sequence] = TextStream(self.tokenizer, sequence.params.stop, prompt)
        text, stopped, reason, error = "", False, "error", None
        if token is None:
            error = f"no token to choose: logits behind {len(sequence.token_ids)} tokens hold NaN, +inf, or −inf alone"
        else:
            sequence.token_ids.append(token)
            text, stopped = stream.push(token)
            reason = "stop" if stopped else self._reason(sequence, token)
        if reason and not stopped:
            rest, stopped = stream.finish()
            text, reason = text + rest, "stop" if stopped and not error else reason
        if reason:
            self._remove(sequence, keep=token is not None)
        cached = sequence.num_cached_tokens or 0
        return TokenOutput(sequence.request_id, sequence.sample, token, text, reason, error, cached, *score)

    def _remove(self, sequence: Sequence, keep: bool) -> None:
        """Free a finished sequence, and forget its request with the last one."""
        del self._texts[sequence]
        self.scheduler.remove(sequence, keep)
        self.requests[sequence.request_id].remove(sequence)
        if not self.requests[sequence.request_id]:
            del self.requests[sequence.request_id]

    def _reason(self, sequence: Sequence, token: int) -> str | None:
        """Why a sequence ends with this token, if it does."""
        params = sequence.params
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if sequence.num_output_tokens == params.max_tokens or len(sequence.token_ids) == self.max_length:
            return "length"
        return None
