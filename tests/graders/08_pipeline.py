"""Answers to 08_pipeline that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
PIPE = """
def pipe(ticks, room=None):
    stages, items = len(ticks), len(ticks[0])
    begin = [[0] * items for _ in range(stages)]
    total, starved, blocked = 0, [0] * stages, [0] * stages
    for item in range(items + 1):
        for stage in range(stages):
            end = gone = 0
            if item:
                last = item - 1
                end = gone = begin[stage][last] + ticks[stage][last]
                if room is not None and stage + 1 < stages and last >= room:
                    gone = max(gone, begin[stage + 1][last - room])
                blocked[stage] += gone - end
                total = end
            if item < items:
                there = begin[stage - 1][item] + ticks[stage - 1][item] if stage else 0
                begin[stage][item] = max(there, gone)
                starved[stage] += begin[stage][item] - gone
    return total, starved, blocked
"""
CLOSED_FORM = "sum(map(max, ticks)) + (items - 1) * max(map(max, ticks)) if items else 0"

RULE = """
def schedule(p, m, limit=None):
    rows, free, over, now = [[] for _ in range(p)], [0] * p, dict(), 0

    def ready(rank, kind, number):
        return rank in (-1, p) or over.get((rank, kind, number), float("inf")) <= now

    while sum(map(len, rows)) < 2 * p * m:
        for rank in range(p):
            b = sum(action.kind == "B" for action in rows[rank])
            f = len(rows[rank]) - b
            most = min(p - rank, p if limit is None else limit)
            may = []
            if b < f and ready(rank, "F", b) and ready(rank + 1, "B", b):
                may.append((Action(rank, "B", b), 2))
            if f < m and f - b < most and ready(rank - 1, "F", f):
                may.append((Action(rank, "F", f), 1))
            if free[rank] <= now and may:
                action, length = may[0]
                rows[rank].append(action)
                over[action] = free[rank] = now + length
        now = now + 1
    return rows
"""
BY_TURNS = """
def schedule(p, m, limit=None):
    rows = []
    for rank in range(p):
        ahead = AHEAD
        row = [Action(rank, "F", number) for number in range(ahead)]
        for number in range(m):
            if ahead + number < m:
                row.append(Action(rank, "F", ahead + number))
            row.append(Action(rank, "B", number))
        rows.append(row)
    return rows
"""
HELD = """
def most_held(actions):
    counts = [0]
    for action in actions:
        counts.append(counts[-1] + {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind])
    return max(counts)
"""

CIRCLE = """
def circle(programs, buffer=0):
    place, put, taken = [0] * len(programs), [], []
    changed = True
    while changed:
        changed = False
        for rank, program in enumerate(programs):
            while place[rank] < len(program):
                call = program[place[rank]]
                if call.kind == "send":
                    letter = (rank, call.peer, call.message)
                    if letter not in put:
                        put.append(letter)
                        changed = True
                    waiting_there = [one for one in put if one not in taken and one[:2] == letter[:2]]
                    if len(waiting_there) > buffer:
                        break
                else:
                    letter = (call.peer, rank, call.message)
                    if letter not in put:
                        break
                    taken.append(letter)
                place[rank] += 1
                changed = True
    stuck = {rank for rank in range(len(programs)) if place[rank] < len(programs[rank])}
    found = set()
    for rank in stuck:
        walk = [rank]
        while walk.count(walk[-1]) == 1:
            walk.append(programs[walk[-1]][place[walk[-1]]].peer)
        if walk[-1] == rank:
            found.add(rank)
    return found
"""
LEAST = """
def least_buffer(programs):
    size = 0
    while circle(programs, size):
        if size > max(len(program) for program in programs):
            return None
        size += 1
    return size
"""

STEP = """
def step(stages, microbatches):
    total = 0
    for _, targets in microbatches:
        total += int(targets.ne(IGNORED).sum())
    first, last = stages[0].table, stages[-1].table
    earlier = [None if table.grad is None else table.grad.clone() for table in (first, last)]
    if first is not last:
        first.grad, last.grad = None, None
    answer = 0.0
    for tokens, targets in microbatches:
        inputs, outputs, x = [], [], tokens
        for stage in stages:
            inputs.append(x if stage.first else x.detach().requires_grad_())
            x = stage(inputs[-1])
            outputs.append(x)
        logits, wanted = x.flatten(0, -2), targets.flatten()
        outputs[-1] = cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum") / total
        answer += outputs[-1].item()
        gradient = None
        for source, output in zip(inputs[::-1], outputs[::-1]):
            if not output.requires_grad:
                break
            torch.autograd.backward([output], [gradient])
            gradient = source.grad
    if first is not last and first.requires_grad:
        one, other = first.grad, last.grad
        whole = one + other
        if earlier[0] is not None:
            whole = whole + earlier[0]
        first.grad, last.grad = whole.clone(), whole.clone()
    return answer
