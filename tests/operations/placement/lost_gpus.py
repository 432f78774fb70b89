"""GPUs that are lost and come back, drawn for tests of many operations."""


def lose_or_restore(operation, scheduler, out, choices, now):
    """A few GPUs "fail" or are drained ("drain"), or half of those in `out` are in use again ("restore")."""
    if operation == "restore":
        back = choices.sample(sorted(out), max(1, len(out) // 2))
        out.difference_update(back)
        scheduler.restore(back)
        return
    gpus = choices.sample(range(scheduler.cluster.gpus), choices.choice((1, 2, 4)))
    out.update(gpus)
    if operation == "fail":
        scheduler.fail(gpus, now)
    else:
        scheduler.drain(gpus)
