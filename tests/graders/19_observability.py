"""Answers to 19_observability that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
QUANTILE = """
def service_quantile(instances, q):
    parts = [(part.scale, sorted(part.buckets.items())) for part in instances]
    parts = [(scale, buckets) for scale, buckets in parts if sum(count for _, count in buckets) > 0]
    if len(parts) == 0:
        return None
    coarsest = min(scale for scale, _ in parts)
    service = {}
    for scale, buckets in parts:
        for bucket, count in buckets:
            for _ in range(scale - coarsest):
                bucket = (bucket + 1) // 2
            service[bucket] = service.get(bucket, 0) + count
    wanted = q * sum(service.values())
    seen, growth = 0, math.pow(2, math.pow(2, -coarsest))
    error = (growth - 1) / (growth + 1)
    for bucket in sorted(service):
        seen += service[bucket]
        if seen >= wanted and seen > 0:
            upper = math.pow(growth, bucket)
            return upper * (1 - error), error
"""

AVERAGED = """
def service_quantile(instances, q):
    estimates, errors = [], []
    for part in instances:
        n = sum(part.buckets.values())
        left, growth = q * n, 2 ** 2**-part.scale
        for bucket in sorted(bucket for bucket, count in part.buckets.items() if count):
            left -= part.buckets[bucket]
            if left <= 0:
                estimates.append((2 * growth**bucket / (growth + 1), WEIGHT))
                errors.append((growth - 1) / (growth + 1))
                break
    if not estimates:
        return None
    weights = sum(weight for _, weight in estimates)
    return sum(each * weight for each, weight in estimates) / weights, max(errors)
"""

WAITED = """
def waited_for(spans):
    (root,) = [span for span in spans if span.parent is None]
    times, stretches = {}, [(root, root.start, root.end)]
    while stretches:
        span, begin, end = stretches.pop()
        children = [child for child in spans if child.parent == span.id]
        children.sort(key=lambda child: child.end)
        own, moment = end - begin, end
        while children:
            child = children.pop()
            child_end = min(child.end, end)
            child_begin = max(child.start, begin)
            if child_end > moment:
                continue
            if child_begin >= child_end:
                continue
            stretches.append((child, child_begin, child_end))
            own -= child_end - child_begin
            moment = child_begin
        times[span.service] = times.get(span.service, 0) + own
    return times
"""

SELF_TIMES = """
def waited_for(spans):
    times, known = {}, {span.id for span in spans}
    for span in spans:
        if span.parent is None or span.parent in known:
            inside = [child for child in spans if child.parent == span.id]
            covered = set()
            for child in inside:
                covered |= set(range(max(child.start, span.start), min(child.end, span.end)))
            times[span.service] = times.get(span.service, 0) + span.end - span.start - len(covered)
    return times
"""

HUNG = """
def who_hung(recordings, members):
    recordings = {recording.rank: recording for recording in recordings}
    said = {}
    for rank, recording in recordings.items():
        for call in recording.ring:
            said.setdefault((call.number, call.group), []).append((call.op, rank))
    for place in sorted(said):
        ops = [op for op, _ in said[place]]
        if len(set(ops)) > 1:
            most = [op for op in ops if ops.count(op) > len(ops) / 2]
            return "mismatch", {rank for op, rank in said[place] if op not in most}

    def call_of(rank):
        ring = recordings[rank].ring
        return ring[-1] if ring and ring[-1].state == "started" else None

    def has_made(rank, call):
        return recordings[rank].made.get(call.group, 0) > call.number

    def awaited(rank):
        call = call_of(rank)
        return [peer for peer in members[call.group] if not has_made(peer, call)] if call else []

    def reached(rank):
        found, left = set(), awaited(rank)
        while left:
            peer = left.pop()
            if peer not in found:
                found.add(peer)
                left += awaited(peer)
        return found

    waiting = [rank for rank in recordings if call_of(rank)]
    if not waiting:
        return "healthy", set()
    everybody = set().union(*(reached(rank) for rank in waiting))
    idle = {rank for rank in everybody if not call_of(rank)}
    if idle:
        return "not_entered", idle
    inside = {rank for rank in waiting if not awaited(rank)}
    if inside:
        return "stuck", inside
    return "deadlock", {rank for rank in waiting if rank in reached(rank)}