"""
MEAN = 'reduction="sum") / total'
BREAK = "            if not output.requires_grad:\n                break\n"
SET_ASIDE = "    if first is not last:\n        first.grad, last.grad = None, None\n"
WHOLE = "        first.grad, last.grad = whole.clone(), whole.clone()\n"
RESCALE = """    for parameter in {parameter for stage in stages for parameter in stage.parameters()}:
        if parameter.grad is not None:
            parameter.grad /= len(microbatches)
    return answer
"""

ACHIEVED = """
def achieved(batch, known_batch, known, stages, replicas, each):
    m, known_m = batch / replicas / each, known_batch / replicas / each
    bubble, known_bubble = ((stages - 1) / (n + stages - 1) for n in (m, known_m))
    return known / (1 - known_bubble) * (1 - bubble)
"""
DESIGN = """
def design(job, most_bubble):
    fitting = []
    for ranks in range(1, job.layers + 1):
        for place, (name, make) in enumerate(CANDIDATES.items()):
            stages = 2 * ranks if name == "interleaved" else ranks
            for microbatches in range(1, job.sequences + 1):
                if job.layers % stages:
                    continue
                if job.sequences % microbatches:
                    continue
                try:
                    price = price_schedule(make(ranks, microbatches), StageTimes(1, 1, 1))
                except ImpossibleSchedule:
                    continue
                sequences = job.sequences // microbatches
                one = sequences * job.activations * job.layers // stages
                memory = job.weights * job.layers // ranks + one * max(price.activations)
                if memory <= job.memory and price.bubble <= most_bubble:
                    fitting.append((ranks, microbatches, place, name))
        if fitting:
            ranks, microbatches, _, name = min(fitting)
            return ranks, name, microbatches
    return None
"""

TASKS = {
    "task_1": Answers(
        correct=(
            PIPE,
            """
def pipe(ticks, room=None):
    stages, items = len(ticks), len(ticks[0])
    wait = {None: items}.get(room, room)
    todo, hand = [list(row) for row in ticks], [None] * stages
    taken, pipes = [0] * stages, [0] * stages
    starved, blocked, total = [0] * stages, [0] * stages, 0
    finished = [0] * stages
    while finished[-1] < items:
        moved = True
        while moved:
            moved = False
            for stage in range(stages):
                if hand[stage] == 0 and (stage + 1 == stages or taken[stage + 1] + wait > finished[stage]):
                    hand[stage], moved = None, True
                    finished[stage] += 1
                    if stage + 1 < stages:
                        pipes[stage + 1] += 1
                elif hand[stage] is None and taken[stage] < items and (stage == 0 or pipes[stage]):
                    hand[stage], moved = ticks[stage][taken[stage]], True
                    taken[stage] += 1
                    pipes[stage] -= stage > 0
                elif (hand[stage] is None and stage and taken[stage] < items and hand[stage - 1] == 0
                      and finished[stage - 1] == taken[stage]):
                    hand[stage], hand[stage - 1], moved = ticks[stage][taken[stage]], None, True
                    finished[stage - 1] += 1
                    taken[stage] += 1
        if finished[-1] == items:
            break
        for stage in range(stages):
            if hand[stage]:
                hand[stage] -= 1
            elif hand[stage] == 0:
                blocked[stage] += 1
            elif taken[stage] < items:
                starved[stage] += 1
        total += 1
    return total, starved, blocked
