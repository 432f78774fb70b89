"""Answers to 07_tensor_parallel that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
COST = """
def cost(widths, cuts, shards, share=False):
    rounds = []
    for i in range(len(cuts)):
        last = i == len(cuts) - 1
        if cuts[i] == "column" and not last and cuts[i + 1] == "row":
            continue
        if cuts[i] == "column" and last and share:
            rounds.append(shards)
            rounds.append(2 * shards)
        elif cuts[i] == "column":
            rounds.append(widths[i + 1])
        else:
            rounds.append(widths[i + 1] * shards)
    return len(rounds), sum(rounds)
"""
BEST = """
def best_cuts(widths, shards, share=False):
    best = None
    for number in range(2 ** (len(widths) - 1)):
        cuts = [["column", "row"][number >> place & 1] for place in range(len(widths) - 1)]
        price = cost(widths, cuts, shards, share)
        if best is None or price < best[0]:
            best = price, cuts
    return best[1]
"""

ENTROPY = """
def cross_entropy(comm, logits, targets, vocab_size):
    positions, width = logits.shape
    first = comm.rank * width
    real = min(width, max(0, vocab_size - first))
    largest = torch.full((positions,), -torch.inf, dtype=torch.float64)
    if real > 0:
        largest = logits[:, :real].max(dim=1).values
    comm.all_reduce(largest, "max")
    powers = torch.zeros_like(logits)
    powers[:, :real] = torch.exp(logits[:, :real] - largest[:, None])
    total = powers.sum(1)
    own = targets - first
    rows = torch.nonzero((own >= 0) & (own < real))[:, 0]
    target = torch.zeros_like(largest)
    target[rows] = logits[rows, own[rows]]
    both = torch.stack([total, target])
    comm.all_reduce(both)
    total, target = both
    gradient = powers / total[:, None]
    gradient[rows, own[rows]] -= 1
    return (torch.log(total) + largest - target).mean(), gradient / positions
"""

FIXED = """
class Fixed(Draft):
    def forward(self, x):
        self.x, self.h = x, x * self.gain
        self.a = torch.relu(self.h @ self.up.T)
        out = self.a @ self.down.T
        self.mesh.tensor.all_reduce(out)
        return x + out

    def backward(self, grad):
        grad_a = (grad @ self.down) * (self.a > 0)
        grad_h = grad_a @ self.up
        self.mesh.tensor.all_reduce(grad_h)
        grad_x = grad + grad_h * self.gain
        gain, up, down = (grad_h * self.x).sum(0), grad_a.T @ self.h, grad.T @ self.a
        for gradient in (gain, up, down):
            self.mesh.data.all_reduce(gradient, "avg")
        return grad_x, {"gain": gain, "up": up, "down": down}
