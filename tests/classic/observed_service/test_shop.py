"""The shop: runs that repeat exactly, one whole tree for each request, instruments that agree with one another."""

import asyncio
import random
from collections import Counter

import psutil
import pytest

from minilib.classic.http.wire import HttpError, Response
from minilib.classic.observed_service.instance import Instance, Pause
from minilib.classic.observed_service.networks import DirectNetwork
from minilib.classic.observed_service.shop import CAUSES, observe
from minilib.classic.observed_service.virtual_time import VirtualTimeLoop
from minilib.mechanisms.telemetry import HeadSampler, Trace


def shape(trace):
    """Who called whom for what, whatever the order, the times, and the waits for one another."""
    names = {span.span_id: (span.process.partition("/")[0], span.name) for span in trace.spans}
    acts = [span for span in trace.spans if not span.name.startswith("wait for")]
    return Counter((names.get(span.parent_id), names[span.span_id]) for span in acts)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_run_repeats_exactly_and_another_seed_is_another_run(cause):
    first, again, other = (observe(cause, 30, seed=seed) for seed in (1, 1, 2))
    assert first.spans == again.spans and first.logs == again.logs and first.use == again.use
    assert first.spans != other.spans


@pytest.mark.parametrize("cause", CAUSES)
def test_every_request_is_one_tree_across_processes(cause):
    traces = observe(cause, 120).traces()
    assert len(traces) == 120
    for trace in traces:
        by_id = {span.span_id: span for span in trace.spans}
        assert not trace.orphans and trace.root.process == "front/0"
        assert sum(segment.duration_ns for segment in trace.critical_path()) == trace.duration_ns
        for span in trace.spans:
            parent = by_id.get(span.parent_id)
            if parent and parent.process != span.process:
                assert parent.name == f"GET {span.name}" and parent.attributes["peer"] == span.process
                assert parent.start_ns < span.start_ns <= span.end_ns < parent.end_ns, "a message takes time"


def test_a_healthy_request_asks_each_shard_and_one_replica():
    observation = observe("healthy", 30, shards=5, replicas=2)
    for trace in observation.traces():
        servers = Counter(span.name for span in trace.spans if "status" in span.attributes and " " not in span.name)
        assert servers == {"front": 1, "auth": 1, "catalog": 1, "store": 5, "recommend": 1}
        critical = [segment.span.name for segment in trace.critical_path()]
        assert critical[0] == "work" and "hold lock" in critical
    assert [observation.red[f"recommend/{number}"].durations.count for number in (0, 1)] == [15, 15]
    assert observation.lost == 0 and set(observation.use) >= {"catalog/0 lock", "front/0 workers"}


def test_red_counts_what_the_traces_show_and_a_retry_hides_errors_from_callers():
    observation = observe("retry", 200)
    for service in ("front", "auth", "catalog", "store", "recommend"):
        durations = [span.duration_ns for span in observation.spans if span.name == service]
        red = observation.red_of(service)
        assert red.durations.count == len(durations) and red.durations.maximum == max(durations)
        assert red.durations.total == pytest.approx(sum(durations))
    assert (observation.red_of("auth").errors, observation.red_of("front").errors) == (4, 0)
    assert observation.red_of("auth").durations.count == 204 and observation.red_of("auth").rate(2) == 102
    retried = [trace for trace in observation.traces() if any(span.name == "retry auth" for span in trace.spans)]
    assert len(retried) == 4
    for trace in retried:
        calls = [span for span in trace.spans if span.name == "GET auth"]
        assert [call.attributes["status"] for call in calls] == [503, 200]
        assert calls[0].attributes["error"] == "HttpError" and "error" not in calls[1].attributes


def test_logs_lead_to_traces():
    observation = observe("retry", 60)
    traces = {trace.trace_id: trace for trace in observation.traces()}
    for process, records in observation.logs.items():
        for record in records:
            spans = {span.span_id: span for span in traces[record["trace_id"]].spans}
            assert spans[record["span_id"]].process == process == record["process"]
            assert spans[record["span_id"]].attributes["status"] == record["status"]
    failed = [record for record in observation.logs["auth/0"] if record["message"] == "request failed"]
    assert [record["status"] for record in failed] == [503]