""",
        ),
        wrong={
            "a pipe holds one item more": changed(
                PIPE, ("last >= room", "last > room"), ("[last - room]", "[last - room - 1]")
            ),
            "an item stays in the pipe until it has been worked on": changed(
                PIPE,
                ("begin[stage + 1][last - room])", "begin[stage + 1][last - room] + ticks[stage + 1][last - room])"),
            ),
            "no bound is taken for no room": changed(
                PIPE,
                ("room is not None and stage", "stage"),
                ("    total, starved", "    room = room or 0\n    total, starved"),
            ),
            "the pipes hold everything": changed(PIPE, ("room is not None", "False")),
            "the fill is not counted": changed(
                PIPE, ("begin[stage][item] - gone\n", "(begin[stage][item] - gone) * (item > 0)\n")
            ),
            "a blocked stage counts as starved, too": changed(
                PIPE, ("begin[stage][item] - gone\n", "begin[stage][item] - end\n")
            ),
            "a stage begins its next item while the finished one waits": changed(
                PIPE, ("max(there, gone)", "max(there, end)")
            ),
            "the last item is never blocked": changed(PIPE, ("+= gone - end", "+= (gone - end) * (item < items)")),
            "the slowest item sets the pace throughout": changed(PIPE, ("return total,", f"return {CLOSED_FORM},")),
            "the work is added up": changed(PIPE, ("return total,", "return sum(map(sum, ticks)),")),
        },
    ),
    "task_2": Answers(
        correct=(
            RULE + HELD,
            """
def schedule(p, m, limit=None):
    if limit is None or limit >= p:
        return [list(actions) for actions in SCHEDULES["1f1b"](p, m).actions]
    begun, time, rows = {}, 0, [[] for _ in range(p)]
    busy = [0] * p
    for time in range(3 * p * m):
        choices = []
        for rank in range(p):
            done = {kind: [n for n in range(m) if begun.get((rank, kind, n), time) < time] for kind in "FB"}
            f, b = len(done["F"]), len(done["B"])
            below = rank + 1 == p or begun.get((rank + 1, "B", b), time) + 2 <= time
            above = rank == 0 or begun.get((rank - 1, "F", f), time) + 1 <= time
            if busy[rank] > time:
                continue
            if b < f and below:
                choices.append((rank, "B", b))
            elif f < m and above and f - b < min(limit, p - rank):
                choices.append((rank, "F", f))
        for rank, kind, number in choices:
            begun[rank, kind, number] = time
            busy[rank] = time + "FB".index(kind) + 1
            rows[rank].append(Action(rank, kind, number))
    return rows

def most_held(actions):
    places = {(a.stage, a.microbatch): number for number, a in enumerate(actions) if a.kind == "F"}
    ends = {(a.stage, a.microbatch): number for number, a in enumerate(actions) if a.kind in "BW"}
    return max((sum(places[key] <= n < ends[key] for key in places) for n in range(len(actions))), default=0)
""",
        ),
        wrong={
            "a forward and a backward by turns, under a limit as well": changed(
                BY_TURNS, ("AHEAD", "min(p - 1 - rank, m, p if limit is None else limit - 1)")
            )
            + HELD,
            "all forwards first": changed(BY_TURNS, ("AHEAD", "m")) + HELD,
            "one forward too many ahead": changed(BY_TURNS, ("AHEAD", "min(p - rank, m)")) + HELD,
            "1F1B without the limit": changed(BY_TURNS, ("AHEAD", "min(p - 1 - rank, m)")) + HELD,
            "as many microbatches as ranks, at least": changed(BY_TURNS, ("AHEAD", "p - 1 - rank")) + HELD,
            "one microbatch at a time": changed(BY_TURNS, ("AHEAD", "0")) + HELD,
            "every rank may hold p": changed(RULE, ("min(p - rank, p if", "min(p, p if"), ("may[0]", "may[-1]")) + HELD,
            "the limit alone counts": changed(RULE, ("min(p - rank, p if limit is None else limit)", "limit or m"))
            + HELD,
            "one less than the limit": changed(RULE, ("else limit)", "else max(1, limit - 1))")) + HELD,
            "a backward does not wait for the next rank": changed(RULE, (' and ready(rank + 1, "B", b)', "")) + HELD,
            "the limit goes down with the ranks": changed(RULE, ("else limit)", "else max(1, limit - rank))")) + HELD,
            "I lets go of the activations": RULE + changed(HELD, ('"I": 0', '"I": -1'), ('"W": -1', '"W": 0')),
            "I and W both let go of them": RULE + changed(HELD, ('"I": 0', '"I": -1')),
            "W does not let go of them": RULE + changed(HELD, ('"W": -1', '"W": 0')),
            "counts microbatches, not activations of stages": RULE
            + """
def most_held(actions):
    held, most = set(), 0
    for action in actions:
        if action.kind == "F":
            held.add(action.microbatch)
        elif action.kind in "BW":
            held.discard(action.microbatch)
        most = max(most, len(held))
    return most
