"""What the endpoints share: the engine, how its prompts are read, and what its clients may cost."""

from __future__ import annotations

import time
from typing import Any

import tokenizers

from minilib.serving.asynchronous.status import ModelDescription
from minilib.serving.server.errors import ApiError
from minilib.serving.server.limits import Limits
from minilib.serving.server.metrics import ServerMetrics
from minilib.serving.server.openai_api.jobs import DEFAULT_TOKENS, GenerationJob, job_of
from minilib.serving.server.openai_api.logprobs import TokenTexts
from minilib.serving.server.openai_api.prompts import PromptEncoder
from minilib.serving.server.openai_api.protocol import ChatRequest, CompletionRequest
from minilib.serving.server.openai_api.templates import ChatTemplate
from minilib.serving.server.openai_api.writers import ChatWriter, CompletionWriter
from minilib.serving.server.records import OpenRecords, RequestObserver
from minilib.serving.server.running import GenerationResponse


class Service:
    """One model behind an API.

    Args:
        engine: `AsyncEngine`, or one that has its interface; it may still be starting.
        model: name that clients call it by.
        tokenizer: of the model; None if it deals in token ids alone.
        template: of chats; None if the checkpoint has none.
        limits: what one client may cost.
        name: of this replica, for the header x-replica.
        max_model_len: most tokens of a prompt and its continuation; what the engine can if left out.
        observer: told of each request when it has ended, such as one that makes spans; None for nobody.

    Attributes:
        records: of the requests that are open.
    """

    def __init__(
        self,
        engine,
        model: str,
        tokenizer: tokenizers.Tokenizer | None,
        template: ChatTemplate | None = None,
        limits: Limits | None = None,
        name: str | None = None,
        max_model_len: int | None = None,
        observer: RequestObserver | None = None,
    ) -> None:
        self.engine, self.model, self.name = engine, model, name
        self.limits = limits or Limits()
        self.prompts, self.texts = PromptEncoder(tokenizer, template), TokenTexts(tokenizer)
        self.records = OpenRecords(observer)
        self.metrics = ServerMetrics(engine.status, self.records)
        self._max_model_len, self._created = max_model_len, int(time.time())

    @property
    def description(self) -> ModelDescription:
        """Of the engine.

        Raises:
            EngineNotReady: if it has not started yet.
        """
        return self.engine.description

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its continuation."""
        most = self.description.max_length
        return most if self._max_model_len is None else min(most, self._max_model_len)

    def card(self) -> dict[str, Any]:
        """What /v1/models says about the model."""
        said = self.description
        return {
            "id": self.model,
            "object": "model",
            "created": self._created,
            "owned_by": "minilib",
            "fingerprint": said.fingerprint,
            "max_model_len": self.max_length,
            "page_size": said.page_size,
        }

    def check_model(self, model: str | None) -> None:
        """Refuse a name that is not this model's.

        Raises:
            ApiError: 404.
        """
        if model is not None and model != self.model:
            message = f"the model {model[:200]!r} does not exist; this server has {self.model!r}"
            raise ApiError(404, message, "model_not_found", "model")

    async def completion(self, request: CompletionRequest) -> GenerationResponse:
        """The answer to a request for completions."""
        self.check_model(request.model)
        if request.echo and request.logprobs is not None:
            message = "this server has no log-probabilities of prompts; leave out echo or logprobs"
            raise ApiError(400, message, "unsupported_parameter", "echo")
        prompts = await self._token_ids(request.prompt)
        job = self._job(request, prompts, "prompt", request.logprobs, request.max_tokens, DEFAULT_TOKENS)
        echo = None
        if request.echo:
            echo = [self._said(prompt) for prompt in _as_list(request.prompt) for _ in range(job.samples)]
        logprobs = request.logprobs is not None
        return self._answer(job, CompletionWriter(self.model, self.texts, logprobs, job.include_usage, echo))

    async def chat(self, request: ChatRequest) -> GenerationResponse:
        """The answer to a request for the next message of a chat."""
        self.check_model(request.model)
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", "invalid_value", "top_logprobs")
        most = request.max_completion_tokens
        if request.max_tokens is not None:
            if most is not None and most != request.max_tokens:
                message = "max_tokens and max_completion_tokens differ; give one of them"
                raise ApiError(400, message, "invalid_value", "max_tokens")
            most = request.max_tokens
        prompt = await self.prompts.chat(request.messages)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        job = self._job(request, [prompt], "messages", logprobs, most)
        return self._answer(job, ChatWriter(self.model, self.texts, bool(request.logprobs), job.include_usage))

    def _job(self, request, prompts: list[list[int]], param: str, *options: int | None) -> GenerationJob:
        return job_of(request, prompts, self.limits, self.max_length, param, *options)

    def _answer(self, job: GenerationJob, writer: CompletionWriter | ChatWriter) -> GenerationResponse:
        return GenerationResponse(self.engine, job, writer, self.limits, self.metrics)

    async def _token_ids(self, prompt: str | list) -> list[list[int]]:
        prompts = _as_list(prompt)
        if len(prompts) > self.limits.prompts:  # before they are encoded
            message = f"{len(prompts)} prompts in one request; at most {self.limits.prompts} are taken"
            raise ApiError(400, message, "too_many", "prompt")
        return [await self.prompts.text(each) if isinstance(each, str) else each for each in prompts]

    def _said(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.prompts.decode(prompt)


def _as_list(prompt: str | list) -> list:
    """Prompts of a request, which may have one by itself."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
