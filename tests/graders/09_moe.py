"""Answers to 09_moe that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(text: str, old: str, new: str) -> str:
    """A text with one mistake in it; `old` must be there once."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the answer"
    return text.replace(old, new)


# Right answers, in steps that a mistake replaces
CHOICES = """
def two_choices(loads, draw):
    if sum(load < math.inf for load in loads) == 1:
        return min(range(len(loads)), key=loads.__getitem__)
    first = draw()
    while loads[first] == math.inf:
        first = draw()
    second = draw()
    while second == first or loads[second] == math.inf:
        second = draw()
    return second if loads[second] < loads[first] else first
"""
OBSERVE = """
def observe(bias, loads, rate):
    bias, up = list(bias), [i for i, load in enumerate(loads) if load != math.inf]
    mean = sum(loads[i] for i in up) / max(1, len(up))
    for i in up:
        if loads[i] < mean:
            bias[i] += rate
        elif loads[i] > mean:
            bias[i] -= rate
    return bias
"""
PLACE = """
def place(chosen, capacity, scores=None):
    pairs = []
    for token, own in enumerate(chosen):
        for choice, expert in enumerate(own):
            score = 0 if scores is None else scores[token][choice]
            pairs.append((-score, choice, token, expert))
    pairs.sort()
    room, kept, dropped = {}, [], 0
    for _, choice, token, expert in pairs:
        left = room.setdefault(expert, capacity)
        if left == 0:
            dropped += 1
            continue
        room[expert] -= 1
        kept.append((token, expert))
    return kept, dropped
"""
DISPATCH = """
def dispatch(chosen, num_experts):
    flat = chosen.flatten()
    there = (flat >= 0).nonzero()[:, 0]
    order = there[flat[there].argsort(stable=True)]
    offsets = (flat[there, None] <= torch.arange(num_experts)).sum(0)
    return order, offsets.to(torch.int32)
"""
COMBINE = """
def combine(answers, order, weights):
    tokens, k = weights.shape
    weighed = answers * weights.reshape(-1)[order].unsqueeze(1)
    out = torch.zeros(tokens, answers.shape[1], dtype=answers.dtype)
    return out.index_put((order // k,), weighed, accumulate=True)
"""
MIXTURE = """
def mixture(x, chosen, weights, matrices, multiply):
    order, offsets = dispatch(chosen, len(matrices))
    token = torch.arange(len(x)).repeat_interleave(chosen.shape[1])
    return combine(multiply(x[token[order]], matrices, offsets), order, weights)
"""
EXCHANGE = """
def exchange(comm, rows, counts):
    told = [torch.tensor([count], dtype=torch.int32) for count in counts]
    heard = [torch.zeros(1, dtype=torch.int32) for _ in counts]
    comm.all_to_all(heard, told)
    received = [count.item() for count in heard]
    parts = [rows.new_empty(count, rows.shape[1]) for count in received]
    comm.all_to_all(parts, list(rows.split(counts)))
    return torch.cat(parts), received
"""
BACK = """
def back(comm, answers, counts, received):
    parts = [answers.new_empty(count, answers.shape[1]) for count in counts]
    comm.all_to_all(parts, list(answers.split(received)))
    return torch.cat(parts)
"""
# EPLB's two rules: slots for whoever has the largest share, then the largest share to the least loaded rank
EXPERTS = """
def place_experts(loads, num_ranks, slots):
    replicas = [1] * len(loads)
    for _ in range(num_ranks * slots - len(loads)):
        some = [e for e in range(len(loads)) if replicas[e] < num_ranks]
        if some:
            replicas[max(some, key=lambda e: loads[e] / replicas[e])] += 1
    share = [loads[e] / replicas[e] for e in range(len(loads))]
    ranks, total = [[] for _ in range(num_ranks)], [0.0] * num_ranks
    for e in sorted(range(len(loads)), key=lambda e: share[e], reverse=True):
        for _ in range(replicas[e]):
            free = [r for r in range(num_ranks) if e not in ranks[r] and len(ranks[r]) < slots]
            if free:
                r = min(free, key=lambda r: total[r])
                ranks[r].append(e)
                total[r] += share[e]
    return ranks
"""
HOPS = """
def two_hops(source, wanted, m):
    network, local = [], []
    for token, ranks in enumerate(wanted):
        hosts = {}
        for rank in ranks:
            hosts.setdefault(rank // m, []).append(rank)
        for host, own in hosts.items():
            via = host * m + source % m
            if host != source // m:
                network.append((token, source, via))
            for rank in own:
                if rank != via:
                    local.append((token, via, rank))
    return network, local
"""
GAIN = """
def gain(source, wanted, m, port, nvlink):
    flat = hops = 0.0
    for ranks in wanted:
        for rank in ranks:
            if rank != source:
                flat += 1 / (nvlink if rank // m == source // m else port)
    network, local = two_hops(source, wanted, m)
    hops = len(network) / port + len(local) / nvlink
    return flat / hops if network or local else 1.0
"""
REPLICAS = EXPERTS[: EXPERTS.index("    share =")]

