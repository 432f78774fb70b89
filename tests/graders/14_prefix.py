"""Answers to 14_prefix that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
ADDED = """
def bytes_added(old, new, size):
    def blocks(data):
        return [data[at : at + size] for at in range(0, len(data), size)]

    def objects(data):
        return set(blocks(data))

    def pasts(data):
        return {tuple(blocks(data)[: count + 1]) for count in range(len(blocks(data)))}

    return {
        "files": len(new) * (new != old),
        "blocks": sum(map(len, objects(new) - objects(old))),
        "chain": sum(len(past[-1]) for past in pasts(new) - pasts(old)),
    }
"""

CACHED = """
def cached_tokens(kept, prompt, size, salt="", name=full_name):
    before, count = ORIGIN, 0
    for end in range(size, len(prompt) + 1, size):
        tokens = tuple(prompt[end - size : end])
        key = name(before, tokens, salt)
        page = kept.get(key)
        if page is None:
            break
        if page.tokens != tokens:
            break
        if page.before != before:
            break
        if page.salt != salt:
            break
        before, count = key, end
    if count == len(prompt):
        count -= 1
    return count
"""

# Steps of mistakes
PARTLY = """
    rest = tuple(prompt[count:])
    if any(page[::2] == (before, salt) and page.tokens[: len(rest)] == rest for page in kept.values()):
        count = len(prompt)
"""
NAMES_ALL = """
    for end in range(size, len(prompt) + 1, size):
        before = name(before, tuple(prompt[end - size : end]), salt)
"""

ADMIT = """
def admit(pool, found, fresh):
    def may_go(left):
        ends = [page for page in left if page.name not in [other.before for other in left]]
        return sorted((page for page in ends if not page.readers), key=lambda page: page.used)

    for name in found:
        pool.pages[name].readers += 1
    left, gone = list(pool.pages.values()), []
    while len(gone) < fresh - pool.empty:
        free = may_go(left)
        if not free:
            for name in found:
                pool.pages[name].readers -= 1
            return False
        gone.append(free[0].name)
        left.remove(free[0])
    for name in gone:
        pool.evict(name)
    pool.empty -= fresh
    return True
"""

HOLD = "        pool.pages[name].readers += 1\n"
DEPTH = """
    def depth(page):
        return 1 + depth(pool.pages[page.before]) if page.before else 1

"""

CHAT = """
def chat_tokens(turns, size):
    text = computed = 0
    counts = []
    for typed, reply in turns:
        text += typed
        cached = computed - computed % size if size is not None else 0
        counts.append(text - cached + reply - 1)
        text += reply
        computed = text - 1
    return counts
"""
CROWD = """
def crowd_tokens(tenants, shared, own, reply, size, together=False):
    known, total = set(), 0
    for tenant in tenants:
        cached = shared // size * size if tenant in known else 0
        total += shared + own - cached + reply - 1
        if not together:
            known.add(tenant)
    return total
"""

AWARE = """
class CacheAware(Line):
    def __init__(self, most):
        super().__init__(most)
        self.times = dict()

    def take(self, kept):
        best = None
        for place, name in enumerate(self.line):
            tokens = kept(name)
            if best is None or tokens > best[0]:
                best = tokens, place
            if self.times.get(name, 0) >= self.most:
                break
        if best is None:
            return None
        for name in self.line[: best[1]]:
            self.times[name] = self.times.get(name, 0) + 1
        return self.line.pop(best[1])
"""

RECOVER = """
def recover(ask, choices):
    used = {token for contents in choices for content in contents for token in content}
    spare = min(set(range(1000)) - used)

    def behind(path):
        if len(path) == len(choices):
            return set()
        found = set()
        for content in choices[len(path)]:
            deeper = (*path, content)
            prompt = [token for page in deeper for token in page]
            if ask(prompt + [spare]) == len(prompt):
                found |= {deeper} | behind(deeper)
        return found

    return behind(())
"""

LIMIT = """            if self.times.get(name, 0) >= self.most:
                break
"""

TASKS = {
    "task_1": Answers(
        correct=(
            ADDED,
            """
