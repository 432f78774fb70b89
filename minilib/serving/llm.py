"""The door for people: prompts in, texts out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tokenizers
import torch
from torch import Tensor
from tqdm import tqdm

from minilib.mechanisms.basics.checks import is_whole
from minilib.mechanisms.basics.interrupts import held
from minilib.model import tokenizer as tokenizer_files
from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.serving.cpu import pack_as_asked
from minilib.serving.engine import Engine
from minilib.serving.request import InvalidRequest, SamplingParams, TokenOutput
from minilib.serving.tensor_parallel.remote import EngineOnRanks


@dataclass
class Completion:
    """One sample of one prompt.

    Args:
        text: without stop string; empty without a tokenizer.
        token_ids: what was generated.
        finish_reason: "stop", "length" or "error".
        error: what went wrong, if finish_reason is "error"; what came before it is there.
        cached_tokens: tokens of the prompt that were not computed, since they were kept.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0


class LLM:
    """A model, its tokenizer, and an engine that serves both.

    Args:
        model: the decoder.
        tokenizer: of the model; None to deal in token ids alone.
        tensor_parallel: ranks that share every layer, and have the pages of their heads; they live as long as the LLM.
        options: more arguments of `Engine`. The end token is this library's own, if the tokenizer has it and none is
            given.

    Raises:
        CannotBeCut, DoesNotDivide: if a layer cannot be cut for so many ranks.
        ValueError: as `Engine`, if tensor_parallel is no whole number above 0, or if ranks cannot copy the model: if it
            is packed, or not on a CPU.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: tokenizers.Tokenizer | None = None,
        *,
        tensor_parallel: int = 1,
        **options,
    ) -> None:
        if not is_whole(tensor_parallel, 1):
            raise ValueError(f"tensor_parallel is how many ranks share the model, 1 or more; got {tensor_parallel!r}")
        if tokenizer is not None:
            options.setdefault("eos_token_id", tokenizer.token_to_id(tokenizer_files.END))
        self.tokenizer = tokenizer
        self.engine: Engine | EngineOnRanks
        if tensor_parallel == 1:
            self.engine = Engine(model, tokenizer=tokenizer, **options)
        else:
            copy = partial(_copy_of, model.config, _plain_weights(model))
            self.engine = EngineOnRanks(model.config, copy, tensor_parallel, tokenizer=tokenizer, **options)
        self._served = 0
        self._outputs_of: dict[str, deque[TokenOutput]] = {}  # what came for a request while somebody else stepped

    @classmethod
    def load(
        cls,
        folder: Path | str = weights.PRETRAINED,
        dtype: torch.dtype = torch.float32,
        *,
        tensor_parallel: int = 1,
        **options,
    ) -> LLM:
        """Load a checkpoint; without a folder, the one that comes with this library.

        End tokens are those of generation_config.json, else of config.json. The model belongs to the LLM alone, so it
        is packed for its CPU, unless ranks share it.

        Cost: the weights once in memory, in `dtype`, and the KV cache as it fills.
        """
        tokenizer = tokenizer_files.load(Path(folder))  # before the weights: it is read at once, and may be missing
        if ends := weights.eos_token_ids(folder):
            options.setdefault("eos_token_id", ends)
        model = weights.load(folder, dtype)
        if tensor_parallel == 1:
            pack_as_asked(model, options.pop("pack", True), over=True)
        return cls(model, tokenizer, tensor_parallel=tensor_parallel, **options)

    def close(self) -> None:
        """End the ranks, if the model is on ranks; they end with this object anyway."""
        if isinstance(self.engine, EngineOnRanks):
            self.engine.close()

    def generate(
        self, prompts: list[str] | list[Row[int]], params: SamplingParams | None = None, progress: bool = False
    ) -> list[list[Completion]]:
        """Complete all prompts together.

        Args:
            prompts: texts, or rows of token ids: lists, arrays or tensors.
            params: how to choose and when to stop, for all of them.
            progress: show a bar that counts finished samples.

        Returns:
            For every prompt the list of its n samples, also if n is 1: `generate([prompt])[0][0].text`, where vLLM has
            `generate([prompt])[0].outputs[0].text`.

        Raises:
            InvalidRequest: if a prompt cannot be served; none is then.
        """
        one = isinstance(prompts, str) or not hasattr(prompts, "__iter__")
        prompts = prompts if one else list(prompts)
        if one or any(map(is_whole, prompts)):
            raise InvalidRequest(f"prompts is a list of prompts, got one, {prompts!r}; put it into a list")
        samples = (params or SamplingParams()).n
        results = [[Completion() for _ in range(samples)] for _ in prompts]
        ids = self._add(prompts, params)
        place = {request_id: number for number, request_id in enumerate(ids)}
        with tqdm(total=len(prompts) * samples, desc="generating", disable=not progress) as bar:
            for output in self._outputs(ids):
                completion = results[place[output.request_id]][output.sample]
                completion.text += output.text
                if output.token_id is not None:
                    completion.token_ids.append(output.token_id)
                completion.finish_reason, completion.error = output.finish_reason, output.error
                completion.cached_tokens = output.cached_tokens
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
            while arrived or not (self.engine.requests.keys() | self.engine.unseen).isdisjoint(ids):
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
        with held():  # an interrupt of the step itself comes through; then nothing was handed out
            for output in self.engine.step():
                if output.request_id in self._outputs_of:
                    self._outputs_of[output.request_id].append(output)

    def _token_ids(self, prompt: str | Row[int]) -> Row[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise InvalidRequest("this LLM has no tokenizer; give the prompt as token ids")
        return self.tokenizer.encode(prompt).ids


def _plain_weights(model: Decoder) -> dict[str, Tensor]:
    """What ranks make a copy from.

    Raises:
        ValueError: if the weights are packed, or not on a CPU.
    """
    device = model.norm.weight.device.type
    if model.ops.compiled or device != "cpu":
        found = "packed" if model.ops.compiled else f"on {device}"
        raise ValueError(
            f"tensor_parallel starts ranks that serve plain weights on a CPU, and these are {found}; load the model "
            "with pack=False, or on GPUs use LeadingEngine and follow on ranks that launch.run starts"
        )
    return model.state_dict()


def _copy_of(config: ModelConfig, state: dict[str, Tensor]) -> Decoder:
    """A model like another one, in another process."""
    model = Decoder(config).to(state["norm.weight"].dtype)
    model.load_state_dict(state)
    return model
