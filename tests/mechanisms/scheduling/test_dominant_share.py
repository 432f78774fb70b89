"""Dominant resource fairness: the paper's example, the certificate of max-min fairness, the properties it proves."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest

from minilib.classic.pod_scheduler import Pod, PodScheduler
from minilib.mechanisms.scheduling import (
    DominantResourceFairness,
    InvalidDemand,
    InvalidWeight,
    Load,
    Task,
    UnknownTenant,
    dominant_share,
    progressive_filling,
)
from minilib.mechanisms.scheduling.placing import Node

PAPER = {"cpu": 9, "memory": 18}
TASKS = {"a": {"cpu": 1, "memory": 4}, "b": {"cpu": 3, "memory": 1}}


def some_case(seed):
    """Demands, capacity and weights of 2 to 4 tenants and 1 to 3 resources."""
    choices = random.Random(seed)
    resources = ["cpu", "memory", "gpu"][: choices.randint(1, 3)]
    capacity = {resource: choices.randint(5, 40) for resource in resources}
    demands = {}
    for tenant in "abcd"[: choices.randint(2, 4)]:
        demand = {resource: choices.randint(0, 5) for resource in resources}
        demands[tenant] = demand if any(demand.values()) else demand | {resources[0]: 1}
    return demands, capacity, {tenant: choices.choice((1, 1, 2, 3)) for tenant in demands}


def share_of(tasks, demand, capacity):
    return tasks * dominant_share(demand, {name: Fraction(amount) for name, amount in capacity.items()})


def is_max_min_fair(tasks, demands, capacity, weights):
    """Whether each tenant has a bottleneck: a resource that it needs, that is used up, and of whose users none has a
    larger dominant share for its weight. Exactly one allocation is like that (Bertsekas and Gallager, "Data Networks",
    section 6.5.2, with resources as links and dominant shares as rates).
    """
    shares = {tenant: share_of(tasks[tenant], demands[tenant], capacity) / weights[tenant] for tenant in demands}
    used_up = [name for name, amount in capacity.items() if amount == sum(tasks[t] * demands[t][name] for t in demands)]
    users = {name: [tenant for tenant in demands if demands[tenant][name]] for name in used_up}
    largest = {name: max(shares[tenant] for tenant in users[name]) for name in used_up}
    return all(any(tenant in users[name] and shares[tenant] == largest[name] for name in used_up) for tenant in demands)


def fill(demands, capacity, tasks=100):
    """Whole tasks, one by one to whoever the policy says; a tenant whose next task does not fit has done."""
    left, held = Counter(capacity), {tenant: Counter() for tenant in demands}
    policy = DominantResourceFairness(capacity, held.__getitem__)
    for number in range(tasks):
        for tenant in demands:
            policy.arrive(Task(key=(tenant, number), tenant=tenant))
    started = Counter()
    while (task := policy.first()) is not None:
        demand = demands[task.tenant]
        if any(left[name] < amount for name, amount in demand.items()):
            for other in [each for each in policy if each.tenant == task.tenant]:
                policy.remove(other)
            continue
        policy.admit(task)
        held[task.tenant].update(demand)
        left.subtract(demand)
        started[task.tenant] += 1
        if started.total() % 16 == 0:
            policy.check_invariants()
    return started, left


def test_the_papers_example():
    assert progressive_filling(TASKS, PAPER) == {"a": 3, "b": 2}
    started, left = fill(TASKS, PAPER, tasks=5)
    assert started == {"a": 3, "b": 2} and left == {"cpu": 0, "memory": 4}
    shares = [share_of(started[tenant], TASKS[tenant], PAPER) for tenant in "ab"]
    assert shares == [Fraction(2, 3), Fraction(2, 3)]


def test_pods_of_namespaces_share_so_too():
    capacity = PAPER | {"pods": 110}  # of which each node has some, and each pod takes one
    policy = DominantResourceFairness(capacity, lambda namespace: scheduler.use(namespace))
    scheduler = PodScheduler([Node("n", capacity)], policy=policy)
    for number in range(5):
        scheduler.submit(*(Pod(f"{name}{number}", TASKS[name], namespace=name) for name in "ab"))
        policy.check_invariants()
    scheduler.run()
    assert Counter(name[0] for name in scheduler.running) == {"a": 3, "b": 2}
    assert policy.share("a") == policy.share("b") == pytest.approx(2 / 3)
    scheduler.check_invariants()


def test_filling_is_the_one_allocation_that_is_max_min_fair():
    for demands, capacity, weights in map(some_case, range(300)):
        tasks = progressive_filling(demands, capacity, weights)
        assert is_max_min_fair(tasks, demands, capacity, weights)
        assert not is_max_min_fair(tasks | {"a": tasks["a"] / 2}, demands, capacity, weights)


@pytest.mark.parametrize("seed", range(100))
def test_nobody_is_worse_off_than_alone_on_its_part_nor_envies_anybody_nor_could_have_more(seed):
    demands, capacity, weights = some_case(seed)
    tasks = progressive_filling(demands, capacity, weights)
    left = {name: amount - sum(tasks[t] * demands[t][name] for t in demands) for name, amount in capacity.items()}
    assert min(left.values()) >= 0
    for tenant, demand in demands.items():
        needs = {name: amount for name, amount in demand.items() if amount}
        part = Fraction(weights[tenant], sum(weights.values()))
        assert tasks[tenant] >= min(part * capacity[name] / amount for name, amount in needs.items())  # sharing pays
        assert any(left[name] == 0 for name in needs)  # Pareto: one more bit of a task would need what is used up
        for other in demands:  # no envy of what another has, scaled to one's own weight
            bundle = {name: tasks[other] * demands[other][name] * weights[tenant] / weights[other] for name in capacity}
            assert tasks[tenant] >= min(Fraction(bundle[name]) / amount for name, amount in needs.items())


@pytest.mark.parametrize("seed", range(60))
def test_a_tenant_that_lies_runs_no_more_tasks(seed):
    demands, capacity, weights = some_case(seed)
    honest = progressive_filling(demands, capacity, weights)
    truth = demands["a"]
    for lie in itertools.product(range(0, 8, 2), repeat=len(capacity)):
        told = dict(zip(capacity, lie, strict=True))
        if any(told.values()):
            got = progressive_filling(demands | {"a": told}, capacity, weights)["a"]
            bundle = {name: got * amount for name, amount in told.items()}
            useful = min(Fraction(bundle[name]) / amount for name, amount in truth.items() if amount)
            assert useful <= honest["a"], told


@pytest.mark.parametrize("seed", range(20))
def test_whole_tasks_come_within_one_of_the_divisible_ones_as_long_as_all_can_go_on(seed):
    demands, capacity, _ = some_case(seed)
    capacity = {name: 5 * amount for name, amount in capacity.items()}
    started, left = fill(demands, capacity, tasks=201)
    for demand in demands.values():
        assert any(left[name] < amount for name, amount in demand.items()), "one more task would have fitted"
    ideal = progressive_filling(demands, capacity)
    largest = max(share_of(1, demand, capacity) for demand in demands.values())
    first_stop = min(share_of(ideal[tenant], demands[tenant], capacity) for tenant in demands)
    for tenant, demand in demands.items():
        assert share_of(started[tenant] + 1, demand, capacity) >= first_stop - len(demands) * largest
    stopped = [t for t in demands if share_of(ideal[t], demands[t], capacity) == first_stop]
    for tenant in stopped:
        gap = abs(share_of(started[tenant], demands[tenant], capacity) - first_stop)
        assert gap <= len(demands) * largest, (started, ideal)


def test_weights():
    one = {"gpus": 1}
    assert progressive_filling({"a": one, "b": one}, {"gpus": 9}, {"a": 2, "b": 1}) == {"a": 6, "b": 3}
    held = {"a": {"gpus": 2}, "b": {"gpus": 1.5}}
    policy = DominantResourceFairness({"gpus": 9}, held.__getitem__, {"a": 2, "b": 1})
    for tenant in "ab":
        policy.arrive(Task(key=tenant, tenant=tenant))
    assert [task.key for task in policy] == ["a", "b"]
    with pytest.raises(UnknownTenant, match="'c'"):
        policy.arrive(Task(key="c", tenant="c"))
    with pytest.raises(UnknownTenant, match="'b' has no weight"):
        progressive_filling({"a": one, "b": one}, {"gpus": 9}, {"a": 1})


def test_nobody_and_one():
    assert progressive_filling({}, {"gpus": 1}) == {}
    assert progressive_filling({"a": {"gpus": 3}}, {"gpus": 8}) == {"a": Fraction(8, 3)}
    policy = DominantResourceFairness({"gpus": 1}, lambda tenant: {})
    assert policy.first() is None and policy.share("nobody") == 0


def test_ties_go_by_arrival():
    policy = DominantResourceFairness({"gpus": 8}, lambda tenant: {"gpus": 4})
    for number, tenant in enumerate("bab"):
        policy.arrive(Task(key=number, tenant=tenant))
    assert policy.first().key == 0


def test_the_rule_alone_lets_newcomers_pass_for_ever():
    """volcano#5805: a tenant's interrupted gang waits while another of its gangs runs and tenants without any come."""
    policy = DominantResourceFairness({"gpus": 16}, lambda tenant: {"gpus": 8 if tenant == "a" else 0})
    policy.arrive(old := Task(key="interrupted", tenant="a"))
    for number in range(100):
        policy.arrive(fresh := Task(key=number, arrival=number, tenant=f"new{number}"))
        assert policy.first() is fresh
        policy.remove(fresh)
    assert policy.first() is old and policy.wait_bound(old, Load(1, 1)) == math.inf


@pytest.mark.parametrize("weight", (0, -1, math.nan, math.inf, "2"))
def test_what_is_no_weight(weight):
    with pytest.raises(InvalidWeight, match="'a'"):
        DominantResourceFairness({"gpus": 8}, lambda tenant: {}, {"a": weight})
    with pytest.raises(InvalidWeight, match="'a'"):
        progressive_filling({"a": {"gpus": 1}}, {"gpus": 8}, {"a": weight})


def test_what_is_no_capacity_and_no_demand():
    for capacity in ({}, {"gpus": 0}, {"gpus": math.nan}, {"gpus": -1}):
        with pytest.raises(ValueError, match="capacity"):
            DominantResourceFairness(capacity, lambda tenant: {})
    for demand in ({"gpus": 0}, {}, {"gpus": -1}, {"gpus": math.nan}, {"gpus": math.inf}, {"tpus": 1}):
        with pytest.raises(InvalidDemand):
            progressive_filling({"a": demand}, {"gpus": 8})
