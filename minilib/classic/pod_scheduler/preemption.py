"""Preemption: on which node pods of lower priority make room, and which of them.

On one node, all pods of lower priority are taken away in thought; if the pod fits then, they come back one by one, the
more important first and those whose disruption budget has nothing left before others. Whoever does not fit again is a
victim. Among nodes the first of these criteria decides that differs:

    fewest victims beyond a budget · lowest highest priority · smallest sum of priorities · fewest victims ·
    latest start of the earliest victim of the highest priority · order of nodes

Source: kubernetes/kubernetes, pkg/scheduler/framework/plugins/defaultpreemption/default_preemption.go
(SelectVictimsOnNode) and pkg/scheduler/framework/preemption/preemption.go (pickOneNodeForPreemption).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minilib.classic.pod_scheduler.objects import Pod, PodDisruptionBudget, selects
from minilib.mechanisms.scheduling.placing import Claim, Ledger, Node, reasons_against
from minilib.mechanisms.scheduling.placing.filters import Filter

ABOVE_NEGATIVE = 2**31  # added to each priority of a sum, so that more victims of negative priority are no smaller sum


@dataclass(frozen=True)
class Preemption:
    """Who makes room where.

    Args:
        node: its name.
        victims: claims that go, the most important first.
        violations: how many of them a disruption budget would have kept.
    """

    node: str
    victims: tuple[Claim, ...]
    violations: int


def allowed_disruptions(budget: PodDisruptionBudget, pods: Mapping[str, Pod], ledger: Ledger) -> int:
    """How many of a budget's pods that have a node may go; below 0 if it is broken already."""
    placed = sum(selects(budget.match_labels, pods[claim.name].labels) for claim in ledger.claims)
    return placed - budget.min_available


def find_preemption(
    pod: Pod,
    pods: Mapping[str, Pod],
    ledger: Ledger,
    filters: Sequence[Filter],
    budgets: Sequence[PodDisruptionBudget] = (),
) -> Preemption | None:
    """The node where the least is lost, and its victims; None if no node has room even without its lesser pods.

    Args:
        pod: who needs room.
        pods: all pods by name.
        ledger: what is free; unchanged.
        filters: what speaks against a node whoever goes.
        budgets: respected where a choice is left.
    """
    opened = [node for node in ledger.nodes if ledger.is_open(node.name)]
    found = [_on_node(pod, node, pods, ledger, filters, budgets) for node in opened]
    candidates = [candidate for candidate in found if candidate]

    def cost(candidate: Preemption) -> tuple[int, ...]:
        priorities = [victim.priority for victim in candidate.victims]
        top = [victim.name for victim in candidate.victims if victim.priority == max(priorities)]
        started = min(ledger.holding(name).since for name in top)
        total = sum(priority + ABOVE_NEGATIVE for priority in priorities)
        return candidate.violations, max(priorities), total, len(priorities), -started

    return min(candidates, key=cost, default=None)


def _on_node(
    pod: Pod,
    node: Node,
    pods: Mapping[str, Pod],
    ledger: Ledger,
    filters: Sequence[Filter],
    budgets: Sequence[PodDisruptionBudget],
) -> Preemption | None:
    lesser = [claim for claim in ledger.claims_on(node.name) if claim.priority < pod.priority]
    lesser.sort(key=lambda claim: -claim.priority)  # the longest running first among equals, as they came
    beyond = _beyond_budget(lesser, pods, ledger, budgets)
    victims = []
    with ledger.attempt():
        for claim in lesser:
            ledger.release(claim.name)
        if not lesser or reasons_against(pod.claim, node, ledger, filters):
            return None
        for claim in sorted(lesser, key=lambda claim: claim.name not in beyond):
            ledger.reserve(claim, node.name)
            if reasons_against(pod.claim, node, ledger, filters):
                ledger.release(claim.name)
                victims.append(claim)
    if not victims:
        return None
    victims.sort(key=lesser.index)
    return Preemption(node.name, tuple(victims), sum(victim.name in beyond for victim in victims))


def _beyond_budget(
    claims: Sequence[Claim], pods: Mapping[str, Pod], ledger: Ledger, budgets: Sequence[PodDisruptionBudget]
) -> set[str]:
    """Claims that a budget would keep if all of these went, the most important first."""
    allowed = [allowed_disruptions(budget, pods, ledger) for budget in budgets]
    beyond = set()
    for claim in claims:
        for number, budget in enumerate(budgets):
            if selects(budget.match_labels, pods[claim.name].labels):
                allowed[number] -= 1
                if allowed[number] < 0:
                    beyond.add(claim.name)
    return beyond
