"""A router whose requests are spans, and whose replicas hang theirs below them.

client ── traceparent ──► router: POST /v1/completions   SERVER
                            ├─ POST   CLIENT, to replica 0, which refused
                            └─ POST   CLIENT, to replica 1 ── traceparent ──► its span, SERVER
"""

from __future__ import annotations

from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.http_attributes import (
    HTTP_REQUEST_METHOD,
    HTTP_REQUEST_RESEND_COUNT,
    HTTP_RESPONSE_STATUS_CODE,
)
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.semconv.attributes.url_attributes import URL_PATH
from opentelemetry.trace import SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from minilib.classic.gateway.connection import ClientLeft
from minilib.classic.gateway.hooks import Ending
from minilib.classic.gateway.messages import GatewayError, GatewayRequest, Headers, Reply
from minilib.operations.tracing.request_spans import tracer_of
from minilib.serving.router.discovery import Discover
from minilib.serving.router.router import ReplicaRouter
from minilib.serving.server.records import CONTEXT_HEADERS

_SPAN, _ATTEMPT = "span", "attempt span"  # notes of a request


class TracedRouter(ReplicaRouter):
    """A router that makes a span of each request, and one of each time it is sent to a replica.

    Args:
        discover: where replicas are.
        provider: of OpenTelemetry's SDK.
        options: more arguments of `ReplicaRouter`.
    """

    def __init__(self, discover: Discover, provider: TracerProvider, **options: Any) -> None:
        super().__init__(discover, **options)
        self._tracer, self._propagator = tracer_of(provider), TraceContextTextMapPropagator()

    async def answer(self, request: GatewayRequest) -> Reply | None:
        """A request that is passed on begins its span here."""
        reply = await super().answer(request)
        if reply is None:
            context = {name.decode(): value.decode("latin-1") for name, value in request.headers}
            context = {name: context[name] for name in map(bytes.decode, CONTEXT_HEADERS) if name in context}
            attributes = {HTTP_REQUEST_METHOD: request.method, URL_PATH: request.target.partition("?")[0]}
            parent = self._propagator.extract(context)
            request.notes[_SPAN] = self._tracer.start_span(request.method, parent, SpanKind.SERVER, attributes)
        return reply

    def dispatched(self, request: GatewayRequest, target: int) -> Headers:
        """It is sent to a replica, in a span of its own that the replica is told."""
        host, port = self.metrics.name(target).removeprefix("http://").rsplit(":", 1)
        attributes = {HTTP_REQUEST_METHOD: request.method, SERVER_ADDRESS: host, SERVER_PORT: int(port)}
        if resent := len(request.tried) - 1:
            attributes[HTTP_REQUEST_RESEND_COUNT] = resent
        within = trace.set_span_in_context(request.notes[_SPAN], otel_context.Context())
        span = request.notes[_ATTEMPT] = self._tracer.start_span(request.method, within, SpanKind.CLIENT, attributes)
        told: dict[str, str] = {}
        self._propagator.inject(told, trace.set_span_in_context(span, otel_context.Context()))
        told_headers = [(name.encode(), value.encode("latin-1")) for name, value in told.items()]
        return super().dispatched(request, target) + told_headers

    def answered(self, request: GatewayRequest, target: int, status: int, headers: Headers) -> Headers:
        """The head of the response has come."""
        for name in (_ATTEMPT, _SPAN):
            request.notes[name].set_attribute(HTTP_RESPONSE_STATUS_CODE, status)
        return super().answered(request, target, status, headers)

    def ended(self, request: GatewayRequest, target: int, ending: Ending) -> None:
        """It is over at this replica."""
        super().ended(request, target, ending)
        span = request.notes[_ATTEMPT]
        if ending is not Ending.COMPLETE:
            span.set_attribute(ERROR_TYPE, ending.value)
        if ending in (Ending.FAILED, Ending.CUT, Ending.REFUSED):
            span.set_status(StatusCode.ERROR)
        if ending is Ending.CUT:  # the client was answered, but not all of it
            request.notes[_SPAN].set_attribute(ERROR_TYPE, ending.value)
            request.notes[_SPAN].set_status(StatusCode.ERROR)
        span.end()

    def finished(self, request: GatewayRequest, error: BaseException | None) -> None:
        """It is over for the client."""
        super().finished(request, error)
        span = request.notes[_SPAN]
        if isinstance(error, GatewayError):
            span.set_attribute(HTTP_RESPONSE_STATUS_CODE, error.status)
            span.set_attribute(ERROR_TYPE, str(error.status))
        if error is not None and not isinstance(error, ClientLeft):
            span.set_status(StatusCode.ERROR)
        span.end()
