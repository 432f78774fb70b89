"""Answers to 20_placement that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
RESERVE = """
def reserve_gang(claims, ledger):
    done = []
    try:
        for name, gpus in claims:
            ledger.reserve(name, gpus)
            done.append(name)
            yield
    except Refused:
        while done:
            ledger.release(done.pop())
        return False
    return True
"""

PLACE = """
def place_workers(free, workers, gpus, talk):
    left, found = list(free), []
    together = workers if talk else 1
    for _ in range(0, workers, together or 1):
        need = together * gpus
        best = None
        for node, has in enumerate(left):
            if has < need:
                continue
            if best is None or has < left[best]:
                best = node
        if best is None:
            return None
        left[best] -= need
        found += [best] * together
    return found
"""

BACKFILL = """
def backfill(free, running, line, now):
    ends = []
    for job in running:
        ends.append((max(job.end, now), job.gpus))
    starts, head, latest, spare = [], None, None, 0
    for job in line:
        end = now + job.seconds
        if head is None:
            if job.gpus <= free:
                free -= job.gpus
                ends.append((end, job.gpus))
                starts.append(job.name)
                continue
            head = job
            for latest in sorted(time for time, _ in ends):
                spare = free - job.gpus
                spare += sum(gpus for time, gpus in ends if time <= latest)
                if spare >= 0:
                    break
            continue
        if job.gpus > free:
            continue
        if end > latest:
            if job.gpus > spare:
                continue
            spare -= job.gpus
        free -= job.gpus  # ahead
        starts.append(job.name)  # ahead
    return starts, latest
"""

WAY = """
def who_gives_way(running, free, gpus, priority, now):
    lower = [gang for gang in running if gang.priority < priority]
    best = None
    for chosen in itertools.product((False, True), repeat=len(lower)):
        gangs = [gang for gang, stops in zip(lower, chosen) if stops]
        if free + sum(gang.gpus for gang in gangs) < gpus:
            continue
        lost = sum(gang.gpus * (now - gang.saved + gang.restart) for gang in gangs)
        names = sorted(gang.name for gang in gangs)
        price = lost, len(gangs), names
        if best is None or price < best:
            best = price
    return None if best is None else best[2]
"""

GREEDY_WAY = """
def who_gives_way(running, free, gpus, priority, now):
    def lost(gang):
        return gang.gpus * (now - gang.saved + gang.restart)

    stopped = []
    for gang in sorted(running, key=lambda gang: (KEY, gang.name)):
        if gang.priority < priority and free < gpus:
            stopped.append(gang)
            free += gang.gpus
    return sorted(gang.name for gang in stopped) if free >= gpus else None
"""

RANKS = """
def after_replacement(gpus, lost, spare, tp, domain_of):
    after, free = list(gpus), {}
    for gpu in spare:
        if gpu not in lost:
            free.setdefault(domain_of(gpu), []).append(gpu)
    groups = [list(range(first, first + tp)) for first in range(0, len(gpus), tp)]

    def missing(group):
        return [rank for rank in group if gpus[rank] in lost]

    def stay(group):
        beside = free.get(domain_of(gpus[group[0]]), [])
        if len(missing(group)) == tp or len(beside) < len(missing(group)):
            return False
        for rank in missing(group):
            after[rank] = beside.pop()
        return True

    def move(group):
        for domain in sorted(free):
            if len(free[domain]) >= tp:
                for rank in group:
                    after[rank] = free[domain].pop()
                return
        raise NoReplacement("too few")

    hit = [group for group in groups if missing(group)]
    hit.sort(key=lambda group: len(missing(group)))
    moving = [group for group in hit if not stay(group)]
    for group in moving:
        move(group)
    return after
"""

SHARES = """
def next_tenant(capacity, tenants, running):
    best, least = None, None
    for tenant in tenants:
        count = running[tenant.name]
        if count >= tenant.tasks:
            continue
        if not fits(capacity, tenants, running, tenant):
            continue
        task = {resource: need for resource, need in tenant.task.items() if need > 0}
        share = max(Fraction(count * need, capacity[resource]) for resource, need in task.items())
        share = share / tenant.weight
        if best is None or share < least:
            best, least = tenant.name, share
    return best

def fits(capacity, tenants, running, tenant):
    for resource, need in tenant.task.items():
        used = sum(running[other.name] * other.task.get(resource, 0) for other in tenants)
        if used + need > capacity[resource]:
            return False
    return True

