"""The door for people: prompts in, texts out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
from tqdm import tqdm

from minilib.model import tokenizer
from minilib.model import weights as checkpoint
from minilib.model.decoder import Decoder
from minilib.serving.engine import Engine
from minilib.serving.request import InvalidRequest, SamplingParams, TokenOutput


@dataclass
class Completion:
    """One sample of one prompt.

    Args:
        text: without stop string; empty without a tokenizer.
        token_ids: what was generated.
        finish_reason: "stop" or "length".
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class LLM:
    """A model, its tokenizer, and an engine that serves both.

    Args:
        model: the decoder.
        words: its tokenizer; None to deal in token ids alone.
        num_pages: pages of the KV cache; enough for four sequences of full length if left out.
        options: more arguments of `Engine`.
    """

    def __init__(
        self,
        model: Decoder,
        words: tokenizers.Tokenizer | None = None,
        num_pages: int | None = None,
        page_size: int = 16,
        **options,
    ) -> None:
        if words is not None:
            options.setdefault("eos_token_id", words.token_to_id(tokenizer.END))
        if num_pages is None:
            num_pages = 4 * -(-model.config.max_position // max(1, page_size))  # the engine refuses a size below 1
        self.words = words
        self.engine = Engine(model, num_pages, page_size, tokenizer=words, **options)
        self._served = 0
        self._outputs_of: dict[str, deque[TokenOutput]] = {}  # what came for a request while somebody else stepped

    @classmethod
    def load(cls, folder: Path | str = checkpoint.PRETRAINED, dtype: torch.dtype = torch.float32, **options) -> LLM:
        """Load a checkpoint; without a folder, the one that comes with this library."""
        return cls(checkpoint.load(folder, dtype), tokenizer.load(Path(folder)), **options)

    def generate(
        self, prompts: list[str] | list[Row[int]], params: SamplingParams | None = None, progress: bool = False
    ) -> list[list[Completion]]:
        """Complete all prompts together.

        Args:
            prompts: texts, or rows of token ids.
            params: how to choose and when to stop, for all of them.
            progress: show a bar that counts finished samples.

        Returns:
            For every prompt its n samples.

        Raises:
            InvalidRequest: if a prompt cannot be served; none is then.
        """
        if isinstance(prompts, str):
            raise InvalidRequest("prompts is a list of prompts, got one text; put it into a list")
        prompts = list(prompts)
        samples = (params or SamplingParams()).n
        results = [[Completion() for _ in range(samples)] for _ in prompts]
        ids = self._add(prompts, params)
        place = {request_id: number for number, request_id in enumerate(ids)}
        with tqdm(total=len(prompts) * samples, desc="generating", disable=not progress) as bar:
            for output in self._outputs(ids):
                completion = results[place[output.request_id]][output.sample]
                completion.text += output.text
                completion.token_ids.append(output.token_id)
                completion.finish_reason = output.finish_reason
                bar.update(output.finish_reason is not None)
        return results

    def stream(self, prompt: str | Row[int], params: SamplingParams | None = None) -> Iterator[TokenOutput]:
        """Complete one prompt, token by token; leaving the loop early aborts it."""
        yield from self._outputs(self._add([prompt], params))

    def _add(self, prompts: list, params: SamplingParams | None) -> list[str]:
        added: list[str] = []
        try:
            for prompt in prompts:
                request_id = f"generate-{self._served + len(added)}"
                self.engine.add_request(request_id, self._token_ids(prompt), params)
                added.append(request_id)
        except BaseException:
            for request_id in added:
                self.engine.abort(request_id)
            raise
        self._served += len(added)
        return added

    def _outputs(self, ids: list[str]) -> Iterator[TokenOutput]:
        """Step until these requests are finished; if the caller stops listening, they are aborted."""
        arrived: deque[TokenOutput] = deque()
        self._outputs_of |= dict.fromkeys(ids, arrived)
        try:
            while arrived or not self.engine.requests.keys().isdisjoint(ids):
                if not arrived:
                    self._step()
                while arrived:
                    yield arrived.popleft()
        finally:
            for request_id in ids:
                del self._outputs_of[request_id]
                self.engine.abort(request_id)

    def _step(self) -> None:
        """One step of the engine, its outputs to whoever waits for them."""
        for output in self.engine.step():
            if output.request_id in self._outputs_of:
                self._outputs_of[output.request_id].append(output)

    def _token_ids(self, prompt: str | Row[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.words is None:
            raise InvalidRequest("this LLM has no tokenizer; give the prompt as token ids")
        return self.words.encode(prompt).ids
