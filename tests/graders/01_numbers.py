"""Answers to 01_numbers that its graders must tell apart."""

from tests.graders.answers import Answers

# Task 4: the right answer in steps that a mistake replaces
BOX = """
def smallest_box(machine, model, context, rate, wait):
    for cards in range(1, 17):
        for batch in range(1, 5000):
            nbytes = 2 * model.parameters + batch * context * model.kv_bytes_per_token
            flops = 2 * model.parameters * batch
            step = price(Cost(flops=flops / cards, bytes=nbytes / cards, dtype="bf16"), machine).seconds
            if nbytes <= 0.9 * cards * machine.memory_bytes and step <= wait and batch / step >= rate:
                return cards, batch
    return None
"""


def changed(text: str, old: str, new: str) -> str:
    """A text with one mistake in it; `old` must be there once."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the answer"
    return text.replace(old, new)


TASKS = {
    "task_1": Answers(
        correct=(
            """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    memory = (parameters * bytes_per_weight + kv_bytes_per_token * context * batch) / machine.memory_bandwidth
    compute = batch * 2 * parameters / machine.flops["bf16"]
    return batch / max(memory, compute)
""",
        ),
        wrong={
            "forgets the KV": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    step = max(parameters * bytes_per_weight / machine.memory_bandwidth, 2 * parameters * batch / machine.peak("bf16"))
    return batch / step
""",
            "counts one sequence's rate instead of the batch's": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    nbytes = bytes_per_weight * parameters + batch * context * kv_bytes_per_token
    return 1 / price(Cost(flops=2 * parameters * batch, bytes=nbytes, dtype="bf16"), machine).seconds
""",
            "never compute-bound": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    nbytes = bytes_per_weight * parameters + batch * context * kv_bytes_per_token
    return batch * machine.memory_bandwidth / nbytes
""",
            "reads the weights once per sequence": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    nbytes = batch * (bytes_per_weight * parameters + context * kv_bytes_per_token)
    return batch / price(Cost(flops=2 * parameters * batch, bytes=nbytes, dtype="bf16"), machine).seconds
""",
            "an H100's arithmetic on any machine": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    nbytes = parameters * bytes_per_weight + batch * context * kv_bytes_per_token
    return batch / max(nbytes / machine.memory_bandwidth, 2 * parameters * batch / h100.peak("bf16"))
""",
            "as many FLOPs as a weight has bytes": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    nbytes = parameters * bytes_per_weight + batch * context * kv_bytes_per_token
    flops = bytes_per_weight * parameters * batch
    return batch / max(nbytes / machine.memory_bandwidth, flops / machine.peak("bf16"))
""",
            "one sequence's KV for the whole batch": """
def decode_rate(machine, parameters, bytes_per_weight, batch, context, kv_bytes_per_token):
    nbytes = bytes_per_weight * parameters + context * kv_bytes_per_token
    return batch / price(Cost(flops=2 * parameters * batch, bytes=nbytes, dtype="bf16"), machine).seconds
""",
        },
    ),
    "task_2": Answers(
        correct=(
            """
def diagnose(trace, machine):
    def bound(event):
        c = event.cost
        link = machine.links["nvlink"]
        terms = {
            "compute": c.flops / machine.flops.get(c.dtype, float("inf")),
            "memory": c.bytes / machine.memory_bandwidth,
            "communication": c.messages * link.latency + c.message_bytes / link.bandwidth,
            "overhead": c.calls * machine.call_overhead,
        }
        longest = max(terms, key=terms.get)
        return "unexplained" if event.seconds / terms[longest] > 2 else longest

    return {event.name: bound(event) for event in trace}
""",
        ),
        wrong={
            "never unexplained": """
def diagnose(trace, machine):
    return {event.name: price(event.cost, machine).bound for event in trace}
""",
            "unexplained from twice on": """
def diagnose(trace, machine):
    found = {}
    for event in trace:
        p = price(event.cost, machine)
        found[event.name] = p.bound if event.seconds < 2 * p.seconds else "unexplained"
    return found
""",
            "compute or memory only": """
def diagnose(trace, machine):
    found = {}
    for event in trace:
        p = price(event.cost, machine)
        side = "compute" if p.terms["compute"] > p.terms["memory"] else "memory"
        found[event.name] = side if event.seconds <= 2 * p.seconds else "unexplained"
    return found
""",
            "half the price is unexplained, too": """
def diagnose(trace, machine):
    found = {}
    for event in trace:
        predicted = price(event.cost, machine)
        explained = 0.5 <= event.seconds / predicted.seconds <= 2
        found[event.name] = predicted.bound if explained else "unexplained"
    return found
""",
            "any deviation is unexplained": """
def diagnose(trace, machine):
    found = {}
    for event in trace:
        p = price(event.cost, machine)
        found[event.name] = p.bound if event.seconds <= p.seconds else "unexplained"
    return found
""",
        },
    ),
    "task_3": Answers(
        correct=(
            """
def attainable(sheet, intensity):
    dense = 1e12 * sheet["tflops"]
    if sheet["sparse"]:
        dense /= 2
    ridge = dense / (1e9 * sheet["memory_gb_per_s"])
    return dense if intensity >= ridge else dense * intensity / ridge
