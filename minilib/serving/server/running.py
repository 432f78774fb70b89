"""A job while it runs: submitted to the engine, read as tokens come, and aborted when its client goes away.

submit ──→ stream.get_many() ──→ one write for all tokens that have come ──→ …        the client reads
receive ─→ http.disconnect: the job is cancelled, its requests are aborted            the client has gone
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Message as AsgiMessage
from starlette.types import Receive, Scope, Send

from minilib.serving.request import TokenOutput
from minilib.serving.server.errors import SERVER, ApiError, as_api_error
from minilib.serving.server.limits import Limits
from minilib.serving.server.metrics import ServerMetrics
from minilib.serving.server.openai_api.jobs import GenerationJob
from minilib.serving.server.openai_api.writers import DONE, Usage, Writer
from minilib.serving.server.records import RECORD, PromptRecord, RequestRecord

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on as they come
]
ABORT = "minilib.abort"  # extension of ASGI: closes the connection without waiting for what is not written

logger = logging.getLogger(__name__)


class SlowClient(Exception):
    """A client did not read what was written to it."""


class GenerationResponse(Response):
    """The answer to one job, whole or as a stream of events.

    Args:
        engine: `AsyncEngine`, or one that has its interface.
        job: what to compute.
        writer: how the answer is written.
        limits: of the server.
        metrics: of the server.
    """

    def __init__(self, engine, job: GenerationJob, writer: Writer, limits: Limits, metrics: ServerMetrics) -> None:
        super().__init__()
        self._engine, self._job, self._writer = engine, job, writer
        self._limits, self._metrics = limits, metrics
        self._usage = Usage(sum(map(len, job.prompts)))
        self._began = time.monotonic()
        self._started = False  # the response
        self._record: RequestRecord  # of the request, by the time it is answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute and respond, unless the client goes away.

        Raises:
            ApiError: before the response has begun.
        """
        self._record = record = scope[RECORD]
        record.tenant, record.is_stream = self._job.scheduling.tenant, self._job.stream
        answer = self._stream(send) if self._job.stream else self._whole(send)
        try:
            if not await unless_gone(receive, answer, self._is_stuck, self._limits.slow_client_seconds / 4):
                self._aborted("client_gone")
        except SlowClient:
            self._aborted("slow_client")
            if abort := scope.get("extensions", {}).get(ABORT):
                abort()
        except Exception as error:
            told = self._told(error)
            self._aborted(told.code)
            if not self._started:
                raise told from error
            data = b"data: " + told.body + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": False})

    def _aborted(self, reason: str) -> None:
        self._metrics.aborted.labels(reason).inc()
        self._record.error = reason

    async def _whole(self, send: Send) -> None:
        samples = self._job.samples
        choices: list[list[TokenOutput]] = [[] for _ in range(samples * len(self._job.prompts))]

        async def take(prompt: int, outputs: list[TokenOutput]) -> None:
            for output in outputs:
                choices[prompt * samples + output.sample].append(output)

        await self._run(take)
        body = json.dumps(self._writer.whole(choices, self._usage)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self._started = True
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, {"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        samples, chunk = self._job.samples, self._writer.chunk
        usage = self._usage if self._job.continuous_usage else None

        async def take(prompt: int, outputs: list[TokenOutput]) -> None:
            if samples == 1:
                data = chunk(prompt, outputs, usage)
            else:
                of_sample: dict[int, list[TokenOutput]] = {}
                for output in outputs:
                    of_sample.setdefault(output.sample, []).append(output)
                data = b"".join([chunk(prompt * samples + sample, made, usage) for sample, made in of_sample.items()])
            if not self._started:  # so late that an error before the first token has a status of its own
                self._started = True
                await self._send(send, {"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
            if data:
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

        await self._run(take)
        end = self._writer.usage_chunk(self._usage) + DONE if self._job.include_usage else DONE
        await self._send(send, {"type": "http.response.body", "body": end, "more_body": False})

    async def _run(self, take: Callable[[int, list[TokenOutput]], Awaitable[None]]) -> None:
        """Submit all prompts, and hand over what comes, until all have ended."""
        async with asyncio.timeout(self._limits.request_seconds), self._submitted() as streams:
            if len(streams) == 1:
                await self._follow(streams[0], 0, take)
            else:
                await _together([self._follow(prompt, number, take) for number, prompt in enumerate(streams)])
        self._metrics.end_to_end.observe(time.monotonic() - self._began)
        self._metrics.pace.ended()

    @asynccontextmanager
    async def _submitted(self) -> AsyncIterator[list[PromptRecord]]:
        """The streams of all prompts; those that have not ended are aborted at the end."""
        prompts = self._record.prompts
        try:
            for prompt, params in zip(self._job.prompts, self._job.params, strict=True):
                made = PromptRecord(params, len(prompt), time.monotonic_ns())
                prompts.append(made)
                made.stream = await self._engine.submit(prompt, params, scheduling=self._job.scheduling)
            yield prompts
        finally:
            for made in prompts:
                if made.stream is not None:
                    made.stream.close()

    async def _follow(
        self, prompt: PromptRecord, number: int, take: Callable[[int, list[TokenOutput]], Awaitable[None]]
    ) -> None:
        """Hand over the outputs of one prompt as they come, and count them."""
        ended, metrics = self._metrics.ended, self._metrics
        while outputs := await prompt.stream.get_many():
            before, tokens = prompt.came(outputs), len(outputs)
            for output in outputs:
                if output.finish_reason:
                    if output.finish_reason == "error":
                        raise ApiError(500, str(output.error), "generation_failed", kind=SERVER)
                    prompt.finish_reasons.append(output.finish_reason)
                    ended.labels(output.finish_reason).inc()
            if before is not None:
                metrics.between_tokens.observe((prompt.last_ns - before) / 1e9 / tokens, tokens)
            else:
                metrics.first_token.observe(prompt.last_ns / 1e9 - self._began)
                metrics.waited(self._record.tenant, prompt)
                self._usage.cached_tokens += prompt.cached_tokens
            metrics.tokens_sent += tokens
            self._usage.completion_tokens += tokens
            await take(number, outputs)
        prompt.ended_ns = time.monotonic_ns()

    async def _send(self, send: Send, message: AsgiMessage) -> None:
        self._record.writing_since_ns = (
            time.monotonic_ns()
        )  # a look now and then costs less than a timer for each write
        await send(message)
        self._record.writing_since_ns = None

    def _is_stuck(self) -> bool:
        since = self._record.writing_since_ns
        return since is not None and time.monotonic_ns() - since > self._limits.slow_client_seconds * 1e9

    def _told(self, error: Exception) -> ApiError:
        if isinstance(error, TimeoutError):
            message = f"the request took longer than {self._limits.request_seconds:g} s"
            return ApiError(408, message, "request_timeout", kind="timeout_error", headers={"x-should-retry": "false"})
        told = as_api_error(error, self._metrics.pace.wait(self._engine.num_waiting))
        if told.code == "internal_error":
            logger.error("a request failed", exc_info=error)
        return told


async def unless_gone(
    receive: Receive, work: Coroutine[None, None, None], is_stuck: Callable[[], bool], look_seconds: float
) -> bool:
    """Do some work unless the client goes away first, which cancels it; False if that happened.

    Raises:
        SlowClient: if the client is found stuck, at one of the looks at it that come every so many seconds.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        both = working, watching
        while not (await asyncio.wait(both, timeout=look_seconds, return_when=asyncio.FIRST_COMPLETED))[0]:
            if is_stuck():
                raise SlowClient
        if not working.done():
            return False
        working.result()
        return True
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _together(work: list[Coroutine[None, None, None]]) -> None:
    """Do all of it, and raise the first error, which cancels the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
