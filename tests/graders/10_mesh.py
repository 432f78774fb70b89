"""Answers to 10_mesh that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
PLACES = """
def coordinates(mesh, rank):
    stride, at = math.prod(mesh.values()), {}
    for axis, size in mesh.items():
        stride //= size
        at[axis] = rank // stride % size
    return at

def groups(mesh, *axes):
    every = [coordinates(mesh, rank) for rank in range(math.prod(mesh.values()))]
    found = []
    for rank, at in enumerate(every):
        group = [r for r, other in enumerate(every) if all(other[a] == at[a] for a in mesh if a not in axes)]
        if group[0] == rank:
            found.append(group)
    return found

def leaving(mesh, node_size):
    found = set()
    for axis in mesh:
        for group in groups(mesh, axis):
            if len({rank // node_size for rank in group}) > 1:
                found.add(axis)
    return found
"""

CHAINS = """
def links(chain, rack_of):
    found = {}
    for sender, receiver in zip(chain, chain[1:]):
        a, b = rack_of[sender], rack_of[receiver]
        if a == b:
            continue
        link = (min(a, b), max(a, b))
        found[link] = found.get(link, 0) + 1
    return found

def lay(leader, copies, left, rack_of, price):
    most = copies - left
    best = None

    def go_on(chain, paid):
        nonlocal best
        racks = [rack_of[host] for host in chain]
        if max(racks.count(rack) for rack in racks) > most:
            return
        if len(chain) == copies:
            if best is None or paid < best[0]:
                best = paid, chain
            return
        for host in rack_of:
            if host in chain:
                continue
            link = tuple(sorted((rack_of[chain[-1]], rack_of[host])))
            go_on([*chain, host], paid + (price[link] if link[0] != link[1] else 0))

    go_on([leader], 0)
    return best and best[1]
"""

GREEDY = """
def lay(leader, copies, left, rack_of, price):
    chain = [leader]

    def cost(host):
        link = tuple(sorted((rack_of[chain[-1]], rack_of[host])))
        return price[link] if link[0] != link[1] else 0

    while len(chain) < copies:
        racks = [rack_of[host] for host in chain]
        free = [h for h in rack_of if h not in chain and racks.count(rack_of[h]) < copies - left]
        if not free:
            return None
        chain.append(min(free, key=cost))
    return chain if copies - left else None
"""

REDUCE = """
def reduce_gradients(mesh, kinds, grads):
    reduced = copy.deepcopy(grads)
    for rank, name in itertools.product(range(mesh.world_size), kinds):
        for at in range(len(grads[rank][name])):
            total = 0
            for other in mesh.group(rank, "dp"):
                if kinds[name] == "partial":
                    total += sum(grads[peer][name][at] for peer in mesh.group(other, "tp"))
                else:
                    total += grads[other][name][at]
            reduced[rank][name][at] = total / mesh.size("dp")
    return reduced
"""

NORM = """
def squared_norm(mesh, kinds, reduced):
    total = 0
    for rank in range(mesh.world_size):
        for name, kind in kinds.items():
            copies = mesh.size("dp")
            if kind != "cut":
                copies *= mesh.size("tp")
            total += sum(value * value for value in reduced[rank][name]) / copies
    return total
"""

LAYOUTS = """
def rank_bytes(model, batch, layout):
    dense = model.dense / layout.tp / layout.pp
    experts = model.expert_parameters / layout.ep / layout.pp
    copies = layout.dp
    expert_copies = layout.dp * layout.tp / layout.ep
    layers = model.layers / layout.pp
    in_flight = min(layout.pp, batch / layout.dp)
    activations = model.kept * layers * in_flight / layout.tp
    return 6 * (dense + experts) + 12 * (dense / copies + experts / expert_copies) + activations

def layouts(model, cluster, batch):
    found = []
    for tp, pp in itertools.product(range(1, model.heads + 1), range(1, model.layers + 1)):
        dp = cluster.gpus // (tp * pp)
        if dp * tp * pp != cluster.gpus:
            continue
        if model.heads % tp:
            continue
        if model.layers % pp:
            continue
        if not dp or batch % dp:
            continue
        if any(first // cluster.domain != (first + tp - 1) // cluster.domain for first in range(0, cluster.gpus, tp)):
            continue
        for ep in range(1, (model.experts or 1) + 1):
            if model.experts % ep:
                continue
            if (dp * tp) % ep:
                continue
            found.append(Layout(dp, tp, pp, ep))
    return [layout for layout in found if rank_bytes(model, batch, layout) <= cluster.memory]

def choose(model, cluster, batch):
    best = None
    for layout in layouts(model, cluster, batch):
        waits = exposed(model, cluster, batch, layout)
        if best is None or waits < best[0]:
            best = waits, layout
    return best[1] if best else None
"""
STRADDLES = "any(first // cluster.domain != (first + tp - 1) // cluster.domain for first in range(0, cluster.gpus, tp))"

TASKS = {
    "task_1": Answers(
        correct=(
            PLACES,
            """
def coordinates(mesh, rank):
    return MeshShape(tuple(mesh), tuple(mesh.values())).coordinates(rank)

def groups(mesh, *axes):
    return MeshShape(tuple(mesh), tuple(mesh.values())).groups(*axes)[::-1]

def leaving(mesh, node_size):
    ends = {axis: [(group[0], group[-1]) for group in groups(mesh, axis)] for axis in mesh}
    return {axis for axis in mesh if any(a // node_size < b // node_size for a, b in ends[axis])}
""",
        ),
        wrong={
            "the first axis turns fastest": changed(
                PLACES,
                ("stride, at = math.prod(mesh.values()), {}", "stride, at = 1, {}"),
                (
                    "        stride //= size\n        at[axis] = rank // stride % size\n",
                    "        at[axis] = rank // stride % size\n        stride *= size\n",
                ),
            ),
            "a place is not taken modulo the size": changed(PLACES, ("rank // stride % size", "rank // stride")),
            "ranks that share the place on the axis are a group": changed(PLACES, ("a not in axes", "a in axes")),
            "of several axes only the first counts": changed(PLACES, ("a not in axes", "a not in axes[:1]")),
            "a group is ranks that follow each other": changed(
                PLACES,
                (
                    "all(other[a] == at[a] for a in mesh if a not in axes)",
                    "r // math.prod(mesh[a] for a in axes) == rank // math.prod(mesh[a] for a in axes)",
                ),
            ),
            "groups of one rank are left out": changed(
                PLACES, ("if group[0] == rank:", "if group[0] == rank < group[-1]:")
            ),
            "only the first group is looked at": changed(
                PLACES, ("in groups(mesh, axis):", "in groups(mesh, axis)[:1]:")
            ),
            "only groups larger than a node leave it": changed(
                PLACES, ("len({rank // node_size for rank in group}) > 1", "len(group) > node_size")
            ),
            "a group that is not longer than a node stays in it": changed(
                PLACES, ("len({rank // node_size for rank in group}) > 1", "group[-1] - group[0] >= node_size")
            ),
            "an axis leaves if its last group does": changed(
                PLACES, ("for group in groups(mesh, axis):", "for group in groups(mesh, axis)[-1:]:")
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            CHAINS,
            """
def links(chain, rack_of):
    racks = [rack_of[host] for host in chain]
    hops = [tuple(sorted(hop)) for hop in zip(racks, racks[1:]) if len(set(hop)) == 2]
    return {hop: hops.count(hop) for hop in hops}

def lay(leader, copies, left, rack_of, price):
    best, lowest = None, math.inf
    for chain in itertools.permutations(rack_of, copies):
        held = [sum(rack_of[host] == rack for host in chain) for rack in set(rack_of.values())]
        paid = sum(price[link] * count for link, count in links(chain, rack_of).items())
        if chain[0] == leader and max(held) <= copies - left and paid < lowest:
            best, lowest = list(chain), paid
    return best
""",
        ),
        wrong={
            "a link has a name for each direction": changed(CHAINS, ("(min(a, b), max(a, b))", "(a, b)")),
            "messages within a rack are counted": changed(CHAINS, ("        if a == b:\n            continue\n", "")),
            "a link is counted once": changed(CHAINS, ("found.get(link, 0) + 1", "1")),
            "the leader sends to all": changed(
                CHAINS, ("zip(chain, chain[1:])", "((chain[0], host) for host in chain[1:])")
            ),
            "two racks are always enough": changed(CHAINS, ("most = copies - left", "most = copies - (left > 0)")),
            "every copy in a rack of its own": changed(
                CHAINS, ("most = copies - left", "most = 1 if left else copies")
            ),
            "all copies in one rack": changed(CHAINS, ("most = copies - left", "most = copies")),
            "only the leader's rack is lost": changed(
                CHAINS, ("max(racks.count(rack) for rack in racks) > most", "racks.count(racks[0]) > most")
            ),
            "one copy less in a rack than allowed": changed(
                CHAINS, ("for rack in racks) > most", "for rack in racks) >= most > 1")
            ),
            "the nearest rack next": CHAINS[: CHAINS.index("def lay")] + GREEDY.lstrip(),
            "counts crossings, and not their prices": changed(
                CHAINS, ("price[link] if link[0] != link[1] else 0", "link[0] != link[1]")
            ),
            "a chain never comes back to a rack": changed(
                CHAINS,
                (
                    "if host in chain:",
                    "if host in chain or (rack_of[host] in racks and rack_of[host] != racks[-1]):",
                ),
            ),
            "each link is paid once": changed(
                CHAINS,
                (
                    "if link[0] != link[1] else 0",
                    "if link[0] != link[1] and link not in links(chain, rack_of) else 0",
                ),
            ),
            "a host has two copies": changed(CHAINS, ("if host in chain:", "if host == chain[-1]:")),
            "any host leads": changed(
                CHAINS, ("    go_on([leader], 0)\n", "    for host in rack_of:\n        go_on([host], 0)\n")
            ),
            "the first safe chain": changed(CHAINS, ("if best is None or paid < best[0]:", "if best is None:")),
            "an empty chain where none is safe": changed(CHAINS, ("best and best[1]", "best[1] if best else []")),
        },
    ),
    "task_3": Answers(
        correct=(
            REDUCE + NORM,
            """
def reduce_gradients(mesh, kinds, grads):
    found = [{} for _ in grads]
    for name, kind in kinds.items():
        for group in mesh.groups("dp", "tp") if kind == "partial" else mesh.groups("dp"):
            sums = [sum(column) for column in zip(*(grads[rank][name] for rank in group))]
            for rank in group:
                found[rank][name] = tuple(value / mesh.size("dp") for value in sums)
    return found

def squared_norm(mesh, kinds, reduced):
    squares = [
        value**2
        for name, kind in kinds.items()
        for group in (mesh.groups("dp") if kind == "cut" else mesh.groups("dp", "tp"))
        for value in reduced[max(group)][name]
    ]
    return math.fsum(squares)
""",
        ),
        wrong={
            "as it runs: ranks that follow each other": """
def reduce_gradients(mesh, kinds, grads):
    return as_it_runs(mesh, kinds, grads)[0]
"""
            + NORM,
            "the mean over the tp group": changed(
                REDUCE + NORM,
                ('in mesh.group(rank, "dp"):', 'in mesh.group(rank, "tp"):'),
                ('total / mesh.size("dp")', 'total / mesh.size("tp")'),
            ),
            "the mean over all ranks": changed(
                REDUCE + NORM,
                ('in mesh.group(rank, "dp"):', 'in mesh.group(rank, "dp", "tp"):'),
                ('total / mesh.size("dp")', 'total / mesh.size("dp", "tp")'),
            ),
            "tp is taken to turn fastest, and dp next": changed(
                REDUCE + NORM,
                (
                    'in mesh.group(rank, "dp"):',
                    'in range(rank % mesh.size("tp"), mesh.size("dp", "tp"), mesh.size("tp")):',
                ),
            ),
            "partial gradients are not added": changed(REDUCE + NORM, ('kinds[name] == "partial"', "False")),
            "partial gradients are averaged over tp as well": changed(
                REDUCE + NORM,
                ('in mesh.group(other, "tp"))', 'in mesh.group(other, "tp")) / mesh.size("tp")'),
            ),
            "complete gradients are added over tp": changed(
                REDUCE + NORM, ('kinds[name] == "partial"', 'kinds[name] != "cut"')
            ),
            "pieces are added over tp": changed(REDUCE + NORM, ('kinds[name] == "partial"', 'kinds[name] != "copied"')),
            "the sum over dp": changed(REDUCE + NORM, ('total / mesh.size("dp")', "total")),
            "the mean over dp reaches over stages": changed(
                REDUCE + NORM,
                (
                    'in mesh.group(rank, "dp"):',
                    'in mesh.group(rank, *(axis for axis in mesh.names if axis != "tp")):',
                ),
                ('total / mesh.size("dp")', 'total / mesh.size(*(axis for axis in mesh.names if axis != "tp"))'),
            ),
            "works in the gradients that it was given": changed(
                REDUCE + NORM,
                ("copy.deepcopy(grads)", "grads"),
                ("grads[other][name][at]", "before[other][name][at]"),
                ("grads[peer][name][at]", "before[peer][name][at]"),
                ("    for rank, name in", "    before = copy.deepcopy(grads)\n    for rank, name in"),
            ),
            "the norm counts copies of dp": changed(REDUCE + NORM, ('copies = mesh.size("dp")', "copies = 1")),
            "the norm counts copies of tp": changed(REDUCE + NORM, ('copies *= mesh.size("tp")', "copies *= 1")),
            "the norm takes pieces for copies": changed(REDUCE + NORM, ('if kind != "cut":', "if True:")),
            "the norm counts partial gradients on each tp rank": changed(
                REDUCE + NORM, ('if kind != "cut":', 'if kind == "copied":')
            ),
            "the norm of rank 0": changed(
                REDUCE + NORM,
                (
                    "    for rank in range(mesh.world_size):\n        for name, kind",
                    "    for rank in [0]:\n        for name, kind",
                ),
                ("/ copies", "* 1"),
            ),
            "the norm of the first stage": changed(
                REDUCE + NORM,
                (
                    "    for rank in range(mesh.world_size):\n        for name, kind",
                    '    for rank in mesh.group(0, "dp", "tp"):\n        for name, kind',
                ),
            ),
            "the norm, and not its square": changed(REDUCE + NORM, ("    return total\n", "    return total**0.5\n")),
        },
    ),
    "task_4": Answers(
        correct=(
            LAYOUTS,
            """
def rank_bytes(model, batch, layout):
    dp, tp, pp, ep = layout
    stage = model.layers // pp * min(pp, batch // dp) * model.kept / tp
    dense = 6 * model.dense / (tp * pp) + 12 * model.dense / (dp * tp * pp)
    return stage + dense + 6 * model.expert_parameters / (pp * ep) + 12 * model.expert_parameters / (dp * tp * pp)

def layouts(model, cluster, batch):
    widest = math.gcd(model.heads, cluster.gpus)
    if cluster.gpus > cluster.domain:
        widest = math.gcd(widest, cluster.domain)
    found = []
    for tp in range(1, widest + 1):
        for pp in range(1, model.layers + 1):
            if widest % tp or model.layers % pp or cluster.gpus % (tp * pp) or batch % (cluster.gpus // (tp * pp)):
                continue
            stage = cluster.gpus // pp
            both = math.gcd(stage, model.experts) if model.experts else 1
            for ep in range(1, both + 1):
                layout = Layout(stage // tp, tp, pp, ep)
                if both % ep == 0 and rank_bytes(model, batch, layout) <= cluster.memory:
                    found.append(layout)
    return found

def choose(model, cluster, batch):
    ranked = sorted((exposed(model, cluster, batch, layout), layout) for layout in layouts(model, cluster, batch))
    return ranked[0][1] if ranked else None
""",
        ),
        wrong={
            "ep multiplies the number of GPUs": changed(
                LAYOUTS,
                ("if dp * tp * pp != cluster.gpus:", "if cluster.gpus % (tp * pp):"),
                ("if not dp or batch % dp:", "if not dp:"),
                ("            if (dp * tp) % ep:\n", "            if dp % ep or batch % (dp // ep):\n"),
                ("Layout(dp, tp, pp, ep))", "Layout(dp // ep, tp, pp, ep))"),
            ),
            "ep divides dp alone": changed(LAYOUTS, ("if (dp * tp) % ep:", "if dp % ep:")),
            "ep need not divide the experts": changed(LAYOUTS, ("if model.experts % ep:", "if False:")),
            "ep need not divide the ranks of a stage": changed(LAYOUTS, ("if (dp * tp) % ep:", "if ep > dp * tp:")),
            "a GPU may be left over": changed(LAYOUTS, ("dp * tp * pp != cluster.gpus", "dp * tp * pp > cluster.gpus")),
            "tp need not divide the heads": changed(LAYOUTS, ("if model.heads % tp:", "if False:")),
            "pp need not divide the layers": changed(LAYOUTS, ("if model.layers % pp:", "if False:")),
            "dp need not divide the batch": changed(LAYOUTS, ("if not dp or batch % dp:", "if not dp:")),
            "tp is at most a domain": changed(LAYOUTS, (STRADDLES, "tp > cluster.domain")),
            "tp always divides a domain": changed(LAYOUTS, (STRADDLES, "cluster.domain % tp")),
            "tp leaves domains": changed(LAYOUTS, (STRADDLES, "False")),
            "whatever fits with a byte to spare": changed(LAYOUTS, ("<= cluster.memory", "< cluster.memory")),
            "memory is not looked at": changed(LAYOUTS, (" if rank_bytes(model, batch, layout) <= cluster.memory", "")),
            "every rank has the whole optimizer": changed(
                LAYOUTS, ("(dense / copies + experts / expert_copies)", "(dense + experts)")
            ),
            "dp ranks share the optimizer of experts": changed(
                LAYOUTS, ("experts / expert_copies", "experts / copies")
            ),
            "parameters and gradients are shared as well": changed(
                LAYOUTS,
                ("6 * (dense + experts) + 12 * (", "18 * ("),
            ),
            "tp cuts experts": changed(LAYOUTS, ("/ layout.ep / layout.pp", "/ layout.ep / layout.pp / layout.tp")),
            "all experts are on each rank": changed(LAYOUTS, ("/ layout.ep / layout.pp", "/ layout.pp")),
            "pp microbatches are in flight, however few there are": changed(
                LAYOUTS, ("min(layout.pp, batch / layout.dp)", "layout.pp")
            ),
            "all microbatches are in flight": changed(
                LAYOUTS, ("min(layout.pp, batch / layout.dp)", "batch / layout.dp")
            ),
            "one microbatch is in flight": changed(LAYOUTS, ("min(layout.pp, batch / layout.dp)", "1")),
            "tp does not cut what a layer keeps": changed(LAYOUTS, ("* in_flight / layout.tp", "* in_flight")),
            "the most dp ranks win": changed(
                LAYOUTS, ("waits = exposed(model, cluster, batch, layout)", "waits = -layout.dp")
            ),
            "the smallest memory wins": changed(
                LAYOUTS, ("waits = exposed(model, cluster, batch, layout)", "waits = rank_bytes(model, batch, layout)")
            ),
            "a choice with a smaller share of the batch": changed(
                LAYOUTS, ("exposed(model, cluster, batch, layout)", "exposed(model, cluster, layout.dp, layout)")
            ),
            "something is chosen that does not fit": changed(
                LAYOUTS,
                (
                    "in layouts(model, cluster, batch):",
                    "in layouts(model, Cluster(cluster.gpus, cluster.domain, math.inf), batch):",
                ),
            ),
            "fails where nothing fits": changed(LAYOUTS, ("best[1] if best else None", "best[1]")),
        },
    ),
}
