"""Answers to 05_data_parallel that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(text: str, old: str, new: str) -> str:
    """A text with one mistake in it; `old` must be there once."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the answer"
    return text.replace(old, new)


# Right answers, in steps that a mistake replaces
SLOWEST = """
def summarise(rows):
    counts, totals = {}, {}
    for service, milliseconds in rows:
        counts[service] = counts.get(service, 0) + 1
        totals[service] = totals.get(service, 0) + milliseconds
    return [(service, totals[service], counts[service]) for service in totals]

def merge(summaries, k):
    counts, totals = {}, {}
    for summary in summaries:
        for service, total, count in summary:
            counts[service] = counts.get(service, 0) + count
            totals[service] = totals.get(service, 0) + total
    averages = [(totals[service] / counts[service], service) for service in totals]
    averages.sort(key=lambda pair: (-pair[0], pair[1]))
    return [(service, average) for average, service in averages[:k]]
"""
DEAL = """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    epoch, position = dealt // num_samples, dealt % num_samples
    size = min(batch, num_samples - position)
    step = order_of(epoch, num_samples)[position : position + size]
    begin, end = rank * size // world_size, (rank + 1) * size // world_size
    return step[begin:end], dealt + size
"""
PIECES = """
def pieces_needed(flops, bandwidth, gradient_bytes, world_size, tokens, share):
    enough = (world_size - 1) * gradient_bytes * flops / (3 * world_size * bandwidth) / share
    return max(1, math.ceil(enough / tokens))
"""
TIMELINE = """
def timeline(layers, buckets, latency, bandwidth):
    n = len(layers[0].seconds)
    clocks, todo, events, free = [0.0] * n, list(layers), [], 0.0
    for size in buckets:
        own, todo = todo[:size], todo[size:]
        clocks = [clock + sum(layer.seconds[rank] for layer in own) for rank, clock in enumerate(clocks)]
        ready, nbytes = max(clocks), sum(layer.gradient_bytes for layer in own)
        begin = max(free, ready)
        free = begin + 2 * (n - 1) * latency + 2 * (n - 1) / n * nbytes / bandwidth
        events.append((ready, begin, free))
    return events
"""
MEAN = """
def mean_gradient(comm, pieces, size):
    both = torch.zeros(size + 1, dtype=torch.float64)
    for gradient, tokens in pieces:
        if tokens:
            both[:size] += gradient * tokens
            both[size] += tokens
    comm.all_reduce(both)
    return both[:size] / max(1.0, both[size].item())
"""
TRAINER = """
class Trainer(Draft):
    def __init__(self, model, comm, rate):
        super().__init__(model, comm, rate)
        for parameter in self.model.parameters():
            self.comm.broadcast(parameter)

    def step(self, pieces):
        for piece in pieces:
            (self.model(*piece) / len(pieces)).backward()
        self.average()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= self.rate * parameter.grad
                parameter.grad = None

    def average(self):
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.comm.all_reduce(parameter.grad, op="avg")
"""
BUCKETS = """
def choose_buckets(layers, world_size, latency, bandwidth):
    from functools import lru_cache

    @lru_cache(None)
    def through(count):
        if count == 0:
            return 0.0, ()
        ready = sum(seconds for _, seconds in layers[:count])
        best = None
        for size in range(1, count + 1):
            free, before = through(count - size)
            nbytes = sum(nbytes for nbytes, _ in layers[count - size : count])
            ring = 2 * (world_size - 1) * (latency + nbytes / world_size / bandwidth)
            end = max(free, ready) + ring
            if best is None or end < best[0]:
                best = end, (*before, size)
        return best

    return list(through(len(layers))[1])
"""
# Buckets by a rule, of which the best is taken: what a mistake puts in place of `rules`
BEST_OF = """
def choose_buckets(layers, world_size, latency, bandwidth):
    def end_of(buckets):
        at, clock, free = 0, 0.0, 0.0
        for size in buckets:
            own = layers[at : at + size]
            at += size
            clock += sum(seconds for _, seconds in own)
            nbytes = sum(nbytes for nbytes, _ in own)
            free = max(clock, free) + 2 * (world_size - 1) * (latency + nbytes / world_size / bandwidth)
        return free

    def filled(sizes, limit):
        buckets, full = [0], 0
        for size in sizes:
            if full >= limit:
                buckets.append(0)
                full = 0
            full += size
            buckets[-1] += 1
        return buckets

    return min(RULES, key=end_of)
"""