def bytes_added(old, new, size):
    import hashlib

    def stored(data, chained):
        objects, name = {}, b""
        for at in range(0, len(data), size):
            block = data[at : at + size]
            name = hashlib.sha256((name if chained else b"") + block).digest()
            objects[name] = len(block)
        return objects

    found = {"files": 0 if new == old else len(new)}
    for layout, chained in (("blocks", False), ("chain", True)):
        there = stored(old, chained)
        found[layout] = sum(count for name, count in stored(new, chained).items() if name not in there)
    return found
""",
        ),
        wrong={
            "a block is looked for at its place alone": changed(
                ADDED,
                ("return set(blocks(data))", "return set(enumerate(blocks(data)))"),
                ("map(len, ", "len(b) for _, b in ("),
            ),
            "equal blocks of the new file are stored each": changed(
                ADDED,
                (
                    "sum(map(len, objects(new) - objects(old)))",
                    "sum(len(b) for b in blocks(new) if b not in objects(old))",
                ),
            ),
            "a chain shares blocks by content": changed(
                ADDED, ("(blocks(data)[: count + 1])", "(blocks(data)[count : count + 1])")
            ),
            "a chained name stands for the block before alone": changed(
                ADDED, ("(blocks(data)[: count + 1])", "(blocks(data)[max(0, count - 1) : count + 1])")
            ),
            "a chain is compared place by place": changed(
                ADDED, ("(blocks(data)[: count + 1])", "([count, blocks(data)[count]])")
            ),
            "equal blocks of a chain are stored once": changed(
                ADDED,
                (
                    "sum(len(past[-1]) for past in pasts(new) - pasts(old))",
                    "sum(map(len, {past[-1] for past in pasts(new) - pasts(old)}))",
                ),
            ),
            "every block has its full size": changed(
                ADDED, ("sum(map(len, objects(new) - objects(old)))", "size * len(objects(new) - objects(old))")
            ),
            "a file stores what differs": changed(
                ADDED,
                ("len(new) * (new != old)", "max(0, len(new) - len(old)) + sum(a != b for a, b in zip(old, new))"),
            ),
            "a file is always stored": changed(ADDED, ("len(new) * (new != old)", "len(new)")),
            "counts objects": changed(
                ADDED, ("sum(map(len, objects(new) - objects(old)))", "len(objects(new) - objects(old))")
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            CACHED,
            """
def cached_tokens(kept, prompt, size, salt="", name=full_name):
    def behind(before, at):
        tokens = tuple(prompt[at : at + size])
        if len(tokens) < size:
            return at
        key = name(before, tokens, salt)
        if key in kept and kept[key] == (before, tokens, salt):
            return behind(key, at + size)
        return at

    return min(behind(ORIGIN, 0), len(prompt) - 1)
""",
        ),
        wrong={
            "equal text at another place is a hit": changed(
                CACHED,
                ("kept.get(key)", "next((p for p in kept.values() if (tokens, salt) == p[1:]), None)"),
                ("page.before != before", "False"),
            ),
            "a page behind a gap counts": changed(
                CACHED,
                (
                    "if page is None:\n            break",
                    "if page is None:\n            before = key\n            continue",
                ),
                ("before, count = key, end", "before, count = key, count + size"),
            ),
            "everything is cached": changed(CACHED, ("        count -= 1\n", "        pass\n")),
            "the last page is given back whole": changed(CACHED, ("        count -= 1\n", "        count -= size\n")),
            "one token less, always": changed(CACHED, ("    if count == len(prompt):\n", "    if count:\n")),
            "tokens are not compared": changed(CACHED, ("page.tokens != tokens", "False")),
            "what came before is not compared": changed(CACHED, ("page.before != before", "False")),
            "the salt is in the name, and not compared": changed(CACHED, ("page.salt != salt", "False")),
            "the salt is not in the name": changed(CACHED, ("name(before, tokens, salt)", 'name(before, tokens, "")')),
            "the name is believed": changed(
                CACHED,
                ("page.tokens != tokens", "False"),
                ("page.before != before", "False"),
                ("page.salt != salt", "False"),
            ),
            "a page that is not full counts": changed(
                CACHED,
                ("    if count == len(prompt):", f"{PARTLY}    if count == len(prompt):"),
            ),
            "counts pages": changed(CACHED, ("    return count\n", "    return count // size\n")),
            "names all pages first": changed(
                CACHED,
                ("    before, count = ORIGIN, 0\n", f"    before = ORIGIN\n{NAMES_ALL}    before, count = ORIGIN, 0\n"),
            ),
            "takes what it finds out of the dictionary": changed(CACHED, ("kept.get(key)", "kept.pop(key, None)")),
        },
    ),
    "task_3": Answers(
        correct=(
            ADMIT,
            """
