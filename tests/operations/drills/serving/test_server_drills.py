"""Drills of a server: what its instruments name, what they must not, and each rule at its edge."""

import copy

import pytest

from minilib.mechanisms.telemetry.spans import Span
from minilib.model import weights
from minilib.operations.drills.score import score_drills
from minilib.operations.drills.serving.drill import ServerRun, drill_server
from minilib.operations.drills.serving.faults import REPLICA, SERVER_FAULTS, TENANTS, ServerFault, server_fault
from minilib.operations.drills.serving.instruments import (
    LOOKS,
    MISSED,
    QUIET,
    ServerFinding,
    leaking_pages,
    slow_tenants,
    stuck_streams,
)

IDLE = {"num_running": 0, "num_waiting": 0, "num_pages": 100, "num_free_pages": 100}


def test_seeds_draw_every_fault_and_healthy_runs_between():
    faults = [server_fault(seed) for seed in range(120)]
    kinds = [fault.kind if fault else None for fault in faults]
    assert {kind: kinds.count(kind) for kind in SERVER_FAULTS} == dict.fromkeys(SERVER_FAULTS, 20)
    assert kinds.count(None) == 40 and kinds[2::3] == [None] * 40
    assert {fault.who for fault in faults if fault} == {*TENANTS, REPLICA}


def test_the_instruments_name_what_is_wrong_with_a_server():
    """One run of each kind and healthy ones between; counted by tokens and shares, so a busy machine is no excuse."""
    runs = drill_server(range(6), weights.load(weights.PRETRAINED).eval())
    score = score_drills(runs)
    assert {run.fault.kind for run in runs if run.fault} == {*SERVER_FAULTS}
    assert (score.faulty, score.healthy, score.false_alarms) == (4, 2, 0), runs
    assert score.recall == score.precision == 1, runs


def test_scores():
    fault, right = ServerFault("stuck_stream", "ann", 3), ServerFinding("stuck_stream", "ann", "")
    wrong = ServerFinding("stuck_stream", "bob", "")
    runs = [
        ServerRun(0, fault, [right]),
        ServerRun(1, fault, [wrong]),
        ServerRun(2, None, []),
        ServerRun(3, None, [wrong]),
    ]
    score = score_drills(runs)
    assert (score.faulty, score.healthy, score.false_alarms) == (2, 2, 1)
    assert score.recall == 1 / 2 and score.precision == 1 / 3
    assert score_drills([]).recall == score_drills([]).precision == 1


def look(sent, *requests, **engine):
    shown = [{"request": n, "tenant": t, "generated_tokens": g, "unread_seconds": u} for n, t, g, u in requests]
    return {"replica": "r", "engine": IDLE | engine, "tokens_sent": sent, "open": shown}


@pytest.mark.parametrize("unread", [0.0, 0.5])
def test_a_stream_is_stuck_if_others_got_enough_in_enough_looks(unread):
    kind = "slow_client" if unread else "stuck_stream"
    seen = [look(0, (1, "ann", 4, 0.0))]
    seen += [look(MISSED * n // (LOOKS - 1), (1, "ann", 4, unread), (2, "bob", n, 0.0)) for n in range(1, LOOKS)]
    (found,) = stuck_streams(seen)
    assert (found.kind, found.who) == (kind, "ann")
    for healthy in (seen[1:], seen[:-1]):
        assert not list(stuck_streams(healthy))
    moved = copy.deepcopy(seen)
    moved[-1]["open"][0]["generated_tokens"] += 1
    still = copy.deepcopy(seen)
    for one in still:
        one["tokens_sent"] = 7  # nobody gets a token: the machine stands still, not one stream
    before = copy.deepcopy(seen)
    for one in before:
        one["open"][0]["generated_tokens"] = 0  # in the queue, or its prompt is computed
    for healthy in (moved, still, before, []):
        assert not list(stuck_streams(healthy))


def quiet(used, looks=QUIET):
    return [look(0, num_free_pages=100 - used)] * looks


def test_pages_leak_if_more_are_held_from_one_quiet_time_to_the_next():
    busy = [look(0, (1, "ann", 4, 0.0), num_running=1, num_free_pages=20)] * 9
    (found,) = leaking_pages(busy + quiet(3) + busy + quiet(5))
    assert (found.kind, found.who) == ("leaking_pages", "r") and "3, 5" in found.evidence
    for held in ((0, 0), (0, 5), (5, 5), (5, 3), (3, 6, 4)):
        assert not list(leaking_pages(sum((busy + quiet(used) for used in held), [])))
    assert not list(leaking_pages(busy + quiet(3, QUIET - 1) + busy + quiet(5)))
    assert not list(leaking_pages([])) and not list(leaking_pages(quiet(9)))


def request(name, tenant, tokens, *times):
    """Spans of one request: submitted, started, first token, end."""
    begin, started, first, end = times
    whole = Span("text_completion", "t", name, None, "r", begin, end, {"user.id": tenant})
    queue = Span("queue", "t", name + "q", name, "r", begin, started)
    return [whole, queue, Span("prefill", "t", name + "p", name, "r", started, first, {"minilib.tokens": tokens})]


def test_a_tenant_is_slow_if_others_wait_behind_its_huge_prompts():
    def others(waited, tokens=50):
        rows = [request(f"b{n}", "bob", tokens, 0, waited, waited + 10, waited + 100) for n in range(3)]
        return sum(rows, [])

    huge = request("a", "ann", 900, 0, 0, 100, 120)
    (found,) = slow_tenants(huge + others(100))
    assert (found.kind, found.who) == ("slow_tenant", "ann")
    assert not list(slow_tenants(huge + others(0)))  # nobody waits
    assert not list(slow_tenants(huge + others(10)))  # nor for long
    assert not list(slow_tenants(huge + others(100, tokens=600)))  # its prompts are no larger than those of others
    assert not list(slow_tenants([])) and not list(slow_tenants(huge))
    later = request("a", "ann", 900, 200, 200, 300, 320)
    assert not list(slow_tenants(later + others(100)))  # they waited for something else
    own = request("a2", "ann", 900, 0, 100, 200, 220)
    assert not list(slow_tenants(huge + own))  # it makes nobody wait but itself