""",
            "counts the forwards before the first backward": RULE
            + """
def most_held(actions):
    kinds = "".join(action.kind for action in actions)
    return len(kinds) - len(kinds.lstrip("F"))
""",
        },
    ),
    "task_3": Answers(
        correct=(
            CIRCLE + LEAST,
            """
def circle(programs, buffer=0):
    queues = [list(program) for program in programs]
    sent, received = set(), set()

    def go_on(rank):
        call = queues[rank][0]
        if call.kind == "receive":
            if (call.peer, rank, call.message) not in sent:
                return False
            received.add((call.peer, rank, call.message))
            return True
        sent.add((rank, call.peer, call.message))
        return len([1 for a, b, _ in sent - received if (a, b) == (rank, call.peer)]) <= buffer

    quiet = 0
    while quiet < 2:
        steps = 0
        for rank in range(len(queues)):
            while queues[rank] and go_on(rank):
                queues[rank].pop(0)
                steps += 1
        quiet = 0 if steps else quiet + 1
    target = {rank: queue[0].peer for rank, queue in enumerate(queues) if queue}
    reach = {rank: {peer} for rank, peer in target.items()}
    for _ in target:
        for rank in reach:
            reach[rank] = reach[rank].union(*(reach[other] for other in reach[rank]))
    return {rank for rank in reach if rank in reach[rank]}

def least_buffer(programs):
    if circle(programs, 10**6):
        return None
    low, high = 0, sum(map(len, programs))
    while low < high:
        middle = (low + high) // 2
        if circle(programs, middle):
            low = middle + 1
        else:
            high = middle
    return low
""",
        ),
        wrong={
            "all ranks that are stuck": changed(CIRCLE, ("        if walk[-1] == rank:\n", "        if walk:\n"))
            + LEAST,
            "the first circle alone": changed(
                CIRCLE,
                ("    return found", "    return set(walk[walk.index(walk[-1]):]) if stuck else set()"),
                ("for rank in stuck:", "for rank in sorted(stuck)[:1]:"),
            )
            + LEAST,
            "circles of two ranks alone": changed(
                CIRCLE, ("if walk[-1] == rank:", "if walk[-1] == rank and len(walk) == 3:")
            )
            + LEAST,
            "a message that waits cannot be received": changed(
                CIRCLE,
                (
                    "                        break\n                else",
                    "                        put.remove(letter)\n                        break\n                else",
                ),
                (
                    "                        put.append(letter)\n                        changed = True\n",
                    "                        put.append(letter)\n",
                ),
            )
            + LEAST,
            "the buffer takes one message less": changed(CIRCLE, ("> buffer", ">= max(1, buffer)")) + LEAST,
            "the buffer takes one message more": changed(CIRCLE, ("> buffer", "> buffer + 1")) + LEAST,
            "a send never waits": changed(CIRCLE, ("> buffer", "> 10**9")) + LEAST,
            "a rank has one buffer for all its links": changed(CIRCLE, ("one[:2] == letter[:2]", "one[0] == rank"))
            + LEAST,
            "a receiver has one buffer for all its links": changed(
                CIRCLE, ("one[:2] == letter[:2]", "one[1] == letter[1]")
            )
            + LEAST,
            "messages are known by their names alone": changed(
                CIRCLE,
                ("letter = (rank, call.peer, call.message)", "letter = (0, 0, call.message)"),
                ("letter = (call.peer, rank, call.message)", "letter = (0, 0, call.message)"),
            )
            + LEAST,
            "messages of a link are received in the order in which they are sent": changed(
                CIRCLE,
                (
                    "if letter not in put:\n                        break",
                    "if next((one for one in put if one[:2] == letter[:2] and one not in taken), None) != letter:\n"
                    "                        break",
                ),
            )
            + LEAST,
            "a message that is put wakes nobody": changed(
                CIRCLE,
                (
                    "                        put.append(letter)\n                        changed = True\n",
                    "                        put.append(letter)\n",
                ),
            )
            + LEAST,
            "a message counts as received once it is sent": changed(
                CIRCLE, ("if one not in taken and", "if one[2] != call.message and")
            )
            + LEAST,
            "a number where no buffer helps": CIRCLE + changed(LEAST, ("return None", "break")),
            "a buffer of one is enough for everybody": CIRCLE
            + changed(LEAST, ("        size += 1\n", "        return 1\n")),
            "gives up too early": CIRCLE
            + changed(LEAST, ("size > max(len(program) for program in programs)", "size > 1")),
        },
    ),
    "task_4": Answers(
        correct=(
            STEP,
            """