def admit(pool, found, fresh):
    pages, missing = pool.pages, fresh - pool.empty
    idle = [name for name in pages if not pages[name].readers and name not in found]
    if missing > len(idle):
        return False
    for _ in range(missing):
        leaves = set(idle) - {page.before for page in pages.values()}
        pool.evict(min(leaves, key=lambda name: pages[name].used))
        idle.remove(pool.evicted[-1])
    for name in found:
        pages[name].readers = pages[name].readers + 1
    pool.empty -= fresh
    return True
""",
        ),
        wrong={
            "the oldest that nobody reads, wherever it stands": changed(
                ADMIT, ("if page.name not in [other.before for other in left]", "if True")
            ),
            "the oldest end, whoever reads it": changed(ADMIT, ("if not page.readers", "if True")),
            "what was found is held too late": changed(
                ADMIT,
                ("        pool.pages[name].readers += 1\n    left", "        pass\n    left"),
                ("                pool.pages[name].readers -= 1\n", "                pass\n"),
                ("    return True\n", "    for name in set(found) & {*pool.pages}:\n" + HOLD + "    return True\n"),
            ),
            "the ends at the beginning are all that may go": changed(
                ADMIT,
                ("not in [other.before for other in left]", "not in [other.before for other in pool.pages.values()]"),
            ),
            "a request that waits goes on holding its pages": changed(
                ADMIT, ("                pool.pages[name].readers -= 1\n", "                pass\n")
            ),
            "evicts before it knows whether that is enough": changed(
                ADMIT,
                ("len(gone) < fresh - pool.empty", "pool.empty < fresh"),
                ("        left.remove(free[0])\n", "        left.remove(free[0])\n        pool.evict(gone[-1])\n"),
                ("    for name in gone:\n        pool.evict(name)\n", ""),
            ),
            "the newest end goes first": changed(
                ADMIT, ("key=lambda page: page.used)", "key=lambda page: -page.used)")
            ),
            "the end of the longest text goes first": changed(
                ADMIT,
                ("key=lambda page: page.used)", "key=lambda page: (-depth(page), page.used))"),
                ("    def may_go(left):", f"{DEPTH}    def may_go(left):"),
            ),
            "once a text is begun, it goes to its beginning": changed(
                ADMIT,
                ("key=lambda page: page.used)", "key=lambda page: (page.name not in begun, page.used))"),
                ("    left, gone =", "    begun = []\n    left, gone ="),
                (
                    "        gone.append(free[0].name)\n",
                    "        gone.append(free[0].name)\n        begun.append(free[0].before)\n",
                ),
            ),
            "evicts though pages are empty": changed(ADMIT, ("len(gone) < fresh - pool.empty", "len(gone) < fresh")),
            "one page more than needed": changed(
                ADMIT, ("len(gone) < fresh - pool.empty", "len(gone) < fresh - pool.empty + (fresh > pool.empty)")
            ),
            "fresh pages stay empty": changed(ADMIT, ("    pool.empty -= fresh\n", "")),
            "readers are not counted": changed(
                ADMIT,
                ("    return True\n", "    for name in found:\n" + HOLD.replace("+", "-") + "    return True\n"),
            ),
            "only the last page found is held": changed(
                ADMIT,
                ("    for name in found:\n" + HOLD, "    for name in found[-1:]:\n" + HOLD),
                ("            for name in found:\n", "            for name in found[-1:]:\n"),
            ),
            "two readers are one": changed(
                ADMIT, ("pool.pages[name].readers += 1\n", "pool.pages[name].readers = 1\n")
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            CHAT + CROWD,
            """
def chat_tokens(turns, size):
    counts = []
    for number, (typed, reply) in enumerate(turns):
        before = sum(sum(turn) for turn in turns[:number])
        pages = (before - 1) // size if before and size else 0
        counts.append(before + typed + reply - 1 - pages * (size or 0))
    return counts