"""
SUM_H = "        self.mesh.tensor.all_reduce(grad_h)\n"
SUM_OUT = "        self.mesh.tensor.all_reduce(out)\n        return x + out\n"

DEAL = """
def deal(num_heads, num_kv_heads, n):
    if num_heads % n:
        raise ValueError("query heads do not divide")
    each = num_heads // n
    if num_kv_heads % n == 0:
        own = num_kv_heads // n
        kv = [range(own * rank, own * (rank + 1)) for rank in range(n)]
    elif n % num_kv_heads == 0:
        copies = n // num_kv_heads
        kv = [[rank // copies] for rank in range(n)]
    else:
        raise ValueError("KV heads do not divide")
    return [(range(rank * each, (rank + 1) * each), kv[rank]) for rank in range(n)]
"""
FINISH = """
def finish(comm, num_kv_heads, gradients, sequence_parallel=False):
    query, kv, head, stream = (gradients[name] for name in ("query", "kv", "head_norm", "stream_norm"))
    n, dim = comm.world_size, len(head)
    copies = n // num_kv_heads if n > num_kv_heads else 1
    buffer = torch.zeros(num_kv_heads * dim if copies > 1 else 0, dtype=torch.float64)
    mine = slice(comm.rank // copies * dim, comm.rank // copies * dim + dim)
    if copies > 1:
        buffer[mine] = kv[0]
    sent = [head, buffer]
    if sequence_parallel:
        sent.append(stream)
    row = torch.cat(sent)
    comm.all_reduce(row)
    head = row[:dim]
    if copies > 1:
        kv = row[dim:][mine][None]
    if sequence_parallel:
        stream = row[dim + len(buffer) :]
    square = (query**2).sum() + (kv**2).sum() / copies
    if comm.rank == 0:
        square = square + (head**2).sum() + (stream**2).sum()
    comm.all_reduce(square)
    return {"query": query, "kv": kv, "head_norm": head, "stream_norm": stream}, float(square)
"""
HEADS = DEAL + FINISH
GATHERED = """
def finish(comm, num_kv_heads, gradients, sequence_parallel=False):
    n, done = comm.world_size, dict(gradients)
    shared = [name for name, there in
              (("kv", n > num_kv_heads), ("head_norm", True), ("stream_norm", sequence_parallel)) if there]
    rows = comm.all_gather(torch.cat([gradients[name].reshape(-1) for name in shared]))
    group = range(n)
    start = 0
    for name in shared:
        stop = start + gradients[name].numel()
        if name == "kv":
            copies = n // num_kv_heads
            same = range(comm.rank // copies * copies, (comm.rank // copies + 1) * copies)
        else:
            same = group
        done[name] = sum(rows[peer][start:stop] for peer in same).reshape(gradients[name].shape)
        start = stop
    weight = {"query": 1, "kv": max(1, n // num_kv_heads), "head_norm": n, "stream_norm": n}
    own = sum((done[name] ** 2).sum() / weight[name] for name in done)
    return done, float(sum(comm.all_gather(own)))
"""

OWN = """
def own_parameters(config, n):
    hidden, d = config.hidden_size, config.head_dim
    queries, kv = config.num_heads // n, config.num_kv_heads // n
    if config.num_kv_heads < n:
        kv = 1
    layer = hidden * d * (2 * queries + 2 * kv)
    layer += 3 * hidden * (config.intermediate_size // n)
    layer += 2 * hidden
    tokens = (config.vocab_size + n - 1) // n
    return config.num_layers * layer + hidden + 2 * hidden * tokens
"""
CHOOSE = """
def choose(config, cluster, tokens, most):
    for n in range(1, cluster.gpus + 1):
        if config.num_heads % n or config.intermediate_size % n:
            continue
        if config.num_kv_heads % n and n % config.num_kv_heads:
            continue
        own, (stream, between) = own_parameters(config, n), kept_bytes(config)
        sent = config.num_layers * 4 * 2 * (n - 1) / n * tokens * config.hidden_size * 2
        seconds = sent / (cluster.inside if n <= cluster.per_node else cluster.outside)
        computing = 6 * own * tokens / cluster.flops
        if seconds > most * (seconds + computing):
            continue
        every = config.num_layers * tokens
        if STATE_BYTES * own + every * stream + every * between / n <= cluster.memory:
            return n, False
        if STATE_BYTES * own + every * stream / n + every * between / n <= cluster.memory:
            return n, True
    return None
"""
PLAN = OWN + CHOOSE
WITHOUT = """        if STATE_BYTES * own + every * stream + every * between / n <= cluster.memory:
            return n, False
"""

TASKS = {
    "task_1": Answers(
        correct=(
            COST + BEST,
            """
def cost(widths, cuts, shards, share=False):
    kept = [a + b == "columnrow" for a, b in zip(cuts, [*cuts[1:], ""])]
    sent = [width * (shards if cut == "row" else 1) for width, cut in zip(widths[1:], cuts)]
    asked, numbers = len(cuts) - sum(kept), sum(count for count, stays in zip(sent, kept) if not stays)
    if share and cuts[-1] == "column":
        return asked + 1, numbers - widths[-1] + 3 * shards
    return asked, numbers

def best_cuts(widths, shards, share=False):
    ways = [[]]
    for _ in widths[1:]:
        ways = [[*way, cut] for way in ways for cut in ("row", "column")]
    return sorted(ways, key=lambda way: cost(widths, way, shards, share))[0]
""",
        ),
        wrong={
            "a part of a total is a weight": changed(COST, ('if cuts[i] == "column" and not last', "if not last"))
            + BEST,
            "totals by column stay where the next table is by column": changed(
                COST, (' and cuts[i + 1] == "row"', ' and cuts[i + 1] == "column"')
            )
            + BEST,
            "totals never stay": changed(COST, (' and cuts[i + 1] == "row"', " and False")) + BEST,
            "by row one shard answers for all": changed(COST, ("widths[i + 1] * shards)", "widths[i + 1])")) + BEST,
            "by column all shards answer for all": changed(
                COST, ("rounds.append(widths[i + 1])", "rounds.append(widths[i + 1] * shards)")
            )
            + BEST,
            "the share takes one round": changed(
                COST,
                (
                    "rounds.append(shards)\n            rounds.append(2 * shards)",
                    "rounds.append(3 * shards)",
                ),
            )
            + BEST,
            "the share by column collects the totals as well": changed(
                COST, ("rounds.append(shards)\n", "rounds += [widths[i + 1], shards]\n")
            )
            + BEST,
            "the second round of the share is one number": changed(COST, ("append(2 * shards)", "append(shards)"))
            + BEST,
            "the share by row is a maximum and two sums": changed(
                COST, ('if cuts[i] == "column" and last and share', "if last and share")
            )
            + BEST,
            "numbers come before rounds": COST + changed(BEST, ("price < best[0]", "price[::-1] < best[0][::-1]")),
            "only rounds count": COST + changed(BEST, ("price < best[0]", "price[0] < best[0][0]")),
            "column and row take turns": COST
            + """
def best_cuts(widths, shards, share=False):
    return (["column", "row"] * len(widths))[: len(widths) - 1]
""",
            "column and row take turns from the end": COST
            + """
def best_cuts(widths, shards, share=False):
    return (["row", "column"] * len(widths))[: len(widths) - 1][::-1]
""",
            "the question for the share is forgotten": COST
            + changed(BEST, ("cost(widths, cuts, shards, share)", "cost(widths, cuts, shards)")),
        },
    ),
    "task_2": Answers(
        correct=(
            ENTROPY,
            """
def cross_entropy(comm, logits, targets, vocab_size):
    # both rounds as gathers: each rank's own log-sum-exp, and its target logits
    width = logits.shape[1]
    real = [token for token in range(comm.rank * width, (comm.rank + 1) * width) if token < vocab_size]
    mine = torch.full_like(logits, -torch.inf)
    mine[:, : len(real)] = logits[:, : len(real)]
    target = torch.zeros(len(targets), dtype=torch.float64)
    for row, token in enumerate(targets.tolist()):
        if token in real:
            target[row] = logits[row, token - comm.rank * width]
    parts = comm.all_gather(torch.stack([torch.logsumexp(mine, 1), target]))
    total = torch.logsumexp(torch.stack([part[0] for part in parts]), 0)
    gradient = (mine - total[:, None]).exp()
    for row, token in enumerate(targets.tolist()):
        if token in real:
            gradient[row, token - comm.rank * width] -= 1
    return (total - sum(part[1] for part in parts)).mean().item(), gradient / len(targets)
""",
        ),
        wrong={
            "padding has probability": changed(
                ENTROPY, ("real = min(width, max(0, vocab_size - first))", "real = width")
            ),
            "padding is in the maximum": changed(ENTROPY, ("logits[:, :real].max", "logits.max")),
            "padding is taken to be small": changed(
                ENTROPY,
                (
                    "powers[:, :real] = torch.exp(logits[:, :real] - largest[:, None])",
                    "powers = torch.exp(logits - largest[:, None])",
                ),
            ),
            "padding is multiplied by 0": changed(
                ENTROPY,
                (
                    "powers[:, :real] = torch.exp(logits[:, :real] - largest[:, None])",
                    "powers = torch.exp(logits - largest[:, None]) * (torch.arange(width) < real)",
                ),
            ),
            "a rank of padding alone has the maximum 0": changed(
                ENTROPY,
                ("torch.full((positions,), -torch.inf, dtype=torch.float64)", "torch.zeros(positions).double()"),
            ),
            "no rank has padding alone": changed(
                ENTROPY,
                ("    largest = torch.full((positions,), -torch.inf, dtype=torch.float64)\n    if real > 0:\n    ", ""),
            ),
            "each rank has a maximum of its own": changed(ENTROPY, ('    comm.all_reduce(largest, "max")\n', "")),
            "the maxima are added": changed(ENTROPY, ('(largest, "max")', "(largest)")),
            "no maximum at all": changed(
                ENTROPY, ('comm.all_reduce(largest, "max")', "largest = torch.zeros_like(largest)")
            ),
            "one maximum for all positions, of the first": changed(
                ENTROPY,
                ('comm.all_reduce(largest, "max")', 'comm.all_reduce(largest, "max")\n    largest[:] = largest[0]'),
            ),
            "the target is looked up on every rank": changed(
                ENTROPY,
                ("torch.nonzero((own >= 0) & (own < real))[:, 0]", "torch.arange(positions)"),
                ("own = targets - first", "own = (targets - first).clamp(0, width - 1)"),
            ),
            "the target is where the remainder says": changed(
                ENTROPY, ("own = targets - first", "own = targets % width")
            ),
            "shards are as long as the vocabulary divides": changed(
                ENTROPY, ("first = comm.rank * width", "first = comm.rank * (vocab_size // comm.world_size)")
            ),
            "the target's logit is not exchanged": changed(
                ENTROPY, ("    total, target = both\n", "    total = both[0]\n")
            ),
            "the sum is not exchanged": changed(ENTROPY, ("    total, target = both\n", "    target = both[1]\n")),
            "all logits are gathered": """
def cross_entropy(comm, logits, targets, vocab_size):
    width = logits.shape[1]
    everything = torch.cat(comm.all_gather(logits), 1)[:, :vocab_size].requires_grad_()
    loss = F.cross_entropy(everything, targets)
    loss.backward()
    gradient = F.pad(everything.grad, (0, width * comm.world_size - vocab_size))
    return loss.item(), gradient[:, comm.rank * width : (comm.rank + 1) * width]
""",
            "three meetings": changed(
                ENTROPY, ("    comm.all_reduce(both)\n", "    comm.all_reduce(both[0])\n    comm.all_reduce(both[1])\n")
            ),
            "the gradient is that of the sum": changed(ENTROPY, ("gradient / positions", "gradient")),
            "the gradient of padding is not 0": changed(
                ENTROPY,
                (
                    "    gradient = powers / total[:, None]\n",
                    "    gradient = torch.softmax(logits.nan_to_num(0, 0, 0) - largest[:, None], 1)\n",
                ),
            ),
            "the gradient without the target": changed(ENTROPY, ("    gradient[rows, own[rows]] -= 1\n", "")),
            "the largest logit is not given back": changed(
                ENTROPY, ("torch.log(total) + largest - target", "torch.log(total) - target")
            ),
            "logits are changed": changed(
                ENTROPY,
                ("    total = powers.sum(1)\n", "    total = powers.sum(1)\n    logits[:, real:] = 0\n"),
            ),
            "in float32": changed(
                ENTROPY,
                (
                    "    positions, width = logits.shape\n",
                    "    positions, width = logits.shape\n    logits = logits.float()\n",
                ),
                ("dtype=torch.float64", "dtype=torch.float32"),
            ),
        },
    ),
    "task_3": Answers(
        correct=(
            FIXED,
            """
class Fixed(Draft):
    def forward(self, x):
        self.x, self.h = x, x * self.gain
        self.a = F.relu(self.h @ self.up.T)
        return x + sum(self.mesh.tensor.all_gather(self.a @ self.down.T))

    def backward(self, grad):
        active = (self.a > 0).double()
        grad_a = grad @ self.down * active
        grad_h = sum(self.mesh.tensor.all_gather(grad_a @ self.up))
        row = torch.cat([(grad_h * self.x).sum(0), (grad_a.T @ self.h).flatten(), (grad.T @ self.a).flatten()])
        self.mesh.data.all_reduce(row, "avg")
        gain, up, down = row.split([self.gain.numel(), self.up.numel(), self.down.numel()])
        return torch.addcmul(grad, grad_h, self.gain), {
            "gain": gain, "up": up.view_as(self.up), "down": down.view_as(self.down),
        }
""",
        ),
        wrong={
            "as the draft": "class Fixed(Draft):\n    pass\n",
            "both axes are swapped": FIXED.replace("mesh.tensor", "mesh.middle")
            .replace("mesh.data", "mesh.tensor")
            .replace("mesh.middle", "mesh.data"),
            "outputs are summed over data": changed(FIXED, (SUM_OUT, SUM_OUT.replace("tensor", "data"))),
            "outputs are not summed": changed(FIXED, (SUM_OUT, "        return x + out\n")),
            "the residual is summed as well": changed(
                FIXED, (SUM_OUT, "        out += x\n        self.mesh.tensor.all_reduce(out)\n        return out\n")
            ),
            "hidden values are summed, not outputs": changed(
                FIXED,
                (
                    "        self.a = torch.relu(self.h @ self.up.T)\n",
                    "        self.a = self.h @ self.up.T\n        self.mesh.tensor.all_reduce(self.a)\n"
                    "        self.a = torch.relu(self.a)\n",
                ),
                (SUM_OUT, "        return x + out\n"),
            ),
            "gradients below are multiplied, not summed": changed(
                FIXED, (SUM_H, "        grad_h *= self.mesh.tensor.world_size\n")
            ),
            "gradients below are not summed": changed(FIXED, (SUM_H, "")),
            "gradients below are averaged": changed(FIXED, (SUM_H, SUM_H.replace("grad_h", 'grad_h, "avg"'))),
            "gradients below are summed with the residual's": changed(
                FIXED,
                (SUM_H, ""),
                (
                    "        grad_x = grad + grad_h * self.gain\n",
                    "        grad_x = grad + grad_h * self.gain\n        self.mesh.tensor.all_reduce(grad_x)\n",
                ),
            ),
            "gain's gradient is taken before the sum": changed(
                FIXED,
                (SUM_H, "        partial = grad_h.clone()\n" + SUM_H),
                ("(grad_h * self.x).sum(0)", "(partial * self.x).sum(0)"),
            ),
            "gain's gradient is summed once more": changed(
                FIXED,
                (
                    "        for gradient in (gain, up, down):\n",
                    "        self.mesh.tensor.all_reduce(gain)\n        for gradient in (gain, up, down):\n",
                ),
            ),
            "x and gain have a collective each": changed(
                FIXED,
                (SUM_H, "        partial = grad_h.clone()\n" + SUM_H),
                (
                    "        for gradient in (gain, up, down):\n",
                    "        gain = (partial * self.x).sum(0)\n        self.mesh.tensor.all_reduce(gain)\n"
                    "        for gradient in (gain, up, down):\n",
                ),
            ),
            "the gradient of x is averaged over users": changed(
                FIXED,
                (
                    "        grad_x = grad + grad_h * self.gain\n",
                    '        grad_x = grad + grad_h * self.gain\n        self.mesh.data.all_reduce(grad_x, "avg")\n',
                ),
            ),
            "gradients of parameters are averaged over tensor": changed(
                FIXED, ("self.mesh.data.all_reduce(gradient", "self.mesh.tensor.all_reduce(gradient")
            ),
            "gradients of parameters are averaged over both axes": changed(
                FIXED,
                (
                    '            self.mesh.data.all_reduce(gradient, "avg")\n',
                    '            self.mesh.data.all_reduce(gradient, "avg")\n'
                    '            self.mesh.tensor.all_reduce(gradient, "avg")\n',
                ),
            ),
            "gradients of parameters are sums": changed(FIXED, ('(gradient, "avg")', "(gradient)")),
            "gradients of parameters stay with each user": changed(
                FIXED, ('            self.mesh.data.all_reduce(gradient, "avg")\n', "            pass\n")
            ),
            "only gain is averaged": changed(FIXED, ("for gradient in (gain, up, down)", "for gradient in (gain,)")),
            "the gradient passes the relu everywhere": changed(FIXED, (" * (self.a > 0)", "")),
        },
    ),
    "task_4": Answers(
        correct=(HEADS, DEAL + GATHERED),
        wrong={
            "query heads are dealt in turns": changed(
                DEAL, ("range(rank * each, (rank + 1) * each)", "range(rank, num_heads, n)")
            )
            + FINISH,
            "copies of KV heads are dealt in turns": changed(DEAL, ("[rank // copies]", "[rank % num_kv_heads]"))
            + FINISH,
            "every rank has all KV heads if they are few": changed(DEAL, ("[rank // copies]", "[*range(num_kv_heads)]"))
            + FINISH,
            "query heads that are left over are dropped": changed(DEAL, ("if num_heads % n:", "if num_heads < n:"))
            + FINISH,
            "KV heads are cut between ranks": changed(
                DEAL,
                ("elif n % num_kv_heads == 0", "elif True"),
                ("n // num_kv_heads\n", "max(1, n // num_kv_heads)\n"),
            )
            + FINISH,
            "copies of KV heads are refused": changed(DEAL, ("elif n % num_kv_heads == 0", "elif False")) + FINISH,
            "KV heads are added over all ranks": DEAL
            + changed(
                FINISH,
                ("slice(comm.rank // copies * dim, comm.rank // copies * dim + dim)", "slice(0, dim)"),
            ),
            "shared KV heads are not added": DEAL
            + changed(FINISH, ("        kv = row[dim:][mine][None]\n", "        pass\n")),
            "shared KV heads are averaged": DEAL
            + changed(FINISH, ("row[dim:][mine][None]", "row[dim:][mine][None] / copies")),
            "KV heads travel though none is shared": DEAL
            + changed(
                FINISH,
                ("num_kv_heads * dim if copies > 1 else 0", "num_kv_heads * dim"),
            ),
            "head_norm is not added": DEAL + changed(FINISH, ("    head = row[:dim]\n", "")),
            "head_norm is averaged": DEAL + changed(FINISH, ("head = row[:dim]", "head = row[:dim] / n")),
            "stream_norm is never added": DEAL + changed(FINISH, ("stream = row[dim + len(buffer) :]", "pass")),
            "stream_norm is always added": DEAL + FINISH.replace("if sequence_parallel", "if True"),
            "norms that all ranks have count n times": DEAL + changed(FINISH, ("if comm.rank == 0", "if True")),
            "shared KV heads count as often as they are held": DEAL
            + changed(FINISH, ("(kv**2).sum() / copies", "(kv**2).sum()")),
            "the norm of what this rank has": DEAL + changed(FINISH, ("    comm.all_reduce(square)\n", "")),
            "the norm before anything is added": DEAL
            + changed(
                FINISH,
                (
                    "    head = row[:dim]\n",
                    "    first = (kv**2).sum(), (head**2).sum(), (stream**2).sum()\n    head = row[:dim]\n",
                ),
                ("(kv**2).sum() / copies", "first[0]"),
                ("if comm.rank == 0", "if True"),
                ("square + (head**2).sum() + (stream**2).sum()", "square + first[1] + first[2]"),
            ),
            "the norm, not its square": DEAL + changed(FINISH, ("float(square)", "float(square) ** 0.5")),
            "a meeting for each kind": DEAL
            + changed(
                FINISH,
                (
                    "    comm.all_reduce(row)\n",
                    "    for part in row.split([dim, len(row) - dim]):\n        comm.all_reduce(part)\n",
                ),
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            PLAN,
            """
from math import ceil

def own_parameters(config, n):
    q, kv, wide = config.num_heads / n, max(1, config.num_kv_heads / n), config.intermediate_size / n
    columns = 2 * (q + kv) * config.head_dim + 3 * wide + 2
    return int(config.hidden_size * (config.num_layers * columns + 1 + 2 * ceil(config.vocab_size / n)))

def choose(config, cluster, tokens, most):
    heads, kv = config.num_heads, config.num_kv_heads
    fitting = [n for n in range(1, cluster.gpus + 1)
               if heads % n == 0 == config.intermediate_size % n and max(n, kv) % min(n, kv) == 0]
    plans = []
    for n in fitting:
        rate = cluster.outside if n > cluster.per_node else cluster.inside
        sending = 16 * (n - 1) * config.num_layers * tokens * config.hidden_size / n / rate
        computing = 6 * tokens * own_parameters(config, n) / cluster.flops
        stream, between = kept_bytes(config)
        for sequence_parallel in (False, True):
            kept = between / n + (stream / n if sequence_parallel else stream)
            held = 16 * own_parameters(config, n) + kept * tokens * config.num_layers
            if held <= cluster.memory and (1 - most) * sending <= most * computing:
                plans.append((n, sequence_parallel))
    return min(plans, default=None)
""",
        ),
        wrong={
            "all parameters are divided": """
def own_parameters(config, n):
    columns = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim + 3 * config.intermediate_size
    return config.hidden_size * (config.num_layers * (columns + 2) + 1 + 2 * config.vocab_size) // n
"""
            + CHOOSE,
            "norms are divided": changed(OWN, ("layer += 2 * hidden\n", "layer += 2 * hidden // n\n")) + CHOOSE,
            "the last norm is forgotten": changed(OWN, (" + hidden + ", " + ")) + CHOOSE,
            "shared KV heads are cut": changed(OWN, ("        kv = 1\n", "        kv = config.num_kv_heads / n\n"))
            + CHOOSE,
            "the vocabulary is rounded down": changed(
                OWN, ("(config.vocab_size + n - 1) // n", "config.vocab_size // n")
            )
            + CHOOSE,
            "one table for both ends": changed(OWN, ("2 * hidden * tokens", "hidden * tokens")) + CHOOSE,
            "gate and up are one matrix": changed(OWN, ("3 * hidden *", "2 * hidden *")) + CHOOSE,
            "two collectives a layer": OWN + changed(CHOOSE, ("num_layers * 4 * 2", "num_layers * 2 * 2")),
            "a reduce-scatter's bytes": OWN + changed(CHOOSE, ("num_layers * 4 * 2", "num_layers * 4")),
            "every rank sends the whole stream": OWN + changed(CHOOSE, (" * (n - 1) / n * tokens", " * tokens")),
            "sequence parallelism halves what is sent": OWN
            + changed(
                CHOOSE,
                (
                    "        if seconds > most * (seconds + computing):\n            continue\n",
                    "        if seconds / 2 > most * (seconds / 2 + computing):\n            continue\n",
                ),
                (
                    "every * between / n <= cluster.memory:\n            return n, False",
                    "every * between / n <= cluster.memory and (\n"
                    "            seconds <= most * (seconds + computing)\n        ):\n            return n, False",
                ),
            ),
            "all links are those of a node": OWN
            + changed(CHOOSE, ("(cluster.inside if n <= cluster.per_node else cluster.outside)", "cluster.inside")),
            "a whole node already needs the outer links": OWN
            + changed(CHOOSE, ("n <= cluster.per_node", "n < cluster.per_node")),
            "the share of computing, not of both": OWN
            + changed(CHOOSE, ("most * (seconds + computing)", "most * computing")),
            "only the forward pass computes": OWN + changed(CHOOSE, ("6 * own", "2 * own")),
            "all ranks compute everything": OWN + changed(CHOOSE, ("6 * own *", "6 * own_parameters(config, 1) *")),
            "the stream is always divided": OWN
            + changed(CHOOSE, ("+ every * stream + every", "+ every * stream / n + every")),
            "sequence parallelism wherever there are ranks": OWN
            + changed(CHOOSE, (WITHOUT, WITHOUT.replace("n, False", "n, n > 1"))),
            "never with sequence parallelism": OWN
            + changed(CHOOSE, ("            return n, True\n", "            continue\n")),
            "activations are not divided": OWN + CHOOSE.replace("every * between / n", "every * between"),
            "more ranks before sequence parallelism": OWN
            + changed(
                CHOOSE,
                (WITHOUT, ""),
                ("def choose(", "def second("),
            )
            + changed(
                CHOOSE,
                (
                    "            return n, True\n    return None",
                    "            continue\n    return second(config, cluster, tokens, most)",
                ),
            ),
            "only powers of two": OWN
            + changed(CHOOSE, ("if config.num_heads % n or", "if n & (n - 1) or config.num_heads % n or")),
            "KV heads are not copied": OWN + changed(CHOOSE, (" and n % config.num_kv_heads:", ":")),
            "KV heads are not looked at": OWN
            + changed(CHOOSE, ("config.num_kv_heads % n and n % config.num_kv_heads", "False")),
            "the feed-forward layer is not looked at": OWN
            + changed(CHOOSE, (" or config.intermediate_size % n:", ":")),
            "the most ranks, not the fewest": OWN
            + changed(CHOOSE, ("range(1, cluster.gpus + 1)", "range(cluster.gpus, 0, -1)")),
            "one GPU is left out": OWN + changed(CHOOSE, ("cluster.gpus + 1", "cluster.gpus")),
            "what fits to the byte does not fit": OWN + CHOOSE.replace("<= cluster.memory", "< cluster.memory"),
        },
    ),
}