def share_out(capacity, tenants):
    running = {tenant.name: 0 for tenant in tenants}
    while True:
        name = next_tenant(capacity, tenants, running)
        if name is None:
            return running
        running[name] += 1
"""
SHARE = "max(Fraction(count * need, capacity[resource]) for resource, need in task.items())"

TASKS = {
    "task_1": Answers(
        correct=(
            RESERVE,
            """
def reserve_gang(claims, ledger):
    if not claims:
        return True
    (name, gpus), *others = claims
    try:
        ledger.reserve(name, gpus)
    except Refused:
        return False
    yield
    complete = yield from reserve_gang(others, ledger)
    if not complete:
        ledger.release(name)
    return complete
""",
            """
def reserve_gang(claims, ledger):
    mine, complete = set(), False
    yield
    while len(mine) < len(claims):
        name, gpus = claims[len(mine)]
        try:
            ledger.reserve(name, gpus)
        except Refused:
            break
        mine.add(name)
        if len(mine) < len(claims):
            yield
    else:
        complete = True
    for name in () if complete else mine:
        ledger.release(name)
    return complete
""",
        ),
        wrong={
            "nothing is given back": changed(
                RESERVE, ("        while done:\n            ledger.release(done.pop())\n", "")
            ),
            "it waits, and holds what it has": """
def reserve_gang(claims, ledger):
    for name, gpus in claims:
        while True:
            try:
                ledger.reserve(name, gpus)
                break
            except Refused:
                yield
        yield
    return True
""",
            "it gives back, and tries again for ever": """
def reserve_gang(claims, ledger):
    done = []
    while len(done) < len(claims):
        try:
            ledger.reserve(*claims[len(done)])
            done.append(claims[len(done)][0])
        except Refused:
            while done:
                ledger.release(done.pop())
        yield
    return True
""",
            "only the last claim is given back": changed(RESERVE, ("        while done:", "        if done:")),
            "one claim is given back each turn": changed(
                RESERVE, ("ledger.release(done.pop())\n", "ledger.release(done.pop())\n            yield\n")
            ),
            "it gives back in its next turn": changed(
                RESERVE, ("        while done:", "        yield\n        while done:")
            ),
            "whoever has one of the names loses it": changed(
                RESERVE,
                (
                    "        while done:\n            ledger.release(done.pop())\n",
                    "        for name, _ in claims:\n            if name in ledger.held:\n"
                    "                ledger.release(name)\n",
                ),
            ),
            "all of the gang's claims are given back, had or not": changed(
                RESERVE,
                (
                    "        while done:\n            ledger.release(done.pop())\n",
                    "        for name, _ in claims:\n            ledger.release(name)\n",
                ),
            ),
            "the claim that was refused is given back as well": changed(
                RESERVE,
                ("        while done:", "        done += [name] if name in ledger.held else []\n        while done:"),
            ),
            "the whole ledger is set back to the beginning": changed(
                RESERVE,
                ("    done = []\n", "    done, free, held = [], list(ledger.free), dict(ledger.held)\n"),
                (
                    "        while done:\n            ledger.release(done.pop())\n",
                    "        ledger.free, ledger.held = free, held\n",
                ),
            ),
            "it adds up what is free, and then trusts that": """
def reserve_gang(claims, ledger):
    if sum(gpus for _, gpus in claims) > sum(ledger.free):
        return False
    for name, gpus in claims:
        ledger.reserve(name, gpus)
        yield
    return True
""",
            "everything is reserved in one turn": changed(
                RESERVE, ("            yield\n", ""), ("    return True", "    yield\n    return True")
            ),
            "a gang without claims is refused": changed(RESERVE, ("    return True", "    return bool(done)")),
            "the refusal is raised": changed(RESERVE, ("        return False", "        raise")),
        },
    ),
    "task_2": Answers(
        correct=(
            PLACE,
            """