def crowd_tokens(tenants, shared, own, reply, size, together=False):
    whole = shared + own + reply - 1
    if together:
        return whole * len(tenants)
    firsts = len(set(tenants))
    return whole * firsts + (whole - shared + shared % size) * (len(tenants) - firsts)
""",
        ),
        wrong={
            "a reply's last token is held": changed(CHAT + CROWD, ("computed = text - 1", "computed = text")),
            "a reply's last token is computed": changed(
                CHAT + CROWD, ("counts.append(text - cached + reply - 1)", "counts.append(text - cached + reply)")
            ),
            "replies are not kept": changed(CHAT + CROWD, ("computed = text - 1", "computed = text - reply")),
            "replies cost nothing": changed(
                CHAT + CROWD, ("counts.append(text - cached + reply - 1)", "counts.append(text - cached)")
            ),
            "pages need not be full": changed(CHAT + CROWD, ("computed - computed % size if", "computed if")),
            "pages are rounded up": changed(
                CHAT + CROWD, ("computed - computed % size if", "min(text - 1, -(-computed // size) * size) if")
            ),
            "each turn begins a page": changed(
                CHAT + CROWD,
                (
                    "        computed = text - 1\n",
                    "        computed += (typed + reply - 1) // (size or 1) * (size or 1)\n",
                ),
            ),
            "None is pages of one token": changed(
                CHAT + CROWD, ("if size is not None else 0", "if size is not None else computed")
            ),
            "the first turn finds its own pages": changed(
                CHAT + CROWD, ("    text = computed = 0\n", "    text, computed = 0, turns[0][0] - 1 if turns else 0\n")
            ),
            "tenants share": changed(CHAT + CROWD, ("if tenant in known else 0", "if known else 0")),
            "the first user finds pages": changed(
                CHAT + CROWD, ("if tenant in known else 0", "if not together else 0")
            ),
            "the first of those who come together fills pages for them": changed(
                CHAT + CROWD,
                ("        if not together:\n            known.add(tenant)\n", "        known.add(tenant)\n"),
            ),
            "all shared tokens are found": changed(CHAT + CROWD, ("cached = shared // size * size", "cached = shared")),
            "the page with the last shared tokens is found": changed(
                CHAT + CROWD, ("cached = shared // size * size", "cached = -(-shared // size) * size")
            ),
            "own tokens are found as well": changed(
                CHAT + CROWD, ("cached = shared // size * size", "cached = (shared + own - 1) // size * size")
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            AWARE,
            """
class CacheAware(Line):
    def __init__(self, most):
        self.most, self.line, self.left = most, [], {}

    def arrive(self, name):
        self.line.append(name)
        self.left[name] = self.most

    def take(self, kept):
        if not self.line:
            return None
        places = [0]
        while places[-1] + 1 < len(self.line) and self.left[self.line[places[-1]]] > 0:
            places.append(places[-1] + 1)
        place = min(places, key=lambda place: (-kept(self.line[place]), place))
        for name in self.line[:place]:
            self.left[name] -= 1
        return self.line.pop(place)
""",
        ),
        wrong={
            "starves": changed(AWARE, (LIMIT, "")),
            "first come, first served": changed(AWARE, ("or tokens > best[0]", "")),
            "one overtaking too many": changed(AWARE, (">= self.most", "> self.most")),
            "one overtaking too few": changed(AWARE, (">= self.most", ">= max(self.most - 1, 0)")),
            "looks at the first of the line alone": changed(AWARE, (">= self.most:", ">= self.most and place == 0:")),
            "whoever was overtaken most goes at once": changed(
                AWARE,
                (LIMIT, LIMIT.replace("break", "best = (tokens, place) if self.most else best\n                break")),
            ),
            "if somebody was overtaken most, the first of the line goes": changed(
                AWARE, (LIMIT, LIMIT.replace("break", "best = 0, 0\n                break"))
            ),
            "all that wait are overtaken": changed(
                AWARE, ("for name in self.line[: best[1]]:", "for name in self.line:")
            ),
            "the first of the line alone is overtaken": changed(
                AWARE, ("for name in self.line[: best[1]]:", "for name in self.line[: min(best[1], 1)]:")
            ),
            "among equals the last": changed(AWARE, ("tokens > best[0]", "tokens >= best[0]")),
            "coming back clears the count": AWARE
            + """
    def back(self, name):
        super().back(name)
        self.times.pop(name, None)
