"""Answers to 13_batching that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
ROWS = """
def row_steps(lengths, size):
    def batches(line):
        steps = 0
        while line:
            batch, line = line[:size], line[size:]
            steps += max(batch)
        return steps

    def joining(line):
        steps, left = 0, []
        while line or left:
            while line and len(left) < size:
                left.append(line.pop(0))
            left = [count - 1 for count in left if count > 1]
            steps += 1
        return steps

    found = {}
    for way, steps in (
        ("static", batches(list(lengths))),
        ("sorted", batches(sorted(lengths))),
        ("continuous", joining(list(lengths))),
    ):
        found[way] = [steps, steps * size - sum(lengths)]
    return found
"""

COMMITS = """
def group_commits(arrivals, duration, most, window):
    there, left, now, commits, waited = [], list(arrivals), 0, 0, 0
    while there or left:
        while left and left[0] <= now:
            there.append(left.pop(0))
        if there and (len(there) >= most or now - there[0] >= window):
            end = now + duration
            waited += sum(end - at for at in there[:most])
            del there[:most]
            commits += 1
            now = end
        else:
            now += 1
    return commits, waited
"""
WINDOW = """
def choose_window(arrivals, duration, most, candidates):
    best = None
    for window in candidates:
        cost = group_commits(arrivals, duration, most, window)[1], window
        if best is None or cost < best:
            best = cost
    return best[1]
"""

PLAN = """
def plan(running, waiting, budget, room):
    work = []

    def give(request):
        nonlocal budget
        tokens = min(budget, request.left)
        if tokens > 0:
            work.append((request.name, tokens, request.left == tokens))
            budget -= tokens

    for request in sorted(running, key=lambda request: request.left > 1):
        give(request)
    places = room - len(running)
    for request in waiting:
        if places > 0:
            give(request)
            places -= 1
    return work
"""

AGED = """
class Aged(Strict):
    def __init__(self, patience):
        self.patience, self.line, self.units = patience, [], 0

    def arrive(self, name, priority):
        self.line.append((priority, name, self.units))

    def serve(self, name, units):
        self.units += units

    def level(self, entry):
        return entry[0] - (self.units - entry[2]) / self.patience

    def first(self):
        return min(self.line, key=self.level)[1]
"""

SHARE = """
class FairShare(Line):
    def arrive(self, tenant):
        line = [other for other in self.waiting if self.waiting[other] > 0]
        if tenant not in line:
            if line:
                lift = min(self.counters[other] for other in line)
            elif self.last is not None:
                lift = self.counters[self.last]
            else:
                lift = 0
            if lift > self.counters[tenant]:
                self.counters[tenant] = lift
        self.waiting[tenant] += 1

    def take(self):
        best = None
        for tenant in self.weights:
            if self.waiting[tenant] and (best is None or self.counters[tenant] < self.counters[best]):
                best = tenant
        if best is not None:
            self.waiting[best] -= 1
            self.last = best
        return best

    def charge(self, tenant, units):
        self.counters[tenant] += units / self.weights[tenant]
"""

BUDGET = """
def choose_budget(price, decoding, context, prompt, objective, candidates):
    best = None
    for budget in sorted(candidates):
        chunk = budget - decoding
        if chunk <= 0:
            continue
        steps, worst = math.ceil(prompt / chunk), 0
        for step in range(1, steps + 1):
            done = min(step * chunk, prompt)
            counts = (1,) * decoding + (done - (step - 1) * chunk,)
            contexts = (context + step,) * decoding + (done,)
            worst = max(worst, price(StepCounts(counts, contexts, decoding + (step == steps))))
        if worst <= objective:
            best = budget, steps
    return best
"""

TASKS = {
    "task_1": Answers(
        correct=(
            ROWS,
            """
import heapq

def row_steps(lengths, size):
    def batches(line):
        return sum(max(line[i : i + size]) for i in range(0, len(line), size))

    rows = [0] * size
    for length in lengths:
        heapq.heapreplace(rows, rows[0] + length)
    steps = {"static": batches(lengths), "sorted": batches(sorted(lengths)), "continuous": max(rows)}
    return {way: (n, n * size - sum(lengths)) for way, n in steps.items()}
