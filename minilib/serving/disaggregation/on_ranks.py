"""Workers as ranks that `launch.run` starts: decode on rank 0, prefill on all others."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass

import torch.distributed as dist

from minilib.model.decoder import Decoder
from minilib.ranks import launch
from minilib.serving.disaggregation.decode import DecodeEngine
from minilib.serving.disaggregation.meeting import check_transport, meet_ranks
from minilib.serving.disaggregation.prefill import PrefillEngine
from minilib.serving.engine import Engine
from minilib.serving.load.arrivals import Arrival
from minilib.serving.load.clock import WallClock
from minilib.serving.load.metrics import RequestTimes
from minilib.serving.load.open_loop import run_open_loop


@dataclass(frozen=True)
class WorkerReport:
    """What a load came to.

    Args:
        times: of each request.
        tokens: that each request got.
        content_bytes: bytes of pages that moved.
        messages: packets of pages that moved.
    """

    times: list[RequestTimes]
    tokens: list[list[int]]
    content_bytes: int
    messages: int


def serve_on_ranks(
    make_model: Callable[[], Decoder],
    load: Row[Arrival],
    prefill_workers: int = 1,
    transport: str = "shared",
    timeout: float = 60.0,
    prefill: dict | None = None,
    **options,
) -> WorkerReport:
    """Serve a load with its prompts computed in processes of their own; nothing is left of them afterwards.

    Args:
        make_model: gives the decoder; called in every process.
        load: the requests.
        prefill_workers: processes that compute prompts; 0 computes them in the one that decodes.
        transport: "shared" or "tcp".
        timeout: seconds that all of it may take.
        prefill: options of `PrefillEngine` that differ from those below.
        options: of all engines.

    Raises:
        ValueError: for another transport, or fewer than 0 workers.
        RankFailed, RanksTimedOut: as `launch.run`.
    """
    check_transport(transport)
    if prefill_workers < 0:
        raise ValueError(f"prefill_workers is a number of processes ≥ 0, got {prefill_workers}")
    prefill = options | (prefill or {})
    size = 1 + prefill_workers
    return launch.run(_work, size, make_model, list(load), transport, timeout, prefill, options, timeout=timeout)[0]


def _work(make_model, load, transport, timeout, prefill, options) -> WorkerReport | None:
    """What a rank does."""
    channels = meet_ranks(transport, timeout) if dist.get_world_size() > 1 else {}
    model = make_model()
    if dist.get_rank():
        worker = PrefillEngine(model, **prefill)
        worker.attach(channels[0])
        worker.serve()
        return None
    ways = list(channels.values())
    engine = DecodeEngine(model, ways, timeout=timeout, **options) if ways else Engine(model, **options)
    tokens: list[list[int]] = [[] for _ in load]
    times = run_open_loop(_Noted(engine, tokens), load, WallClock())
    if ways:
        engine.close()
    moved = sum(way.content_bytes_received for way in ways), sum(way.num_received.get("pages", 0) for way in ways)
    return WorkerReport(times, tokens, *moved)


class _Noted:
    """An engine whose tokens are noted as they come."""

    def __init__(self, engine: Engine, tokens: list[list[int]]) -> None:
        self._engine, self._tokens = engine, tokens

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def step(self):
        outputs = self._engine.step()
        for output in outputs:
            if output.token_id is not None:
                self._tokens[int(output.request_id)].append(output.token_id)
        return outputs
