"""Requests of a server as spans of OpenTelemetry, named as its conventions for HTTP and for generative AI name them.

    POST /v1/completions          SERVER     child of whatever span the client's traceparent names
      text_completion tiny        INTERNAL   one for each prompt: what was asked, usage, why it ended
        queue                                until the first step in which it ran
        prefill                              until its first token
        decode                               until its last token; tokens are counted, and have no spans

Spans are made when a request has ended, from the server's record of it: nothing happens between two tokens, and whether
it was slow or failed is known when it is decided whether to keep them.

Source: OpenTelemetry semantic conventions 1.44, "HTTP spans"; "Generative AI spans" (in development).
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import (
    HTTP_REQUEST_METHOD,
    HTTP_RESPONSE_STATUS_CODE,
    HTTP_ROUTE,
)
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from minilib.mechanisms.telemetry import TailSampler
from minilib.serving.server.records import PromptRecord, RequestRecord

SCHEMA = Schemas.V1_44_0.value
PROVIDER = "minilib"  # of the model, as the conventions have it
WEIGHT = "minilib.sampling.weight"  # how many requests this one stands for
TOKENS = "minilib.tokens"  # of a phase: those that prefill computed, or those that decode made
BY_CLIENT = frozenset({"client_gone", "slow_client"})  # ends that are no failure of the server
CHAT = "/v1/chat/completions"


def tracer_of(provider: TracerProvider) -> Tracer:
    """The tracer of all spans of this library."""
    return provider.get_tracer("minilib", schema_url=SCHEMA)


class RequestSpans:
    """A `RequestObserver` that makes spans.

    Args:
        provider: of the SDK, with exporters and sampler; a client's decision to sample is followed by its default one.
        model: name that the server serves its model by.
        sampler: keeps what was slow or failed, and a share of the rest; everything is kept if left out. The share is by
            the hash of the client's trace id, so that services which keep the same share keep the same traces.
    """

    def __init__(self, provider: TracerProvider, model: str, sampler: TailSampler | None = None) -> None:
        self._tracer, self._model, self._sampler = tracer_of(provider), model, sampler
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, record: RequestRecord) -> None:
        """Make the spans of a request, or drop them."""
        parent = self._propagator.extract(record.context)
        weight = self._weight(record, parent)
        if not weight:
            return
        shift = time.time_ns() - time.monotonic_ns()  # one for all spans of the request, so that they stay nested
        name = record.method if record.route == "other" else f"{record.method} {record.route}"
        attributes: dict[str, Any] = {HTTP_REQUEST_METHOD: record.method}
        if record.route != "other":
            attributes[HTTP_ROUTE] = record.route
        if record.status is not None:
            attributes[HTTP_RESPONSE_STATUS_CODE] = record.status
        if self._sampler is not None:
            attributes[WEIGHT] = weight
        span = self._start(name, parent, record.began_ns + shift, attributes, SpanKind.SERVER)
        if span.is_recording():
            within = trace.set_span_in_context(span, otel_context.Context())
            for prompt in record.prompts:
                self._inference(record, prompt, within, shift)
            _mark(span, record.error, failed=_failed(record))
        span.end(record.ended_ns + shift)

    def _weight(self, record: RequestRecord, parent: otel_context.Context) -> float:
        """How many requests this one stands for; 0 if it is dropped."""
        if self._sampler is None:
            return 1.0
        caller = trace.get_current_span(parent).get_span_context()
        key = f"{caller.trace_id:032x}" if caller.is_valid else f"request {record.number}"
        return self._sampler.weight(key, record.ended_ns - record.began_ns, _failed(record))

    def _inference(self, record: RequestRecord, prompt: PromptRecord, parent: otel_context.Context, shift: int) -> None:
        operation = "chat" if record.route == CHAT else "text_completion"
        attributes = self._asked(record, prompt) | _came(record, prompt) | {gen_ai.GEN_AI_OPERATION_NAME: operation}
        end = prompt.ended_ns or record.ended_ns
        span = self._start(f"{operation} {self._model}", parent, prompt.submitted_ns + shift, attributes)
        within = trace.set_span_in_context(span, otel_context.Context())
        if prompt.stream is not None or record.error in BY_CLIENT:  # the engine did not refuse it
            self._phase("queue", within, prompt.submitted_ns, prompt.started_ns or end, shift)
        if prompt.started_ns is not None:
            computed = prompt.prompt_tokens - prompt.cached_tokens
            self._phase("prefill", within, prompt.started_ns, prompt.first_ns or end, shift, computed)
        if prompt.first_ns is not None:
            made = prompt.generated_tokens - len(prompt.finish_reasons or (None,))
            self._phase("decode", within, prompt.first_ns, prompt.last_ns, shift, max(made, 0))
        error = None if prompt.ended_ns else record.error
        _mark(span, error, failed=error is not None and _failed(record))
        span.end(end + shift)

    def _asked(self, record: RequestRecord, prompt: PromptRecord) -> dict[str, Any]:
        params = prompt.params
        asked = {
            gen_ai.GEN_AI_PROVIDER_NAME: PROVIDER,
            gen_ai.GEN_AI_REQUEST_MODEL: self._model,
            gen_ai.GEN_AI_RESPONSE_MODEL: self._model,
            gen_ai.GEN_AI_REQUEST_MAX_TOKENS: params.max_tokens,
            gen_ai.GEN_AI_REQUEST_TEMPERATURE: float(params.temperature),
            gen_ai.GEN_AI_REQUEST_TOP_P: float(params.top_p),
            gen_ai.GEN_AI_REQUEST_STREAM: record.is_stream,
            gen_ai.GEN_AI_USAGE_INPUT_TOKENS: prompt.prompt_tokens,
        }
        optional = {
            gen_ai.GEN_AI_REQUEST_TOP_K: float(params.top_k) if params.top_k else None,
            gen_ai.GEN_AI_REQUEST_SEED: params.seed,
            gen_ai.GEN_AI_REQUEST_CHOICE_COUNT: params.n if params.n != 1 else None,
            gen_ai.GEN_AI_REQUEST_STOP_SEQUENCES: params.stop or None,
            USER_ID: record.tenant or None,
        }
        return asked | {name: value for name, value in optional.items() if value is not None}

    def _phase(
        self, name: str, parent: otel_context.Context, begin: int, end: int, shift: int, tokens: int | None = None
    ) -> None:
        attributes = {} if tokens is None else {TOKENS: tokens}
        begin = min(begin, end)  # a step may have begun before the server knew that its request was taken
        self._start(name, parent, begin + shift, attributes).end(end + shift)

    def _start(
        self,
        name: str,
        parent: otel_context.Context,
        begin_ns: int,
        attributes: dict[str, Any],
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> trace.Span:
        return self._tracer.start_span(name, parent, kind, attributes, start_time=begin_ns)


def _came(record: RequestRecord, prompt: PromptRecord) -> dict[str, Any]:
    came: dict[str, Any] = {gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: prompt.generated_tokens}
    if prompt.cached_tokens:
        came[gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] = prompt.cached_tokens
    if prompt.finish_reasons:
        came[gen_ai.GEN_AI_RESPONSE_FINISH_REASONS] = tuple(prompt.finish_reasons)
    if record.is_stream and prompt.first_ns is not None:
        came[gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = (prompt.first_ns - record.began_ns) / 1e9
    return came


def _failed(record: RequestRecord) -> bool:
    """Whether the server failed: no answer, one of 5xx, or one that was cut; what the client did wrong is its own."""
    if record.status is None or record.status >= 500:
        return record.error not in BY_CLIENT
    return record.status < 400 and record.error is not None and record.error not in BY_CLIENT


def _mark(span: trace.Span, error: str | None, failed: bool) -> None:
    if error is not None:
        span.set_attribute(ERROR_TYPE, error)
    if failed:
        span.set_status(Status(StatusCode.ERROR))
