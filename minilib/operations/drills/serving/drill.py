"""Run a server with a fault, or a healthy one, and see whether its instruments name the fault."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from minilib.model.decoder import Decoder
from minilib.operations.drills.serving.faults import REPLICA, ServerFault, inject, server_fault
from minilib.operations.drills.serving.instruments import ServerEvidence, ServerFinding, diagnose_server
from minilib.operations.drills.serving.load import MODEL, DrillLoad
from minilib.operations.tracing.exported import telemetry_spans
from minilib.operations.tracing.request_spans import RequestSpans
from minilib.serving.asynchronous.async_engine import AsyncEngine
from minilib.serving.engine import Engine
from minilib.serving.server.limits import Limits
from minilib.serving.server.serve import DrainingServer
from minilib.serving.server.service import Service

ENGINE = {"num_pages": 512, "max_batch_tokens": 64, "max_sequences": 16}
LIMITS = Limits(send_bytes=4096)  # so that few tokens are enough to fill what a client does not read
LIMIT_SECONDS = 300.0  # for a whole run, whatever happens


@dataclass(frozen=True)
class ServerRun:
    """One run, and what was made of it.

    Args:
        seed: that the fault and the load are drawn from.
        fault: that was injected; None if the run was healthy.
        findings: of the instruments, which did not know.
    """

    seed: int
    fault: ServerFault | None
    findings: Sequence[ServerFinding]

    def is_right(self, finding: ServerFinding) -> bool:
        """Whether a finding names kind and who."""
        return self.fault is not None and (finding.kind, finding.who) == (self.fault.kind, self.fault.who)


def run_server(model: Decoder, fault: ServerFault | None, seed: int) -> ServerEvidence:
    """Run a server in a thread with its load, and collect what its instruments show.

    Args:
        model: small, with 1024 positions.
        fault: to inject.
        seed: of the load.

    Cost: about a second on an idle machine.

    Raises:
        TimeoutError: after LIMIT_SECONDS.
    """
    engine = Engine(model, **ENGINE)
    inject(fault, engine)
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.instance.id": REPLICA}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observer = RequestSpans(provider, MODEL)
    statuses: Future[list[dict]] = Future()

    def drilled() -> None:
        service = Service(AsyncEngine(engine), MODEL, None, limits=LIMITS, name=REPLICA, observer=observer)
        try:
            statuses.set_result(asyncio.run(_serve(DrainingServer(service, drain_seconds=0), fault, seed)))
        except BaseException as error:
            statuses.set_exception(error)

    thread = threading.Thread(target=drilled, name="drilled server")  # a notebook's event loop runs in this one
    thread.start()
    thread.join()
    seen = statuses.result()
    return ServerEvidence(seen, telemetry_spans(exporter.get_finished_spans()))


async def _serve(server: DrainingServer, fault: ServerFault | None, seed: int) -> list[dict]:
    serving = asyncio.ensure_future(server.serve())
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            while not server.started and not serving.done():
                await asyncio.sleep(0.001)
            port = server.servers[0].sockets[0].getsockname()[1]
            return await DrillLoad(port, fault, random.Random(seed)).run()
    finally:
        server.stop()
        await serving


def drill_server(
    seeds: Iterable[int],
    model: Decoder,
    diagnose: Callable[[ServerEvidence], Sequence[ServerFinding]] = diagnose_server,
) -> list[ServerRun]:
    """Run the faults of some seeds, healthy runs between, and have each diagnosed."""
    faults = {seed: server_fault(seed) for seed in seeds}
    return [ServerRun(seed, fault, diagnose(run_server(model, fault, seed))) for seed, fault in faults.items()]