""",
        ),
        wrong={
            "still sparse": """
def attainable(sheet, intensity):
    return min(sheet["tflops"] * 1e12, sheet["memory_gb_per_s"] * 1e9 * intensity)
""",
            "still binary": """
def attainable(sheet, intensity):
    return min(sheet["tflops"] * 1e12 / (2 if sheet["sparse"] else 1), sheet["memory_gb_per_s"] * 2**30 * intensity)
""",
            "still the larger ceiling": """
def attainable(sheet, intensity):
    return max(sheet["tflops"] * 1e12 / (2 if sheet["sparse"] else 1), sheet["memory_gb_per_s"] * 1e9 * intensity)
""",
            "halves every sheet": """
def attainable(sheet, intensity):
    return min(sheet["tflops"] * 1e12 / 2, sheet["memory_gb_per_s"] * 1e9 * intensity)
""",
        },
    ),
    "task_4": Answers(
        correct=(
            """
def smallest_box(machine, model, context, rate, wait):
    weights, kv = 2 * model.parameters, context * model.kv_bytes_per_token
    for cards in range(1, 17):
        most = int((0.9 * cards * machine.memory_bytes - weights) // kv)
        for batch in range(1, most + 1):
            memory = (weights + batch * kv) / (cards * machine.memory_bandwidth)
            compute = 2 * model.parameters * batch / (cards * machine.peak("bf16"))
            step = max(memory, compute)
            if step <= wait and batch >= rate * step:
                return (cards, batch)
    return None
""",
        ),
        wrong={
            "forgets that it must fit": changed(BOX, "nbytes <= 0.9 * cards * machine.memory_bytes and step", "step"),
            "uses all of the memory": changed(BOX, "0.9 * cards", "cards"),
            "ignores how long users wait": changed(BOX, "step <= wait and batch", "batch"),
            "never compute-bound": """
def smallest_box(machine, model, context, rate, wait):
    for cards in range(1, 17):
        for batch in range(1, 2000):
            nbytes = 2 * model.parameters + batch * context * model.kv_bytes_per_token
            step = nbytes / cards / machine.memory_bandwidth
            if nbytes <= 0.9 * cards * machine.memory_bytes and step <= wait and batch / step >= rate:
                return cards, batch
    return None
""",
            "less than 90 % of the memory": changed(BOX, "nbytes <= 0.9", "nbytes < 0.9"),
            "quicker than users will wait": changed(BOX, "step <= wait", "step < wait"),
            "more than the rate": changed(BOX, "batch / step >= rate", "batch / step > rate"),
            "fifteen cards at most": changed(BOX, "range(1, 17)", "range(1, 16)"),
            "returns the largest batch": """
def smallest_box(machine, model, context, rate, wait):
    for cards in range(1, 17):
        for batch in range(2000, 0, -1):
            nbytes = 2 * model.parameters + batch * context * model.kv_bytes_per_token
            flops = 2 * model.parameters * batch
            step = price(Cost(flops=flops / cards, bytes=nbytes / cards, dtype="bf16"), machine).seconds
            if nbytes <= 0.9 * cards * machine.memory_bytes and step <= wait and batch / step >= rate:
                return cards, batch
    return None
""",
        },
    ),
    "task_5": Answers(
        correct=(
            """
def exposed_seconds(machine, link, gpus, parameters, tokens):
    way = machine.links[link]
    steps = 2 * (gpus - 1)
    talk = steps * way.latency + steps * (2 * parameters / gpus) / way.bandwidth
    work = 4 * parameters * tokens / machine.peak("bf16")
    return talk - work if talk > work else 0
""",
        ),
        wrong={
            "may be negative": """
def exposed_seconds(machine, link, gpus, parameters, tokens):
    ring = Cost(messages=2 * (gpus - 1), message_bytes=4 * (gpus - 1) / gpus * parameters)
    return price(ring, machine, link).seconds - 4 * parameters * tokens / machine.peak("bf16")
""",
            "sends everything twice, whatever the number of GPUs": """
def exposed_seconds(machine, link, gpus, parameters, tokens):
    ring = Cost(messages=2 * (gpus - 1), message_bytes=4 * parameters)
    return max(0, price(ring, machine, link).seconds - 4 * parameters * tokens / machine.peak("bf16"))
""",
            "forgets the latency": """
def exposed_seconds(machine, link, gpus, parameters, tokens):
    ring = Cost(message_bytes=4 * (gpus - 1) / gpus * parameters)
    return max(0, price(ring, machine, link).seconds - 4 * parameters * tokens / machine.peak("bf16"))
""",
            "six FLOPs, forward pass included": """
def exposed_seconds(machine, link, gpus, parameters, tokens):
    ring = Cost(messages=2 * (gpus - 1), message_bytes=4 * (gpus - 1) / gpus * parameters)
    return max(0, price(ring, machine, link).seconds - 6 * parameters * tokens / machine.peak("bf16"))
""",
            "nothing overlaps": """
def exposed_seconds(machine, link, gpus, parameters, tokens):
    ring = Cost(messages=2 * (gpus - 1), message_bytes=4 * (gpus - 1) / gpus * parameters)
    return price(ring, machine, link).seconds
""",
        },
    ),
}
