"""Answers to 04_collectives that its graders must tell apart."""

from tests.graders.answers import Answers

# What several answers have in common
CHUNKS = """
def scatter_chunk(rank, step, n):
    return SCATTER

def gather_chunk(rank, step, n):
    return GATHER
"""
PRICE = """
def predict(way, n, nbytes, link):
    rounds, tensors, sent = table(n)[way]
    return rounds, sent * nbytes, rounds * link.latency + tensors * nbytes / link.bandwidth

def table(n):
    log = n.bit_length() - 1
    return {
        "star": (2 * (n - 1), 2 * (n - 1), n - 1),
        "exchange": (n - 1, n - 1, n - 1),
        "ring": (2 * (n - 1), 2 * (n - 1) / n, 2 * (n - 1) / n),
        "halving-doubling": (2 * log, 2 * (n - 1) / n, 2 * (n - 1) / n),
    }

def break_even(one, other, n, link):
    few, many = sorted((table(n)[one], table(n)[other]))
    if few[0] == many[0] or few[1] <= many[1] or not link.latency:
        return None
    return link.latency * link.bandwidth * (many[0] - few[0]) / (few[1] - many[1])
"""
DIAGNOSE = """
def diagnose(plan):
    error = complaint(plan).partition(":")[0]
    if not error:
        return None
    held = [{c: {rank} for c in plan.starts_with(rank)} for rank in range(plan.world_size)]
    for number, transfers in enumerate(plan.rounds, start=1):
        after = [dict(mine) for mine in held]
        for t in transfers:
            for c in t.chunks:
                came, there = held[t.src].get(c), held[t.dst].get(c, set())
                if came is None:
                    return error, number, t
                if error == "CountedTwice" and t.reduce and came & there:
                    return error, number, t
                if error == "ContributionLost" and not t.reduce and not there <= came:
                    return error, number, t
                after[t.dst][c] = came | there if t.reduce else came
        held = after
    return error, None, None
"""
MEND = """
def mend(plan):
    for number in range(len(plan.rounds), 0, -1):
        for t in plan.rounds[number - 1]:
            for chunk in range(plan.num_chunks + 1 - t.count):
                tried = rewrite(plan, number, t.src, chunk=chunk)
                if not complaint(tried):
                    return tried
"""
LOOK = """
import re

def diagnose(plan):
    states = []
    try:
        simulate(plan, lambda number, state: states.append([dict(held) for held in state]))
        return None
    except PlanError as raised:
        error, said = type(raised).__name__, str(raised)
    if error != "ContributionLost":
        number, rank = map(int, re.match(r"round (\\d+): rank (\\d+)", said).groups())
        side = "src" if error == "NothingToSend" else "dst"
        return error, number, next(t for t in plan.rounds[number - 1] if getattr(t, side) == rank)
    for number in range(1, len(states)):
        for rank in range(plan.world_size):
            for chunk, ranks in states[number - 1][rank].items():
                if not ranks <= states[number][rank][chunk]:
                    return error, number, next(t for t in plan.rounds[number - 1] if t.dst == rank)
    return error, None, None
"""
BROADCAST = """
def broadcast(n, root):
    rounds = []
    for k in reversed(range((n - 1).bit_length())):
        pairs = [(place, place + 2**k) for place in range(0, n, 2 ** (k + 1)) if place + 2**k < n]
        rounds.append(tuple(Transfer((root + a) % n, (root + b) % n, 0) for a, b in pairs))
    return Plan("farthest first", "broadcast", n, 1, tuple(rounds), root)
"""
BACKWARDS = """
def backwards(plan):
    rounds = []
    for transfers in plan.rounds:
        rounds.insert(0, tuple(replace(t, src=t.dst, dst=t.src, reduce=True) for t in transfers))
    collective = "reduce" if plan.collective == "broadcast" else "reduce_scatter"
    return Plan("backwards", collective, plan.world_size, plan.num_chunks, tuple(rounds), plan.root)
"""
WALK = """
async def walk(plan, tensor, me):
    edges = np.cumsum([0, *map(len, np.array_split(tensor, plan.num_chunks))])
    for transfers in plan.rounds:
        for t in transfers:
            part = tensor[edges[t.chunk] : edges[t.chunk + t.count]]
            if t.src == me.rank and len(part):
                me.send(t.dst, part.copy())
        for t in transfers:
            part = tensor[edges[t.chunk] : edges[t.chunk + t.count]]
            if t.dst == me.rank and len(part):
                arrived = await me.receive(t.src)
                if t.reduce:
                    part += arrived
                else:
                    part[:] = arrived
    return tensor
"""
DESIGN = """
def design(hosts, gpus, nbytes, nvlink, port):
    n = hosts * gpus
    distances = [2**k for k in range(n.bit_length() - 1)]
    ways = [build(n, distances, halvings) for halvings in range(len(distances) + 1)]
    return min(ways, key=lambda plan: price_on(plan, gpus, nbytes, nvlink, port))

def build(n, distances, halvings):
    transfers, back, pieces = [], [], 2**halvings
    ranges = {rank: (0, pieces) for rank in range(n)}
    for number, d in enumerate(distances):
        halve, before = number < halvings, dict(ranges)
        for rank, (first, count) in before.items():
            if halve:  # the farther rank keeps the lower half
                half = count // 2
                ranges[rank] = (first if rank & d else first + half), half
        for rank in range(n):
            first, count = ranges[rank ^ d]
            transfers.append(Transfer(rank, rank ^ d, first, True, count))
            if halve:
                back.append((number, Transfer(rank, rank ^ d, *ranges[rank][:1], False, ranges[rank][1])))
    back.sort(key=lambda pair: -pair[0])
    rounds = [tuple(transfers[i : i + n]) for i in range(0, len(transfers), n)]
    rounds += [tuple(t for k, t in back if k == number) for number in reversed(range(halvings))]
    return Plan("partners", "all_reduce", n, pieces, tuple(rounds))
"""
BY_SUBSETS = """
from itertools import product

def design(hosts, gpus, nbytes, nvlink, port):
    n, best = hosts * gpus, None
    for halves in product([False, True], repeat=n.bit_length() - 1):
        plan = of_choice(n, halves)
        cost = price_on(plan, gpus, nbytes, nvlink, port)
        if best is None or cost < best[0]:
            best = cost, plan
    return best[1]

def of_choice(n, halves):
    pieces, mine = 2 ** sum(halves), [0] * n
    rounds, undo, width = [], [], pieces
    for k, halve in enumerate(halves):
        d = 2**k
        if halve:
            width //= 2
            mine = [mine[r] + width * (r // d % 2) for r in range(n)]
            undo = [tuple(Transfer(r, r ^ d, mine[r], count=width) for r in range(n)), *undo]
        rounds.append(tuple(Transfer(r, r ^ d, mine[r ^ d], reduce=True, count=width) for r in range(n)))
    return Plan("chosen", "all_reduce", n, pieces, (*rounds, *undo))
"""


