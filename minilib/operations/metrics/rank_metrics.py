"""What one rank of a training job counts, in a registry of its own, read when somebody asks.

    metrics = RankMetrics("pretraining", rank, world_size)
    trainer = Trainer(…, phases=metrics.phase)
    trainer.run(after_step=watch_steps(trainer, metrics))

A step pays for a clock and an addition a phase; memory is read, and text written, by whoever scrapes. Counters count
since this process began and start again with it, which Prometheus' rate() expects; `training_step` is the place in the
run, which falls when a run goes on from a checkpoint, and so a gauge.

Series are what a metrics store pays for, so all label values are known in advance: a phase that was not named at the
beginning is refused, and a rank has at most MOST_SERIES_OF_A_RANK series. A label for each layer would multiply them by
the model's depth; what a layer does is a profiler's matter.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from minilib.mechanisms.basics.checks import check_whole
from minilib.serving.server.metrics import Distribution
from minilib.training.phases import PHASES

PREFIX = "training_"
STEP_BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # seconds: a step of anything from a test to a cluster
WAITING = ("gradients", "loss")  # phases in which a rank of a data-parallel run waits for others
MOST_SERIES_OF_A_RANK = 128


class UnknownPhase(ValueError):
    """A phase that was not named at the beginning; each would be a dozen new series."""


class TooManySeries(ValueError):
    """More series than a rank may have; the message says what makes them."""


class _Phase:
    """One phase of every step, timed."""

    __slots__ = ("_began", "_metrics", "_synchronize", "seconds")

    def __init__(self, metrics: RankMetrics, synchronize: Callable[[], object] | None) -> None:
        self._metrics, self._synchronize, self._began = metrics, synchronize, 0
        self.seconds = Distribution(STEP_BOUNDS)

    def __enter__(self) -> None:
        self._began = self._metrics.heartbeat = time.perf_counter_ns()

    def __exit__(self, *exception: object) -> None:
        if self._synchronize is not None:
            self._synchronize()
        now = self._metrics.heartbeat = time.perf_counter_ns()
        self.seconds.observe((now - self._began) * 1e-9)


class RankMetrics(Collector):
    """Counters of one rank.

    Args:
        run: name of the job, a label.
        rank, world_size: of this process.
        restarts: how often the job was started again before, such as TORCHELASTIC_RESTART_COUNT says.
        durable: when the checkpoint that the run goes on from became durable, in seconds since 1970; None at its start.
        device: of the model, whose memory is shown beside the host's.
        phases: all that steps have.
        waited: seconds that this rank has waited in collectives, counted since it began, as a recorder of collectives
            knows them. Without one, the seconds of the phases in WAITING, which holds for data parallelism alone.
        synchronize: called before the clock at the end of every phase, such as torch.cuda.synchronize: on a device
            that works behind the calls, a phase else lasts as long as its launches. It costs their overlap.
        queue_depth: batches that wait for this rank, asked by whoever scrapes; None if nothing is prefetched.

    Attributes:
        registry: of this rank alone.
        heartbeat: time.perf_counter_ns() when the training loop last did anything.

    Raises:
        TooManySeries: if so many phases make more series than a rank may have.
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        run: str,
        rank: int = 0,
        world_size: int = 1,
        *,
        restarts: int = 0,
        durable: float | None = None,
        device: torch.device | str = "cpu",
        phases: tuple[str, ...] = PHASES,
        waited: Callable[[], float] | None = None,
        synchronize: Callable[[], object] | None = None,
        queue_depth: Callable[[], int] | None = None,
    ) -> None:
        for name, value, least in (("rank", rank, 0), ("world_size", world_size, rank + 1), ("restarts", restarts, 0)):
            check_whole(name, value, least)
        self.run, self.rank, self.world_size, self.restarts = run, rank, world_size, restarts
        self._device, self._queue_depth = torch.device(device), queue_depth
        self._process = psutil.Process()
        self.heartbeat = time.perf_counter_ns()
        self.running = True
        self.phases = {name: _Phase(self, synchronize) for name in phases}
        self._waited = waited or self._waiting_phases
        self.step: int | None = None
        self.steps = self.nonfinite_steps = self.saves = self.written_bytes = 0
        self.tokens = self.stall_seconds = 0.0
        self.loss: float | None = None
        self.grad_norm: float | None = None
        self.learning_rate: float | None = None
        self.durable = durable
        self.step_seconds = Distribution(STEP_BOUNDS)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        made = num_series(self.registry)
        if made > MOST_SERIES_OF_A_RANK - 8:  # those that come with the first step and the first checkpoint
            raise TooManySeries(f"{len(phases)} phases make {made} series a rank, of {MOST_SERIES_OF_A_RANK} at most")

    def phase(self, name: str) -> _Phase:
        """Time a phase; a `StepPhases` of training/phases.py.

        Raises:
            UnknownPhase: if it was not named at the beginning.
        """
        try:
            return self.phases[name]
        except KeyError:
            raise UnknownPhase(f"phases named here: {', '.join(self.phases)}; got {name!r}") from None

    def step_ended(
        self, step: int, seconds: float, tokens: float, loss: float, grad_norm: float, learning_rate: float
    ) -> None:
        """Count a step.

        Args:
            step: steps of the run that are done.
            seconds: that it took.
            tokens: this rank's part of those that it was trained on.
            loss: NaN and infinity are shown as they are, and counted, since a scrape may come after the next step.
            grad_norm: before clipping; the same holds for it.
            learning_rate: of this step.
        """
        self.step, self.loss, self.grad_norm, self.learning_rate = step, loss, grad_norm, learning_rate
        self.steps += 1
        self.tokens += tokens
        self.step_seconds.observe(seconds)
        self.nonfinite_steps += not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.heartbeat = time.perf_counter_ns()

    def stalled(self, seconds: float) -> None:
        """Steps waited so long for a checkpoint."""
        self.stall_seconds += seconds
        self.heartbeat = time.perf_counter_ns()

    def durable_checkpoint(self, written_bytes: int, at: float | None = None) -> None:
        """A checkpoint is durable.

        Args:
            written_bytes: by this rank.
            at: when it became so, in seconds since 1970; now if left out.
        """
        self.saves += 1
        self.written_bytes += written_bytes
        self.durable = time.time() if at is None else at

    def collect(self) -> Iterator[Metric]:
        """All that is known now; what is not known yet is left out, so that no alert takes it for 0."""
        yield from (self._counter(*row) for row in self._counters())
        yield from (self._gauge(*row) for row in self._gauges() if row[2] is not None)
        yield from self._memory()
        yield self._histogram("step_seconds", "Steps by their seconds.", {"": self.step_seconds})
        phases = {name: phase.seconds for name, phase in self.phases.items()}
        yield self._histogram("phase_seconds", "Phases of steps by their seconds.", phases, "phase")

    def _counters(self) -> Iterator[tuple[str, str, float]]:
        yield "steps", "Steps that this process took.", self.steps
        yield "tokens", "Tokens that this rank's part of them had.", self.tokens
        yield "nonfinite_steps", "Steps whose loss or gradients were NaN or infinite.", self.nonfinite_steps
        yield "collective_wait_seconds", "Seconds waited in collectives.", self._waited()
        yield "checkpoint_stall_seconds", "Seconds that steps waited for checkpoints.", self.stall_seconds
        yield "checkpoint_written_bytes", "Bytes of durable checkpoints that this rank wrote.", self.written_bytes
        yield "checkpoints", "Checkpoints that became durable.", self.saves
        yield "restarts", "How often the job was started again.", self.restarts

    def _gauges(self) -> Iterator[tuple[str, str, float | None]]:
        since = (time.perf_counter_ns() - self.heartbeat) * 1e-9
        yield "running", "1 until the job has ended.", float(self.running)
        yield "world_size", "Ranks of the job.", self.world_size
        yield "heartbeat_timestamp_seconds", "When the training loop last did anything.", time.time() - since
        yield "step", "Steps of the run that are done.", self.step
        yield "steps_per_second", "Of stepping, without what lies between steps.", self._pace()
        yield "loss", "Mean loss over ranks of the last step, nats a token.", self.loss
        yield "grad_norm", "Global norm of its gradients before clipping.", self.grad_norm
        yield "learning_rate", "Of the last step.", self.learning_rate
        yield "checkpoint_durable_timestamp_seconds", "When the newest checkpoint became durable.", self.durable
        yield "data_queue_depth", "Batches that wait for this rank.", self._queue_depth and self._queue_depth()

    def _memory(self) -> Iterator[Metric]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        rows = {"host": (self._process.memory_info().rss, peak, psutil.virtual_memory().available, None)}
        if self._device.type == "cuda":
            counts = (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.mem_get_info)
            used, peak, (free, _) = (count(self._device) for count in counts)
            rows["cuda"] = (used, peak, free, torch.cuda.memory_reserved(self._device))
        texts = {
            "used": "Resident on the host; in tensors on a GPU.",
            "peak": "The most of it so far.",
            "available": "That this and other processes could still take.",
            "reserved": "Kept by torch's allocator.",
        }
        for column, (name, text) in enumerate(texts.items()):
            family = GaugeMetricFamily(f"{PREFIX}memory_{name}_bytes", text, labels=(*self._labels, "memory"))
            for memory, row in rows.items():
                if row[column] is not None:
                    family.add_metric((*self._labels.values(), memory), row[column])
            yield family

    @property
    def _labels(self) -> dict[str, str]:
        return {"run": self.run, "rank": str(self.rank)}

    def _waiting_phases(self) -> float:
        return sum(self.phases[name].seconds.total for name in WAITING if name in self.phases)

    def _pace(self) -> float | None:
        return self.steps / self.step_seconds.total if self.step_seconds.total else None

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), value)
        return family

    def _histogram(self, name: str, text: str, rows: dict[str, Distribution], *label: str) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=(*self._labels, *label))
        for value, row in rows.items():
            family.add_metric((*self._labels.values(), *([value] if label else [])), row.buckets(), row.total)
        return family


def num_series(registry: CollectorRegistry) -> int:
    """Series that a scrape of this registry brings: each bucket of a histogram is one."""
    return sum(len(family.samples) for family in registry.collect())