TASKS = {
    "task_1": Answers(
        correct=(
            CHOICES,
            """
def two_choices(loads, draw):
    up = {target for target in range(len(loads)) if not math.isinf(loads[target])}
    drawn = {}
    while len(drawn) < min(2, len(up)):
        target = draw()
        if target in up:
            drawn.setdefault(target, loads[target])
    return min(drawn, key=drawn.get)
""",
        ),
        wrong={
            "the least loaded of all": """
def two_choices(loads, draw):
    first = draw()
    return min([first, *range(len(loads))], key=lambda target: loads[target])
""",
            "among equals the one drawn last": changed(
                CHOICES, "loads[second] < loads[first]", "loads[second] <= loads[first]"
            ),
            "the same target twice counts as two": changed(
                CHOICES, "second == first or loads[second] == math.inf", "loads[second] == math.inf"
            ),
            "draws again only if both are down": """
def two_choices(loads, draw):
    while True:
        first, second = draw(), draw()
        target = first if loads[first] <= loads[second] else second
        if first != second and loads[target] < math.inf:
            return target
""",
            "a load of more than a million is down": CHOICES.replace("== math.inf", "> 1e6"),
            "waits for a second one where only one is up": changed(
                CHOICES, "sum(load < math.inf for load in loads) == 1", "len(loads) == 1"
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            OBSERVE,
            """
def observe(bias, loads, rate):
    loads = torch.tensor(loads, dtype=torch.float64)
    up = loads.isfinite()
    mean = loads[up].mean() if up.any() else 0.0
    moves = torch.where(up, torch.sign(mean - loads), 0.0)
    return (torch.tensor(bias, dtype=torch.float64) + rate * moves).tolist()
""",
        ),
        wrong={
            "the mean as a whole number": changed(OBSERVE, " / max(1, len(up))", " // max(1, len(up))"),
            "who has exactly the mean moves, too": changed(OBSERVE, "elif loads[i] > mean:", "else:"),
            "in proportion to what is too much": """
def observe(bias, loads, rate):
    mean = sum(loads) / len(loads)
    return [value + rate * (mean - load) / (mean or 1) for value, load in zip(bias, loads)]
""",
            "changes the biases that it was given": changed(OBSERVE, "bias, up = list(bias), [", "up = ["),
            "backends that are down count": changed(OBSERVE, " if load != math.inf]", "]"),
        },
    ),
    "task_3": Answers(
        correct=(
            PLACE,
            # ranks of pairs, in torch
            """
def place(chosen, capacity, scores=None):
    if not chosen:
        return [], 0
    experts = torch.tensor(chosen).T.flatten()
    tokens = torch.arange(len(chosen)).repeat(len(chosen[0]))
    if scores is not None:
        by_score = torch.tensor(scores).double().T.flatten().sort(descending=True, stable=True).indices
        experts, tokens = experts[by_score], tokens[by_score]
    before = torch.tril(experts[:, None] == experts[None, :], diagonal=-1).sum(1)
    kept = before < capacity
    return list(zip(tokens[kept].tolist(), experts[kept].tolist())), int((~kept).sum())
""",
        ),
        wrong={
            "token by token, with all its choices": changed(PLACE, "(-score, choice,", "(-score, token,"),
            "each choice has a room of its own": changed(
                changed(PLACE, "room.setdefault(expert, capacity)", "room.setdefault((choice, expert), capacity)"),
                "room[expert] -= 1",
                "room[choice, expert] -= 1",
            ),
            "who loses one expert loses the others, too": changed(
                changed(PLACE, "left == 0:", "left == 0 or token in lost:\n            lost.add(token)"),
                "dropped = {}, [], 0",
                "dropped, lost = {}, [], 0, set()",
            ),
            "counts tokens that are dropped, not pairs": changed(
                PLACE, "return kept, dropped", "return kept, len(chosen) - len({token for token, _ in kept})"
            ),
            "among equal scores the last comes first": changed(
                PLACE,
                "pairs.sort()",
                "pairs.sort(key=lambda pair: pair[0] if scores else pair[:3])\n"
                "    if scores:\n        pairs = sorted(reversed(pairs), key=lambda pair: pair[0])",
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            DISPATCH + COMBINE + MIXTURE,
            """
def dispatch(chosen, num_experts):
    parts = [(chosen.flatten() == e).nonzero()[:, 0] for e in range(num_experts)]
    return torch.cat(parts), torch.tensor([len(part) for part in parts]).cumsum(0, dtype=torch.int32)

def combine(answers, order, weights):
    slots = answers.new_zeros(weights.numel(), answers.shape[1])
    slots[order] = answers
    return (slots.view(*weights.shape, -1 if answers.numel() else answers.shape[1]) * weights[:, :, None]).sum(1)

def mixture(x, chosen, weights, matrices, multiply):
    order, offsets = dispatch(chosen, len(matrices))
    rows = x.index_select(0, torch.div(order, chosen.size(1), rounding_mode="floor"))
    return combine(multiply(rows, matrices, offsets), order, weights)
""",
        ),
        wrong={
            "a token's second answer replaces its first": DISPATCH
            + changed(COMBINE, "accumulate=True", "accumulate=False")
            + MIXTURE,
            "weights in the order of tokens": DISPATCH
            + changed(COMBINE, "weights.reshape(-1)[order]", "weights.reshape(-1)[order.sort().values]")
            + MIXTURE,
            "pairs lie choice by choice": DISPATCH
            + COMBINE
            + changed(
                MIXTURE, "arange(len(x)).repeat_interleave(chosen.shape[1])", "arange(len(x)).repeat(chosen.shape[1])"
            ),
            "offsets end with the last expert that has pairs": """
def dispatch(chosen, num_experts):
    experts, order = chosen.flatten().sort(stable=True)
    there = experts >= 0
    return order[there], experts[there].bincount().cumsum(0).int()
"""
            + COMBINE
            + MIXTURE,
            "x is cut from the graph": DISPATCH
            + COMBINE
            + changed(MIXTURE, "x[token[order]]", "x.detach()[token[order]]"),
            "weights are cut from the graph": DISPATCH
            + COMBINE
            + changed(MIXTURE, "order, weights)", "order, weights.detach())"),
            "results in float32": DISPATCH + changed(COMBINE, "accumulate=True)", "accumulate=True).float()") + MIXTURE,
            "a call for each expert": DISPATCH
            + COMBINE
            + """
def mixture(x, chosen, weights, matrices, multiply):
    out = torch.zeros_like(x)
    for e in range(len(matrices)):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        ends = torch.tensor([len(token)]).int()
        answers = multiply(x[token], matrices[e : e + 1], ends)
        out = out.index_add(0, token, answers * weights[token, choice, None])
    return out
""",
        },
    ),
    "task_5": Answers(
        correct=(
            EXCHANGE + BACK,
            # in flat buffers, and the way back as a journey of which both ends are known
            """
def travel(comm, rows, there, here):
    width = rows.shape[1]
    out = torch.zeros(sum(here) * width, dtype=rows.dtype)
    comm.all_to_all(
        list(out.split([count * width for count in here])),
        list(rows.reshape(-1).split([count * width for count in there])),
    )
    return out.reshape(-1, width)

def exchange(comm, rows, counts):
    numbers = torch.tensor(counts).view(-1, 1)
    received = [int(count) for count in travel(comm, numbers, [1] * len(counts), [1] * len(counts))]
    return travel(comm, rows, counts, received), received

def back(comm, answers, counts, received):
    return travel(comm, answers, received, counts)
""",
        ),
        wrong={
            "gets as many rows as it sends": """
def exchange(comm, rows, counts):
    arrived = torch.empty_like(rows)
    comm.all_to_all(list(arrived.split(counts)), list(rows.split(counts)))
    return arrived, counts
"""
            + BACK,
            "parts are padded to the longest": """
def exchange(comm, rows, counts):
    told, heard = torch.tensor(counts), torch.empty(len(counts), dtype=torch.int64)
    comm.all_to_all(list(heard.split(1)), list(told.split(1)))
    longest = told.max().view(1).repeat(comm.world_size)
    comm.all_gather(longest)
    padded = rows.new_zeros(2, comm.world_size, int(longest.max()), rows.shape[1])
    for part, own in zip(padded[0], rows.split(counts)):
        part[: len(own)] = own
    comm.all_to_all(list(padded[1]), list(padded[0]))
    received = heard.tolist()
    return torch.cat([part[:count] for part, count in zip(padded[1], received)]), received
"""
            + BACK,
            "everybody hears all counts": """
def exchange(comm, rows, counts):
    table = torch.zeros(comm.world_size, comm.world_size, dtype=torch.int64)
    table[comm.rank] = torch.tensor(counts)
    comm.all_gather(table)
    received = table[:, comm.rank].tolist()
    arrived = rows.new_empty(sum(received), rows.shape[1])
    comm.all_to_all(list(arrived.split(received)), list(rows.split(counts)))
    return arrived, received
"""
            + BACK,
            "its own rows come first": changed(
                EXCHANGE,
                "    return torch.cat(parts), received",
                "    parts.insert(0, parts.pop(comm.rank))\n"
                "    received.insert(0, received.pop(comm.rank))\n"
                "    return torch.cat(parts), received",
            )
            + changed(
                BACK,
                "list(answers.split(received))",
                "own_first",
            ).replace(
                "    comm.all_to_all",
                "    own_first = list(answers.split(received))\n"
                "    own_first.insert(comm.rank, own_first.pop(0))\n"
                "    comm.all_to_all",
            ),
            "width 3 both ways": changed(EXCHANGE, "rows.shape[1]", "3") + changed(BACK, "answers.shape[1]", "3"),
            "float32 both ways": changed(EXCHANGE, "rows.new_empty", "torch.empty")
            + changed(BACK, "answers.new_empty", "torch.empty"),
            "travels in float32": changed(
                changed(EXCHANGE, "rows.new_empty", "torch.empty"), "rows.split(counts)", "rows.float().split(counts)"
            )
            + BACK,
            "answers come back in float32": EXCHANGE
            + changed(
                changed(BACK, "answers.new_empty", "torch.empty"),
                "answers.split(received)",
                "answers.float().split(received)",
            ),
            "counts in an int16": EXCHANGE.replace("torch.int32", "torch.int16") + BACK,
            "tells counts again on the way back": EXCHANGE
            + """
def back(comm, answers, counts, received):
    return exchange(comm, answers, received)[0]
""",
        },
    ),
    "task_6": Answers(
        correct=(
            EXPERTS,
            # Halve the hottest share, from the largest down; then swap experts between ranks while that helps.
            """
def place_experts(loads, num_ranks, slots):
    import heapq

    heap, count = [(-load, e) for e, load in enumerate(loads)], [1] * len(loads)
    heapq.heapify(heap)
    for _ in range(num_ranks * slots - len(loads)):
        while heap and count[heap[0][1]] == num_ranks:
            heapq.heappop(heap)
        if heap:
            e = heap[0][1]
            count[e] += 1
            heapq.heapreplace(heap, (-loads[e] / count[e], e))
    share, number = [load / n for load, n in zip(loads, count)], 0
    ranks = [[] for _ in range(num_ranks)]
    for e in sorted(range(len(loads)), key=lambda e: -count[e]):
        for _ in range(count[e]):
            ranks[number % num_ranks].append(e)
            number += 1

    def total(r):
        return sum(share[e] for e in ranks[r])

    for _ in range(2000):
        busiest, moved = max(range(num_ranks), key=total), False
        for other in sorted(range(num_ranks), key=total):
            gap = total(busiest) - total(other)
            swaps = [
                (abs(gap / 2 - (share[a] - (share[b] if b is not None else 0))), a, b)
                for a in set(ranks[busiest]) - set(ranks[other])
                for b in [*(set(ranks[other]) - set(ranks[busiest])), None]
                if b is not None or len(ranks[other]) < slots
            ]
            _, a, b = min(swaps, key=lambda swap: swap[0], default=(0, None, None))
            if a is not None and 1e-9 < share[a] - (share[b] if b is not None else 0) < gap - 1e-9:
                ranks[busiest].remove(a)
                ranks[other].append(a)
                if b is not None:
                    ranks[other].remove(b)
                    ranks[busiest].append(b)
                moved = True
                break
        if not moved:
            break
    return ranks
""",
        ),
        wrong={
            "no replicas": changed(EXPERTS, "range(num_ranks * slots - len(loads))", "range(0)"),
            "dealt to ranks in turn": REPLICAS
            + """
    everything = [e for e, count in enumerate(replicas) for _ in range(count)]
    return [everything[r::num_ranks] for r in range(num_ranks)]
""",
            "the largest whole load gets the next replica": changed(
                EXPERTS, "key=lambda e: loads[e] / replicas[e]", "key=lambda e: loads[e]"
            ),
            "replicas of one expert on one rank": changed(
                changed(EXPERTS, "if e not in ranks[r] and len(ranks[r]) < slots", "if len(ranks[r]) < slots"),
                "if replicas[e] < num_ranks]",
                "]",
            ),
            "ranks have room for any number": changed(EXPERTS, " and len(ranks[r]) < slots", ""),
        },
    ),
    "task_7": Answers(
        correct=(
            HOPS + GAIN,
            # sets of what each rank has to get
            """
def two_hops(source, wanted, m):
    home = source // m
    needs = {(token, rank) for token, ranks in enumerate(wanted) for rank in ranks}
    first = {(token, rank // m * m + source % m) for token, rank in needs}
    network = [(token, source, via) for token, via in first if via // m != home]
    local = [(token, rank // m * m + source % m, rank) for token, rank in needs - first]
    return network, local

def gain(source, wanted, m, port, nvlink):
    ranks = torch.tensor([rank for own in wanted for rank in own if rank != source], dtype=torch.int64)
    if len(ranks) == 0:
        return 1.0
    far = (ranks // m != source // m).sum().item()
    network, local = map(len, two_hops(source, wanted, m))
    return (far * nvlink + (len(ranks) - far) * port) / (network * nvlink + local * port)
""",
        ),
        wrong={
            "once for each expert": changed(
                HOPS, "network.append((token, source, via))", "network += [(token, source, via)] * len(own)"
            )
            + GAIN,
            "always to the first rank of a host": changed(HOPS, "host * m + source % m", "host * m") + GAIN,
            "straight to the first rank that wants it": changed(HOPS, "host * m + source % m", "own[0]") + GAIN,
            "over the network to its own host": changed(HOPS, "if host != source // m:", "if True:") + GAIN,
            "whoever has it at once sends to itself": changed(HOPS, "if rank != via:", "if True:") + GAIN,
            "the source sends within other hosts": changed(
                HOPS, "local.append((token, via,", "local.append((token, source,"
            )
            + GAIN,
            "places and hosts exchanged": changed(HOPS, "rank // m, []", "rank % m, []") + GAIN,
            "a host is served once, whatever the token": changed(
                HOPS, "network, local = [], []", "network, local, seen = [], [], set()"
            ).replace(
                "if host != source // m:",
                "if host != source // m and host not in seen:\n                seen.add(host)",
            )
            + GAIN,
            "the second hop costs nothing": HOPS + changed(GAIN, " + len(local) / nvlink", ""),
            "upside down": HOPS + changed(GAIN, "return flat / hops", "return hops / flat"),
            "its own host costs nothing when flat": HOPS
            + changed(GAIN, "if rank != source:", "if rank // m != source // m:"),
            "no gain at all where nothing is sent": HOPS + changed(GAIN, "else 1.0", "else 0.0"),
        },
    ),
}
