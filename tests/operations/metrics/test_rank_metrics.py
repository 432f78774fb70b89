"""What a rank counts, as a scraper reads it."""

import math
import time
from collections import Counter

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from minilib.operations.metrics.job_metrics import JobMetrics
from minilib.operations.metrics.rank_metrics import (
    MOST_SERIES_OF_A_RANK,
    STEP_BOUNDS,
    RankMetrics,
    TooManySeries,
    UnknownPhase,
    num_series,
)
from minilib.training.phases import PHASES

COUNTERS = {
    "training_steps", "training_tokens", "training_nonfinite_steps", "training_collective_wait_seconds",
    "training_checkpoint_stall_seconds", "training_checkpoint_written_bytes", "training_checkpoints",
    "training_restarts",
}  # fmt: skip


def families(metrics):
    return {each.name: each for each in text_string_to_metric_families(generate_latest(metrics.registry).decode())}


def value(metrics, name, **labels):
    """Of the one series; None if there is none."""
    wanted = {"run": "tiny", "rank": "0"} | labels
    found = [
        sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name == name and wanted.items() <= sample.labels.items()
    ]
    assert len(found) <= 1
    return found[0] if found else None


def step(metrics, number=1, seconds=0.5, loss=2.0, grad_norm=1.0):
    metrics.step_ended(number, seconds, tokens=100.0, loss=loss, grad_norm=grad_norm, learning_rate=0.01)


def test_what_is_not_known_yet_is_left_out():
    """A loss of 0, or a checkpoint of 1970, would be a number that an alert takes for one."""
    metrics = RankMetrics("tiny")
    for name in ("step", "steps_per_second", "loss", "grad_norm", "learning_rate", "data_queue_depth",
                 "checkpoint_durable_timestamp_seconds", "memory_reserved_bytes"):  # fmt: skip
        assert value(metrics, f"training_{name}") is None, name
    assert value(metrics, "training_steps_total") == 0 and value(metrics, "training_running") == 1


def test_steps_are_counted_and_their_last_numbers_shown():
    metrics = RankMetrics("tiny", restarts=2, queue_depth=lambda: 3)
    step(metrics, 41, 0.5)
    step(metrics, 42, 1.5, loss=1.5)
    metrics.stalled(0.25)
    metrics.durable_checkpoint(1000, at=123.0)
    metrics.durable_checkpoint(500, at=456.0)
    expected = {
        "steps_total": 2, "tokens_total": 200, "nonfinite_steps_total": 0, "checkpoint_stall_seconds_total": 0.25,
        "checkpoint_written_bytes_total": 1500, "checkpoints_total": 2, "restarts_total": 2, "step": 42,
        "steps_per_second": 1, "loss": 1.5, "grad_norm": 1, "learning_rate": 0.01, "data_queue_depth": 3,
        "checkpoint_durable_timestamp_seconds": 456, "world_size": 1, "step_seconds_sum": 2, "step_seconds_count": 2,
    }  # fmt: skip
    for name, number in expected.items():
        assert value(metrics, f"training_{name}") == number, name
    assert value(metrics, "training_step_seconds_bucket", le="1.0") == 1
    assert value(metrics, "training_step_seconds_bucket", le="3.0") == 2


def test_counters_are_counters_and_what_may_fall_is_a_gauge():
    """A process begins at 0, which rate() takes for a reset; the place in the run falls after a resume."""
    metrics = RankMetrics("tiny")
    step(metrics)
    kinds = {name: family.type for name, family in families(metrics).items()}
    assert {name for name, kind in kinds.items() if kind == "counter"} == COUNTERS
    assert {name for name, kind in kinds.items() if kind == "histogram"} == {
        "training_step_seconds",
        "training_phase_seconds",
    }
    assert kinds["training_step"] == "gauge"
    assert set(kinds.values()) == {"counter", "gauge", "histogram"}


def test_there_are_no_series_of_when_a_counter_was_made():
    metrics = RankMetrics("tiny")
    step(metrics)
    assert "_created" not in generate_latest(metrics.registry).decode()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stays_one_and_is_counted(bad):
    metrics = RankMetrics("tiny")
    step(metrics, 1, loss=bad)
    shown = value(metrics, "training_loss")
    assert math.isnan(shown) if math.isnan(bad) else shown == bad
    step(metrics, 2, grad_norm=bad)
    step(metrics, 3)
    assert value(metrics, "training_loss") == 2 and value(metrics, "training_nonfinite_steps_total") == 2


def test_phases_are_counted_each_for_itself_also_if_they_fail():
    metrics = RankMetrics("tiny")
    for name in ("data", "forward", "backward", "forward", "backward"):
        with metrics.phase(name):
            pass
    with pytest.raises(RuntimeError), metrics.phase("data"):
        raise RuntimeError
    seen = {name: value(metrics, "training_phase_seconds_count", phase=name) for name in PHASES}
    assert seen == {"data": 2, "forward": 2, "backward": 2, "gradients": 0, "optimizer": 0, "loss": 0}
    assert value(metrics, "training_phase_seconds_bucket", phase="data", le="+Inf") == 2