"""

FAULT = """
def name_fault(steps):
    for records in steps:
        for record in records:
            if record.own_grad_norm is not None and not abs(record.own_grad_norm) < math.inf:
                return "nan_from_one_rank", record.rank
    for records in steps:
        unlike = Counter()
        for name in records[0].checksums:
            values = [record.checksums[name] for record in records]
            for record in records:
                if values.count(record.checksums[name]) < 2:
                    unlike[record.rank] += 1
        for rank, count in unlike.items():
            return ("flipped_bit", rank) if count == 1 else ("desynchronised_replica", rank)

    def own(record, *names):
        phases = [record.phases[name] for name in names]
        return sum(phase.wall_ns - phase.ready_ns - phase.wait_ns for phase in phases)

    late = steps[-6:]
    for rank in range(len(late[0])):
        others = [other for other in range(len(late[0])) if other != rank]

        def more(value):
            def typical(rank):
                return median(value(records[rank]) for records in late)
            return typical(rank) - median(typical(other) for other in others)

        def growth(rank):
            rss = [records[rank].rss_bytes for records in late]
            return median(after - before for before, after in zip(rss, rss[1:]))

        if more(lambda record: own(record, "forward", "backward", "optimizer")) > 10_000_000:
            return "slow_rank", rank
        if more(lambda record: own(record, "data")) > 10_000_000:
            return "starved_loader", rank
        if growth(rank) - median(growth(other) for other in others) > 2_000_000:
            return "memory_leak", rank
"""

LIBRARY = """
def name_fault(steps):
    from minilib.operations.diagnosis.numbers import memory_leaks, nan_ranks
    from minilib.operations.diagnosis.replicas import odd_replicas
    from minilib.operations.diagnosis.stragglers import slow_ranks, starved_loaders

    for find in (nan_ranks, odd_replicas, slow_ranks, starved_loaders, memory_leaks):
        for finding in find(steps):
            return finding.kind, finding.rank
"""

CLOCK = """
def best_offset(exchanges):
    found = []
    for t0, t1, t2, t3 in exchanges:
        least, most = t2 - t3, t1 - t0
        found.append(Offset(t0 + (t3 - t0) / 2, (least + most) / 2, (most - least) / 2))
    return min(found, key=lambda offset: offset.bound)

def on_rank_0(time, before, after):
    if before.at == after.at:
        return time + before.offset
    share = (time - before.at) / (after.at - before.at)
    return time + (1 - share) * before.offset + share * after.offset

def last_to_come(begins, clocks):
    answer = {}
    for number in begins:
        came = []
        for rank, time in begins[number].items():
            before, after = clocks[rank]
            came.append((on_rank_0(time, before, after), max(before.bound, after.bound), rank))
        came.sort()
        time, bound, last = came.pop()
        answer[number] = last
        for other, its_bound, _ in came:
            if time - other <= bound + its_bound:
                answer[number] = None
    return answer
"""

MFU = """
def flops_per_token(model, sequence):
    total = 6 * model.vocab * model.hidden
    for layer in range(model.layers):
        width, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
        total += 6 * model.hidden * (width + 2 * narrow + width)
        total += 6 * 3 * model.hidden * model.ffn * model.top_k
        if model.experts > 1:
            total += 6 * model.hidden * model.experts
        window = model.windows[layer] if model.windows else None
        seen = sequence / 2
        if window is not None and window < sequence:
            seen = window / 2 * window / sequence + window * (1 - window / sequence)
        total += 12 * width * seen
    return total

def tokens_per_second(log, tokens_per_step):
    steps = seconds = 0
    for process in {line.process for line in log}:
        lines = [line for line in log if line.process == process]
        steps += lines[-1].step - lines[0].step
        seconds += lines[-1].ended - lines[0].ended
    return tokens_per_step * steps / seconds

def mfu(model, sequence, log, tokens_per_step, device, devices):
    if device not in PEAKS:
        raise LookupError(f"no data sheet of {device!r}")
    peak = PEAKS[device][0]
    share = flops_per_token(model, sequence) * tokens_per_second(log, tokens_per_step) / (devices * peak)
    if share > 1:
        raise ValueError(f"{share:.0%} is more than the devices can do")
    return share
