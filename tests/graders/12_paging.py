"""Answers to 12_paging that its graders must tell apart."""

from tests.graders.answers import Answers

# What several answers to task 3 have in common
APPEND = """
    def append(self, token):
        index, offset = divmod(self.length, self.memory.page_size)
        if index == len(self.frames):
            self.frames.append(self.memory.pool.allocate())
        self.own(index)
        self.memory.data[self.frames[index]][offset] = token
        self.length += 1
"""
WRITE = """
    def write(self, position, token):
        index, offset = divmod(position, self.memory.page_size)
        self.own(index)
        self.memory.data[self.frames[index]][offset] = token
"""
OWN = """
    def own(self, index):
        frame = self.frames[index]
        if self.memory.pool.ref_counts[frame] > 1:
            self.frames[index] = self.memory.pool.allocate()
            self.memory.copy(frame, self.frames[index])
            self.memory.pool.release(frame)
"""

TASKS = {
    "task_1": Answers(
        correct=(
            """
def waste(lengths, max_length, page_size):
    reserved = {"maximum": 0, "buddies": 0, "pages": 0}
    for length in lengths:
        reserved["maximum"] += max_length
        if length > 0:
            buddy = 1
            while buddy < length:
                buddy *= 2
            reserved["buddies"] += buddy
            full, rest = divmod(length, page_size)
            reserved["pages"] += (full + (rest > 0)) * page_size
    return {way: [slots, slots - sum(lengths)] for way, slots in reserved.items()}
""",
            """
import math

def waste(lengths, max_length, page_size):
    def total(slots):
        taken = [slots(length) for length in lengths]
        return sum(taken), sum(mine - length for mine, length in zip(taken, lengths))

    return {
        "maximum": total(lambda length: max_length),
        "buddies": total(lambda length: 2 ** math.ceil(math.log2(length)) if length else 0),
        "pages": total(lambda length: math.ceil(length / page_size) * page_size),
    }
""",
        ),
        wrong={
            "a page too many for exact multiples": """
def waste(lengths, max_length, page_size):
    reserved = {
        "maximum": max_length * len(lengths),
        "buddies": sum(1 << (length - 1).bit_length() for length in lengths if length),
        "pages": sum((length // page_size + 1) * page_size for length in lengths if length),
    }
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
            "twice too much for powers of two": """
def waste(lengths, max_length, page_size):
    reserved = {
        "maximum": max_length * len(lengths),
        "buddies": sum(1 << length.bit_length() for length in lengths if length),
        "pages": sum(-(-length // page_size) * page_size for length in lengths),
    }
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
            "at least one page and one buddy each": """
def waste(lengths, max_length, page_size):
    reserved = {
        "maximum": max_length * len(lengths),
        "buddies": sum(1 << (max(length, 1) - 1).bit_length() for length in lengths),
        "pages": sum(max(1, -(-length // page_size)) * page_size for length in lengths),
    }
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
            "buddies end at the maximum": """
def waste(lengths, max_length, page_size):
    reserved = {
        "maximum": max_length * len(lengths),
        "buddies": sum(min(max_length, 1 << (length - 1).bit_length()) for length in lengths if length),
        "pages": sum(-(-length // page_size) * page_size for length in lengths),
    }
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
            "requests share their last pages": """
def waste(lengths, max_length, page_size):
    reserved = {
        "maximum": max_length * len(lengths),
        "buddies": sum(1 << (length - 1).bit_length() for length in lengths if length),
        "pages": -(-sum(lengths) // page_size) * page_size,
    }
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
            "nothing is reserved before the first token": """
def waste(lengths, max_length, page_size):
    reserved = {
        "maximum": sum(max_length for length in lengths if length),
        "buddies": sum(1 << (length - 1).bit_length() for length in lengths if length),
        "pages": sum(-(-length // page_size) * page_size for length in lengths),
    }
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
            "a buddy has two slots or more": """
def waste(lengths, max_length, page_size):
    reserved = {"maximum": max_length * len(lengths), "buddies": 0, "pages": 0}
    for length in filter(None, lengths):
        buddy = 2
        while buddy < length:
            buddy *= 2
        reserved["buddies"] += buddy
        reserved["pages"] += -(-length // page_size) * page_size
    return {way: (slots, slots - sum(lengths)) for way, slots in reserved.items()}
""",
        },
    ),
    "task_2": Answers(
        correct=(
            """
def slot_mapping(frames, page_size, start, count):
    first, last = start // page_size, -(-(start + count) // page_size)
    if count and (first < 0 or last > len(frames) or None in frames[first:last]):
        raise IndexError("outside the table")
    slots = [frame * page_size + offset for frame in frames[first:last] for offset in range(page_size)] if count else []
    return slots[start - first * page_size :][:count]
""",
            """
import numpy as np

def slot_mapping(frames, page_size, start, count):
    flat = {}
    for index, frame in enumerate(frames):
        if frame is not None:
            flat.update(zip(range(index * page_size, (index + 1) * page_size), range(frame * page_size, 2**60)))
    if not set(range(start, start + count)) <= set(flat):
        raise IndexError("not mapped")
    return np.array([flat[start + i] for i in range(count)], dtype=np.int64)
""",
        ),
        wrong={
            "the chunk goes on contiguously": """
def slot_mapping(frames, page_size, start, count):
    if start < 0 or start + count > len(frames) * page_size or None in frames[start // page_size :]:
        raise IndexError("outside")
    first = frames[start // page_size] * page_size + start % page_size if count else 0
    return list(range(first, first + count))
""",
            "looks up negative positions from the end": """
def slot_mapping(frames, page_size, start, count):
    slots = []
    for position in range(start, start + count):
        frame = frames[position // page_size]
        if frame is None:
            raise IndexError("never touched")
        slots.append(frame * page_size + position % page_size)
    return slots
""",
            "positions count from the chunk": """
def slot_mapping(frames, page_size, start, count):
    if not 0 <= start <= start + count <= len(frames) * page_size:
        raise IndexError("outside")
    return [frames[start // page_size + i // page_size] * page_size + i % page_size for i in range(count)]
""",
            "leaves out what lies outside": """
def slot_mapping(frames, page_size, start, count):
    if not 0 <= start // page_size < len(frames) and count:
        raise IndexError("outside")
    slots = [frame * page_size + offset for frame in frames for offset in range(page_size)]
    return slots[start : start + count]
""",
            "skips pages that were never touched": """
def slot_mapping(frames, page_size, start, count):
    if not 0 <= start <= start + count <= len(frames) * page_size:
        raise IndexError("outside")
    where = [divmod(position, page_size) for position in range(start, start + count)]
    return [frames[index] * page_size + offset for index, offset in where if frames[index] is not None]
""",
            "looks at the first and the last position only": """
def slot_mapping(frames, page_size, start, count):
    for position in {start, start + count - 1} if count else ():
        if not 0 <= position < len(frames) * page_size or frames[position // page_size] is None:
            raise IndexError("outside")
    where = [divmod(position, page_size) for position in range(start, start + count)]
    return [frames[index] * page_size + offset for index, offset in where if frames[index] is not None]
""",
            "None taken for frame 0": """
def slot_mapping(frames, page_size, start, count):
    if not 0 <= start <= start + count <= len(frames) * page_size:
        raise IndexError("outside")
    if count and None in (frames[start // page_size], frames[(start + count - 1) // page_size]):
        raise IndexError("never touched")
    return [(frames[i // page_size] or 0) * page_size + i % page_size for i in range(start, start + count)]
""",
            "wants the page after the chunk, too": """
def slot_mapping(frames, page_size, start, count):
    slots = []
    for position in range(start, start + count):
        index, offset = divmod(position, page_size)
        if not 0 <= index < len(frames) or None in frames[index : index + 2]:
            raise IndexError("outside")
        slots.append(frames[index] * page_size + offset)
    return slots
""",
            "a ValueError": """
def slot_mapping(frames, page_size, start, count):
    slots = []
    for position in range(start, start + count):
        index, offset = divmod(position, page_size)
        if not 0 <= index < len(frames) or frames[index] is None:
            raise ValueError("outside")
        slots.append(frames[index] * page_size + offset)
    return slots
""",
            "frame 0 taken for no frame": """
def slot_mapping(frames, page_size, start, count):
    slots = []
    for position in range(start, start + count):
        index, offset = divmod(position, page_size)
        if not 0 <= index < len(frames) or not frames[index]:
            raise IndexError("no frame")
        slots.append(frames[index] * page_size + offset)
    return slots
""",
            "a page that was never touched spoils the table": """
def slot_mapping(frames, page_size, start, count):
    if None in frames or not 0 <= start <= start + count <= len(frames) * page_size:
        raise IndexError("outside")
    return [frames[i // page_size] * page_size + i % page_size for i in range(start, start + count)]
""",
        },
    ),
    "task_3": Answers(
        correct=(
            "class Table(Draft):\n" + APPEND + WRITE + OWN,
            """
class Table:
    def __init__(self, memory, frames=(), length=0):
        self.memory, self.frames, self.length = memory, list(frames), length

    def tokens(self):
        return [token for frame in self.frames for token in self.memory.data[frame]][: self.length]

    def fork(self):
        for frame in self.frames:
            self.memory.pool.share(frame)
        return Table(self.memory, self.frames, self.length)

    def release(self):
        while self.frames:
            self.memory.pool.release(self.frames.pop())
        self.length = 0

    def append(self, token):
        if self.length % self.memory.page_size == 0:
            self.frames.append(self.memory.pool.allocate())
        self.length += 1
        self.write(self.length - 1, token)

    def write(self, position, token):
        pool, index = self.memory.pool, position // self.memory.page_size
        old = self.frames[index]
        if pool.ref_counts[old] != 1:
            pool.release(old)
            self.frames[index] = pool.allocate()
            self.memory.copy(old, self.frames[index])
        self.memory.data[self.frames[index]][position % self.memory.page_size] = token
""",
        ),
        wrong={
            "append still writes to shared pages": "class Table(Draft):\n" + WRITE + OWN,
            "the old page still counts this table": (
                "class Table(Draft):\n" + APPEND + WRITE + OWN.replace("self.memory.pool.release(frame)", "pass")
            ),
            "still owns all pages before it writes to one": """
class Table(Draft):
    def append(self, token):
        index, offset = divmod(self.length, self.memory.page_size)
        if index == len(self.frames):
            self.frames.append(self.memory.pool.allocate())
        self.own()
        self.memory.data[self.frames[index]][offset] = token
        self.length += 1

    def own(self):
        for index, frame in enumerate(self.frames):
            if self.memory.pool.ref_counts[frame] > 1:
                self.frames[index] = self.memory.pool.allocate()
                self.memory.copy(frame, self.frames[index])
                self.memory.pool.release(frame)
""",
            "copies everything at the fork": """
class Table(Draft):
    def fork(self):
        child = Table(self.memory)
        for token in self.tokens():
            child.append(token)
        return child
""",
            "copies the last page at the fork": (
                "class Table(Draft):\n"
                + APPEND
                + WRITE
                + OWN
                + """
    def fork(self):
        child = super().fork()
        if child.frames:
            child.own(len(child.frames) - 1)
        return child
"""
            ),
            "only the child is careful": (
                "class Table(Draft):\n"
                + APPEND
                + WRITE
                + """
    borrowed = frozenset()

    def fork(self):
        child = super().fork()
        child.borrowed = frozenset(range(len(child.frames)))
        return child

    def own(self, index):
        if index in self.borrowed:
            frame = self.frames[index]
            self.frames[index] = self.memory.pool.allocate()
            self.memory.copy(frame, self.frames[index])
            self.memory.pool.release(frame)
            self.borrowed -= {index}
"""
            ),
            "copies the full last page before it takes a fresh one": (
                "class Table(Draft):\n"
                + WRITE
                + OWN
                + """
    def append(self, token):
        if self.frames:
            self.own(len(self.frames) - 1)
        super().append(token)
"""
            ),
            "copies pages that nobody else holds": (
                "class Table(Draft):\n" + APPEND + WRITE + OWN.replace("ref_counts[frame] > 1", "ref_counts[frame] > 0")
            ),
            "takes a fresh page without the old content": (
                "class Table(Draft):\n"
                + APPEND
                + WRITE
                + OWN.replace("self.memory.copy(frame, self.frames[index])", "self.memory.copies += 1")
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            """
import math

def swap_or_recompute(machine, model, tokens, longest):
    link = machine.links["pcie"]
    move = 2 * model.kv_bytes_per_token / link.bandwidth
    compute = 2 * model.parameters / machine.flops["bf16"]
    read = 2 * model.parameters / machine.memory_bandwidth
    pays = lambda n: max(compute * n, read) <= 2 * link.latency + move * n
    first = max(1, math.ceil((read - 2 * link.latency) / move))
    return ("recompute" if pays(tokens) else "swap"), (first if first <= longest and pays(first) else None)
""",
        ),
        wrong={
            "one way only": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=1, message_bytes=n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "forgets that the weights are read": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "reads the weights for every token": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters * n, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "arithmetic and memory one after the other": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        flops, read = Cost(flops=2 * model.parameters * n, dtype="bf16"), Cost(bytes=2 * model.parameters)
        return (price(flops, machine) + price(read, machine)).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "forgets the latency": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "swaps at equal prices": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters, dtype="bf16")
        return price(prefill, machine).seconds < price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "ends before the longest length": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
            "recomputes everything from the break-even on": """
def swap_or_recompute(machine, model, tokens, longest):
    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, "pcie").seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if first is not None and tokens >= first else "swap"), first
""",
            "takes the faster link": """
def swap_or_recompute(machine, model, tokens, longest):
    link = "nvlink" if "nvlink" in machine.links else "pcie"

    def recompute(n):
        swap = Cost(messages=2, message_bytes=2 * n * model.kv_bytes_per_token)
        prefill = Cost(flops=2 * model.parameters * n, bytes=2 * model.parameters, dtype="bf16")
        return price(prefill, machine).seconds <= price(swap, machine, link).seconds

    first = next((n for n in range(1, longest + 1) if recompute(n)), None)
    return ("recompute" if recompute(tokens) else "swap"), first
""",
        },
    ),
}

# Task 5: the right answer in steps that a mistake replaces
CHOOSE = """
def choose_page_size(pool_bytes, bytes_per_token, lengths, table_bytes, largest_waste, candidates):
    best = None
    for size in sorted(candidates):
        page = size * bytes_per_token + table_bytes
        free = pool_bytes // page
        needs = [(length + size - 1) // size for length in lengths]
        taken = sum(needs) * page
        share = 1 - sum(lengths) * bytes_per_token / taken if taken else 0
        fits = all(need <= free for need in needs)
        if share <= largest_waste and fits:
            admitted = 0
            for need in needs:
                if need > free:
                    break
                free -= need
                admitted += 1
            best = size, admitted
    return best
"""


def mistaken(step: str, mistake: str) -> str:
    """The right answer with one step replaced."""
    assert CHOOSE.count(step) == 1, f"{step!r} stands {CHOOSE.count(step)} times in the answer"
    return CHOOSE.replace(step, mistake)


TASKS["task_5"] = Answers(
    correct=(
        CHOOSE,
        """
import itertools
import math

def choose_page_size(pool_bytes, bytes_per_token, lengths, table_bytes, largest_waste, candidates):
    def pages(size):
        return [math.ceil(length / size) for length in lengths]

    def page_bytes(size):
        return size * bytes_per_token + table_bytes

    def good(size):
        reserved, used = sum(pages(size)) * page_bytes(size), sum(lengths) * bytes_per_token
        little = reserved == 0 or (reserved - used) / reserved <= largest_waste
        return little and max([0, *pages(size)]) * page_bytes(size) <= pool_bytes

    size = max(filter(good, candidates), default=None)
    if size is None:
        return None
    return size, sum(total * page_bytes(size) <= pool_bytes for total in itertools.accumulate(pages(size)))
""",
    ),
    wrong={
        "others overtake who does not fit": mistaken("                    break\n", "                    continue\n"),
        "the smallest candidate": mistaken("if share <=", "if best is None and share <="),
        "stops at the first candidate that fails": mistaken(
            "            best = size, admitted\n",
            "            best = size, admitted\n        elif best:\n            break\n",
        ),
        "the largest is the last of the list": mistaken("sorted(candidates)", "candidates"),
        "table entries take no room": mistaken("pool_bytes // page", "pool_bytes // (size * bytes_per_token)"),
        "table entries are no waste": mistaken(
            "taken = sum(needs) * page", "taken = sum(needs) * size * bytes_per_token"
        ),
        "waste as a share of the tokens": mistaken(
            "1 - sum(lengths) * bytes_per_token / taken if taken else 0",
            "taken / (sum(lengths) * bytes_per_token) - 1 if taken else 0",
        ),
        "the mean of the requests' shares": mistaken(
            "1 - sum(lengths) * bytes_per_token / taken if taken else 0",
            "sum(1 - n * bytes_per_token / (k * page) for n, k in zip(lengths, needs) if k) / max(1, len(lengths))",
        ),
        "never asks whether the longest fits": mistaken("fits = all(need <= free for need in needs)", "fits = True"),
        "stops when the pool is exactly full": mistaken("if need > free:", "if need > free or free == 0:"),
        "wants all requests to fit at once": mistaken("all(need <= free for need in needs)", "sum(needs) <= free"),
        "a page for requests without tokens": mistaken("(length + size - 1) // size", "max(1, -(-length // size))"),
        "the largest waste is not allowed": mistaken("share <= largest_waste", "share < largest_waste"),
        "a page too many for exact multiples": mistaken("(length + size - 1) // size", "length // size + 1"),
        "counts tokens and not pages": mistaken(
            "                if need > free:\n                    break\n                free -= need\n",
            "                if sum(lengths[: admitted + 1]) > pool_bytes // page * size:\n                    break\n",
        ),
    },
)

# Task 6: the right answer in steps that a mistake replaces
DECODE = """
def paged_decode(q, k_pages, v_pages, tables, lengths, window=None):
    page_size, d = k_pages.shape[2:]
    results = []
    for query, table, length in zip(q, tables, lengths):
        count = (length + page_size - 1) // page_size
        start = 0 if window is None else max(0, length - window)
        before = start // page_size
        frames = table[before:count]
        k, v = (torch.cat([pages[frame] for frame in frames], dim=1) for pages in (k_pages, v_pages))
        group = q.shape[1] // k.shape[0]
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        positions = torch.arange(k.shape[1]) + before * page_size
        hidden = (positions < start) | (positions >= length)
        scores = torch.einsum("hd,hsd->hs", query, k) / d**0.5
        scores = scores.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=1)
        v = v.masked_fill(hidden[:, None], 0)
        results.append(torch.einsum("hs,hsd->hd", weights, v))
    return torch.stack(results)
"""


def misread(step: str, mistake: str) -> str:
    """The right answer to task 6 with one step replaced."""
    assert DECODE.count(step) == 1, f"{step!r} stands {DECODE.count(step)} times in the answer"
    return DECODE.replace(step, mistake)


TASKS["task_6"] = Answers(
    correct=(
        DECODE,
        """
def paged_decode(q, k_pages, v_pages, tables, lengths, window=None):
    page_size, group = k_pages.shape[2], q.shape[1] // k_pages.shape[1]
    out = torch.empty_like(q)
    for i, length in enumerate(lengths):
        start = max(0, length - (window or length))
        slots = [divmod(slot, page_size) for slot in range(start, length)]
        for head in range(q.shape[1]):
            top, total, mean = -torch.inf, 0.0, torch.zeros_like(q[i, head])
            for page, offset in slots:  # one pass: a running maximum, sum and mean
                frame = tables[i][page]
                score = float(q[i, head] @ k_pages[frame, head // group, offset]) / q.shape[2] ** 0.5
                new_top = max(top, score)
                scale = torch.exp(torch.tensor(top - new_top)).item()
                share = torch.exp(torch.tensor(score - new_top)).item()
                total = total * scale + share
                mean = mean * scale + share * v_pages[frame, head // group, offset]
                top = new_top
            out[i, head] = mean / total
    return out
""",
        """
def paged_decode(q, k_pages, v_pages, tables, lengths, window=None):
    size, out = k_pages.shape[2], []
    for query, table, length in zip(q, tables, lengths):
        slots = torch.arange(length)[-window if window else 0 :]
        frames = torch.tensor([-1 if frame is None else frame for frame in table[: -(-length // size)]])
        k, v = (pages[frames[slots // size], :, slots % size].transpose(0, 1)[None] for pages in (k_pages, v_pages))
        attention = torch.nn.functional.scaled_dot_product_attention(query[None, :, None], k, v, enable_gqa=True)
        out.append(attention[0, :, 0])
    return torch.stack(out)
""",
    ),
    wrong={
        "reads the frames in the order of the pool": misread("table[before:count]", "sorted(table[before:count])"),
        "takes the page number for the frame": misread("table[before:count]", "list(range(before, count))"),
        "every sequence by the first table": misread("= table[before:count]", "= tables[0][before:count]"),
        "neighbouring heads use different heads of the pages": misread(
            "x.repeat_interleave(group, dim=0)", "x.repeat(group, 1, 1)"
        ),
        "all heads use the first head of the pages": misread("x.repeat_interleave(group, dim=0)", "x[:1]"),
        "sees the unwritten end of the last page": misread(" | (positions >= length)", ""),
        "hides the scores and not the values": misread("        v = v.masked_fill(hidden[:, None], 0)\n", ""),
        "hides with the score 0": misread("masked_fill(hidden, -torch.inf)", "masked_fill(hidden, 0)"),
        "hides the weights after the softmax": misread(
            "        scores = scores.masked_fill(hidden, -torch.inf)\n        weights = torch.softmax(scores, dim=1)\n",
            "        scores = scores.nan_to_num(0)\n        weights = scores.softmax(1).masked_fill(hidden, 0)\n",
        ),
        "turns NaN into 0 instead of hiding": misread(
            "scores = scores.masked_fill(hidden, -torch.inf)", "scores, v = scores.nan_to_num(0), v.nan_to_num(0)"
        ),
        "does not see the new token": misread("positions >= length", "positions >= max(1, length - 1)"),
        "forgets to scale": misread(" / d**0.5", ""),
        "scales by d and not by its root": misread("d**0.5", "d"),
        "softmax over the heads": misread("softmax(scores, dim=1)", "softmax(scores, dim=0)"),
        "exp without the maximum": misread(
            "torch.softmax(scores, dim=1)", "scores.exp() / scores.exp().sum(1, keepdim=True)"
        ),
        "a softmax for each page": misread(
            "torch.softmax(scores, dim=1)",
            "torch.cat([s.softmax(1) for s in scores.split(page_size, 1)], 1) / len(frames)",
        ),
        "looks up every entry of the table": misread("table[before:count]", "table[before:]"),
        "reads a page too many for exact multiples": misread(
            "(length + page_size - 1) // page_size", "length // page_size + 1"
        ),
        "no window": misread("max(0, length - window)", "0"),
        "the window does not count the new token": misread("length - window)", "length - window - 1)"),
        "a window of whole pages": misread("(positions < start) | ", ""),
        "the window counts from the start": misread(
            "hidden = (positions < start) | (positions >= length)",
            "hidden = positions >= min(length, window or length)",
        ),
        "looks up pages that were freed": misread("before = start // page_size", "before = 0"),
        "clears unseen slots in the pages themselves": misread(
            "        count =", "        k_pages.nan_to_num_(0), v_pages.nan_to_num_(0)\n        count ="
        ),
    },
)