""",
        ),
        wrong={
            "rows are filled without gaps": changed(
                ROWS, ("joining(list(lengths))", "max([-(-sum(lengths) // size), *lengths])")
            ),
            "a row is free one step late": changed(ROWS, ("if count > 1]", "if count > 0]")),
            "requests are dealt to rows in turn": changed(
                ROWS, ("joining(list(lengths))", "max([sum(lengths[row::size]) for row in range(size)])")
            ),
            "others join when all rows are free": changed(ROWS, ("joining(list(lengths))", "batches(list(lengths))")),
            "an empty row costs nothing": changed(
                ROWS, ("steps * size - sum(lengths)", "steps * min(size, len(lengths)) - sum(lengths)")
            ),
            "a batch takes its mean": changed(ROWS, ("max(batch)", "-(-sum(batch) // len(batch))")),
            "the longest first": changed(ROWS, ("sorted(lengths)", "sorted(lengths, reverse=True)")),
            "continuous batches sort as well": changed(ROWS, ("joining(list(lengths))", "joining(sorted(lengths))")),
            "sorts the caller's list": changed(ROWS, ("    found = {}\n", "    found = {}\n    lengths.sort()\n")),
        },
    ),
    "task_2": Answers(
        correct=(COMMITS + WINDOW,),
        wrong={
            "the window begins when the last commit ends": changed(
                COMMITS + WINDOW,
                ("    while there or left:", "    free = 0\n    while there or left:"),
                ("now - there[0] >= window", "now - max(free, there[0]) >= window"),
                ("now = end\n", "now = free = end\n"),
            ),
            "each newcomer begins the window anew": changed(COMMITS + WINDOW, ("now - there[0]", "now - there[-1]")),
            "a full group waits for its window": changed(COMMITS + WINDOW, ("len(there) >= most or ", "")),
            "a commit takes any number of rows": changed(
                COMMITS + WINDOW, ("for at in there[:most]", "for at in there"), ("del there[:most]", "there.clear()")
            ),
            "rows join a commit that runs": changed(
                COMMITS + WINDOW,
                (
                    "            end = now + duration\n",
                    "            end = now + duration\n"
                    "            while left and left[0] < end:\n"
                    "                there.append(left.pop(0))\n",
                ),
            ),
            "a row waits until its commit begins": changed(COMMITS + WINDOW, ("sum(end - at", "sum(now - at")),
            "all wait for as long as the oldest": changed(COMMITS + WINDOW, ("sum(end - at", "sum(end - there[0]")),
            "who arrives as the commit begins is late": changed(
                COMMITS + WINDOW, ("left[0] <= now:", "left[0] < now + (not there):")
            ),
            "commits run beside each other": changed(COMMITS + WINDOW, ("            now = end\n", "")),
            "the fewest commits": changed(COMMITS + WINDOW, ("window)[1], window", "window)[0], window")),
            "among equals the longest": changed(
                COMMITS + WINDOW, ("window)[1], window", "window)[1], -window"), ("best[1]", "-best[1]")
            ),
            "among equals the first of the list": changed(COMMITS + WINDOW, ("cost < best:", "cost[0] < best[0]:")),
            "never a window": changed(COMMITS + WINDOW, ("return best[1]", "return min(candidates)")),
        },
    ),
    "task_3": Answers(
        correct=(
            PLAN,
            """
def plan(running, waiting, budget, room):
    queue = [r for r in running if r.left <= 1] + [r for r in running if r.left > 1]
    queue += waiting[: max(room - len(running), 0)]
    work = []
    while queue and budget:
        request = queue.pop(0)
        tokens = request.left if request.left <= budget else budget
        budget = budget - tokens
        work.append([request.name, tokens, not request.left - tokens])
    return work