def place_workers(free, workers, gpus, talk):
    fullest = sorted(range(len(free)), key=free.__getitem__)
    if talk:
        slots = [node for node in fullest if free[node] >= workers * gpus][:1] * workers
    else:
        slots = [node for node in fullest for _ in range(free[node] // gpus)]
    return slots[:workers] if len(slots) >= workers else None
""",
        ),
        wrong={
            "the first node that suffices": changed(PLACE, ("best is None or has < left[best]", "best is None")),
            "the emptiest node": changed(PLACE, ("has < left[best]", "has > left[best]")),
            "of nodes that are alike, the last": changed(PLACE, ("has < left[best]", "has <= left[best]")),
            "a node that is filled exactly does not suffice": changed(PLACE, ("if has < need", "if has <= need")),
            "the node that comes nearest, though it is too small": changed(
                PLACE,
                ("            if has < need:\n                continue\n", ""),
                ("has < left[best]", "abs(has - need) < abs(left[best] - need)"),
            ),
            "free is changed": changed(PLACE, ("left, found = list(free), []", "left, found = free, []")),
            "workers are all placed one by one": changed(PLACE, ("workers if talk else 1", "1")),
            "workers all stand together": changed(PLACE, ("workers if talk else 1", "workers")),
            "together where it is possible, whether they talk or not": """
def place_workers(free, workers, gpus, talk):
    left, found = list(free), []
    for together in (workers, 1):
        enough = [node for node in range(len(left)) if left[node] >= together * gpus]
        if enough:
            break
    for _ in range(0, workers, together or 1):
        enough = [node for node in range(len(left)) if left[node] >= together * gpus]
        if not enough:
            return None
        node = min(enough, key=lambda node: left[node])
        left[node] -= together * gpus
        found += [node] * together
    return found
""",
            "the rest of a job is left out": changed(PLACE, ("            return None", "            break")),
            "what earlier workers took is forgotten": changed(PLACE, ("        left[best] -= need\n", "")),
            "a worker takes one GPU": changed(PLACE, ("        left[best] -= need\n", "        left[best] -= 1\n")),
            "a job that talks needs one worker's GPUs": changed(PLACE, ("need = together * gpus", "need = gpus")),
            "a job without workers is not placed": changed(PLACE, ("    return found", "    return found or None")),
        },
    ),
    "task_3": Answers(
        correct=(
            BACKFILL,
            """
def backfill(free, running, line, now):
    total = free + sum(job.gpus for job in running)
    held = [Runs(job.gpus, max(job.end, now)) for job in running]
    starts, waits, latest = [], [], None

    def left(time, held):
        return total - sum(job.gpus for job in held if job.end > time)

    for job in line:
        more = [*held, Runs(job.gpus, now + job.seconds)]
        if sum(each.gpus for each in more) > total:
            waits.append(job)
        elif waits and left(latest, more) < waits[0].gpus:
            waits.append(job)
        else:
            starts.append(job.name)
            held = more
        if len(waits) == 1 and latest is None:
            latest = next(end for _, end in sorted(held, key=lambda job: job.end) if left(end, held) >= job.gpus)
    return starts, latest
""",
        ),
        wrong={
            "whoever fits goes ahead": changed(
                BACKFILL, ("            if job.gpus > spare:\n                continue\n", "")
            ),
            "nobody goes ahead": changed(
                BACKFILL, ("        if job.gpus > free:\n            continue\n", "        break\n")
            ),
            "the first that does not fit behind the head ends it": changed(
                BACKFILL,
                (
                    "        if job.gpus > free:\n            continue\n",
                    "        if job.gpus > free:\n            break\n",
                ),
            ),
            "to end exactly at the latest start is too late": changed(
                BACKFILL, ("if end > latest", "if end >= latest")
            ),
            "to end one second after it is early enough": changed(BACKFILL, ("if end > latest", "if end > latest + 1")),
            "only who ends before goes ahead": changed(BACKFILL, ("if job.gpus > spare:", "if True:")),
            "only who needs what is left over goes ahead": changed(BACKFILL, ("if end > latest:", "if True:")),
            "who goes ahead must be short and small": changed(
                BACKFILL,
                (
                    "        if end > latest:\n            if job.gpus > spare:\n                continue\n"
                    "            spare -= job.gpus\n",
                    "        if end > latest or job.gpus > spare:\n            continue\n",
                ),
            ),
            "what is left over is given twice": changed(BACKFILL, ("            spare -= job.gpus\n", "")),
            "what is free now is given twice": changed(BACKFILL, ("        free -= job.gpus  # ahead\n", "")),
            "of those that end together, one is counted": changed(
                BACKFILL,
                (
                    "            for latest in sorted(time for time, _ in ends):\n"
                    "                spare = free - job.gpus\n",
                    "            spare = free - job.gpus\n            for latest, gpus in sorted(ends):\n",
                ),
                (
                    "                spare += sum(gpus for time, gpus in ends if time <= latest)\n",
                    "                spare += gpus\n",
                ),
            ),
            "what is left over is counted when all have ended": changed(
                BACKFILL,
                (
                    "            continue\n        if job.gpus > free",
                    "            spare = free + sum(gpus for _, gpus in ends) - job.gpus\n            continue\n"
                    "        if job.gpus > free",
                ),
            ),
            "who just started is not among those that run": changed(
                BACKFILL, ("                ends.append((end, job.gpus))\n", "")
            ),
            "the head starts when one job frees all that it needs": changed(
                BACKFILL, ("spare = free - job.gpus", "spare = -job.gpus")
            ),
            "the head waits for all that run": changed(BACKFILL, ("if spare >= 0", "if latest == max(ends)[0]")),
            "the head starts when an estimate passed long ago": changed(BACKFILL, ("max(job.end, now)", "job.end")),
            "who outlived the estimate never ends": changed(
                BACKFILL, ("max(job.end, now)", "job.end if job.end > now else 10**9")
            ),
            "who outlived the estimate has ended": changed(
                BACKFILL,
                (
                    "        ends.append((max(job.end, now), job.gpus))\n",
                    "        if job.end > now:\n            ends.append((job.end, job.gpus))\n"
                    "        else:\n            free += job.gpus\n",
                ),
            ),
            "seconds are taken for the time of the end": changed(
                BACKFILL, ("end = now + job.seconds", "end = job.seconds")
            ),
            "the latest start is told in seconds from now": changed(
                BACKFILL, ("return starts, latest", "return starts, latest and latest - now")
            ),
            "the head is told although it starts": changed(
                BACKFILL, ("return starts, latest", "return starts, latest or now")
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            WAY,
            """
def who_gives_way(running, free, gpus, priority, now):
    best = {0: (0, 0, ())}  # GPUs that are freed -> the least for it, with names in order
    for gang in sorted(running):
        if gang.priority >= priority:
            continue
        for freed, (lost, count, names) in dict(best).items():
            more = lost + gang.gpus * (gang.restart + now - gang.saved), count + 1, (*names, gang.name)
            if freed + gang.gpus not in best or more < best[freed + gang.gpus]:
                best[freed + gang.gpus] = more
    enough = [each for freed, each in best.items() if freed >= gpus - free]
    return list(min(enough)[2]) if enough else None
""",
        ),
        wrong={
            "the gang that loses least first": GREEDY_WAY.replace("KEY", "lost(gang)"),
            "the gang that loses least for each GPU first": GREEDY_WAY.replace("KEY", "lost(gang) / gang.gpus"),
            "the largest gang first": GREEDY_WAY.replace("KEY", "-gang.gpus"),
            "the smallest gang first": GREEDY_WAY.replace("KEY", "gang.gpus"),
            "the least important gang first": GREEDY_WAY.replace("KEY", "gang.priority, lost(gang)"),
            "the newest checkpoint first": GREEDY_WAY.replace("KEY", "-gang.saved"),
            "the one that loses least first, and nobody without need": GREEDY_WAY.replace("KEY", "lost(gang)").replace(
                "    return sorted",
                "    for gang in sorted(stopped, key=lost, reverse=True):\n"
                "        if free - gang.gpus >= gpus:\n"
                "            stopped.remove(gang)\n"
                "            free -= gang.gpus\n"
                "    return sorted",
            ),
            "one gang alone": changed(
                WAY, ("        if free +", "        if len(gangs) > 1:\n            continue\n        if free +")
            ),
            "as few gangs as possible": changed(
                WAY, ("price = lost, len(gangs), names", "price = len(gangs), lost, names")
            ),
            "as few GPUs as possible": changed(
                WAY,
                ("price = lost, len(gangs), names", "price = sum(gang.gpus for gang in gangs), lost, names"),
            ),
            "exactly as many GPUs as are needed": changed(
                WAY, ("for gang in gangs) < gpus", "for gang in gangs) != gpus")
            ),
            "equally important gangs give way": changed(WAY, ("gang.priority < priority", "gang.priority <= priority")),
            "everybody may give way": changed(WAY, (" if gang.priority < priority", "")),
            "what is free is forgotten": changed(WAY, ("if free + sum", "if sum")),
            "a restart is forgotten": changed(WAY, (" + gang.restart", "")),
            "a restart costs one GPU": changed(
                WAY, ("(now - gang.saved + gang.restart)", "(now - gang.saved) + gang.restart")
            ),
            "seconds are counted, not GPU-seconds": changed(WAY, ("gang.gpus * (now", "(now")),
            "only the GPUs that the new job gets lose": changed(
                WAY, ("gang.gpus * (now", "min(gang.gpus, gpus - free) * (now")
            ),
            "of equal losses, whoever comes first by name": changed(WAY, ("lost, len(gangs), names", "lost, 0, names")),
            "of equal losses, whoever comes first in the list": changed(WAY, ("price < best", "price[:2] < best[:2]")),
            "of equal losses, most gangs": changed(WAY, ("lost, len(gangs), names", "lost, -len(gangs), names")),
            "all who may give way do if that is not enough": changed(
                WAY, ("return None if best is None", "return sorted(gang.name for gang in lower) if best is None")
            ),
            "nobody suffices and nobody needs to are the same": changed(
                WAY, ("return None if best is None else best[2]", "return best[2] if best else []")
            ),
            "nobody needs to stop: None": changed(
                WAY, ("return None if best is None else best[2]", "return best[2] if best and best[2] else None")
            ),
            "names in the order of the list": changed(
                WAY, ("names = sorted(gang.name for gang in gangs)", "names = [gang.name for gang in gangs]")
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            RANKS,
            """
def after_replacement(gpus, lost, spare, tp, domain_of):
    spare = sorted(set(spare) - set(lost))
    hit = [first for first in range(0, len(gpus), tp) if set(gpus[first : first + tp]) & set(lost)]
    best = None
    for stays in itertools.product((True, False), repeat=len(hit)):
        after, left = list(gpus), list(spare)
        for stay, first in sorted(zip(stays, hit), reverse=True):
            group = range(first, first + tp)
            ranks = [rank for rank in group if gpus[rank] in lost] if stay else group
            domains = Counter(domain_of(gpu) for gpu in left)
            enough = [domain for domain in domains if domains[domain] >= len(ranks)]
            if stay and len(ranks) < tp:
                enough = [domain for domain in enough if domain == domain_of(gpus[first])]
            if not enough:
                break
            new = [gpu for gpu in left if domain_of(gpu) == enough[0]][: len(ranks)]
            for rank, gpu in zip(ranks, new):
                after[rank] = gpu
                left.remove(gpu)
        else:
            moved = sum(old != new for old, new in zip(gpus, after))
            if best is None or moved < best[0]:
                best = moved, after
    if best is None:
        raise NoReplacement(f"of {len(hit)} groups")
    return best[1]
""",
        ),
        wrong={
            "any spare GPU will do": """
def after_replacement(gpus, lost, spare, tp, domain_of):
    left = [gpu for gpu in spare if gpu not in lost]
    if len(left) < len(set(gpus) & set(lost)):
        raise NoReplacement("too few")
    return [left.pop(0) if gpu in lost else gpu for gpu in gpus]
""",
            "the new GPUs come last": """
def after_replacement(gpus, lost, spare, tp, domain_of):
    kept = [gpu for gpu in gpus if gpu not in lost]
    left = [gpu for gpu in spare if gpu not in lost]
    if len(kept) + len(left) < len(gpus):
        raise NoReplacement("too few")
    return (kept + left)[: len(gpus)]
""",
            "all ranks are dealt anew, in topology order": """
def after_replacement(gpus, lost, spare, tp, domain_of):
    there = sorted({*gpus, *spare} - set(lost))
    by_domain = defaultdict(list)
    for gpu in there:
        by_domain[domain_of(gpu)].append(gpu)
    after = []
    for domain in sorted(by_domain):
        after += by_domain[domain][: len(by_domain[domain]) // tp * tp]
    if len(after) < len(gpus):
        raise NoReplacement("too few")
    return after[: len(gpus)]
""",
            "a group that is hit moves": changed(RANKS, ("if len(missing(group)) == tp or len", "if True or len")),
            "no group moves": changed(RANKS, ("        for domain in sorted(free):", "        for domain in ():")),
            "groups choose in the order of ranks": changed(
                RANKS, ("    hit.sort(key=lambda group: len(missing(group)))\n", "")
            ),
            "who needs most chooses first": changed(RANKS, ("key=lambda group: len(", "key=lambda group: -len(")),
            "who cannot stay moves before others have chosen": changed(
                RANKS,
                ("    moving = [group for group in hit if not stay(group)]\n", ""),
                (
                    "    for group in moving:\n        move(group)",
                    "    for group in hit:\n        stay(group) or move(group)",
                ),
            ),
            "who cannot stay moves first, in the order of ranks": changed(
                RANKS,
                ("    hit.sort(key=lambda group: len(missing(group)))\n", ""),
                ("    moving = [group for group in hit if not stay(group)]\n", ""),
                (
                    "    for group in moving:\n        move(group)",
                    "    for group in hit:\n        stay(group) or move(group)",
                ),
            ),
            "a spare GPU that is lost is used": changed(RANKS, ("        if gpu not in lost:\n", "        if True:\n")),
            "a spare GPU is used twice": changed(RANKS, ("after[rank] = beside.pop()", "after[rank] = beside[-1]")),
            "spare GPUs beside are there for all groups": changed(
                RANKS,
                (
                    "        beside = free.get(domain_of(gpus[group[0]]), [])\n",
                    "        beside = list(free.get(domain_of(gpus[group[0]]), []))\n",
                ),
            ),
            "a group that moves may span domains": changed(
                RANKS,
                (
                    "        for domain in sorted(free):\n            if len(free[domain]) >= tp:\n",
                    "        everywhere = [gpu for gpus in free.values() for gpu in gpus]\n"
                    "        for domain in [None]:\n            if len(everywhere) >= tp:\n",
                ),
                ("after[rank] = free[domain].pop()", "after[rank] = everywhere.pop()"),
            ),
            "a group stays if its domain has as many as it lost, and moves to as few": changed(
                RANKS,
                ("if len(free[domain]) >= tp:", "if len(free[domain]) >= len(missing(group)):"),
                ("                for rank in group:\n", "                for rank in missing(group):\n"),
            ),
            "what a group leaves behind is given to the next": changed(
                RANKS,
                (
                    "                for rank in group:\n",
                    "                for gpu in [gpus[rank] for rank in group if gpus[rank] not in lost]:\n"
                    "                    free.setdefault(domain_of(gpu), []).append(gpu)\n"
                    "                for rank in group:\n",
                ),
            ),
            "every so many-th rank is in a group": changed(
                RANKS,
                (
                    "[list(range(first, first + tp)) for first in range(0, len(gpus), tp)]",
                    "[list(range(first, len(gpus), len(gpus) // tp)) for first in range(len(gpus) // tp)]",
                ),
            ),
            "who stays is dealt anew within the domain": changed(
                RANKS,
                (
                    "        for rank in missing(group):\n",
                    "        for rank in group if len(beside) >= tp else missing(group):\n",
                ),
            ),
            "too few spare GPUs: the list is returned as it is": changed(
                RANKS, ('        raise NoReplacement("too few")\n', "")
            ),
            "too few spare GPUs: None": changed(
                RANKS,
                ('        raise NoReplacement("too few")\n', "        return True\n"),
                (
                    "    for group in moving:\n        move(group)\n",
                    "    for group in moving:\n        if move(group):\n            return None\n",
                ),
            ),
            "spares are counted, and domains are not": changed(
                RANKS,
                (
                    "    groups = ",
                    "    if len(spare) < len(set(gpus) & set(lost)):\n"
                    "        raise NoReplacement('too few')\n    groups = ",
                ),
                (
                    '        raise NoReplacement("too few")\n',
                    "        for rank in missing(group):\n"
                    "            after[rank] = next(gpus for gpus in free.values() if gpus).pop()\n",
                ),
            ),
        },
    ),
    "task_6": Answers(
        correct=(
            SHARES,
            """
def next_tenant(capacity, tenants, running):
    left = dict(capacity)
    for tenant in tenants:
        for resource in tenant.task:
            left[resource] -= tenant.task[resource] * running[tenant.name]
    able = []
    for place, tenant in enumerate(tenants):
        enough = all(left[resource] >= tenant.task[resource] for resource in tenant.task)
        if enough and running[tenant.name] < tenant.tasks:
            used = [(running[tenant.name] * need, capacity[r]) for r, need in tenant.task.items()]
            shares = [Fraction(amount, whole) if amount else Fraction(0) for amount, whole in used]
            able.append((max(shares) / tenant.weight, place))
    return tenants[min(able)[1]].name if able else None

def share_out(capacity, tenants):
    running = dict.fromkeys((tenant.name for tenant in tenants), 0)
    while next_tenant(capacity, tenants, running):
        running[next_tenant(capacity, tenants, running)] += 1
    return running
""",
        ),
        wrong={
            "who runs the fewest tasks": changed(SHARES, (SHARE, "Fraction(count)")),
            "shares of the first resource": changed(
                SHARES, (SHARE, "next(Fraction(count * tenant.task.get(r, 0), n or 1) for r, n in capacity.items())")
            ),
            "all shares are added up": changed(SHARES, ("share = max(", "share = sum(")),
            "the least of the shares": changed(SHARES, ("share = max(", "share = min(")),
            "the resource of which a task needs the largest number": changed(
                SHARES, (SHARE, "Fraction(count * max(task.values()), capacity[max(task, key=task.get)])")
            ),
            "units are compared, not shares": changed(SHARES, (SHARE, "count * Fraction(max(task.values()))")),
            "shares of what is left": changed(
                SHARES,
                (
                    SHARE,
                    "max(Fraction(count * need, capacity[r] - sum(running[o.name] * o.task.get(r, 0) "
                    "for o in tenants)) for r, need in task.items())",
                ),
            ),
            "the share with the next task": changed(SHARES, ("Fraction(count * need,", "Fraction((count + 1) * need,")),
            "the share is multiplied by the weight": changed(
                SHARES, ("share / tenant.weight", "share * tenant.weight")
            ),
            "weights are not looked at": changed(SHARES, ("        share = share / tenant.weight\n", "")),
            "of equal shares, the last": changed(SHARES, ("share < least", "share <= least")),
            "of equal shares, the first by name": changed(
                SHARES, ("share < least", "(share, tenant.name) < (least, best)")
            ),
            "a tenant runs more than it wants": changed(
                SHARES, ("        if count >= tenant.tasks:\n            continue\n", "")
            ),
            "a tenant who wants one more is done": changed(
                SHARES, ("count >= tenant.tasks", "count + 1 >= tenant.tasks")
            ),
            "when the poorest does not fit, all is over": changed(
                SHARES,
                ("        if not fits(capacity, tenants, running, tenant):\n            continue\n", ""),
                (
                    "    return best\n",
                    "    poorest = [tenant for tenant in tenants if tenant.name == best]\n"
                    "    return best if poorest and fits(capacity, tenants, running, *poorest) else None\n",
                ),
                (
                    "capacity[resource]) for resource, need in task",
                    "capacity[resource] or 1) for resource, need in task",
                ),
            ),
            "what others run is not looked at": changed(SHARES, ("for other in tenants)", "for other in [tenant])")),
            "the last of a resource is never given": changed(
                SHARES, ("used + need > capacity", "used + need >= capacity")
            ),
            "a resource of which there is none divides by 0": changed(SHARES, (" if need > 0}", "}")),
            "whoever knows a resource of which there is none cannot run": changed(
                SHARES,
                (
                    "if used + need > capacity[resource]:",
                    "if used + need > capacity[resource] or not capacity[resource]:",
                ),
            ),
            "shares are added up as floating-point numbers": changed(
                SHARES, (SHARE, "max(sum(need / capacity[r] for _ in range(count)) for r, need in task.items())")
            ),
            "tenants who run nothing are left out": changed(
                SHARES,
                ("            return running\n", "            return {name: n for name, n in running.items() if n}\n"),
            ),
            "each tenant gets an equal part of everything": changed(
                SHARES,
                (
                    "    while True:\n        name = next_tenant(capacity, tenants, running)\n"
                    "        if name is None:\n            return running\n        running[name] += 1\n",
                    "    for tenant in tenants:\n"
                    "        parts = [capacity[r] // len(tenants) // n for r, n in tenant.task.items() if n]\n"
                    "        running[tenant.name] = min(tenant.tasks, *parts)\n    return running\n",
                ),
            ),
        },
    ),
}
