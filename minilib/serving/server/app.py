"""The application: paths, what each answers, and the OpenAPI document that says so."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from minilib.serving.asynchronous.errors import EngineStopped
from minilib.serving.request import InvalidRequest
from minilib.serving.server.door import Door
from minilib.serving.server.errors import SERVER, ApiError, as_api_error, retry_after, unavailable
from minilib.serving.server.limits import read_body
from minilib.serving.server.openai_api import answers, protocol
from minilib.serving.server.records import note_error
from minilib.serving.server.service import Service

logger = logging.getLogger(__name__)

WHY = {
    400: "the request is invalid",
    401: "the API key is wrong",
    404: "no such model or path",
    405: "no such method",
    408: "the request or its body took too long",
    413: "the body is too large",
    415: "the body is no JSON",
    429: "the queue is full",
    500: "the server failed",
    503: "the engine takes no requests now",
}
GET, POST = (401, 404, 405, 503), (400, 401, 404, 405, 408, 413, 415, 429, 500, 503)


def build_app(service: Service, api_key: str | None = None) -> Door:
    """The application for one model.

    Args:
        service: the model and its limits.
        api_key: what clients must send; None for no key.
    """
    no_spans = {"tracing": False}  # newer FastAPIs make their own, beside those of an observer of the records
    app = FastAPI(title="minilib", docs_url=None, redoc_url=None, telemetry=no_spans)
    _add_errors(app, service)
    _add_probes(app, service)
    _add_models(app, service)
    _add_generation(app, service)
    _add_tokens(app, service)
    app.openapi = lambda: _document(app, service)
    paths = frozenset({"/openapi.json", *(route.path for route in app.routes)})
    return Door(app, service.metrics, service.records, paths, service.name, api_key)


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        note_error(request.scope, error.code)
        return Response(error.body, error.status, error.headers, "application/json")

    async def refused(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    async def of_the_engine(request: Request, error: Exception) -> Response:
        return answer(request, as_api_error(error, service.metrics.pace.wait(service.engine.num_waiting)))

    async def of_starlette(request: Request, error: HTTPException) -> Response:
        came, headers = f"{request.method} {request.url.path[:200]}", error.headers or {}
        code, hint = {
            404: ("unknown_path", "not found; GET /openapi.json lists the paths there are"),
            405: ("method_not_allowed", f"this path takes {headers.get('Allow', 'another method')}"),
        }.get(error.status_code, (None, error.detail))
        return answer(request, ApiError(error.status_code, f"{came}: {hint}", code, headers=headers))

    async def failed(request: Request, error: Exception) -> Response:
        return answer(request, ApiError(500, "the server failed; its log says why", "internal_error", kind=SERVER))

    app.exception_handler(ApiError)(refused)
    app.exception_handler(EngineStopped)(of_the_engine)
    app.exception_handler(InvalidRequest)(of_the_engine)
    app.exception_handler(HTTPException)(of_starlette)
    app.exception_handler(Exception)(failed)


def _add_probes(app: FastAPI, service: Service) -> None:
    def state_or(refuse: bool, state: str) -> Response:
        body = {"status": state, "replica": service.name}
        return JSONResponse(body, 503 if refuse else 200, retry_after(1) if refuse else None)

    @app.get("/health", responses=_responses(answers.HealthBody, (405,), {503: answers.HealthBody}))
    async def health() -> Response:
        """200 while the process answers and the engine is not dead."""
        state = service.engine.status().state
        return state_or(state == "stopped", state)

    @app.get("/ready", responses=_responses(answers.HealthBody, (405,), {503: answers.HealthBody}))
    async def ready() -> Response:
        """200 while requests are taken."""
        state = service.engine.status().state
        return state_or(state != "ready", state)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}} | _errors((405,)))
    async def metrics(request: Request) -> Response:
        """Numbers for Prometheus."""
        body, content_type = service.metrics.text(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    @app.get("/status", responses=_responses(answers.StatusBody, (401, 405)))
    async def status() -> Response:
        """What the engine and its open requests do now."""
        counts = dataclasses.asdict(service.engine.status())
        body = {"replica": service.name, "engine": counts, "tokens_sent": service.metrics.tokens_sent}
        return JSONResponse(body | {"open": service.records.shown()})


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_responses(answers.ModelList, GET))
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{model:path}", responses=_responses(answers.ModelCard, GET))
    async def model(model: str) -> Response:
        """The model of this name."""
        service.check_model(model)
        return JSONResponse(service.card())


def _add_generation(app: FastAPI, service: Service) -> None:
    events = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post(
        "/v1/completions",
        responses=_responses(answers.CompletionBody, POST, content=events),
        openapi_extra=_takes(protocol.CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Continue prompts."""
        asked = protocol.parse(protocol.CompletionRequest, await _json_body(request, service))
        _check_ready(service)
        return await service.completion(asked)

    @app.post(
        "/v1/chat/completions",
        responses=_responses(answers.ChatBody, POST, content=events),
        openapi_extra=_takes(protocol.ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """The next message of a chat."""
        asked = protocol.parse(protocol.ChatRequest, await _json_body(request, service))
        _check_ready(service)
        return await service.chat(asked)


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post(
        "/tokenize", responses=_responses(answers.TokenizeBody, POST), openapi_extra=_takes(protocol.TokenizeRequest)
    )
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of a chat."""
        body = await _json_body(request, service)
        asked = protocol.parse(protocol.TokenizeRequest, body).root
        service.check_model(asked.model)
        if isinstance(asked, protocol.TokenizeChatRequest):
            tokens = await service.prompts.chat(asked.messages, asked.add_generation_prompt)
        else:
            tokens = await service.prompts.text(asked.prompt, asked.add_special_tokens)
        return JSONResponse({"count": len(tokens), "max_model_len": service.max_length, "tokens": tokens})

    @app.post(
        "/detokenize",
        responses=_responses(answers.DetokenizeBody, POST),
        openapi_extra=_takes(protocol.DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        asked = protocol.parse(protocol.DetokenizeRequest, await _json_body(request, service))
        service.check_model(asked.model)
        return JSONResponse({"prompt": service.prompts.decode(asked.tokens)})


async def _json_body(request: Request, service: Service) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the body must be JSON, with Content-Type: application/json; got {kind[:100]!r}"
        raise ApiError(415, message, "unsupported_media_type", headers={"Connection": "close"})
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        message = f"the body must come as it is, without Content-Encoding; got {coding[:100]!r}"
        raise ApiError(415, message, "unsupported_content_encoding", headers={"Connection": "close"})
    return await read_body(request, service.limits)


def _check_ready(service: Service) -> None:
    state = service.engine.status().state
    if state != "ready":
        message = f"the engine is {state}; send the request again later or to another replica"
        raise unavailable(message, f"engine_{state}")


# The OpenAPI document


def _errors(statuses: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    return {status: {"model": answers.ErrorBody, "description": WHY[status]} for status in statuses}


def _responses(
    model: type[BaseModel],
    errors: tuple[int, ...],
    others: dict[int, type[BaseModel]] | None = None,
    content: dict[str, Any] | None = None,
) -> dict[int, dict[str, Any]]:
    good: dict[str, Any] = {"model": model, "description": "as asked"}
    if content:
        good["content"] = content
    more = {status: {"model": shape, "description": WHY[status]} for status, shape in (others or {}).items()}
    return {200: good} | _errors(errors) | more


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    """The OpenAPI document, with the one name of a model that is taken."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    requests = (
        protocol.CompletionRequest,
        protocol.ChatRequest,
        protocol.TokenizeRequest,
        protocol.DetokenizeRequest,
    )
    schemas = models_json_schema(
        [(request, "validation") for request in requests], ref_template="#/components/schemas/{model}"
    )[1]["$defs"]
    for schema in schemas.values():
        model = schema.get("properties", {}).get("model", {})
        for choice in model.get("anyOf", [model]):
            if choice.get("type") == "string":
                choice["enum"] = [service.model]
    document["components"]["schemas"] |= schemas
    for shape in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which this server never answers with
        document["components"]["schemas"].pop(shape, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return document
