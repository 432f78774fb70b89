"""Answers to 17_serving that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


def in_method(name: str, answer: str, *swaps: tuple[str, str]) -> str:
    """The same, where the steps stand in one method, up to its first empty line."""
    before, method, rest = answer.partition(f"    def {name}(")
    body, end, after = rest.partition("\n\n")
    return before + method + changed(body, *swaps) + end + after


# Right answers, in steps that mistakes replace
AGAIN = """
def send_again(attempt, untried, take):
    method, sent, status, headers, timed_out, passed_on = attempt
    if passed_on:
        return False
    if not untried:
        return False
    if status is None and sent:
        if timed_out:
            return False
        if method not in IDEMPOTENT:
            return False
    if status is not None:
        if status not in (429, 503):
            return False
        if status == 503 and "retry-after" not in headers:
            return False
    return take()
"""

BOOKS = """
class Books(Late):
    def __init__(self, backends):
        super().__init__(backends)
        self.there, self.silent = set(), set()

    def dispatch(self):
        request = super().dispatch()
        self.there.add(request)
        self.silent.add(request)
        self.count(request, 1, 1)
        return request

    def count(self, request, flying, silent):
        self.in_flight[request.backend] += flying
        self.unanswered[request.backend] += silent

    def began(self, request):
        if request in self.silent:
            self.failures[request.backend] = 0
            self.silent.discard(request)
            self.count(request, 0, -1)

    def ended(self, request):
        if request in self.there:
            self.count(request, -1, -(request in self.silent))
            self.there.discard(request)
            self.silent.discard(request)

    def failed(self, request):
        if request in self.there:
            self.failures[request.backend] += 1
        self.ended(request)
"""

CAREFUL = """
class Careful(Longest):
    def choose(self, prompt, loads):
        def match(replica):
            length = 0
            while length < len(blocks) and name(length + 1) in self.sent[replica]:
                length += 1
            return length

        def name(length):
            return prompt.salt, blocks[:length]

        blocks = prompt.blocks
        up = [replica for replica in range(len(loads)) if loads[replica] < math.inf]
        least = min(loads[replica] for replica in up)
        near = []
        for replica in up:
            if loads[replica] <= least + self.gap or loads[replica] <= least * self.ratio:
                near.append(replica)
        best = max(map(match, near))
        chosen = min(up, key=lambda replica: loads[replica])
        if best > 0:
            if best >= self.share * len(blocks):
                chosen = min((loads[replica], replica) for replica in near if match(replica) == best)[1]
        for length in range(len(blocks)):
            self.sent[chosen].add(name(length + 1))
        return chosen
"""

RESPOND = """
async def respond(stream, connection):
    me = asyncio.current_task()
    writing = asyncio.create_task(write_all(stream, connection))
    leaving = asyncio.create_task(connection.gone())
    leaving.add_done_callback(lambda _: writing.cancel())
    writing.add_done_callback(lambda _: leaving.cancel())
    try:
        await asyncio.gather(writing, leaving, return_exceptions=True)
    finally:
        stream.close()

async def write_all(stream, connection):
    end = "[DONE]"
    try:
        while True:
            outputs = await stream.get_many()
            if not outputs:
                break
            *_, last = outputs
            text = "".join([output.text for output in outputs])
            event = {"text": text, "finish_reason": last.finish_reason}
            await connection.write(b"data: %s\\n\\n" % json.dumps(event).encode())
    except RequestFailed as error:
        end = json.dumps({"error": {"message": str(error)}})
    await connection.write(f"data: {end}\\n\\n".encode())