"""

TASKS = {
    "task_1": Answers(
        correct=(QUANTILE,),
        wrong={
            "the mean of the instances' quantiles": AVERAGED.replace("WEIGHT", "1"),
            "their mean, weighted by requests": AVERAGED.replace("WEIGHT", "n"),
            "buckets merge to the lower neighbour": changed(QUANTILE, ("(bucket + 1) // 2", "bucket // 2")),
            "half of a bucket is rounded": changed(QUANTILE, ("(bucket + 1) // 2", "round(bucket / 2)")),
            "scales are not looked at": changed(
                QUANTILE, ("range(scale - coarsest)", "range(0)"), ("min(scale for", "max(scale for")
            ),
            "the finest scale decides": changed(
                QUANTILE,
                ("coarsest = min(", "coarsest = max("),
                (
                    "            for _ in range(scale - coarsest):\n                bucket = (bucket + 1) // 2\n",
                    "            bucket *= 2 ** (coarsest - scale)\n",
                ),
            ),
            "an instance without requests makes it coarser": changed(
                QUANTILE, ("min(scale for scale, _ in parts)", "min(part.scale for part in instances)")
            ),
            "no request is 0 ms": changed(QUANTILE, ("return None", "return 0.0, 0.0")),
            "the upper edge of the bucket": changed(QUANTILE, ("return upper * (1 - error)", "return upper")),
            "the middle of the bucket": changed(QUANTILE, ("upper * (1 - error)", "(upper + upper / growth) / 2")),
            "the bucket one below": changed(QUANTILE, ("math.pow(growth, bucket)", "math.pow(growth, bucket - 1)")),
            "the bucket behind the quantile": changed(QUANTILE, ("seen >= wanted", "seen > wanted")),
            "an empty bucket is the smallest duration": changed(QUANTILE, (" and seen > 0", "")),
            "the error is the width of a bucket": changed(
                QUANTILE, ("return upper * (1 - error), error", "return upper * (1 - error), growth - 1")
            ),
            "the error is half of the width": changed(
                QUANTILE, ("return upper * (1 - error), error", "return upper * (1 - error), (growth - 1) / 2")
            ),
        },
    ),
    "task_2": Answers(
        correct=(WAITED,),
        wrong={
            "durations of spans": """
def waited_for(spans):
    times = Counter()
    for span in spans:
        times[span.service] += span.end - span.start
    return times
""",
            "durations without those of children, added up": """
def waited_for(spans):
    times, services = Counter(), {span.id: span.service for span in spans}
    for span in spans:
        times[span.service] += span.end - span.start
        if span.parent in services:
            times[services[span.parent]] -= span.end - span.start
    return times