def test_a_device_is_waited_for_before_the_clock_is_read(monkeypatch):
    """Launches return at once; without waiting, a phase of a second takes nothing."""
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def synchronize():
        now[0] += 10**9

    for wait, seconds in ((synchronize, 1.0), (None, 0.0)):
        metrics = RankMetrics("tiny", synchronize=wait)
        with metrics.phase("forward"):
            pass
        assert value(metrics, "training_phase_seconds_sum", phase="forward") == seconds


def test_seconds_waited_are_those_of_a_recorder_or_of_phases_that_wait(monkeypatch):
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    metrics = RankMetrics("tiny")
    for number, name in enumerate(PHASES):
        with metrics.phase(name):
            now[0] += 10**number * 10**9
    assert PHASES.index("gradients") == 3 and PHASES.index("loss") == 5
    assert value(metrics, "training_collective_wait_seconds_total") == 101_000
    assert value(RankMetrics("tiny", waited=lambda: 7.0), "training_collective_wait_seconds_total") == 7


def test_a_heartbeat_is_the_training_loops_and_not_the_scrapers(monkeypatch):
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1000 + now[0] * 1e-9)
    metrics = RankMetrics("tiny")

    def beat():
        return value(metrics, "training_heartbeat_timestamp_seconds")

    def enter_and_leave():
        with metrics.phase("data"):
            now[0] += 10**9

    for seconds, act in ((5, lambda: step(metrics)), (8, lambda: metrics.stalled(1)), (10, enter_and_leave)):
        now[0] = seconds * 10**9
        act()
        acted = 1000 + now[0] * 1e-9
        now[0] += 100 * 10**9
        assert beat() == beat() == acted


def test_a_scrape_changes_nothing():
    metrics = RankMetrics("tiny")
    step(metrics)
    first, second = (Counter(generate_latest(metrics.registry).decode().splitlines()) for _ in range(2))
    changed = {line.split("{")[0] for line in (first - second) + (second - first)}
    memory = {f"training_memory_{name}_bytes" for name in ("used", "peak", "available")}
    assert changed <= memory | {"training_heartbeat_timestamp_seconds"}


def test_memory_of_the_host_is_what_the_system_says():
    metrics = RankMetrics("tiny")
    used, peak = (value(metrics, f"training_memory_{name}_bytes", memory="host") for name in ("used", "peak"))
    assert 10 * 2**20 < used <= 1.1 * peak and value(metrics, "training_memory_available_bytes", memory="host") > 0


# Cardinality


def full(world_size=1000, rank=999):
    """A rank that shows all that it can."""
    metrics = RankMetrics("tiny", rank, world_size, queue_depth=lambda: 0)
    JobMetrics(metrics, 1e9, 1e12, started=0).step_ended(1, 1, 1)
    step(metrics)
    metrics.durable_checkpoint(1)
    return metrics


def test_series_of_a_rank_are_counted_and_bounded():
    of_phases = len(PHASES) * (len(STEP_BOUNDS) + 3)
    made = num_series(full().registry)
    assert of_phases == 78 and made == of_phases + 13 + 8 + 10 + 3 + 4
    on_a_gpu = made + 4
    assert on_a_gpu <= MOST_SERIES_OF_A_RANK


def test_a_thousand_ranks_have_as_many_series_each_as_one():
    assert num_series(full(1000, 999).registry) == num_series(full(1, 0).registry)
    assert 1000 * MOST_SERIES_OF_A_RANK <= 150_000
    assert 1000 * len(PHASES) * 80 * (len(STEP_BOUNDS) + 3) > 6_000_000  # of phases by 80 layers


def test_a_label_for_each_layer_is_refused():
    metrics = RankMetrics("tiny")
    with pytest.raises(UnknownPhase, match="data, forward, .*; got 'forward of layer 3'"):
        metrics.phase("forward of layer 3")
    with pytest.raises(TooManySeries, match="80 phases make"):
        RankMetrics("tiny", phases=tuple(f"layer {number}" for number in range(80)))
    RankMetrics("tiny", phases=("data", "compute"))


def test_all_series_say_whose_they_are():
    """Ranks of a host share one node_exporter, which refuses two series with the same labels."""
    for family in families(full()).values():
        for sample in family.samples:
            own = {"run": "tiny"} if family.name in OF_THE_JOB else {"run": "tiny", "rank": "999"}
            assert own.items() <= sample.labels.items()
            assert set(sample.labels) - set(own) <= {"le", "phase", "memory"}


OF_THE_JOB = {
    f"training_{name}" for name in ("started_timestamp_seconds", "tokens_per_second", "mfu_ratio", "goodput_ratio")
}


@pytest.mark.parametrize(
    "wrong", [{"rank": -1}, {"rank": 2, "world_size": 2}, {"restarts": -1}, {"rank": 0.5}, {"restarts": True}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        RankMetrics("tiny", **wrong)