TASKS = {
    "task_1": Answers(
        correct=(
            SLOWEST,
            # counts and means, weighed
            """
from collections import defaultdict

def summarise(rows):
    by_service = defaultdict(list)
    for service, milliseconds in rows:
        by_service[service].append(milliseconds)
    return {service: (len(own), sum(own) / len(own)) for service, own in by_service.items()}

def merge(summaries, k):
    parts = defaultdict(list)
    for summary in summaries:
        for service, part in summary.items():
            parts[service].append(part)
    averages = {
        service: sum(count * mean for count, mean in own) / sum(count for count, _ in own)
        for service, own in parts.items()
    }
    names = sorted(averages)
    names.sort(key=averages.get, reverse=True)
    return [[name, averages[name]] for name in names[:k]]
""",
        ),
        wrong={
            "the mean of the shards' means": """
def summarise(rows):
    means = {}
    for service in {service for service, _ in rows}:
        own = [milliseconds for name, milliseconds in rows if name == service]
        means[service] = sum(own) / len(own)
    return means

def merge(summaries, k):
    means = {}
    for summary in summaries:
        for service, mean in summary.items():
            means.setdefault(service, []).append(mean)
    averages = [(service, sum(own) / len(own)) for service, own in means.items()]
    return sorted(averages, key=lambda pair: (-pair[1], pair[0]))[:k]
""",
            "each shard sends its own slowest only": changed(
                SLOWEST,
                "    return [(service, totals[service], counts[service]) for service in totals]\n",
                "    slowest = sorted(totals, key=lambda name: totals[name] / counts[name])[-3:]\n"
                "    return [(service, totals[service], counts[service]) for service in slowest]\n",
            ),
            "sends all rows": changed(
                SLOWEST,
                "    return [(service, totals[service], counts[service]) for service in totals]\n",
                "    return [(service, milliseconds, 1) for service, milliseconds in rows]\n",
            ),
            "sends the values of each service": """
def summarise(rows):
    values = {}
    for service, milliseconds in rows:
        values.setdefault(service, []).append(milliseconds)
    return values

def merge(summaries, k):
    values = {}
    for summary in summaries:
        for service, own in summary.items():
            values.setdefault(service, []).extend(own)
    averages = [(service, sum(own) / len(own)) for service, own in values.items()]
    return sorted(averages, key=lambda pair: (-pair[1], pair[0]))[:k]
""",
            "divides by the number of shards": changed(
                SLOWEST, "totals[service] / counts[service], service)", "totals[service] / len(summaries), service)"
            ),
            "the last shard's counts": changed(
                SLOWEST, "counts[service] = counts.get(service, 0) + count\n", "counts[service] = count\n"
            ),
            "the fastest first": changed(SLOWEST, "(-pair[0], pair[1])", "(pair[0], pair[1])"),
            "equal averages backwards": changed(
                SLOWEST, "averages.sort(key=lambda pair: (-pair[0], pair[1]))", "averages.sort(reverse=True)"
            ),
            "equal averages as they come": changed(SLOWEST, "(-pair[0], pair[1])", "-pair[0]"),
            "the slowest in total": changed(SLOWEST, "(-pair[0], pair[1])", "(-totals[pair[1]], pair[1])"),
            "only services that all shards have": changed(
                SLOWEST,
                "for service in totals]\n    averages.sort",
                "for service in totals\n"
                "                if all(service in {name for name, _, _ in s} for s in summaries)]\n"
                "    averages.sort",
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            DEAL,
            # each rank picks its places of the whole order
            """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    order = order_of(dealt // num_samples, num_samples)
    begin = dealt % num_samples
    end = min(begin + batch, num_samples)
    return [order[i] for i in range(begin, end) if i % world_size == rank], dealt + end - begin
""",
        ),
        wrong={
            "the rest of the batch is lost": changed(
                DEAL,
                "begin, end = rank * size // world_size, (rank + 1) * size // world_size",
                "begin, end = rank * (size // world_size), (rank + 1) * (size // world_size)",
            ),
            "the last rank takes the rest": changed(
                DEAL,
                "begin, end = rank * size // world_size, (rank + 1) * size // world_size",
                "begin = rank * (size // world_size)\n"
                "    end = size if rank == world_size - 1 else begin + size // world_size",
            ),
            "shares rounded up, the last ranks get what is left": changed(
                DEAL,
                "begin, end = rank * size // world_size, (rank + 1) * size // world_size",
                "each = -(-size // world_size)\n    begin, end = rank * each, (rank + 1) * each",
            ),
            "fills the shares up with samples dealt twice": """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    epoch, position = divmod(dealt, num_samples)
    step = order_of(epoch, num_samples)[position : position + batch]
    padded = (step * world_size)[: -(-len(step) // world_size) * world_size]
    return padded[rank::world_size], dealt + len(step)
""",
            "counts this rank's samples only": changed(DEAL, "dealt + size", "dealt + end - begin"),
            "takes all shares to be as large as its own": changed(
                DEAL, "dealt + size", "dealt + (end - begin) * world_size"
            ),
            "counts a whole batch at the end of an epoch": changed(DEAL, "dealt + size", "dealt + batch"),
            "one order for all epochs": changed(DEAL, "order_of(epoch, num_samples)", "order_of(0, num_samples)"),
            "another order on every rank": changed(
                DEAL, "order_of(epoch, num_samples)", "order_of(epoch + rank, num_samples)"
            ),
            "counts steps": """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    epoch, step = divmod(dealt, -(-num_samples // batch))
    own = order_of(epoch, num_samples)[step * batch : (step + 1) * batch]
    return own[rank::world_size], dealt + 1
""",
            "cuts the epoch into shards, one a rank": """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    epoch, position = divmod(dealt, num_samples)
    mine = order_of(epoch, num_samples)[rank::world_size]
    each, size = batch // world_size, min(batch, num_samples - position)
    begin = position // world_size
    return mine[begin : begin + each], dealt + size
""",
            "a step goes on into the next epoch": """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    places = [divmod(dealt + i, num_samples) for i in range(batch)]
    step = [order_of(epoch, num_samples)[position] for epoch, position in places]
    return step[rank::world_size], dealt + batch
""",
            "leaves out a last batch that is not full": """
def part_of_step(dealt, num_samples, batch, world_size, rank):
    epoch, position = divmod(dealt, num_samples)
    if position + batch > num_samples and num_samples >= batch:
        epoch, position, dealt = epoch + 1, 0, (epoch + 1) * num_samples
    step = order_of(epoch, num_samples)[position : position + batch]
    return step[rank::world_size], dealt + len(step)
""",
        },
    ),
    "task_3": Answers(
        correct=(
            PIECES + TIMELINE,
            # by counting up, and by looking at each layer
            """
def pieces_needed(flops, bandwidth, gradient_bytes, world_size, tokens, share):
    reducing = 2 * (world_size - 1) * gradient_bytes / (world_size * bandwidth)
    pieces = 1
    while reducing > share * pieces * 6 * tokens / flops:
        pieces += 1
    return pieces

def timeline(layers, buckets, latency, bandwidth):
    from itertools import accumulate

    n, events = len(layers[0].seconds), []
    clocks = [accumulate([layer.seconds[rank] for layer in layers]) for rank in range(n)]
    done = [max(times) for times in zip(*clocks)]
    ends = list(accumulate(buckets))
    for first, end in zip([0, *ends], ends):
        ready = done[end - 1]
        begin = max(ready, events[-1][2] if events else 0)
        share = sum(layer.gradient_bytes for layer in layers[first:end]) / n
        events.append([ready, begin, begin + (2 * n - 2) * (latency + share / bandwidth)])
    return events
""",
        ),
        wrong={
            "2 FLOPs a parameter and token, as in serving": changed(PIECES, "(3 * world_size", "(world_size")
            + TIMELINE,
            "every rank sends all bytes twice": changed(
                PIECES, "(world_size - 1) * gradient_bytes * flops / (3 * world_size", "gradient_bytes * flops / (3"
            )
            + TIMELINE,
            "a piece more for exact multiples": changed(
                PIECES, "math.ceil(enough / tokens)", "int(enough / tokens) + 1"
            )
            + TIMELINE,
            "no piece at all for one rank": changed(
                PIECES, "max(1, math.ceil(enough / tokens))", "math.ceil(enough / tokens)"
            )
            + TIMELINE,
            "multiplies by the share": changed(PIECES, "/ share", "* share") + TIMELINE,
            "all-reduces overlap": PIECES + changed(TIMELINE, "begin = max(free, ready)", "begin = ready"),
            "communicates after the whole backward pass": PIECES
            + changed(
                TIMELINE,
                "begin = max(free, ready)",
                "begin = max(free, max(sum(layer.seconds[r] for layer in layers) for r in range(n)))",
            ),
            "ranks wait for each other after every layer": PIECES
            + changed(
                TIMELINE,
                "clocks = [clock + sum(layer.seconds[rank] for layer in own) for rank, clock in enumerate(clocks)]",
                "clocks = [clocks[0] + sum(max(layer.seconds) for layer in own)] * n",
            ),
            "a rank computes only while the link is idle": PIECES
            + changed(TIMELINE, "        events.append", "        clocks = [free] * n\n        events.append"),
            "rank 0's clock": PIECES + changed(TIMELINE, "max(clocks)", "clocks[0]"),
            "one latency for an all-reduce": PIECES + changed(TIMELINE, "2 * (n - 1) * latency", "(n > 1) * latency"),
            "every message has all bytes": PIECES + changed(TIMELINE, "2 * (n - 1) / n *", "2 * (n - 1) *"),
            "ready with the first layer of the bucket": PIECES
            + changed(
                TIMELINE,
                "ready, nbytes = max(clocks),",
                "ready, nbytes = max(clocks) - max(sum(l.seconds[r] for l in own[1:]) for r in range(n)),",
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            MEAN,
            # weights first, as `weight` of the chapter gives them, and then an average
            """
def mean_gradient(comm, pieces, size):
    total = torch.tensor([sum(tokens for _, tokens in pieces)])
    comm.all_reduce(total)
    mine = torch.zeros(size, dtype=torch.float64)
    for gradient, tokens in pieces:
        if tokens > 0:
            mine = mine + gradient * (tokens * comm.world_size / total.item())
    comm.all_reduce(mine, op="avg")
    return mine
""",
        ),
        wrong={
            "the mean of the ranks' means": """
def mean_gradient(comm, pieces, size):
    count = sum(tokens for _, tokens in pieces)
    mine = torch.zeros(size, dtype=torch.float64)
    for gradient, tokens in pieces:
        if tokens:
            mine += gradient * tokens / count
    comm.all_reduce(mine, op="avg")
    return mine
""",
            "the mean of the pieces' means": """
def mean_gradient(comm, pieces, size):
    both = torch.zeros(size + 1, dtype=torch.float64)
    for gradient, tokens in pieces:
        if tokens:
            both[:size] += gradient
            both[size] += 1
    comm.all_reduce(both)
    return both[:size] / max(1.0, both[size].item())
""",
            "a rank without tokens returns at once": changed(
                MEAN,
                "    for gradient",
                "    if not sum(tokens for _, tokens in pieces):\n        return both[:size]\n    for gradient",
            ),
            "NaN times 0": changed(MEAN, "        if tokens:\n", "        if True:\n"),
            "every NaN becomes 0": changed(
                changed(MEAN, "        if tokens:\n", "        if True:\n"),
                "gradient * tokens",
                "gradient.nan_to_num() * tokens",
            ),
            "sums in float32": changed(MEAN, "torch.zeros(size + 1, dtype=torch.float64)", "torch.zeros(size + 1)"),
            "a row": changed(MEAN, "return both[:size] /", "return both[None, :size] /"),
            "a list": changed(
                MEAN,
                "both[:size] / max(1.0, both[size].item())",
                "[x / max(1.0, both[size].item()) for x in both[:size].tolist()]",
            ),
            "NaN for everybody if nobody has a token": changed(MEAN, "max(1.0, both[size].item())", "both[size]"),
            "forgets to divide": changed(MEAN, "both[:size] / max(1.0, both[size].item())", "both[:size]"),
            "divides by its own tokens": changed(
                MEAN, "max(1.0, both[size].item())", "max(1, sum(tokens for _, tokens in pieces))"
            ),
            "an all-reduce for each piece": """
def mean_gradient(comm, pieces, size):
    most = torch.zeros(comm.world_size, dtype=torch.float64)
    most[comm.rank] = len(pieces)
    comm.all_reduce(most)
    total, count = torch.zeros(size, dtype=torch.float64), 0.0
    for k in range(int(most.max())):
        both = torch.zeros(size + 1, dtype=torch.float64)
        if k < len(pieces) and pieces[k][1]:
            both[:size], both[size] = pieces[k][0] * pieces[k][1], pieces[k][1]
        comm.all_reduce(both)
        total, count = total + both[:size], count + both[size].item()
    return total / max(1.0, count)
""",
            "averages a sum, and divides by all tokens": """
def mean_gradient(comm, pieces, size):
    mine, count = torch.zeros(size, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for gradient, tokens in pieces:
        if tokens:
            mine += gradient * tokens
            count += tokens
    comm.all_reduce(mine, op="avg")
    comm.all_reduce(count)
    return mine / max(1.0, count.item())
""",
            "weighs the gradients where they lie": changed(
                MEAN,
                "            both[:size] += gradient * tokens\n",
                "            both[:size] += gradient.mul_(tokens)\n",
            ),
            "looks at the first piece only": changed(MEAN, "in pieces:", "in pieces[:1]:"),
        },
    ),
    "task_5": Answers(
        correct=(
            TRAINER,
            # everything in one flat buffer, from scratch
            """
class Trainer:
    def __init__(self, model, comm, rate):
        self.model, self.comm, self.rate = model, comm, rate
        self.parameters = list(model.parameters())
        flat = torch.nn.utils.parameters_to_vector(self.parameters).detach()
        if comm.rank:
            flat.zero_()
        comm.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, self.parameters)

    def step(self, pieces):
        loss = sum(self.model(*piece) for piece in pieces) / len(pieces) / self.comm.world_size
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(found, self.parameters)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        self.comm.all_reduce(flat)
        with torch.no_grad():
            for part, p in zip(flat.split([p.numel() for p in self.parameters]), self.parameters):
                p.sub_(self.rate * part.view_as(p))
""",
        ),
        wrong={
            "the draft as it is": """
class Trainer(Draft):
    pass
""",
            "ranks start different": changed(
                TRAINER, "            self.comm.broadcast(parameter)\n", "            pass\n"
            ),
            "averages the weights of all ranks at the start": changed(
                TRAINER,
                "            self.comm.broadcast(parameter)\n",
                '            self.comm.all_reduce(parameter.data, op="avg")\n',
            ),
            "sends out the weights in every step": changed(
                TRAINER,
                "        self.average()\n",
                "        self.average()\n        for p in self.model.parameters():\n"
                "            self.comm.broadcast(p)\n",
            ),
            "still in the order in which gradients arrive": changed(
                TRAINER,
                "        for parameter in self.model.parameters():\n            if parameter.grad is None:\n",
                "        late = [p for p in self.model.parameters() if p.grad is None]\n"
                "        order, self.arrived = list(dict.fromkeys(map(id, self.arrived))), []\n"
                "        known = {id(p): p for p in self.model.parameters()}\n"
                "        for parameter in [known[i] for i in order] + late:\n            if parameter.grad is None:\n",
            ),
            "leaves out parameters without a gradient": changed(
                changed(
                    TRAINER,
                    "                parameter.grad = torch.zeros_like(parameter)\n",
                    "                continue\n",
                ),
                "                parameter -= self.rate * parameter.grad\n",
                "                if parameter.grad is None:\n                    continue\n"
                "                parameter -= self.rate * parameter.grad\n",
            ),
            "the average of the ranks that have a gradient": changed(
                TRAINER,
                "            if parameter.grad is None:\n"
                "                parameter.grad = torch.zeros_like(parameter)\n"
                '            self.comm.all_reduce(parameter.grad, op="avg")\n',
                "            g = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad\n"
                "            has = torch.tensor([float(parameter.grad is not None)], dtype=torch.float64)\n"
                "            both = torch.cat([g.flatten(), has])\n"
                "            self.comm.all_reduce(both)\n"
                "            parameter.grad = (both[:-1] / both[-1].clamp(min=1)).view_as(parameter)\n",
            ),
            "communicates after every piece": changed(
                changed(TRAINER, "        self.average()\n", ""),
                "            (self.model(*piece) / len(pieces)).backward()\n",
                "            (self.model(*piece) / len(pieces)).backward()\n            self.average()\n",
            ),
            "communicates after the first piece": changed(
                TRAINER,
                "            (self.model(*piece) / len(pieces)).backward()\n        self.average()\n",
                "            (self.model(*piece) / len(pieces)).backward()\n"
                "            if piece is pieces[0]:\n                self.average()\n"
                "        for p in self.model.parameters():\n"
                "            p.grad = torch.zeros_like(p) if p.grad is None else p.grad\n",
            ),
            "adds gradients up and does not average them": changed(TRAINER, 'op="avg"', 'op="sum"'),
            "a rate of 0.1 whatever the rate is": changed(
                TRAINER, "self.rate * parameter.grad", "0.1 * parameter.grad"
            ),
            "divides by the pieces twice": changed(
                TRAINER,
                "        self.average()\n",
                "        self.average()\n        for p in self.model.parameters():\n"
                "            p.grad /= len(pieces)\n",
            ),
            "keeps only the last piece": changed(
                TRAINER,
                "            (self.model(*piece) / len(pieces)).backward()\n",
                "            self.model.zero_grad()\n            (self.model(*piece) / len(pieces)).backward()\n",
            ),
            "keeps the gradients of the step before": changed(TRAINER, "                parameter.grad = None\n", ""),
        },
    ),
    "task_6": Answers(
        correct=(
            BUCKETS,
            # from the front: the earliest end for every number of layers, and where it came from
            """
def choose_buckets(layers, world_size, latency, bandwidth):
    count = len(layers)
    ready, size = [0.0], [0]
    for nbytes, seconds in layers:
        ready.append(ready[-1] + seconds)
        size.append(size[-1] + nbytes)
    end, came_from = [0.0] + [math.inf] * count, [0] * (count + 1)
    for first in range(count):
        for last in range(first + 1, count + 1):
            message = latency + (size[last] - size[first]) / world_size / bandwidth
            this = max(end[first], ready[last]) + 2 * (world_size - 1) * message
            if this < end[last]:
                end[last], came_from[last] = this, first
    buckets = []
    while count:
        buckets.append(count - came_from[count])
        count = came_from[count]
    return buckets[::-1]
""",
        ),
        wrong={
            "one bucket": """
def choose_buckets(layers, world_size, latency, bandwidth):
    return [len(layers)]
""",
            "a bucket a layer": """
def choose_buckets(layers, world_size, latency, bandwidth):
    return [1] * len(layers)
""",
            "the best limit in bytes, for all buckets the same": changed(
                BEST_OF,
                "RULES",
                "[filled([nbytes for nbytes, _ in layers], limit) for limit in "
                "{sum(x for x, _ in layers[i:j]) for i in range(len(layers)) for j in range(i + 1, len(layers) + 1)}]",
            ),
            "the best number of layers, for all buckets the same": changed(
                BEST_OF, "RULES", "[filled([1] * len(layers), k) for k in range(1, len(layers) + 1)]"
            ),
            "the best of two buckets": changed(
                BEST_OF, "RULES", "[[k, len(layers) - k] if k else [len(layers)] for k in range(len(layers))]"
            ),
            "sends what is ready whenever the link is free": """
def choose_buckets(layers, world_size, latency, bandwidth):
    buckets, waiting, nbytes, clock, free = [], 0, 0, 0.0, 0.0
    for index, (size, seconds) in enumerate(layers):
        clock, waiting, nbytes = clock + seconds, waiting + 1, nbytes + size
        next_ready = clock + layers[index + 1][1] if index + 1 < len(layers) else math.inf
        if next_ready > max(free, clock):
            free = max(free, clock) + 2 * (world_size - 1) * (latency + nbytes / world_size / bandwidth)
            buckets.append(waiting)
            waiting = nbytes = 0
    return buckets
""",
            "leaves the latency out": changed(BUCKETS, "(latency + nbytes", "(0 * latency + nbytes"),
            "one latency for an all-reduce": changed(
                BUCKETS,
                "2 * (world_size - 1) * (latency + nbytes / world_size / bandwidth)",
                "latency + 2 * (world_size - 1) * nbytes / world_size / bandwidth",
            ),
            "every message has all bytes": changed(BUCKETS, "nbytes / world_size / bandwidth", "nbytes / bandwidth"),
            "takes the link for always free": changed(BUCKETS, "end = max(free, ready) + ring", "end = ready + ring"),
            "takes everything for ready at once": changed(
                BUCKETS, "end = max(free, ready) + ring", "end = free + ring"
            ),
            "starts with the layer computed last": changed(
                BUCKETS, "return list(through(len(layers))[1])", "return list(through(len(layers))[1])[::-1]"
            ),
        },
    ),
}