""",
        ),
        wrong={
            "a chunk samples": changed(PLAN, ("request.left == tokens)", "True)")),
            "samples when the prompt is computed": changed(
                PLAN, ("request.left == tokens)", "request.computed + tokens >= request.prompt)")
            ),
            "only who decodes samples": changed(PLAN, ("request.left == tokens)", "request.left == 1)")),
            "prompts first": changed(PLAN, ("request.left > 1", "request.left == 1")),
            "in the order of running": changed(
                PLAN, ("sorted(running, key=lambda request: request.left > 1)", "running")
            ),
            "a prompt waits until it fits whole": changed(PLAN, ("if tokens > 0:", "if tokens == request.left:")),
            "decoding is free": changed(PLAN, ("budget -= tokens", "budget -= tokens if tokens > 1 else 0")),
            "who decodes always gets a token": changed(
                PLAN, ("min(budget, request.left)", "max(min(budget, request.left), request.left == 1)")
            ),
            "one prompt a step": changed(
                PLAN, ("if places > 0:", "if places > 0 and all(tokens == 1 for _, tokens, _ in work):")
            ),
            "prompts share the rest evenly": changed(
                PLAN, ("min(budget, request.left)", "min(request.left, -(-budget // max(1, len(waiting))))")
            ),
            "one more than there is room for": changed(PLAN, ("if places > 0:", "if places >= 0:")),
            "those without a token are in the plan": changed(PLAN, ("if tokens > 0:", "if True:")),
            "a preempted request computes its prompt alone": changed(
                PLAN,
                (
                    "tokens = min(budget, request.left)",
                    "goal = request.prompt - request.computed\n"
                    "        goal = goal if goal > 0 else 1\n"
                    "        tokens = min(budget, goal)",
                ),
                ("request.left == tokens)", "goal == tokens)"),
            ),
            "carries the plan out": changed(
                PLAN, ("budget -= tokens", "budget -= tokens\n            request.computed += tokens")
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            AGED,
            """
class Aged:
    def __init__(self, patience):
        self.patience, self.there = patience, {}

    def arrive(self, name, priority):
        self.there[name] = priority * self.patience

    def first(self):
        return min(self.there, key=self.there.get)

    def serve(self, name, units):
        for other in self.there:
            self.there[other] -= units

    def leave(self, name):
        self.there.pop(name)
""",
        ),
        wrong={
            "still starves": changed(AGED, ("self.units += units", "pass")),
            "first come, first served": changed(AGED, ("return entry[0] - ", "return -")),
            "counts steps and not units": changed(AGED, ("self.units += units", "self.units += 1")),
            "whole levels only": changed(AGED, (") / self.patience", ") // self.patience")),
            "levels end at 0": changed(
                AGED, ("return entry[0] - ", "return max(0, entry[0] - "), ("/ self.patience", "/ self.patience)")
            ),
            "to the front when the patience is at its end": changed(
                AGED,
                ("return entry[0] - (", "return -1 if ("),
                (") / self.patience", ") >= self.patience else entry[0]"),
            ),
            "whoever is served is young again": changed(
                AGED,
                (
                    "self.units += units",
                    "self.units += units\n"
                    "        self.line = [(p, n, self.units if n == name else at) for p, n, at in self.line]",
                ),
            ),
            "a level for each unit": changed(AGED, (") / self.patience", ")")),
            "all are as old as the first": changed(AGED, ("name, self.units))", "name, 0))")),
            "among equals the newest": changed(AGED, ("min(self.line, key", "min(reversed(self.line), key")),
            "ages slower with a high priority": changed(
                AGED, (") / self.patience", ") / (self.patience * max(1, entry[0]))")
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            SHARE,
            """
class FairShare:
    def __init__(self, weights):
        self.weights, self.line, self.last = weights, [], None
        self.received = dict.fromkeys(weights, 0.0)

    def arrive(self, tenant):
        if tenant not in self.line:
            there = self.line or ([self.last] if self.last else [tenant])
            lift = min(self.received[other] for other in there)
            self.received[tenant] = max(lift, self.received[tenant])
        self.line.append(tenant)

    def take(self):
        if not self.line:
            return None
        names = list(self.weights)
        self.last = min(self.line, key=lambda tenant: (self.received[tenant], names.index(tenant)))
        self.line.remove(self.last)
        return self.last

    def charge(self, tenant, units):
        self.received[tenant] += units * (1 / self.weights[tenant])