def filled(text: str, **parts: str) -> str:
    """A text with words in capitals replaced."""
    for word, code in parts.items():
        text = text.replace(word, code)
    return text


def changed(text: str, old: str, new: str) -> str:
    """A text with one mistake in it; `old` must be there."""
    assert old in text, old
    return text.replace(old, new)


TASKS = {
    "task_1": Answers(
        correct=(
            filled(CHUNKS, SCATTER="(rank - (n - 1 - step)) % n", GATHER="(rank - n + step) % n"),
            filled(
                CHUNKS,
                SCATTER="(rank + 1) % n if step == 0 else scatter_chunk((rank + 1) % n, step - 1, n)",
                GATHER="rank if step == 0 else gather_chunk((rank + 1) % n, step - 1, n)",
            ),
        ),
        wrong={
            "the ring to the right": filled(CHUNKS, SCATTER="(rank - step - 1) % n", GATHER="(rank - step) % n"),
            "the complete chunk ends on the wrong neighbour": filled(
                CHUNKS, SCATTER="(rank + step) % n", GATHER="(rank + step) % n"
            ),
            "does not close the ring": filled(CHUNKS, SCATTER="rank + step + 1", GATHER="rank + step"),
            "gathers a chunk that it does not have yet": filled(
                CHUNKS, SCATTER="(rank + step + 1) % n", GATHER="(rank + step + 1) % n"
            ),
            "sends one chunk again and again": filled(CHUNKS, SCATTER="(rank + 1) % n", GATHER="rank"),
            "one in place of the other": filled(CHUNKS, SCATTER="(rank + step) % n", GATHER="(rank + step + 1) % n"),
            "for four ranks only": filled(CHUNKS, SCATTER="(rank + step + 1) % 4", GATHER="(rank + step) % 4"),
            "the scatter counts down to its own chunk": filled(
                CHUNKS, SCATTER="(rank + n - step) % n", GATHER="(rank + step) % n"
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            PRICE,
            """
def predict(way, n, nbytes, link):
    def message(size):
        return link.latency + size / link.bandwidth

    piece = nbytes / n
    if way == "star":
        return 2 * (n - 1), (n - 1) * nbytes, 2 * (n - 1) * message(nbytes)
    if way == "exchange":
        return n - 1, (n - 1) * nbytes, (n - 1) * message(nbytes)
    if way == "ring":
        return 2 * (n - 1), 2 * (n - 1) * piece, 2 * (n - 1) * message(piece)
    sizes = []
    half = nbytes / 2
    while len(sizes) < round(math.log2(n)):
        sizes.append(half)
        half /= 2
    return 2 * len(sizes), 2 * sum(sizes), 2 * sum(map(message, sizes))

def break_even(one, other, n, link):
    def lead(nbytes):
        first, second = (predict(way, n, nbytes, link)[2] for way in (one, other))
        return 0 if math.isclose(first, second, rel_tol=1e-13) else first - second

    small, large = 1e-6, 1e18
    if lead(small) * lead(large) >= 0:
        return None
    for _ in range(200):
        middle = math.sqrt(small * large)
        if lead(small) * lead(middle) > 0:
            small = middle
        else:
            large = middle
    return middle
""",
        ),
        wrong={
            "a star's time from the bytes that the root sends": changed(
                PRICE, "(2 * (n - 1), 2 * (n - 1), n - 1)", "(2 * (n - 1), n - 1, n - 1)"
            ),
            "the root sends what it receives, too": changed(
                PRICE, "(2 * (n - 1), 2 * (n - 1), n - 1)", "(2 * (n - 1), 2 * (n - 1), 2 * (n - 1))"
            ),
            "a ring passes whole tensors": changed(
                PRICE, '"ring": (2 * (n - 1), 2 * (n - 1) / n, 2', '"ring": (2 * (n - 1), 2 * (n - 1), 2'
            ),
            "a ring is only the first half of it": changed(
                PRICE,
                '"ring": (2 * (n - 1), 2 * (n - 1) / n, 2 * (n - 1) / n)',
                '"ring": (n - 1, (n - 1) / n, (n - 1) / n)',
            ),
            "a ring goes round once more": changed(PRICE, '"ring": (2 * (n - 1)', '"ring": (2 * n'),
            "an exchange takes one round": changed(
                PRICE, '"exchange": (n - 1, n - 1', '"exchange": (min(1, n - 1), n - 1'
            ),
            "halving without doubling": changed(PRICE, '"halving-doubling": (2 * log', '"halving-doubling": (log'),
            "halves stay as large as the first": changed(
                PRICE, "(2 * log, 2 * (n - 1) / n, 2 * (n - 1) / n)", "(2 * log, log, log)"
            ),
            "a break-even where one is better in both": changed(
                PRICE, " or few[1] <= many[1]", " or few[1] == many[1]"
            ),
            "divides by zero where bytes are equal": changed(PRICE, "few[1] <= many[1]", "few[1] < many[1]"),
            "0 for no break-even": changed(PRICE, "        return None\n", "        return 0.0\n"),
            "a break-even of size 0": changed(PRICE, " or not link.latency", ""),
            "tensors in place of bytes": changed(PRICE, "return link.latency * link.bandwidth *", "return"),
            "the product of latency and bandwidth, whatever the plans": changed(
                PRICE, " * (many[0] - few[0]) / (few[1] - many[1])", ""
            ),
        },
    ),
    "task_3": Answers(
        correct=(DIAGNOSE + MEND, LOOK + MEND),
        wrong={
            "keeps simulate's own state": changed(LOOK, "[dict(held) for held in state]", "state") + MEND,
            "copies the list, not what ranks hold": changed(LOOK, "[dict(held) for held in state]", "list(state)")
            + MEND,
            "counts rounds from 0": changed(DIAGNOSE, "start=1", "start=0") + MEND,
            "looks at the first chunk of a message": changed(DIAGNOSE, "for c in t.chunks", "for c in [t.chunk]")
            + MEND,
            "a loss that hurts nobody": changed(
                changed(
                    DIAGNOSE, "    if not error:\n        return None\n", "    error = error or 'ContributionLost'\n"
                ),
                "    return error, None, None",
                "    return (error, None, None) if complaint(plan) else None",
            )
            + MEND,
            "blames the last round for a missing message": changed(
                DIAGNOSE, "return error, None, None", "return error, len(plan.rounds), plan.rounds[-1][-1]"
            )
            + MEND,
            "takes a missing message for a sound plan": changed(DIAGNOSE, "return error, None, None", "return None")
            + MEND,
            "messages of one round follow each other": changed(
                DIAGNOSE, "after[t.dst][c] =", "held[t.dst][c] = after[t.dst][c] ="
            )
            + MEND,
            "blames the message that brings the victim its last news": """
def diagnose(plan):
    try:
        simulate(plan)
        return None
    except PlanError as raised:
        error, words = type(raised).__name__, str(raised).replace(":", "").replace(",", "").split()
    rank, chunk = (int(words[words.index(word) + 1]) for word in ("rank", "chunk"))
    for number in range(len(plan.rounds), 0, -1):
        for t in plan.rounds[number - 1]:
            if rank in (t.src, t.dst) and chunk in t.chunks:
                return error, number, t
    return error, None, None
"""
            + MEND,
            "mends where it shows": DIAGNOSE
            + """
def mend(plan):
    error, number, t = diagnose(plan)
    for chunk in range(plan.num_chunks + 1 - t.count if number else 0):
        tried = rewrite(plan, number, t.src, chunk=chunk)
        if not complaint(tried):
            return tried
    return plan
""",
            "tries messages of one chunk only": DIAGNOSE
            + changed(
                MEND,
                "for t in plan.rounds[number - 1]:",
                "for t in filter(lambda t: t.count == 1, plan.rounds[number - 1]):",
            ),
            "tries chunks beyond the last": DIAGNOSE
            + changed(MEND, "plan.num_chunks + 1 - t.count", "plan.num_chunks"),
            "mends by taking the message out": DIAGNOSE
            + """
def mend(plan):
    for number, transfers in enumerate(plan.rounds):
        for t in transfers:
            rest = tuple(other for other in transfers if other is not t)
            tried = replace(plan, rounds=(*plan.rounds[:number], rest, *plan.rounds[number + 1 :]))
            if not complaint(tried):
                return tried
    return plan
""",
            "a new ring in place of the plan": DIAGNOSE
            + """
def mend(plan):
    return plans.ring("all_reduce", plan.world_size)
""",
        },
    ),
    "task_4": Answers(
        correct=(
            BROADCAST + BACKWARDS,
            """
from minilib.mechanisms.replication import pack_rounds

def broadcast(n, root):
    have, lack, transfers = [root], [rank for rank in range(n) if rank != root], []
    while lack:
        for rank in list(have):
            if lack:
                have.append(lack.pop())
                transfers.append(Transfer(rank, have[-1], 0))
    return Plan("gossip", "broadcast", n, 1, pack_rounds(transfers), root)

def backwards(plan):
    last = [[Transfer(t.dst, t.src, t.chunk, True, t.count) for t in some] for some in plan.rounds]
    names = dict(broadcast="reduce", all_gather="reduce_scatter")
    return replace(plan, rounds=tuple(map(tuple, last[::-1])), collective=names[plan.collective])
""",
        ),
        wrong={
            "the chapter's tree": 'def broadcast(n, root):\n    return plans.tree("broadcast", n, root)\n' + BACKWARDS,
            "only the root sends": 'def broadcast(n, root):\n    return plans.star("broadcast", n, root)\n' + BACKWARDS,
            "the root is rank 0": changed(BROADCAST, "(root + a) % n, (root + b) % n", "a, b") + BACKWARDS,
            "the plan does not know its root": changed(BROADCAST, ", tuple(rounds), root)", ", tuple(rounds))")
            + BACKWARDS,
            "sends to some who have it": changed(BROADCAST, " if place + 2**k < n", "") + BACKWARDS,
            "powers of two only": changed(BROADCAST, "(n - 1).bit_length()", "n.bit_length() - 1") + BACKWARDS,
            "a round too many": changed(BROADCAST, "(n - 1).bit_length()", "n.bit_length()") + BACKWARDS,
            "keeps the order of the rounds": BROADCAST
            + changed(BACKWARDS, "rounds.insert(0, ", "rounds.insert(len(rounds), "),
            "does not add": BROADCAST + changed(BACKWARDS, ", reduce=True", ""),
            "adds, but in the same direction": BROADCAST + changed(BACKWARDS, "src=t.dst, dst=t.src, ", ""),
            "one chunk a message": BROADCAST + changed(BACKWARDS, "reduce=True)", "reduce=True, count=1)"),
            "the reduce's root is rank 0": BROADCAST + changed(BACKWARDS, ", plan.root)", ")"),
            "a reduce of whatever it gets": BROADCAST
            + changed(BACKWARDS, '"reduce" if plan.collective == "broadcast" else "reduce_scatter"', '"reduce"'),
            "all-reduces, and so sends twice as much": BROADCAST
            + changed(BACKWARDS, "tuple(rounds), plan.root", "(*rounds, *plan.rounds), plan.root"),
        },
    ),
    "task_5": Answers(
        correct=(
            WALK,
            """
async def walk(plan, tensor, me):
    chunks = np.array_split(tensor, plan.num_chunks)
    for transfers in plan.rounds:
        mine = {t.src == me.rank: t for t in transfers if me.rank in (t.src, t.dst)}
        if True in mine:
            content = np.concatenate([chunks[c] for c in mine[True].chunks])
            if content.size:
                me.send(mine[True].dst, content)
        if False in mine:
            into = mine[False].chunks
            sizes = [chunks[c].size for c in into]
            if sum(sizes):
                arrived = np.split(await me.receive(mine[False].src), np.cumsum(sizes)[:-1])
                for c, came in zip(into, arrived):
                    chunks[c] = chunks[c] + came if mine[False].reduce else came
    return np.concatenate(chunks)
""",
            """
async def walk(plan, tensor, me):
    now = tensor
    owner = np.concatenate([np.full(len(x), c) for c, x in enumerate(np.array_split(tensor, plan.num_chunks))])
    for transfers in plan.rounds:
        begin, now = now, now.copy()
        for t in transfers:
            part = (owner >= t.chunk) & (owner < t.chunk + t.count)
            if t.src == me.rank and part.any():
                me.send(t.dst, begin[part])
        for t in transfers:
            part = (owner >= t.chunk) & (owner < t.chunk + t.count)
            if t.dst == me.rank and part.any():
                now[part] = await me.receive(t.src) + t.reduce * begin[part]
    return now
""",
        ),
        wrong={
            "waits before it sends": """
async def walk(plan, tensor, me):
    edges = np.cumsum([0, *map(len, np.array_split(tensor, plan.num_chunks))])
    for transfers in plan.rounds:
        before, old = tensor.copy(), tensor
        for t in sorted(transfers, key=lambda t: t.src == me.rank):
            part = slice(edges[t.chunk], edges[t.chunk + t.count])
            if t.dst == me.rank and len(old[part]):
                arrived = await me.receive(t.src)
                old[part] = old[part] + arrived if t.reduce else arrived
            if t.src == me.rank and len(old[part]):
                me.send(t.dst, before[part])
    return tensor
""",
            "sends its memory and adds to it": changed(WALK, "part.copy()", "part"),
            "copies only if it also receives in the round": changed(
                WALK, "part.copy()", "part.copy() if any(u.dst == me.rank for u in transfers) else part"
            ),
            "copies only what a transfer of the round overwrites": changed(
                WALK,
                "part.copy()",
                "part.copy() if any(u.dst == me.rank and set(u.chunks) & set(t.chunks) for u in transfers) else part",
            ),
            "copies only what will be added": changed(WALK, "part.copy()", "part.copy() if t.reduce else part"),
            "whole numbers": changed(WALK, "part.copy()", "part.astype(int)"),
            "copies when it reads, not when it sends": changed(
                changed(WALK, "part.copy()", "part"), "await me.receive(t.src)", "(await me.receive(t.src)).copy()"
            ),
            "a message for every chunk": changed(
                changed(
                    WALK,
                    "me.send(t.dst, part.copy())",
                    "for c in t.chunks:\n                    me.send(t.dst, tensor[edges[c] : edges[c + 1]].copy())",
                ),
                "arrived = await me.receive(t.src)",
                "arrived = np.concatenate([await me.receive(t.src) for c in t.chunks])",
            ),
            "the first chunk of a message only": changed(WALK, "edges[t.chunk + t.count]", "edges[t.chunk + 1]"),
            "sends empty messages": changed(
                changed(WALK, "t.src == me.rank and len(part)", "t.src == me.rank"),
                "t.dst == me.rank and len(part)",
                "t.dst == me.rank",
            ),
            "waits for empty messages": changed(WALK, "t.dst == me.rank and len(part)", "t.dst == me.rank"),
            "pieces of equal size": changed(
                WALK,
                "edges = np.cumsum([0, *map(len, np.array_split(tensor, plan.num_chunks))])",
                "edges = [len(tensor) // plan.num_chunks * k for k in range(plan.num_chunks + 1)]",
            ),
            "rounds the size of a chunk up": changed(
                WALK,
                "edges = np.cumsum([0, *map(len, np.array_split(tensor, plan.num_chunks))])",
                "edges = [-(-len(tensor) // plan.num_chunks) * k for k in range(plan.num_chunks + 1)]",
            ),
            "adds whatever comes": changed(WALK, "if t.reduce:", "if True:"),
            "takes over whatever comes": changed(WALK, "if t.reduce:", "if False:"),
            "skips rounds in which it sends nothing": changed(
                WALK,
                "    for transfers in plan.rounds:\n",
                "    for transfers in plan.rounds:\n"
                "        if all(t.src != me.rank for t in transfers):\n"
                "            continue\n",
            ),
            "sends what it has after receiving": changed(
                changed(WALK, "me.send(t.dst, part.copy())", "later.append((t.dst, part))"),
                "    for transfers in plan.rounds:\n",
                "    later = []\n"
                "    for transfers in plan.rounds:\n"
                "        for dst, part in later:\n"
                "            me.send(dst, part.copy())\n"
                "        later = []\n",
            ),
            "expects every message to be added by plan.collective": changed(
                WALK, "if t.reduce:", "if plan.collective != 'broadcast' and plan.collective != 'all_gather':"
            ),
        },
    ),
    "task_6": Answers(
        correct=(DESIGN, BY_SUBSETS),
        wrong={
            "a flat ring": """
def design(hosts, gpus, nbytes, nvlink, port):
    return plans.ring("all_reduce", hosts * gpus)
""",
            "two levels of rings": """
def design(hosts, gpus, nbytes, nvlink, port):
    return plans.two_level([rank // gpus for rank in range(hosts * gpus)])
""",
            "halving and doubling, farthest first": """
def design(hosts, gpus, nbytes, nvlink, port):
    return plans.halving_doubling(hosts * gpus)
""",
            "the best of the library": """
def design(hosts, gpus, nbytes, nvlink, port):
    n = hosts * gpus
    there = [plans.ring("all_reduce", n), plans.tree("all_reduce", n), plans.halving_doubling(n)]
    there += [plans.two_level([rank // gpus for rank in range(n)]), plans.star("all_reduce", n)]
    return min(there, key=lambda plan: price_on(plan, gpus, nbytes, nvlink, port))
""",
            "the farthest partners first": changed(
                DESIGN, "for k in range(n.bit_length() - 1)]", "for k in reversed(range(n.bit_length() - 1))]"
            ),
            "always halves": changed(DESIGN, "in range(len(distances) + 1)]", "in [len(distances)]]"),
            "never halves": changed(DESIGN, "in range(len(distances) + 1)]", "in [0]]"),
            "halves everywhere or nowhere": changed(DESIGN, "in range(len(distances) + 1)]", "in {0, len(distances)}]"),
            "halves at all distances but the last": changed(
                DESIGN, "in range(len(distances) + 1)]", "in [max(0, len(distances) - 1)]]"
            ),
            "halves within the host, whole ranges between": changed(
                DESIGN, "in range(len(distances) + 1)]", "in [gpus.bit_length() - 1]]"
            ),
            "switches at 64 KiB": changed(
                DESIGN, "in range(len(distances) + 1)]", "in [0 if nbytes < 65536 else len(distances)]]"
            ),
            "prices all links as NVLink": changed(DESIGN, "nbytes, nvlink, port))", "nbytes, nvlink, nvlink))"),
            "takes the plan with the fewest rounds": changed(
                DESIGN,
                "key=lambda plan: price_on(plan, gpus, nbytes, nvlink, port)",
                "key=lambda plan: len(plan.rounds)",
            ),
            "never gives the halves back": changed(
                DESIGN, "for number in reversed(range(halvings))]", "for number in ()]"
            ),
        },
    ),
}