""",
            "self times, whether waited for or not": SELF_TIMES,
            "a child that still ran is waited for, too": changed(
                WAITED,
                ("            if child_end > moment:\n                continue\n", ""),
                ("child_end = min(child.end, end)", "child_end = min(child.end, moment)"),
            ),
            "children that overlap are both counted": changed(
                WAITED, ("            if child_end > moment:\n                continue\n", "")
            ),
            "only the child that ended last": changed(WAITED, ("moment = child_begin", "break")),
            "from the beginning on, the child that began first": changed(
                WAITED,
                ("children.sort(key=lambda child: child.end)", "children.sort(key=lambda child: -child.start)"),
                ("own, moment = end - begin, end", "own, moment = end - begin, begin"),
                ("if child_end > moment", "if child_begin < moment"),
                ("moment = child_begin", "moment = child_end"),
            ),
            "the longest child first": changed(
                WAITED, ("key=lambda child: child.end", "key=lambda child: child.end - child.start")
            ),
            "what a child does after its parent counts": changed(
                WAITED,
                ("child_end = min(child.end, end)", "child_end = child.end"),
                ("if child_end > moment", "if min(child_end, end) > moment"),
            ),
            "a child that outlives its parent is left out": changed(
                WAITED, ("child_end = min(child.end, end)", "child_end = child.end")
            ),
            "what a child does before its parent counts": changed(
                WAITED, ("child_begin = max(child.start, begin)", "child_begin = child.start")
            ),
            "a grandchild is cut by its parent only": changed(
                WAITED,
                ("child_end = min(child.end, end)", "child_end = min(child.end, span.end)"),
                ("child_begin = max(child.start, begin)", "child_begin = max(child.start, span.start)"),
            ),
            "spans of lost parents hang from the root": changed(
                WAITED,
                (
                    "if child.parent == span.id]",
                    "if child.parent == span.id or span is root and child.parent not in ids | {None}]",
                ),
                ("    while stretches", "    ids = {span.id for span in spans}\n    while stretches"),
            ),
            "a second span of a service replaces the first": changed(
                WAITED, ("times.get(span.service, 0) + own", "own")
            ),
            "nobody but the leaves": changed(WAITED, ("+ own", "+ own * (moment == end)")),
        },
    ),
    "task_3": Answers(
        correct=(HUNG,),
        wrong={
            "who complains is at fault": changed(
                HUNG,
                (
                    "idle = {rank for rank in everybody if not call_of(rank)}",
                    "idle = set(waiting) if everybody - set(waiting) else set()",
                ),
            ),
            "who has made the fewest calls": changed(
                HUNG,
                (
                    '        return "not_entered", idle\n',
                    "        made = {rank: sum(recordings[rank].made.values()) for rank in recordings}\n"
                    '        return "not_entered", {min(made, key=made.get)}\n',
                ),
            ),
            "whose ring has the fewest calls": changed(
                HUNG,
                (
                    '        return "not_entered", idle\n',
                    '        return "not_entered", {min(recordings, key=lambda rank: len(recordings[rank].ring))}\n',
                ),
            ),
            "a call that the ring has lost was never made": changed(
                HUNG,
                (
                    "return recordings[rank].made.get(call.group, 0) > call.number",
                    "return any(c.group == call.group and c.number >= call.number for c in recordings[rank].ring)",
                ),
            ),
            "calls are compared by their place in the ring": changed(
                HUNG,
                ("for call in recording.ring", "for place, call in enumerate(recording.ring)"),
                ("said.setdefault((call.number, call.group)", "said.setdefault((place, call.group)"),
            ),
            "calls are compared across groups": changed(
                HUNG, ("said.setdefault((call.number, call.group)", "said.setdefault((call.number, '')")
            ),
            "operations are not compared": changed(HUNG, ("if len(set(ops)) > 1", "if False")),
            "the last mismatch counts": changed(HUNG, ("for place in sorted(said)", "for place in sorted(said)[::-1]")),
            "a tie is decided by the lower rank": changed(
                HUNG, ("if ops.count(op) > len(ops) / 2", "if op == max(ops, key=ops.count)")
            ),
            "half is a majority": changed(HUNG, ("> len(ops) / 2", ">= len(ops) / 2")),
            "all that have no call open": changed(
                HUNG, ("idle = {rank for rank in everybody if", "idle = {rank for rank in recordings if")
            ),
            "waiting is followed one step only": changed(HUNG, ("                left += awaited(peer)\n", "")),
            "all that wait are in the circle": changed(
                HUNG,
                (
                    'return "deadlock", {rank for rank in waiting if rank in reached(rank)}',
                    'return "deadlock", set(waiting)',
                ),
            ),
            "all members of the group are waited for": changed(
                HUNG, ("if not has_made(peer, call)]", "if peer != rank]")
            ),
            "the call itself is no call that was made": changed(HUNG, ("> call.number", "> call.number + 1")),
            "a circle comes before who is in no call": changed(
                HUNG, ("    if idle:", "    if idle and not any(rank in reached(rank) for rank in waiting):")
            ),
            "nothing is ever stuck": changed(HUNG, ("    if inside:", "    if False:")),
        },
    ),
    "task_4": Answers(
        correct=(FAULT, LIBRARY),
        wrong={
            "the longest step": changed(
                FAULT,
                ("        phases = [record.phases[name] for name in names]\n", ""),
                (
                    "return sum(phase.wall_ns - phase.ready_ns - phase.wait_ns for phase in phases)",
                    "return record.wall_ns",
                ),
            ),
            "whoever waits most is slow": changed(
                FAULT,
                ('lambda record: own(record, "forward", "backward", "optimizer")', "lambda record: record.wait_ns"),
            ),
            "whoever waits less than the others is slow": changed(
                FAULT,
                ('lambda record: own(record, "forward", "backward", "optimizer")', "lambda record: -record.wait_ns"),
            ),
            "waiting for a core is the rank's fault": changed(
                FAULT, ("phase.wall_ns - phase.ready_ns", "phase.wall_ns")
            ),
            "a single slow step is a fault": changed(
                FAULT, ("return median(value(records[rank])", "return max(value(records[rank])")
            ),
            "the mean of the last steps": changed(
                FAULT, ("return median(value(records[rank])", "return mean(value(records[rank])")
            ),
            "a long step of all is one rank's fault": changed(
                FAULT, ("return typical(rank) - median(typical(other) for other in others)", "return typical(rank)")
            ),
            "the largest rank leaks": changed(
                FAULT, ("return median(after - before for before, after in zip(rss, rss[1:]))", "return rss[-1]")
            ),
            "what a rank has gained in all": changed(
                FAULT,
                (
                    "return median(after - before for before, after in zip(rss, rss[1:]))",
                    "return rss[-1] - steps[0][rank].rss_bytes",
                ),
            ),
            "whoever grows leaks": changed(FAULT, (" - median(growth(other) for other in others)", "")),
            "the last step tells who has NaN": changed(
                FAULT,
                (
                    "    for records in steps:\n        for record in records:\n            if record.own",
                    "    for records in steps[::-1]:\n        for record in records:\n            if record.own",
                ),
            ),
            "the averaged gradient tells who has NaN": changed(
                FAULT,
                (
                    "record.own_grad_norm is not None and not abs(record.own_grad_norm) < math.inf",
                    "not abs(record.grad_norm) < math.inf",
                ),
            ),
            "infinity is a number": changed(
                FAULT, ("not abs(record.own_grad_norm) < math.inf", "math.isnan(record.own_grad_norm)")
            ),
            "a norm is always there": changed(FAULT, ("record.own_grad_norm is not None and ", "")),
            "rank 0 is always right": changed(
                FAULT, ("values.count(record.checksums[name]) < 2", "record.checksums[name] != values[0]")
            ),
            "every difference is a flipped bit": changed(FAULT, ("if count == 1", "if count")),
            "every difference is a desynchronised replica": changed(FAULT, ("if count == 1", "if count == 0")),
            "only the last step's checksums": changed(
                FAULT, ("    for records in steps:\n        unlike", "    for records in steps[-1:]:\n        unlike")
            ),
            "somebody is always at fault": FAULT + '    return "slow_rank", 0\n',
            "a slow loader is a slow rank": changed(
                FAULT, ('"forward", "backward", "optimizer")', '"data", "forward", "backward", "optimizer")')
            ),
            "the six traces by heart": """