""",
            "coming back is overtaking": AWARE
            + """
    def back(self, name):
        for other in self.line:
            self.times[other] = self.times.get(other, 0) + 1
        super().back(name)
""",
            "a preempted request stands at the end": AWARE
            + """
    def back(self, name):
        self.line.append(name)
""",
            "asks once what is kept": changed(
                AWARE,
                ("self.times = dict()", "self.times, self.seen = dict(), dict()"),
                ("tokens = kept(name)", "tokens = self.seen.setdefault(name, kept(name))"),
            ),
            "the shortest kept prefix first": changed(AWARE, ("tokens > best[0]", "tokens < best[0]")),
            "fails when nobody waits": changed(AWARE, ("        if best is None:\n            return None\n", "")),
        },
    ),
    "task_6": Answers(
        correct=(
            RECOVER,
            """
def recover(ask, choices):
    spare, found, left = 0, set(), [()]
    while any(spare in content for contents in choices for content in contents):
        spare += 1
    while left:
        path = left.pop()
        for content in choices[len(path)] if len(path) < len(choices) else ():
            prompt = list(sum((*path, content), ()))
            if len(content) > 1:
                hit = ask(prompt) == len(prompt) - 1
            else:
                hit = ask([*prompt, spare]) > len(prompt) - 1
            if hit:
                left.append((*path, content))
                found.add((*path, content))
    return found
""",
        ),
        wrong={
            "reads its own pages as those of others": """
def recover(ask, choices):
    import itertools

    found, size = set(), len(choices[0][0])
    for order in itertools.product(*choices):
        cached = ask([token for page in order for token in page] + [999])
        found |= {order[: depth + 1] for depth in range(cached // size)}
    return found
""",
            "asks for each field by itself": """
def recover(ask, choices):
    found = set()
    for depth, contents in enumerate(choices):
        hits = [content for content in contents if ask([*content, 999]) == len(content)]
        found |= {(content,) for content in hits} if depth == 0 else {
            (*path, content) for path in found if len(path) == depth for content in hits
        }
    return found
""",
            "the last token of a prompt is never cached": changed(
                RECOVER, ("ask(prompt + [spare]) ==", "ask(prompt) ==")
            ),
            "a prompt without another token, whatever the pages": changed(
                RECOVER, ("ask(prompt + [spare]) == len(prompt)", "ask(prompt) >= len(prompt) - 1")
            ),
            "any hit will do": changed(RECOVER, ("== len(prompt)", "> 0")),
            "adds a token that may be a choice": changed(
                RECOVER, ("spare = min(set(range(1000)) - used)", "spare = 0")
            ),
            "adds a high token that may be a choice": changed(
                RECOVER, ("spare = min(set(range(1000)) - used)", "spare = 999")
            ),
            "one order alone": changed(
                RECOVER, ("found |= {deeper} | behind(deeper)", "return {deeper} | behind(deeper)")
            ),
            "whole orders alone": changed(RECOVER, ("{deeper} | behind(deeper)", "behind(deeper) or {deeper}")),
            "asks for all forms": """
def recover(ask, choices):
    import itertools

    used = {token for contents in choices for content in contents for token in content}
    spare, found = min(set(range(1000)) - used), set()
    for depth in range(1, len(choices) + 1):
        for order in itertools.product(*choices[:depth]):
            prompt = [token for page in order for token in page]
            if ask(prompt + [spare]) == len(prompt):
                found.add(order)
    return found
""",
            "asks twice to be sure": changed(
                RECOVER,
                (
                    "            if ask(prompt + [spare])",
                    "            ask(prompt)\n            if ask(prompt + [spare])",
                ),
            ),
            "asks for a beginning again": changed(
                RECOVER, ("        found = set()\n", "        found = set()\n        ask([*sum(path, ()), spare])\n")
            ),
            "the last field is not asked for": changed(
                RECOVER, ("len(path) == len(choices)", "len(path) >= max(1, len(choices) - 1)")
            ),
        },
    ),
}
