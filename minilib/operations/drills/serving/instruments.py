"""What /status and the spans of a server say of its faults: who makes others wait, what leaks, and what is stuck.

No rule here compares a duration with a number of seconds: shares, tokens and pages are the same on a busy machine.

    slow_tenant     of the time that others waited, most passed while one tenant's prompts were computed
    leaking_pages   pages are held while no request is open, and more of them after every load
    stuck_stream    a stream got no token while many went to other streams
    slow_client     the same, and what was written to its client was not taken
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from minilib.mechanisms.telemetry.spans import Span

BLAMED = 0.6  # of others' wait, from which on one tenant makes them wait
WAITED = 0.1  # of others' requests, from which on their wait matters
LARGE = 0.5  # of all tokens of prompts, that a tenant has computed whose prompts are to blame
MISSED = 100  # tokens that other streams got meanwhile, from which on a stream is stuck
LOOKS = 4  # in a row that see no token, at least
QUIET = 3  # looks in a row without a request, from which on pages must be free


@dataclass(frozen=True)
class ServerFinding:
    """A verdict about a server.

    Args:
        kind: of fault, such as "slow_tenant".
        who: the tenant that causes or has it; the replica, for a fault of the engine as a whole.
        evidence: the numbers that led to the verdict, in one sentence.
    """

    kind: str
    who: str
    evidence: str


@dataclass
class ServerEvidence:
    """What the instruments of a server have shown.

    Args:
        statuses: bodies of GET /status, in the order in which they came.
        spans: of all requests, as OpenTelemetry has them.
    """

    statuses: list[dict[str, Any]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


def diagnose_server(evidence: ServerEvidence) -> list[ServerFinding]:
    """All faults that the evidence shows."""
    statuses = evidence.statuses
    return [*slow_tenants(evidence.spans), *leaking_pages(statuses), *stuck_streams(statuses)]


def slow_tenants(spans: Sequence[Span]) -> Iterator[ServerFinding]:
    """The tenant, if there is one, behind whose prompts the requests of all the others wait."""
    tenants = {span.span_id: span.attributes.get("user.id", "") for span in spans}
    queues = [(tenants.get(span.parent_id, ""), span) for span in spans if span.name == "queue"]
    prefills = [(tenants.get(span.parent_id, ""), span) for span in spans if span.name == "prefill"]
    blame: dict[str, int] = defaultdict(int)
    computed: dict[str, int] = defaultdict(int)
    for cause, prefill in prefills:
        computed[cause] += prefill.attributes["minilib.tokens"]
        for tenant, queue in queues:
            if tenant != cause:
                both = min(prefill.end_ns, queue.end_ns) - max(prefill.start_ns, queue.start_ns)
                blame[cause] += max(both, 0)
    if not sum(blame.values()):
        return
    cause = max(blame, key=lambda tenant: blame[tenant])
    share, large = blame[cause] / sum(blame.values()), computed[cause] / sum(computed.values())
    others = {span.parent_id for tenant, span in queues if tenant != cause}
    lasted = sum(span.duration_ns for span in spans if span.span_id in others)
    waited = sum(span.duration_ns for tenant, span in queues if tenant != cause) / max(lasted, 1)
    if share >= BLAMED and large >= LARGE and waited >= WAITED:
        yield ServerFinding(
            "slow_tenant",
            cause,
            f"others waited for {waited:.0%} of their requests' time, {share:.0%} of it behind prompts of {cause!r}, "
            f"which has {large:.0%} of the tokens that were computed",
        )


def leaking_pages(statuses: Sequence[dict[str, Any]]) -> Iterator[ServerFinding]:
    """Pages that nobody holds and that are not free, if they become more from one quiet time to the next."""
    held: list[int] = []
    for is_quiet, looks in groupby(statuses, key=_is_quiet):
        if is_quiet and len(looks := list(looks)) >= QUIET:
            held.append(min(look["engine"]["num_pages"] - look["engine"]["num_free_pages"] for look in looks))
    if len(held) > 1 and 0 < held[0] < held[-1] and held == sorted(held):
        evidence = f"pages held while no request was open, at {len(held)} quiet times: {', '.join(map(str, held))}"
        yield ServerFinding("leaking_pages", statuses[-1]["replica"] or "", evidence)


def stuck_streams(statuses: Sequence[dict[str, Any]]) -> Iterator[ServerFinding]:
    """Requests that got nothing in several looks in a row, while other streams got much."""
    looks: dict[int, list[tuple[dict[str, Any], int]]] = defaultdict(list)
    for status in statuses:
        for request in status["open"]:
            if request["generated_tokens"]:
                looks[request["request"]].append((request, status["tokens_sent"]))
    for seen in looks.values():
        last = seen[-1][0]
        silent = [look for look in seen if look[0]["generated_tokens"] == last["generated_tokens"]]
        missed = silent[-1][1] - silent[0][1]
        if len(silent) >= LOOKS and missed >= MISSED:
            unread = all(request["unread_seconds"] for request, _ in silent[1:])
            yield ServerFinding(
                "slow_client" if unread else "stuck_stream",
                last["tenant"],
                f"request {last['request']} stood at {last['generated_tokens']} tokens while others got {missed}"
                + (", and its client did not read" if unread else ""),
            )


def _is_quiet(status: dict[str, Any]) -> bool:
    engine = status["engine"]
    return not status["open"] and not engine["num_running"] and not engine["num_waiting"]