""",
        ),
        wrong={
            "who was away has saved up": changed(SHARE, ("if lift > self.counters[tenant]:", "if False:")),
            "coming back clears a debt": changed(SHARE, ("if lift > self.counters[tenant]:", "if line or self.last:")),
            "lifted to the largest counter": changed(SHARE, ("lift = min(", "lift = max(")),
            "lifted to the mean": changed(
                SHARE, ("lift = min(", "lift = sum("), ("for other in line)", "for other in line) / len(line)")
            ),
            "lifted to the smallest of all": changed(
                SHARE, ("min(self.counters[other] for other in line)", "min(self.counters.values())")
            ),
            "lifted to the smallest of others, whether they wait or not": changed(
                SHARE, ("for other in line)", "for other in self.weights if other != tenant)")
            ),
            "whoever waits already is lifted as well": changed(
                SHARE, ("if self.waiting[other] > 0]", "if self.waiting[other] and other != tenant]")
            ),
            "no lift when nobody waits": changed(SHARE, ("elif self.last is not None:", "elif False:")),
            "counters start anew when nobody waits": changed(
                SHARE,
                ("lift = self.counters[self.last]", "self.counters, lift = dict.fromkeys(self.weights, 0), 0"),
            ),
            "multiplies by the weight": changed(SHARE, ("units / self.weights", "units * self.weights")),
            "counts requests and not units": changed(SHARE, ("+= units / ", "+= 1 / ")),
            "forgets the weights": changed(SHARE, ("units / self.weights[tenant]", "units")),
            "one request of each tenant in turn": changed(
                SHARE, ("self.counters[tenant] < self.counters[best]", "tenant != self.last and best == self.last")
            ),
            "whoever is far ahead has to wait, even alone": changed(
                SHARE,
                (
                    "if self.waiting[tenant] and (",
                    "ahead = self.counters[tenant] - min(self.counters.values())\n"
                    "            if self.waiting[tenant] and ahead < 20 and (",
                ),
            ),
            "among equals the last": changed(
                SHARE, ("self.counters[tenant] < self.counters[best]", "self.counters[tenant] <= self.counters[best]")
            ),
        },
    ),
    "task_6": Answers(
        correct=(
            BUDGET,
            """
def choose_budget(price, decoding, context, prompt, objective, candidates):
    def steps(budget):
        left, number = prompt, 0
        while left:
            taken, number = min(left, budget - decoding), number + 1
            left -= taken
            yield StepCounts(
                tuple([1] * decoding + [taken]),
                tuple([context + number] * decoding + [prompt - left]),
                rows=decoding + (0 if left else 1),
            )

    good = [b for b in candidates if b > decoding and max(map(price, steps(b))) <= objective]
    return (max(good), len(list(steps(max(good))))) if good else None
""",
        ),
        wrong={
            "looks at the first step alone": changed(
                BUDGET, ("worst = max(worst, ", "worst = worst if step > 1 else max(worst, ")
            ),
            "looks at the last step alone": changed(BUDGET, ("worst = max(worst, ", "worst = max(0, ")),
            "looks at the mean of the steps": changed(
                BUDGET,
                ("worst = max(worst, price(", "worst += (price("),
                ("if worst <=", "if worst / steps <="),
            ),
            "the whole budget is for the prompt": changed(BUDGET, ("chunk = budget - decoding", "chunk = budget")),
            "the last chunk is as large as all": changed(BUDGET, ("(done - (step - 1) * chunk,)", "(chunk,)")),
            "answers do not grow": changed(BUDGET, ("(context + step,)", "(context + 1,)")),
            "caches before the step": changed(BUDGET, ("(context + step,)", "(context + step - 1,)")),
            "a chunk sees its own tokens alone": changed(
                BUDGET, ("* decoding + (done,)", "* decoding + (done - (step - 1) * chunk,)")
            ),
            "every chunk chooses a token": changed(BUDGET, ("decoding + (step == steps)", "decoding + 1")),
            "the prompt never chooses a token": changed(BUDGET, ("decoding + (step == steps)", "decoding")),
            "the smallest that does": changed(BUDGET, ("if worst <=", "if best is None and worst <=")),
            "ends at the first that does not": changed(
                BUDGET, ("best = budget, steps\n", "best = budget, steps\n        else:\n            break\n")
            ),
            "the last of the list": changed(BUDGET, ("sorted(candidates)", "candidates")),
            "the objective itself is too long": changed(BUDGET, ("if worst <=", "if worst <")),
            "one step too many for exact multiples": changed(
                BUDGET, ("best = budget, steps", "best = budget, prompt // chunk + 1")
            ),
            "the rest of the prompt is no step": changed(
                BUDGET, ("best = budget, steps", "best = budget, max(1, prompt // chunk)")
            ),
        },
    ),
}