"""

RACING = """
async def respond(stream, connection):
    gone = asyncio.ensure_future(connection.gone())

    async def before_gone(coroutine):
        step = asyncio.ensure_future(coroutine)
        try:
            await asyncio.wait({step, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                raise ConnectionError("the client has left")
            return step.result()
        finally:
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)

    def event(content):
        return b"data: " + (content if isinstance(content, bytes) else json.dumps(content).encode()) + b"\\n\\n"

    try:
        try:
            while outputs := await before_gone(stream.get_many()):
                text = "".join(output.text for output in outputs)
                content = {"text": text, "finish_reason": outputs[-1].finish_reason}
                await before_gone(connection.write(event(content)))
        except RequestFailed as error:
            await before_gone(connection.write(event({"error": {"message": str(error)}})))
        else:
            await before_gone(connection.write(event(b"[DONE]")))
    except ConnectionError:
        pass
    finally:
        gone.cancel()
        stream.close()
        await asyncio.gather(gone, return_exceptions=True)
"""

LAYOUT = """
def choose_layout(load, promise, workers, chunks, link, price=h100, config=llama):
    def mixed(chunk):
        chunk = min(chunk, load.prompt)
        costs = price_phases(load.prompt, load.answer, load.batch, price, chunk)
        behind = load.prompt - chunk
        gap = token_gap(load.batch, load.prompt + load.answer // 2, price, chunk, behind)
        steps = -(-load.prompt // chunk)
        return steps * gap, gap, workers / (costs.prefill + costs.decode)

    def split(p, d):
        costs = price_phases(load.prompt, load.answer, load.batch, price, load.prompt)
        move = price_move(config, load.prompt, price, link, chunk=load.prompt)
        first = costs.prefill + move.exposed + costs.step
        return first, costs.step, min(p / costs.prefill, d / costs.decode)

    best = None
    layouts = [(("mixed", chunk), mixed(chunk)) for chunk in chunks]
    layouts += [(("split", p, workers - p), split(p, workers - p)) for p in range(1, workers)]
    for layout, (first, gap, rate) in layouts:
        if first <= promise.first and gap <= promise.gap:
            if best is None or rate > best[1]:
                best = layout, rate
    return best
"""

LEASES = """
class Leases(Careless):
    def __init__(self, epoch, frames, seconds):
        super().__init__(epoch, frames, seconds)
        self.given = 0

    def over(self, number, now):
        return now >= self.leases[number][1]

    def collect(self, now):
        for number in list(self.leases):
            if self.over(number, now):
                self.free.extend(self.leases.pop(number)[0])

    def hold(self, count, now):
        self.collect(now)
        if count > len(self.free):
            return None
        frames, self.free = self.free[:count], self.free[count:]
        self.given += 1
        self.leases[self.given] = frames, now + self.seconds
        return self.given

    def known(self, epoch, number, now):
        if epoch != self.epoch:
            return False
        if number not in self.leases:
            return False
        return not self.over(number, now)

    def read(self, epoch, number, now):
        if not self.known(epoch, number, now):
            return None
        return [*self.leases[number][0]]

    def renew(self, epoch, number, now):
        if not self.known(epoch, number, now):
            return False
        frames, end = self.leases[number]
        self.leases[number] = frames, now + self.seconds
        return True

    def release(self, epoch, number, now):
        if not self.known(epoch, number, now):
            return False
        self.free.extend(self.leases.pop(number)[0])
        return True
"""

TASKS = {
    "task_1": Answers(
        correct=(
            AGAIN,
            """
def send_again(attempt, untried, take):
    begun = attempt.sent
    if attempt.status is not None:
        begun = not (attempt.status == 429 or attempt.status == 503 and "retry-after" in attempt.headers)
    harmless = attempt.status is None and attempt.method in IDEMPOTENT and not attempt.timed_out
    if attempt.passed_on or untried == 0 or (begun and not harmless):
        return None
    return take()
""",
        ),
        wrong={
            "a POST that was read is sent again": changed(
                AGAIN, ("        if method not in IDEMPOTENT:\n            return False\n", "")
            ),
            "only POST is dangerous": changed(AGAIN, ("method not in IDEMPOTENT", 'method == "POST"')),
            "a stream that has begun is sent again": changed(AGAIN, ("if passed_on", "if passed_on and status == 200")),
            "a GET is sent again after a timeout": changed(AGAIN, ("if timed_out", "if False")),
            "a timeout before anything was sent is final": changed(
                AGAIN,
                ("        if timed_out:\n            return False\n", ""),
                ("if not untried", "if not untried or timed_out"),
            ),
            "a refused POST is final": changed(AGAIN, ("if status is None and sent", "if status is None")),
            "a POST that was refused by status is final": changed(AGAIN, ("if status is None and sent", "if sent")),
            "every 503 is a refusal": changed(
                AGAIN, ('        if status == 503 and "retry-after" not in headers:\n            return False\n', "")
            ),
            "a 429 needs a retry-after as well": changed(AGAIN, ('if status == 503 and "', 'if "')),
            "every retry-after is a refusal": changed(
                AGAIN, ("if status not in (429, 503)", 'if status not in (429, 503) and "retry-after" not in headers')
            ),
            "no refusal is sent again": changed(AGAIN, ("if status not in (429, 503)", "if True")),
            "every error of the server is sent again": changed(
                AGAIN, ("if status not in (429, 503)", "if status != 429 and status < 500")
            ),
            "there is no budget": changed(AGAIN, ("    return take()\n", "    return True\n")),
            "the budget is asked first": changed(
                AGAIN,
                ("    if passed_on:", "    if not take():\n        return False\n    if passed_on:"),
                ("    return take()\n", "    return True\n"),
            ),
            "a retry is spent where no backend is left": changed(
                AGAIN, ("    if not untried:\n        return False\n", "")
            ),
            "a retry is asked for twice": changed(AGAIN, ("return take()", "return take() and take()")),
        },
    ),
    "task_2": Answers(
        correct=(
            BOOKS,
            """
class Books(Late):
    def dispatch(self):
        least = min(self.in_flight)
        request = Request(next(at for at, load in enumerate(self.in_flight) if load == least))
        self.in_flight[request.backend] += 1
        self.unanswered[request.backend] += 1
        request.state = "waits"
        return request

    def move(self, request, state):
        before, request.state = request.state, state
        self.in_flight[request.backend] += (state != "over") - (before != "over")
        self.unanswered[request.backend] += (state == "waits") - (before == "waits")

    def began(self, request):
        if request.state == "waits":
            self.failures[request.backend] = 0
            self.move(request, "read")

    def ended(self, request):
        self.move(request, "over")

    def failed(self, request):
        self.failures[request.backend] += request.state != "over"
        self.move(request, "over")
""",
        ),
        wrong={
            "load counts at the first byte": changed(
                BOOKS,
                ("self.count(request, 1, 1)", "self.count(request, 0, 1)"),
                ("self.count(request, 0, -1)", "self.count(request, 1, -1)"),
                ("self.count(request, -1, -(", "self.count(request, (request in self.silent) - 1, -("),
            ),
            "load is what has no answer yet": changed(
                BOOKS,
                ("self.count(request, 0, -1)", "self.count(request, -1, -1)"),
                ("self.count(request, -1, -(", "self.count(request, -(request in self.silent), -("),
            ),
            "an end counts as often as it is reported": in_method(
                "ended", BOOKS, ("if request in self.there", "if True")
            ),
            "a failure counts as often as it is reported": in_method(
                "failed", BOOKS, ("if request in self.there", "if True")
            ),
            "a first byte counts as often as it is reported": in_method(
                "began", BOOKS, ("if request in self.silent", "if request in self.there")
            ),
            "every first byte forgives": changed(
                BOOKS,
                (
                    "        if request in self.silent:\n            self.failures[request.backend] = 0\n",
                    "        self.failures[request.backend] = 0\n        if request in self.silent:\n",
                ),
            ),
            "a first byte after the end forgives": changed(
                BOOKS,
                (
                    "        if request in self.silent:\n            self.failures[request.backend] = 0\n",
                    "        if request in self.silent or request not in self.there:\n"
                    "            self.failures[request.backend] = 0\n        if request in self.silent:\n",
                ),
            ),
            "a client that leaves is a failure": changed(
                BOOKS,
                (
                    "            self.there.discard(request)\n",
                    "            self.failures[request.backend] += request in self.silent\n"
                    "            self.there.discard(request)\n",
                ),
            ),
            "who leaves before the first byte is unanswered for ever": changed(
                BOOKS, ("-(request in self.silent)", "0"), ("            self.silent.discard(request)\n\n", "\n")
            ),
            "an answered request is counted off twice": changed(BOOKS, ("-(request in self.silent)", "-1")),
            "a failure after the first byte is none": in_method(
                "failed", BOOKS, ("if request in self.there", "if request in self.silent")
            ),
            "a failure is no end": changed(BOOKS, ("        self.ended(request)\n", "")),
            "a first byte does not forgive": changed(BOOKS, ("            self.failures[request.backend] = 0\n", "")),
            "an end forgives": changed(
                BOOKS,
                (
                    "            self.there.discard(request)\n",
                    "            self.failures[request.backend] = 0\n            self.there.discard(request)\n",
                ),
            ),
        },
    ),
    "task_3": Answers(
        correct=(
            CAREFUL,
            """
class Careful(Longest):
    def choose(self, prompt, loads):
        ends = range(len(prompt.blocks), 0, -1)
        names = [hash((prompt.salt, prompt.blocks[:end])) for end in ends]
        least = min(loads)
        order = sorted(range(len(loads)), key=loads.__getitem__)
        chosen = order[0]
        for end, name in zip(ends, names):
            there = [at for at in order if name in self.sent[at] and loads[at] < math.inf
                     and (loads[at] - least <= self.gap or loads[at] <= self.ratio * least)]
            if there:
                chosen = there[0] if end >= self.share * len(names) else chosen
                break
        self.sent[chosen] |= set(names)
        return chosen
""",
        ),
        wrong={
            "there is no bound": changed(
                CAREFUL,
                ("if loads[replica] <= least + self.gap or loads[replica] <= least * self.ratio", "if True"),
            ),
            "the bound is a difference alone": changed(CAREFUL, (" or loads[replica] <= least * self.ratio", "")),
            "the bound is a ratio alone": changed(CAREFUL, ("loads[replica] <= least + self.gap or ", "")),
            "both bounds must hold": changed(CAREFUL, ("+ self.gap or", "+ self.gap and")),
            "the bound is missed by one": changed(CAREFUL, ("<= least + self.gap", "< least + self.gap")),
            "a beginning that all prompts have attracts": changed(
                CAREFUL, ("if best >= self.share * len(blocks)", "if True")
            ),
            "exactly the share does not count": changed(
                CAREFUL, ("best >= self.share * len(blocks)", "best > self.share * len(blocks)")
            ),
            "the share is one of blocks that are not held": changed(
                CAREFUL, ("best >= self.share * len(blocks)", "best >= self.share * (len(blocks) - best)")
            ),
            "salts are not looked at": changed(
                CAREFUL, ("return prompt.salt, blocks[:length]", "return blocks[:length]")
            ),
            "the same block anywhere is a match": changed(
                CAREFUL, ("return prompt.salt, blocks[:length]", "return prompt.salt, blocks[length - 1]")
            ),
            "the longest match of all, and if that is busy the least load": changed(
                CAREFUL,
                ("best = max(map(match, near))", "best = max(map(match, up))"),
                (
                    "min((loads[replica], replica) for replica in near if match(replica) == best)[1]",
                    "min(((loads[r], r) for r in near if match(r) == best), default=(0, chosen))[1]",
                ),
            ),
            "a miss goes to whoever holds least": changed(
                CAREFUL,
                (
                    "chosen = min(up, key=lambda replica: loads[replica])",
                    "chosen = min(up, key=lambda replica: (len(self.sent[replica]), loads[replica]))",
                ),
            ),
            "a miss goes to the longest match within the bound": changed(
                CAREFUL,
                (
                    "chosen = min(up, key=lambda replica: loads[replica])",
                    "chosen = min(near, key=lambda replica: (-match(replica), loads[replica]))",
                ),
            ),
            "among equal matches the first": changed(
                CAREFUL, ("min((loads[replica], replica) for", "min((0, replica) for")
            ),
            "the index learns of hits alone": changed(
                CAREFUL, ("for length in range(len(blocks))", "for length in range(len(blocks) * (best > 0))")
            ),
            "the index learns of every replica": changed(
                CAREFUL,
                (
                    "            self.sent[chosen].add(name(length + 1))\n",
                    "            for sent in self.sent:\n                sent.add(name(length + 1))\n",
                ),
            ),
            "who is down is chosen": changed(
                CAREFUL,
                ("in range(len(loads)) if loads[replica] < math.inf", "in range(len(loads))"),
                (
                    "if loads[replica] <= least + self.gap",
                    "if loads[replica] == math.inf or loads[replica] <= least + self.gap",
                ),
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            RESPOND,
            RACING,
            """
class ClientLeft(Exception):
    pass

async def respond(stream, connection):
    async def watch():
        await connection.gone()
        raise ClientLeft

    async def send(content):
        await connection.write(f"data: {content}\\n\\n".encode())

    async def write_all(group, watching):
        last = "[DONE]"
        try:
            outputs = await stream.get_many()
            while outputs:
                texts, reasons = zip(*outputs)
                await send(json.dumps(dict(text="".join(texts), finish_reason=reasons[-1]), ensure_ascii=False))
                outputs = await stream.get_many()
        except RequestFailed as error:
            last = json.dumps(dict(error=dict(message=str(error))), ensure_ascii=False)
        await send(last)
        watching.cancel()

    try:
        async with asyncio.TaskGroup() as group:
            await write_all(group, group.create_task(watch()))
    except* ClientLeft:
        pass
    finally:
        stream.close()
""",
        ),
        wrong={
            "looks for the client after each write": """
async def respond(stream, connection):
    leaving = asyncio.create_task(connection.gone())
    writing = asyncio.current_task()
    try:
        await write_all(stream, connection, leaving)
    finally:
        leaving.cancel()
        stream.close()

async def write_all(stream, connection, leaving):
    try:
        while outputs := await stream.get_many():
            event = {"text": "".join(each.text for each in outputs), "finish_reason": outputs[-1].finish_reason}
            await connection.write(b"data: %s\\n\\n" % json.dumps(event).encode())
            if leaving.done():
                return
    except RequestFailed as error:
        await connection.write(b"data: %s\\n\\n" % json.dumps({"error": {"message": str(error)}}).encode())
    else:
        await connection.write(b"data: [DONE]\\n\\n")
""",
            "waits for tokens or the client, and then writes without a look": changed(
                RACING,
                ("await before_gone(connection.write(event(content)))", "await connection.write(event(content))"),
            ),
            "looks for the client between outputs": changed(
                RACING,
                (
                    "while outputs := await before_gone(stream.get_many()):",
                    "while not gone.done() and (outputs := await stream.get_many()):",
                ),
            ),
            "the last write waits for ever": changed(
                RACING,
                ('await before_gone(connection.write(event(b"[DONE]")))', 'await connection.write(event(b"[DONE]"))'),
            ),
            "the client is not watched": changed(
                RESPOND,
                ("asyncio.create_task(connection.gone())", "asyncio.create_task(asyncio.Event().wait())"),
            ),
            "the request is not closed": changed(RESPOND, ("        stream.close()\n", "        pass\n")),
            "closed only at a normal end": changed(
                RESPOND,
                (
                    "    finally:\n        stream.close()\n",
                    "    finally:\n        if not writing.cancelled():\n            stream.close()\n",
                ),
            ),
            "not closed when the server shuts down": changed(
                RESPOND,
                (
                    "    try:\n        await asyncio.gather(writing, leaving, return_exceptions=True)\n"
                    "    finally:\n        stream.close()\n",
                    "    await asyncio.gather(writing, leaving, return_exceptions=True)\n    stream.close()\n",
                ),
            ),
            "a task is left behind": changed(RACING, ("        gone.cancel()\n", "")).replace(
                "        await asyncio.gather(gone, return_exceptions=True)\n", ""
            ),
            "the writer goes on in the background": changed(
                RESPOND,
                ("    leaving.add_done_callback(lambda _: writing.cancel())\n", ""),
                (
                    "await asyncio.gather(writing, leaving, return_exceptions=True)",
                    "await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)",
                ),
            ),
            "the cancellation is swallowed": changed(
                RESPOND,
                (
                    "    finally:\n        stream.close()\n",
                    "    except asyncio.CancelledError:\n        pass\n    finally:\n        stream.close()\n",
                ),
            ),
            "an event for each token": changed(
                RESPOND,
                ("            *_, last = outputs\n", "            for last in outputs:\n"),
                ('            text = "".join([output.text for output in outputs])\n', ""),
                ('            event = {"text": text, ', '                event = {"text": last.text, '),
                ("            await connection.write(b", "                await connection.write(b"),
            ),
            "the reason of the first one": changed(RESPOND, ("*_, last = outputs", "last, *_ = outputs")),
            "there is no [DONE]": changed(
                RESPOND,
                ('await connection.write(f"data: {end}', 'if "error" in end: await connection.write(f"data: {end}'),
            ),
            "[DONE] comes after an error": changed(
                RESPOND,
                (
                    '        end = json.dumps({"error": {"message": str(error)}})\n',
                    '        failure = json.dumps({"error": {"message": str(error)}})\n'
                    '        await connection.write(f"data: {failure}\\n\\n".encode())\n',
                ),
            ),
            "half an answer looks whole": changed(
                RESPOND, ('        end = json.dumps({"error": {"message": str(error)}})\n', "        pass\n")
            ),
            "asks for outputs after the last one": changed(
                RESPOND, ("                break\n", "                continue\n")
            ),
            "an error ends in silence": changed(
                RESPOND, ('        end = json.dumps({"error": {"message": str(error)}})\n', "        return\n")
            ),
            "text goes out as it is": changed(
                RESPOND,
                ("json.dumps(event).encode()", "str(event).replace(\"'\", '\"').replace('None', 'null').encode()"),
            ),
            "one newline": changed(RESPOND, ('b"data: %s\\n\\n" %', 'b"data: %s\\n" %')),
        },
    ),
    "task_5": Answers(
        correct=(
            LAYOUT,
            """
def choose_layout(load, promise, workers, chunks, link, price=h100, config=llama):
    prompt, answer, batch = load
    found = {}
    for chunk in chunks:
        chunk = min(chunk, prompt)
        gap = token_gap(batch, prompt + answer // 2, price, chunk, prompt - chunk)
        if max(gap / promise.gap, math.ceil(prompt / chunk) * gap / promise.first) <= 1:
            found["mixed", chunk] = price_phases(prompt, answer, batch, price, chunk).mixed_rate(workers)
    if workers > 1:
        phases = price_phases(prompt, answer, batch, price, prompt)
        first = phases.prefill + phases.step + price_move(config, prompt, price, link, chunk=prompt).exposed
        if phases.step <= promise.gap and first <= promise.first:
            p, d = phases.best_split(workers)
            found["split", p, d] = phases.rate(p, d)
    return max(found.items(), key=lambda item: item[1]) if found else None
""",
        ),
        wrong={
            "the largest chunk that will do": changed(LAYOUT, ("or rate > best[1]", "or layout[1] > best[0][1]")),
            "a split pays whenever it keeps the promise": changed(
                LAYOUT, ("or rate > best[1]", 'or (layout[0] == "split", rate) > (best[0][0] == "split", best[1])')
            ),
            "a split never pays": changed(LAYOUT, ("for p in range(1, workers)", "for p in range(0)")),
            "half of the workers compute prompts": changed(
                LAYOUT, ("for p in range(1, workers)", "for p in {workers // 2} - {0}")
            ),
            "the share of prefill, rounded": changed(
                LAYOUT,
                (
                    "for p in range(1, workers)]",
                    "for p in [round(workers * price_phases(*load, price, load.prompt).prefill_share)]"
                    " if 0 < p < workers]",
                ),
            ),
            "the faster side decides": changed(LAYOUT, ("min(p / costs", "max(p / costs")),
            "the two kinds of workers are swapped": changed(
                LAYOUT, ("min(p / costs.prefill, d / costs.decode)", "min(d / costs.prefill, p / costs.decode)")
            ),
            "pages move at no cost": changed(
                LAYOUT, ("costs.prefill + move.exposed + costs.step", "costs.prefill + costs.step")
            ),
            "nothing overlaps": changed(LAYOUT, ("move.exposed", "move.travel")),
            "the prompt's last token is for nothing": changed(LAYOUT, ("move.exposed + costs.step", "move.exposed")),
            "the gap of a chunk at the beginning": changed(LAYOUT, ("price, chunk, behind)", "price, chunk)")),
            "the gap of a step without a chunk": changed(LAYOUT, ("price, chunk, behind)", "price)")),
            "the mean gap": changed(
                LAYOUT, ("        steps = -(", "        gap = costs.step * costs.slowdown\n        steps = -(")
            ),
            "the first token comes after one step": changed(LAYOUT, ("return steps * gap, gap", "return gap, gap")),
            "the last chunk is forgotten": changed(
                LAYOUT, ("steps = -(-load.prompt // chunk)", "steps = load.prompt // chunk")
            ),
            "a prompt alone in its steps": changed(LAYOUT, ("return steps * gap, gap", "return costs.prefill, gap")),
            "the gap is not looked at": changed(LAYOUT, (" and gap <= promise.gap", "")),
            "the first token is not looked at": changed(LAYOUT, ("first <= promise.first and ", "")),
            "the best layout, and then the promise": changed(
                LAYOUT,
                ("        if first <= promise.first and gap <= promise.gap:\n", "        if True:\n"),
                ("best = layout, rate", "best, kept = (layout, rate), first <= promise.first and gap <= promise.gap"),
                ("return best", "return best if kept else None"),
            ),
            "a worker answers while it computes": changed(
                LAYOUT,
                ("workers / (costs.prefill + costs.decode)", "workers / max(costs.prefill, costs.decode)"),
            ),
        },
    ),
    "task_6": Answers(
        correct=(
            LEASES,
            """
class Leases:
    def __init__(self, epoch, frames, seconds):
        self.epoch, self.seconds = epoch, seconds
        self.owners, self.ends = [None] * frames, []

    def alive(self, number, now):
        return now < self.ends[number]

    def hold(self, count, now):
        free = [at for at, owner in enumerate(self.owners) if owner is None or not self.alive(owner, now)]
        if len(free) < count:
            return None
        for frame in free[:count]:
            self.owners[frame] = len(self.ends)
        self.ends.append(now + self.seconds)
        return len(self.ends) - 1

    def read(self, epoch, number, now):
        if epoch != self.epoch or number not in range(len(self.ends)) or not self.alive(number, now):
            return None
        return [frame for frame, owner in enumerate(self.owners) if owner == number]

    def renew(self, epoch, number, now):
        if self.read(epoch, number, now) is None:
            return False
        self.ends[number] = now + self.seconds
        return True

    def release(self, epoch, number, now):
        if self.read(epoch, number, now) is None:
            return False
        self.ends[number] = -math.inf
        return True
""",
        ),
        wrong={
            "leases do not end": changed(LEASES, ("return now >= self.leases[number][1]", "return False")),
            "a lease lasts a moment longer": changed(LEASES, ("now >= self", "now > self")),
            "a late reader finds its frames, until somebody wants them": changed(
                LEASES, ("return not self.over(number, now)", "return True")
            ),
            "an expired lease is renewed": in_method(
                "renew",
                LEASES,
                ("not self.known(epoch, number, now)", "epoch != self.epoch or number not in self.leases"),
            ),
            "an expired lease is released": in_method(
                "release",
                LEASES,
                ("not self.known(epoch, number, now)", "epoch != self.epoch or number not in self.leases"),
            ),
            "a read asks for no epoch": in_method("read", LEASES, ("known(epoch", "known(self.epoch")),
            "a renewal asks for no epoch": in_method("renew", LEASES, ("known(epoch", "known(self.epoch")),
            "a release asks for no epoch": in_method("release", LEASES, ("known(epoch", "known(self.epoch")),
            "numbers are counted by leases": changed(LEASES, ("self.given += 1", "self.given = len(self.leases)")),
            "numbers are those of the first frame": changed(
                LEASES, ("self.given += 1", "self.given = frames[0] if frames else -1")
            ),
            "the newest number is used again": changed(
                LEASES, ("self.given += 1", "self.given = max(self.leases, default=0) + 1")
            ),
            "frames of expired leases are lost": in_method(
                "collect", LEASES, ("self.free.extend(self.leases.pop(number)[0])", "del self.leases[number]")
            ),
            "expired leases are not collected": changed(LEASES, ("        self.collect(now)\n", "")),
            "frames are free, and the lease goes on": in_method(
                "release", LEASES, ("self.leases.pop(number)", "self.leases[number]")
            ),
            "a release frees nothing": in_method(
                "release", LEASES, ("self.free.extend(self.leases.pop(number)[0])", "del self.leases[number]")
            ),
            "as many frames as there are": changed(
                LEASES, ("        if count > len(self.free):\n            return None\n", "")
            ),
            "a renewal adds to the end": in_method("renew", LEASES, ("now + self.seconds", "end + self.seconds")),
            "who reads renews": changed(
                LEASES,
                (
                    "        return [*self.leases[number][0]]\n",
                    "        self.leases[number] = self.leases[number][0], now + self.seconds\n"
                    "        return [*self.leases[number][0]]\n",
                ),
            ),
            "pages are read once": changed(
                LEASES, ("return [*self.leases[number][0]]", "return self.leases.pop(number)[0]")
            ),
            "an empty lease is none": changed(
                LEASES, ("if number not in self.leases", "if not self.leases.get(number, [[]])[0]")
            ),
            "the list of frames is given out": changed(
                LEASES, ("return [*self.leases[number][0]]", "return self.leases[number][0]")
            ),
        },
    ),
}
