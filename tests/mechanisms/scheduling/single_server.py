"""One server, one unit of work at a time, on a clock that counts units: what policies are compared by."""

from collections import defaultdict

from minilib.mechanisms.scheduling import Load, Task


class Served:
    """What became of each task.

    Attributes:
        sequence: the key of the task that each unit went to, None for a unit of time in which nobody was there.
        ended: key → time of completion.
        order: keys in the order of completion.
        others: key → units that others received, from arrival to completion, while this one received none.
        bounds: key → what the policy had said about that at its arrival.
    """

    def __init__(self):
        self.sequence, self.ended, self.order, self.others, self.bounds = [], {}, [], defaultdict(int), {}


def serve(policy, tasks, costs, preemptive=True, cancel=None, load=None):
    """Serve tasks by a policy until all have gone.

    Args:
        tasks: with whole arrivals.
        costs: key → units of work that the task really takes, at least 1.
        preemptive: whether the policy is asked before every unit, or at completions alone.
        cancel: key → time at which the task is taken back.
        load: what bounds are stated for; the worst of these tasks if left out.
    """
    result, clock, coming, left = Served(), 0, sorted(tasks, key=lambda task: task.arrival), dict(costs)
    cancel = cancel or {}
    largest = max([*costs.values(), *(task.predicted or 0 for task in tasks)])
    load = load or Load(len(tasks) - 1, largest, 1, len({task.tenant for task in tasks}))
    present, current = [], None
    while coming or present:
        while coming and coming[0].arrival <= clock:
            present.append(coming.pop(0))
            policy.arrive(present[-1])
            result.bounds[present[-1].key] = policy.wait_bound(present[-1], load)
        for task in [task for task in present if cancel.get(task.key, clock + 1) <= clock]:
            policy.remove(task)
            present.remove(task)
            current = None if current is task else current
        policy.check_invariants()
        assert len(policy) == len(present)
        assert list(policy) == policy.order(present)
        task = current if current and not preemptive else policy.first()
        assert (task is None) == (not present), "the server is idle although somebody waits"
        clock += 1
        result.sequence.append(task and task.key)
        if task is None:
            assert coming or not present
            continue
        for other in present:
            result.others[other.key] += other is not task
        current = task
        left[task.key] -= 1
        policy.serve(task, 1)
        if not left[task.key]:
            policy.remove(task)
            present.remove(task)
            result.ended[task.key] = clock
            result.order.append(task.key)
            current = None
    policy.check_invariants()
    assert not policy.num_tasks and policy.first() is None and not len(policy)
    return result


def at_once(costs, **options):
    """Tasks 0, 1, … that all arrive at time 0, with these costs as predictions, and the costs by key."""
    return [Task(key=key, predicted=cost, **options) for key, cost in enumerate(costs)], dict(enumerate(costs))