def step(stages, microbatches):
    trained = list({p: None for stage in stages for p in stage.parameters() if p.requires_grad})
    sums = {parameter: torch.zeros_like(parameter) for parameter in trained}
    counts = [int((targets != IGNORED).sum()) for _, targets in microbatches]
    mean = 0.0
    for tokens, targets in microbatches:
        x, work = tokens, []
        for stage in stages:
            source = x if stage.first else x.detach().requires_grad_()
            x = stage(source)
            work.append((stage, source, x))
        x = cross_entropy(x.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        mean, gradient = mean + x.item() / sum(counts), torch.ones_like(x) / sum(counts)
        for stage, source, output in reversed(work):
            output = x if stage.last else output
            own = [parameter for parameter in stage.parameters() if parameter.requires_grad]
            asked = own + ([] if stage.first else [source])
            if asked:
                found = torch.autograd.grad(output, asked, gradient)
                for parameter, value in zip(own, found):
                    sums[parameter] += value
                gradient = found[-1]
    first, last = stages[0].table, stages[-1].table
    if first is not last and first in sums:
        sums[first] = sums[last] = sums[first] + sums[last]
    for parameter, value in sums.items():
        parameter.grad = value.clone() if parameter.grad is None else parameter.grad + value
    return mean
""",
        ),
        wrong={
            "the draft as it is": "step = draft_step",
            "the mean of the means of microbatches": changed(
                STEP, (MEAN, 'reduction="sum") / max(1, int((targets != IGNORED).sum())) / len(microbatches)')
            ),
            "gradients are summed, not averaged": changed(
                STEP,
                (
                    "torch.autograd.backward([output], [gradient])",
                    "torch.autograd.backward([output * (total if gradient is None else 1)], [gradient])",
                ),
            ),
            "the mean of each microbatch by its tokens, which has no value without tokens": changed(
                STEP, (MEAN, 'reduction="mean") * (targets != IGNORED).sum() / total')
            ),
            "tokens that do not count are counted": changed(
                STEP, ("int(targets.ne(IGNORED).sum())", "targets.numel()")
            ),
            "what earlier steps have added up is rescaled": changed(
                STEP,
                (MEAN, 'reduction="sum") / total * len(microbatches)'),
                ("answer += outputs[-1].item()", "answer += outputs[-1].item() / len(microbatches)"),
                ("    return answer\n", RESCALE),
            ),
            "the last microbatch alone trains": changed(
                STEP,
                (
                    "        gradient = None\n",
                    "        gradient = None\n        if tokens is not microbatches[-1][0]:\n            continue\n",
                ),
            ),
            "earlier steps are forgotten": changed(
                STEP, ("    answer = 0.0\n", "    answer = 0.0\n    for stage in stages:\n        stage.zero_grad()\n")
            ),
            "earlier gradients of the table are forgotten": changed(STEP, ("whole = whole + earlier[0]", "pass")),
            "earlier gradients of the table are added up once more": changed(
                STEP, (SET_ASIDE, ""), ("whole = whole + earlier[0]", "pass")
            ),
            "each copy of the table keeps its own gradient": changed(
                STEP,
                (
                    "first.grad, last.grad = whole.clone(), whole.clone()",
                    "first.grad, last.grad = (g if e is None else g + e for g, e in zip((one, other), earlier))",
                ),
            ),
            "copies of the table are averaged, as replicas are": changed(
                STEP, ("whole = one + other", "whole = (one + other) / 2")
            ),
            "the first copy alone has the sum": changed(STEP, ("whole.clone(), whole.clone()", "whole.clone(), other")),
            "one table, used twice, is added up twice": changed(
                STEP, ("if first is not last and first.requires_grad:", "if first.requires_grad:")
            ),
            "backward stops at a stage that has nothing to train": changed(
                STEP,
                ("zip(inputs[::-1], outputs[::-1])", "zip(inputs[::-1], outputs[::-1], stages[::-1])"),
                ("for source, output in", "for source, output, stage in"),
                (
                    BREAK,
                    "            if not any(p.requires_grad for p in stage.parameters()):\n                break\n",
                ),
            ),
            "a first stage that has nothing to train gets a backward": changed(STEP, (BREAK, "")),
            "the graph goes on between stages": changed(
                STEP,
                ("x if stage.first else x.detach().requires_grad_()", "x"),
                (
                    "        for source, output in zip(inputs[::-1], outputs[::-1]):",
                    "        for source, output in [(x, outputs[-1])]:",
                ),
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            ACHIEVED + DESIGN,
            """
def achieved(batch, known_batch, known, stages, replicas, each):
    ticks = [size // (replicas * each) + stages - 1 for size in (batch, known_batch)]
    return known * batch / known_batch * ticks[1] / ticks[0]

def design(job, most_bubble):
    def held(name, p, m):
        if name == "interleaved":
            return max(price_schedule(CANDIDATES[name](p, m), StageTimes(1, 1, 1)).activations) / 2
        return m if name == "gpipe" else min(m, p)

    for p in (n for n in range(1, job.layers + 1) if job.layers % n == 0):
        for m in (n for n in range(1, job.sequences + 1) if job.sequences % n == 0):
            for name in CANDIDATES:
                if name == "interleaved" and job.layers % (2 * p):
                    continue
                try:
                    plan = CANDIDATES[name](p, m)
                except ImpossibleSchedule:
                    continue
                each = job.sequences / m * job.layers / p * job.activations
                fits = job.layers / p * job.weights + each * held(name, p, m) <= job.memory
                if fits and price_schedule(plan, StageTimes(1, 1, 1)).bubble <= most_bubble:
                    return p, name, m
""",
        ),
        wrong={
            "the batch is not divided among replicas": changed(
                ACHIEVED, ("batch / replicas / each, known_batch / replicas / each", "batch / each, known_batch / each")
            )
            + DESIGN,
            "a microbatch has one sequence": changed(
                ACHIEVED,
                ("batch / replicas / each, known_batch / replicas / each", "batch / replicas, known_batch / replicas"),
            )
            + DESIGN,
            "as many in the bubble as there are stages": changed(ACHIEVED, ("((stages - 1) /", "(stages /")) + DESIGN,
            "the bubble is a fraction of the work, not of the time": changed(ACHIEVED, ("(n + stages - 1)", "n"))
            + DESIGN,
            "the known run has no bubble": changed(ACHIEVED, ("known / (1 - known_bubble)", "known")) + DESIGN,
            "memory without activations": ACHIEVED + changed(DESIGN, (" + one * max(price.activations)", "")),
            "one activation a rank": ACHIEVED + changed(DESIGN, ("one * max(price.activations)", "one")),
            "the last rank's memory": ACHIEVED + changed(DESIGN, ("max(price.activations)", "price.activations[-1]")),
            "an activation of interleaved is that of all layers of the rank": ACHIEVED
            + changed(DESIGN, ("job.layers // stages\n", "job.layers // ranks\n")),
            "an activation has one sequence": ACHIEVED
            + changed(DESIGN, ("sequences = job.sequences // microbatches", "sequences = 1")),
            "every rank has all weights": ACHIEVED + changed(DESIGN, ("job.layers // ranks + one", "job.layers + one")),
            "layers need not divide": ACHIEVED
            + changed(DESIGN, ("if job.layers % stages:", "if job.layers < stages:")),
            "interleaved has one stage a rank": ACHIEVED
            + changed(DESIGN, ('2 * ranks if name == "interleaved" else ranks', "ranks")),
            "sequences need not divide": ACHIEVED + changed(DESIGN, ("if job.sequences % microbatches:", "if False:")),
            "the most microbatches": ACHIEVED
            + changed(DESIGN, ("min(fitting)", "min(fitting, key=lambda f: (f[0], -f[1], f[2]))")),
            "the simplest schedule before the fewest microbatches": ACHIEVED
            + changed(DESIGN, ("min(fitting)", "min(fitting, key=lambda f: (f[0], f[2], f[1]))")),
            "the smallest bubble": ACHIEVED
            + changed(
                DESIGN,
                (
                    "fitting.append((ranks, microbatches, place, name))",
                    "fitting.append((price.bubble, ranks, microbatches, name))",
                ),
                ("ranks, microbatches, _, name = min", "_, ranks, microbatches, name = min"),
            ),
            "a backward takes as long as a forward": ACHIEVED
            + changed(DESIGN, ("StageTimes(1, 1, 1)", "StageTimes(2, 1, 1)")),
            "the bubble of 1F1B for all": ACHIEVED
            + changed(DESIGN, ("price.bubble <=", "(ranks - 1) / (microbatches + ranks - 1) <=")),
        },
    ),
}
