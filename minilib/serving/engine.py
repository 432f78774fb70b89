"""The engine: requests come and go at every step, and their tokens come out as they are made."""

from __future__ import annotations

from collections.abc import Sequence as Row

import tokenizers
import torch

from minilib.model.decoder import Decoder
from minilib.serving.cache.paged import PagedCache
from minilib.serving.cache.paged_attention import PagedAttention, Work
from minilib.serving.cpu.packing import packed
from minilib.serving.detokenizer import TextStream
from minilib.serving.request import InvalidRequest, SamplingParams, Sequence, TokenOutput
from minilib.serving.sampling import sample
from minilib.serving.scheduler import Scheduler


class Engine:
    """Serves one model: `add_request`, then `step` until nothing is unfinished.

    Args:
        model: the decoder; its dtype and device are those of the cache. On a CPU its matrices are packed anew.
        num_pages: pages of the KV cache.
        page_size: tokens in a page.
        num_swap_pages: pages in host memory, for preemption by swap.
        max_batch_tokens: most tokens in one step.
        max_sequences: most sequences that run at once.
        preemption: "recompute" or "swap".
        tokenizer: for text in the outputs and for stop strings; None to deal in token ids alone.
        eos_token_id: token that ends a sequence unless a request ignores it.

    Raises:
        ValueError: if a size or the preemption makes no sense, or for a mixture of experts that drops tokens or whose
            experts choose: what a request gets would depend on who else is in the batch.
    """

    def __init__(
        self,
        model: Decoder,
        num_pages: int,
        page_size: int = 16,
        num_swap_pages: int = 0,
        max_batch_tokens: int = 2048,
        max_sequences: int = 256,
        preemption: str = "recompute",
        tokenizer: tokenizers.Tokenizer | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        moe, weight = model.config.moe, model.embed.weight
        if moe and (moe.choice == "expert" or moe.capacity_factor is not None):
            raise ValueError(
                f"this model's answers depend on who else is in the batch (choice={moe.choice!r}, capacity_factor="
                f"{moe.capacity_factor}); serve it with choice='token' and capacity_factor=None"
            )
        self.model, self.device = packed(model.eval()), weight.device
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id
        self.cache = PagedCache(model.config, num_pages, page_size, num_swap_pages, weight.dtype, weight.device)
        self.scheduler = Scheduler(self.cache, max_batch_tokens, max_sequences, preemption)
        self.requests: dict[str, list[Sequence]] = {}  # the unfinished samples of every unfinished request
        self._texts: dict[Sequence, TextStream] = {}

    @property
    def max_length(self) -> int:
        """Most tokens of one sequence that can be computed: the model's positions or the pool's slots."""
        return min(self.model.config.max_position, self.cache.num_slots)

    @property
    def has_unfinished(self) -> bool:
        """True while `step` has something to do."""
        return bool(self.requests)

    def add_request(self, request_id: str, prompt_token_ids: Row[int], params: SamplingParams | None = None) -> None:
        """Queue a request; it joins at the next step that has room.

        Args:
            request_id: the client's name for it, not one of an unfinished request.
            prompt_token_ids: at least one token; a list, an array or a tensor.
            params: how to choose tokens and when to stop; the defaults of `SamplingParams` if left out.

        Raises:
            InvalidRequest: if it cannot be served; the engine goes on serving the others.
        """
        params = params or SamplingParams()
        prompt = list(prompt_token_ids.tolist() if hasattr(prompt_token_ids, "tolist") else prompt_token_ids)
        self._check(request_id, prompt, params)
        sequence = Sequence(request_id, 0, prompt, len(prompt), params, self.cache.new_table())
        self.requests[request_id] = [sequence]
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request in whatever state it is and free its pages; False if it is unknown or finished already."""
        sequences = self.requests.pop(request_id, [])
        for sequence in sequences:
            self.scheduler.remove(sequence)
            self._texts.pop(sequence, None)
        return bool(sequences)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Compute one batch and return the tokens that it made; none while prompts are only partly computed.

        If the model raises, or the user interrupts it, the running sequences are recomputed by later steps.
        """
        try:
            work = self.scheduler.schedule()
            if not work:
                return []
            logits = self._forward(work)
            for sequence, count in work:
                sequence.num_computed_tokens += count
            caught_up = [sequence for sequence, _ in work if not sequence.num_uncomputed_tokens]
            due = [(row, sequence, k) for row, sequence in enumerate(caught_up) for k in sequence.samples_due]
            tokens = sample(logits[[row for row, _, _ in due]], *self._chances(due)) if due else []
        except BaseException:
            for sequence in list(self.scheduler.running):
                self.scheduler.drop(sequence)
            raise
        members = [sequence if k == sequence.sample else self._fork(sequence, k) for _, sequence, k in due]
        return [self._append(sequence, token) for sequence, token in zip(members, tokens, strict=True)]

    def check_invariants(self) -> None:
        """What must hold between steps: the scheduler's pages balance, and every sequence belongs to a request."""
        self.scheduler.check_invariants()
        owned = {sequence for sequences in self.requests.values() for sequence in sequences}
        assert owned == {*self.scheduler.running, *self.scheduler.waiting}, "a sequence was lost or left behind"
        assert self._texts.keys() <= owned, "text of a finished sequence was kept"
        assert all(self.requests.values()), "a finished request was kept"

    def _forward(self, work: list[tuple[Sequence, int]]) -> torch.Tensor:
        """Logits (rows, vocab_size) of the sequences that this batch brings up to date, in their order."""
        attention = PagedAttention(self.cache, [Work(sequence.table, count) for sequence, count in work])
        tokens: list[int] = []
        positions: list[int] = []
        wanted = []
        for sequence, count in work:
            first = sequence.num_computed_tokens
            tokens += sequence.token_ids[first : first + count]
            positions += range(first, first + count)
            if count == sequence.num_uncomputed_tokens:
                wanted.append(len(tokens) - 1)
        inputs = (torch.tensor(row, device=self.device) for row in (tokens, positions))
        return self.model(*inputs, attention, wanted=torch.tensor(wanted, dtype=torch.int64, device=self.device))

    @staticmethod
    def _chances(due: list[tuple[int, Sequence, int]]) -> tuple[list[SamplingParams], list[float]]:
        return [sequence.params for _, sequence, _ in due], [sequence.chance(k) for _, sequence, k in due]

    def _fork(self, sequence: Sequence, k: int) -> Sequence:
        """One more sample of a prompt that has just been computed."""
        child = sequence.fork(k)
        self.requests[sequence.request_id].append(child)
        self.scheduler.add(child)
        return child

    def _append(self, sequence: Sequence, token: int) -> TokenOutput:
        """Give a sequence its new token, and free it if that was the last one."""
        sequence.token_ids.append(token)
        text, reason = self._text(sequence, token)
        reason = reason or self._reason(sequence, token)
        if reason:
            stream = self._texts.pop(sequence, None)
            text += stream.rest() if stream else ""
            self.scheduler.remove(sequence)
            self.requests[sequence.request_id].remove(sequence)
            if not self.requests[sequence.request_id]:
                del self.requests[sequence.request_id]
        return TokenOutput(sequence.request_id, sequence.sample, token, text, reason)

    def _text(self, sequence: Sequence, token: int) -> tuple[str, str | None]:
        """The text that a token adds, and "stop" if a stop string ended it."""
        if self.tokenizer is None:
            return "", None
        if sequence not in self._texts:
            self._texts[sequence] = TextStream(self.tokenizer, sequence.params.stop)
        text, stopped = self._texts[sequence].push(token)
        return text, "stop" if stopped else None

    def _reason(self, sequence: Sequence, token: int) -> str | None:
        """Why a sequence ends with this token, if it does."""
        params = sequence.params
        if token in params.stop_token_ids or (token == self.eos_token_id and not params.ignore_eos):
            return "stop"
        if sequence.num_output_tokens == params.max_tokens or len(sequence.token_ids) > self.max_length:
            return "length"
        return None

    def _check(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        """Refuse what cannot be served."""
        vocab_size, positions = self.model.config.vocab_size, self.model.config.max_position
        if request_id in self.requests:
            raise InvalidRequest(f"request {request_id!r} is being served already; choose another id")
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token id")
        for name, tokens in (("prompt", prompt), ("stop_token_ids", params.stop_token_ids)):
            wrong = [
                token
                for token in tokens
                if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size
            ]
            if wrong:
                raise InvalidRequest(f"{name} holds {wrong[0]!r}, and the model knows token ids 0 … {vocab_size - 1}")
        if len(prompt) > positions:
            raise InvalidRequest(f"the prompt has {len(prompt)} tokens, and the model takes at most {positions}")
        if len(prompt) > self.cache.num_slots:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, and the whole KV cache holds {self.cache.num_slots}; "
                "give the engine more pages"
            )
        if params.n > self.scheduler.max_sequences:
            raise InvalidRequest(f"n is {params.n}, and max_sequences is {self.scheduler.max_sequences}")
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need text: give the engine a tokenizer, or use stop_token_ids")
