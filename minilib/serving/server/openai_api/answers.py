"""The shapes of all responses, for the OpenAPI document; answers themselves are written without these models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    """A response has these fields and no others."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Shape):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shape):
    """Every response whose status is 400 or above."""

    error: ErrorDetail


class ModelCard(Shape):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fingerprint: str
    max_model_len: int
    page_size: int


class ModelList(Shape):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class CachedTokens(Shape):
    """Of the prompt."""

    cached_tokens: int


class UsageBody(Shape):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TextLogprobs(Shape):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Shape):
    """One sample of a completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionBody(Shape):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody


class TokenLogprob(Shape):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that was chosen."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Shape):
    """Log-probabilities of an answer's tokens."""

    content: list[ChosenLogprob]
    refusal: None


class AnswerMessage(Shape):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Shape):
    """One sample of an answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatBody(Shape):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class TokenizeBody(Shape):
    """POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeBody(Shape):
    """POST /detokenize."""

    prompt: str


class EngineCounts(Shape):
    """The engine's status."""

    state: Literal["starting", "ready", "restarting", "draining", "stopped"]
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    restarts: int


class OpenRequestBody(Shape):
    """A request that has not ended."""

    request: int
    tenant: str
    state: Literal["waiting", "running"]
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    silent_seconds: float
    unread_seconds: float


class StatusBody(Shape):
    """GET /status."""

    replica: str | None
    engine: EngineCounts
    tokens_sent: int
    open: list[OpenRequestBody]


class HealthBody(Shape):
    """GET /health and /ready."""

    status: Literal["starting", "ready", "restarting", "draining", "stopped"]
    replica: str | None