def test_head_sampling_keeps_whole_traces_or_nothing_and_metrics_count_all():
    all_of_them, sampled = observe("healthy", 120), observe("healthy", 120, head_rate=0.2)
    keeps = HeadSampler(0.2).weight
    assert [t.trace_id for t in sampled.traces()] == [t.trace_id for t in all_of_them.traces() if keeps(t.trace_id)]
    assert 0 < len(sampled.traces()) < 60 and not any(trace.orphans for trace in sampled.traces())
    assert {shape(trace) == shape(all_of_them.traces()[0]) for trace in sampled.traces()} == {True}
    assert sampled.red_of("store").durations.count == 480
    assert observe("healthy", 5, head_rate=0).spans == ()


def test_real_http_servers_tell_the_same_tree_and_leave_nothing_behind():
    files = psutil.Process().num_fds()
    real, simulated = observe("healthy", 25, rate=50, real=True), observe("healthy", 25)
    assert real.lost == 0 and len(real.traces()) == 25
    assert {shape(trace) == shape(simulated.traces()[0]) for trace in real.traces()} == {True}
    assert psutil.Process().num_fds() == files


def test_batches_of_jobs_are_seen_in_use_and_in_no_trace_of_their_own():
    observation = observe("queue", 120)
    assert len(observation.traces()) == 120
    workers, healthy = observation.use["catalog/0 workers"], observe("healthy", 120).use["catalog/0 workers"]
    assert workers.saturation > 0.3 > 0.01 > healthy.saturation and workers.utilisation > healthy.utilisation


def test_slow_instances_are_those_that_differ():
    assert observe("slow replica", 60).slow_instances("recommend") == ["recommend/2"]
    paused = observe("pause", 200)
    assert paused.slow_instances("store", 0.5) == [] and paused.slow_instances("store", 0.99) == ["store/3"]
    assert observe("healthy", 60).slow_instances("store", 1.0) == [] == paused.slow_instances("recommend", 1.0)


def test_bad_arguments_are_named():
    for arguments in ({"requests": 0}, {"shards": 0}, {"replicas": 0}, {"rate": 0}, {"rate": float("nan")}):
        with pytest.raises(ValueError, match="one of each"):
            observe(**arguments)
    with pytest.raises(ValueError, match="slow replica"):
        observe("gremlins")
    with pytest.raises(ValueError, match="between 0 and 1"):
        observe(head_rate=2)
    with pytest.raises(TimeoutError):
        observe(requests=100, rate=1)


def alone(handle, network=None, **options):
    """The response and the trace of one request to one instance."""
    spans = []

    async def main():
        instance = Instance("front/0", handle, network or DirectNetwork(), spans, random.Random(0), **options)
        return await instance.respond("/", {})

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main()), Trace(spans)


class Silent:
    """A network on which nobody ever answers."""

    async def call(self, process, target, headers):
        await asyncio.sleep(10**6)
        return Response(200, b"")


UNANSWERED = [(None, "ConnectionRefused", 0.0001), (Silent(), "Timeout", 2)]


@pytest.mark.parametrize(("network", "error", "seconds"), UNANSWERED)
def test_a_call_without_an_answer_fails_in_time_and_says_so_in_its_span(network, error, seconds):
    async def handle(front):
        with pytest.raises(HttpError, match=error):
            await front.call("auth/0")
        await front.call_all(["auth/0", "auth/1"])

    response, trace = alone(handle, network)
    assert response.status == 502 == trace.root.attributes["status"]
    calls = [span for span in trace.spans if span.name == "GET auth"]
    assert len(calls) == 3 and {span.attributes["error"] for span in calls} <= {"HttpError", "CancelledError"}
    assert calls[0].duration_ns == pytest.approx(seconds * 1e9, rel=1e-6)


@pytest.mark.parametrize("work", [0.001, 0.3])
def test_a_stop_adds_what_of_it_falls_into_the_work(work):
    """Stops from 0.5 to 0.6 s, 1.5 to 1.6 s, …, and work that begins at every tenth of a millisecond around them."""
    pause, rng = Pause(1.0, 0.1), random.Random(1)

    async def main():
        for _ in range(300):
            spans, now = [], asyncio.get_running_loop().time
            instance = Instance("store/0", None, None, spans, rng, pause=pause)
            begun = now()
            await instance.work(work)
            of_work = next(span for span in spans if span.name == "work")
            stopped = sum(span.duration_ns for span in spans if span.name == "pause") / 1e9
            assert 0.8 * work - 1e-6 <= of_work.duration_ns / 1e9 - stopped <= 1.2 * work + 1e-6
            in_stops = sum(
                max(0.0, min(now(), k + 0.6) - max(begun, k + 0.5)) for k in range(int(begun), int(now()) + 1)
            )
            assert stopped == pytest.approx(in_stops, abs=1e-6)
            await asyncio.sleep(rng.uniform(0, 0.05))

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())
