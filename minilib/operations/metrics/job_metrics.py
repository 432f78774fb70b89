"""What a whole training job achieves, shown by one of its ranks: tokens a second, MFU, goodput.

    MFU       of the seconds in which steps ran
    goodput   those seconds, of steps that were not lost again, over all seconds since the job began

Their product is what the hardware was paid for. Neither counts what the other does: an MFU over all seconds times a
goodput would charge each stop twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minilib.mechanisms.basics.checks import check_quantity, check_whole
from minilib.operations.metrics.rank_metrics import PREFIX, RankMetrics
from minilib.training.trainer import Trainer


class JobMetrics(Collector):
    """Numbers of all ranks together, added to the registry of one rank, commonly rank 0's.

    Args:
        of: that rank.
        flops_per_token: that the model needs; see `model_flops_per_token`.
        peak: FLOP/s of all ranks together; None where nobody measured it, and MFU is not shown.
        started: when the job first began, before all restarts, in seconds since 1970; now if left out.
        window: steps over which tokens a second are averaged.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        of: RankMetrics,
        flops_per_token: float,
        peak: float | None = None,
        started: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_quantity("flops_per_token", flops_per_token, above_zero=True)
        check_whole("window", window, 1)
        if peak is not None:
            check_quantity("peak", peak, above_zero=True)
        self._run, self._flops_per_token, self._peak, self._clock = of.run, flops_per_token, peak, clock
        self.started = clock() if started is None else started
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)
        self.productive_seconds = 0.0
        of.registry.register(self)

    def step_ended(self, seconds: float, tokens: float, productive_seconds: float) -> None:
        """Count a step.

        Args:
            seconds: that it took.
            tokens: of all ranks.
            productive_seconds: of all steps of the run so far, each counted once however often it was taken; what
                `Trainer.seconds` is, since a checkpoint holds it.
        """
        self._steps.append((seconds, tokens))
        self.productive_seconds = productive_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of the last steps, all ranks together; None before the first."""
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds else None

    @property
    def mfu(self) -> float | None:
        """Of the last steps, as it comes out: a value above 1 says that something is counted wrong, and is shown."""
        speed = self.tokens_per_second
        return None if speed is None or self._peak is None else self._flops_per_token * speed / self._peak

    @property
    def goodput(self) -> float | None:
        """Part of the seconds since the job began that went into steps which still count; None at its first moment."""
        passed = self._clock() - self.started
        return self.productive_seconds / passed if passed > 0 else None

    def collect(self) -> Iterator[Metric]:
        """All that is known now."""
        rows = (
            ("started_timestamp_seconds", "When the job first began.", self.started),
            ("tokens_per_second", "Tokens of all ranks a second of the last steps.", self.tokens_per_second),
            ("mfu_ratio", "FLOPs that the model needed over those that all ranks could do, last steps.", self.mfu),
            ("goodput_ratio", "Seconds of steps that count over seconds since the job began.", self.goodput),
        )  # fmt: skip
        for name, text, value in rows:
            if value is not None:
                family = GaugeMetricFamily(PREFIX + name, text, labels=("run",))
                family.add_metric((self._run,), value)
                yield family


def watch_steps(trainer: Trainer, metrics: RankMetrics, job: JobMetrics | None = None) -> Callable[[Trainer], None]:
    """What to give to Trainer.run as `after_step`, made just before, after any resume.

    A rank's part of a step's tokens is an equal one, so that the sum over ranks is the job's, whatever ranks share.
    """
    seen = trainer.seconds

    def after_step(trainer: Trainer) -> None:
        nonlocal seen
        seconds, seen = trainer.seconds - seen, trainer.seconds
        config = trainer.config
        tokens = config.batch_size * config.context
        metrics.step_ended(
            trainer.step,
            seconds,
            tokens / metrics.world_size,
            trainer.losses[-1],
            trainer.grad_norms[-1],
            config.rate(trainer.step - 1),
        )
        if job is not None:
            job.step_ended(seconds, tokens, trainer.seconds)

    return after_step