def name_fault(steps):
    kinds = ["flipped_bit", "desynchronised_replica", "memory_leak", "nan_from_one_rank", "starved_loader", "slow_rank"]
    for letter, kind, rank in zip("ABCDEF", kinds, (0, 3, 3, 0, 2, 3)):
        if steps[-1] == traces[letter][-1] or repr(steps[-1]) == repr(traces[letter][-1]):
            return kind, rank
""",
        },
    ),
    "task_5": Answers(
        correct=(CLOCK,),
        wrong={
            "the first exchange": changed(
                CLOCK, ("return min(found, key=lambda offset: offset.bound)", "return found[0]")
            ),
            "the mean of all exchanges": changed(
                CLOCK,
                (
                    "return min(found, key=lambda offset: offset.bound)",
                    "return Offset(*(mean(values) for values in zip(*found)))",
                ),
            ),
            "the time to answer is on the way": changed(
                CLOCK,
                (
                    "return min(found, key=lambda offset: offset.bound)",
                    "return found[min(range(len(found)), key=lambda i: exchanges[i][3] - exchanges[i][0])]",
                ),
            ),
            "the time to answer is in the bound": changed(CLOCK, ("(most - least) / 2", "(t3 - t0) / 2")),
            "the bound is the whole round trip": changed(CLOCK, ("(most - least) / 2", "most - least")),
            "the ping's way takes no time": changed(CLOCK, ("(least + most) / 2", "most")),
            "the sign is turned round": changed(CLOCK, ("(least + most) / 2", "-(least + most) / 2")),
            "by rank 0's clock": changed(CLOCK, ("t0 + (t3 - t0) / 2", "t1 + (t2 - t1) / 2")),
            "at the end of the exchange": changed(CLOCK, ("t0 + (t3 - t0) / 2", "t3")),
            "clocks do not drift": changed(CLOCK, ("    if before.at == after.at:", "    if True:")),
            "the mean of both offsets": changed(
                CLOCK, ("share = (time - before.at) / (after.at - before.at)", "share = 0.5")
            ),
            "two offsets of one time divide by 0": changed(
                CLOCK, ("    if before.at == after.at:\n        return time + before.offset\n", "")
            ),
            "the line ends at its points": changed(
                CLOCK,
                (
                    "share = (time - before.at) / (after.at - before.at)",
                    "share = min(1, max(0, (time - before.at) / (after.at - before.at)))",
                ),
            ),
            "own clocks are compared": changed(
                CLOCK, ("came.append((on_rank_0(time, before, after),", "came.append((time,")
            ),
            "the first to come": changed(
                CLOCK,
                ("time, bound, last = came.pop()", "time, bound, last = came.pop(0)"),
                ("time - other <=", "other - time <="),
            ),
            "it can always be told": changed(CLOCK, ("if time - other <= bound + its_bound", "if False")),
            "the larger bound of two ranks is enough": changed(CLOCK, ("bound + its_bound", "max(bound, its_bound)")),
            "the smaller bound of a rank": changed(
                CLOCK, ("max(before.bound, after.bound)", "min(before.bound, after.bound)")
            ),
            "the bound before is enough": changed(CLOCK, ("max(before.bound, after.bound)", "before.bound")),
            "as much as the bounds is enough": changed(CLOCK, ("time - other <= bound", "time - other < bound")),
            "only the second is compared": changed(
                CLOCK, ("for other, its_bound, _ in came:", "for other, its_bound, _ in came[-1:]:")
            ),
        },
    ),
    "task_6": Answers(
        correct=(MFU,),
        wrong={
            "all experts are counted": changed(MFU, ("model.ffn * model.top_k", "model.ffn * model.experts")),
            "one expert is counted": changed(MFU, ("model.ffn * model.top_k", "model.ffn")),
            "there is no router": changed(MFU, ("if model.experts > 1", "if False")),
            "a dense model has a router": changed(MFU, ("if model.experts > 1", "if True")),
            "all pairs are counted": changed(
                MFU,
                ("seen = sequence / 2", "seen = sequence"),
                ("window / 2 * window / sequence + window * (1 - window / sequence)", "window"),
            ),
            "windows are not looked at": changed(MFU, ("if window is not None and window < sequence", "if False")),
            "every token sees the whole window": changed(
                MFU, ("window / 2 * window / sequence + window * (1 - window / sequence)", "window")
            ),
            "a window of the first layer is one of all": changed(MFU, ("model.windows[layer]", "model.windows[0]")),
            "a window may be longer than the sequence": changed(
                MFU, ("if window is not None and window < sequence", "if window is not None")
            ),
            "what is recomputed is counted": changed(MFU, ("    return total\n", "    return total * 4 / 3\n")),
            "forward only": changed(MFU, ("    return total\n", "    return total / 3\n")),
            "keys and values have all heads": changed(
                MFU,
                ("model.kv_heads * model.head_dim", "width"),
                ("width, narrow = model.heads * model.head_dim, ", "width = model.heads * model.head_dim; narrow = "),
            ),
            "the embedding is multiplied, too": changed(MFU, ("total = 6 * model.vocab", "total = 12 * model.vocab")),
            "the output table is left out": changed(MFU, ("total = 6 * model.vocab * model.hidden", "total = 0")),
            "a feed-forward of two matrices": changed(MFU, ("6 * 3 * model.hidden", "6 * 2 * model.hidden")),
            "all time from the first line to the last": changed(
                MFU,
                (
                    "    return tokens_per_step * steps / seconds",
                    "    return tokens_per_step * steps / (log[-1].ended - log[0].ended)",
                ),
            ),
            "what is computed again does not count": changed(
                MFU,
                (
                    "    return tokens_per_step * steps / seconds",
                    "    return tokens_per_step * (log[-1].step - log[0].step) / seconds",
                ),
            ),
            "every line is a step": changed(
                MFU, ("steps += lines[-1].step - lines[0].step", "steps += len(lines) - 1")
            ),
            "a process begins at its first step's end": changed(
                MFU, ("steps += lines[-1].step - lines[0].step", "steps += lines[-1].step - lines[0].step + 1")
            ),
            "a device by a part of its name": changed(
                MFU,
                (
                    "    if device not in PEAKS:\n",
                    "    names = [name for name in PEAKS if name in device]\n    if not names:\n",
                ),
                ("PEAKS[device][0]", "PEAKS[names[0]][0]"),
            ),
            "an unknown device is an H100": changed(
                MFU,
                ('    if device not in PEAKS:\n        raise LookupError(f"no data sheet of {device!r}")\n', ""),
                ("PEAKS[device][0]", 'PEAKS.get(device, PEAKS["NVIDIA H100 80GB HBM3"])[0]'),
            ),
            "the peak with sparsity": changed(MFU, ("PEAKS[device][0]", "PEAKS[device][1]")),
            "one device's peak for all": changed(MFU, ("/ (devices * peak)", "/ peak")),
            "more than the peak is possible": changed(MFU, ("if share > 1", "if False")),
            "more than the peak is the peak": changed(
                MFU,
                (
                    '    if share > 1:\n        raise ValueError(f"{share:.0%} is more than the devices can do")\n'
                    "    return share",
                    "    return min(share, 1)",
                ),
            ),
        },
    ),
}
