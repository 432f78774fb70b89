"""Metrics of real runs: tokens, MFU, goodput over a resume, and how often a step calls its instruments."""

import pytest
import torch.distributed as dist

from minilib.operations.metrics.instrument_cost import calls_per_step, nanoseconds_per_call
from minilib.operations.metrics.job_metrics import JobMetrics, watch_steps
from minilib.operations.metrics.rank_metrics import RankMetrics
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.group import GroupTransport
from minilib.training.phases import PHASES
from minilib.training.planner.shape import TrainedShape
from tests.operations.metrics.runs import PEAK, SHAPE, config, job_of, trainer_of


class CountedMetrics(RankMetrics):
    """Counts the calls of a step."""

    entered = 0

    def phase(self, name):
        self.entered += 1
        return super().phase(name)


def of_two_ranks():
    rank, settings = dist.get_rank(), config(steps=5)
    metrics = RankMetrics("tiny", rank, 2)
    trainer = trainer_of(settings, metrics, Communicator(GroupTransport()))
    job = job_of(metrics, settings)
    trainer.run(after_step=watch_steps(trainer, metrics, job))
    counts = {name: sum(count for count in phase.seconds._counts) for name, phase in metrics.phases.items()}
    shown = (metrics.step, metrics.steps, metrics.tokens, metrics.loss, metrics.grad_norm, metrics.learning_rate)
    return shown, counts, (job.mfu, job.tokens_per_second, trainer.seconds), metrics.step_seconds.total


def test_ranks_of_a_real_run_count_what_it_did():
    settings = config(steps=5)
    ranks = run(of_two_ranks, 2, timeout=240)
    assert sum(shown[2] for shown, *_ in ranks) == 5 * 6 * 8
    for (step, steps, _, loss, norm, rate), counts, (mfu, speed, seconds), counted in ranks:
        assert step == steps == 5 and counts == dict.fromkeys(PHASES, 5)
        assert rate == settings.rate(4) and loss == ranks[0][0][3] and norm == pytest.approx(ranks[0][0][4])
        assert counted == pytest.approx(seconds) and speed == pytest.approx(5 * 6 * 8 / seconds)
        assert mfu == pytest.approx(TrainedShape.of(SHAPE).flops_per_token(8) * speed / PEAK)


def test_a_resumed_run_goes_on_and_what_was_lost_is_no_goodput(tmp_path):
    """Five steps, a checkpoint, three more, a crash; then three again and two."""
    settings, now = config(steps=10), [1000.0]
    first = RankMetrics("tiny")
    trainer = trainer_of(settings, first)
    job = job_of(first, settings, started=1000.0, clock=lambda: now[0])
    assert job.goodput is None and job.tokens_per_second is None and job.mfu is None
    after_step = watch_steps(trainer, first, job)
    trainer.run(5, after_step)
    trainer.save(tmp_path / "run.pt")
    kept = trainer.seconds
    trainer.run(8, after_step)
    lost = trainer.seconds - kept
    now[0] = 1000 + 2 * trainer.seconds
    assert job.goodput == pytest.approx(0.5)

    second = RankMetrics("tiny", restarts=1)
    trainer = trainer_of(settings, second)
    trainer.resume(tmp_path / "run.pt")
    again = job_of(second, settings, started=1000.0, clock=lambda: now[0])
    trainer.run(10, watch_steps(trainer, second, again))
    assert (first.step, first.steps, second.step, second.steps) == (8, 8, 10, 5)
    assert again.productive_seconds == pytest.approx(kept + second.step_seconds.total)
    now[0] = 1000 + kept + lost + second.step_seconds.total
    assert again.goodput == pytest.approx((kept + second.step_seconds.total) / (now[0] - 1000)) and again.goodput < 1


def test_goodput_falls_while_nothing_is_done():
    metrics, now = RankMetrics("tiny"), [0.0]
    job = JobMetrics(metrics, 1e9, started=0.0, clock=lambda: now[0])
    job.step_ended(10, 100, 10)
    seen = []
    for now[0] in (10, 20, 100):
        seen.append(job.goodput)
    assert seen == [1, 0.5, 0.1] and job.mfu is None


def test_speed_is_that_of_the_last_steps():
    job = JobMetrics(RankMetrics("tiny"), 2.0, 1000.0, window=3)
    for seconds in (100, 1, 1, 2):
        job.step_ended(seconds, 400, 0)
    assert job.tokens_per_second == 300 and job.mfu == 0.6


def test_an_impossible_mfu_is_shown_and_does_not_stop_the_job():
    job = JobMetrics(RankMetrics("tiny"), 2.0, 1.0)
    job.step_ended(1, 10, 1)
    assert job.mfu == 20


@pytest.mark.parametrize("wrong", [{"flops_per_token": 0}, {"peak": 0.0}, {"peak": float("nan")}, {"window": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        JobMetrics(RankMetrics("tiny"), **({"flops_per_token": 1.0} | wrong))


# The price of instruments


@pytest.mark.parametrize("accumulate", [1, 3])
def test_calls_of_a_step_are_those_that_are_priced(accumulate):
    metrics = CountedMetrics("tiny")
    trainer = trainer_of(config(4, accumulate), metrics)
    trainer.run(after_step=watch_steps(trainer, metrics))
    assert metrics.entered == 4 * calls_per_step(accumulate) == 4 * (4 + 2 * accumulate)


def test_the_price_of_a_call_is_measured_and_its_arguments_checked():
    found = nanoseconds_per_call(times=100, repeats=2)
    assert list(found) == ["phase", "step", "scrape"] and all(value > 0 for value in found.values())
    for wrong in ({"times": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            nanoseconds_per_call(**wrong)
    with pytest.raises(ValueError, match="accumulate"):
        calls_per_step(0)
