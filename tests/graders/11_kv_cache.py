"""Answers to 11_kv_cache that its graders must tell apart."""

from tests.graders.answers import Answers

# An answer to task 1, with a mistake in it if asked for one
BYTES = """
def kept_bytes(config, length, itemsize=2):
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        return layers * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * length * itemsize
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or config["hidden_size"] // heads
    window = config.get("sliding_window")
    total = 0
    for layer in range(layers):
        kinds = config.get("layer_types")
        slides = window is not None and (kinds is None or kinds[layer] == "sliding_attention")
        total += 2 * kv_heads * width * (min(length, window) if slides else length)
    return total * itemsize
"""
# The same for task 2
LOOP = """
def continue_text(state, prompt, max_tokens):
    ids, new = list(prompt), []
    if len(state.held) >= len(ids):
        state.held = state.held[: len(ids) - 1]
    while len(new) < max_tokens:
        fresh = ids[len(state.held) :]
        positions = range(len(state.held), len(ids))
        new.append(state.compute(fresh, positions))
        state.held.extend(fresh)
        ids.append(new[-1])
    return new
"""
# For task 3
RING = """
def ring_slots(window, chunk):
    return window - 1 + chunk

def slot_of(token, num_sinks, ring):
    if token < num_sinks:
        return token
    return num_sinks + (token - num_sinks) % ring

def slots_seen(token, num_sinks, window, ring):
    seen = [other for other in range(token + 1) if token - other < window or other < num_sinks]
    return [slot_of(other, num_sinks, ring) for other in seen]
"""
# For task 4
PREFIX = """
def usable_prefix(held, held_model, prompt, model, cut=1):
    if held_model != model:
        return 0
    usable = min(len(held), len(prompt) - 1)
    while list(held[:usable]) != list(prompt[:usable]):
        usable -= 1
    if usable < len(held):
        usable = usable - usable % cut if cut else 0
    return usable
"""
# For task 5
VICTIM = """
def victim(sessions, now):
    idle = [session for session in sessions if session.readers == 0]
    return min(idle, key=lambda one: ORDER).name if idle else None
"""
# For task 6
LIMITS = """
import math

def batch_limits(machine, shape, context, new_tokens=1):
    weights, state = 2 * shape.parameters, 2 * context * shape.kept
    flops = new_tokens * (2 * shape.parameters + 4 * context * shape.width)
    arithmetic, reading = flops / machine.peak("bf16"), state / machine.memory_bandwidth
    turns = None
    if arithmetic > reading:
        turns = math.ceil(weights / machine.memory_bandwidth / (arithmetic - reading))
    fits = math.floor((machine.memory_bytes - weights) / state)
    return turns, max(fits, 0)
"""


def variant(code: str, *changes: str) -> str:
    """The code with each (old, new) replaced; there must be something to replace."""
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in code, f"{old!r} is not there to be replaced"
        code = code.replace(old, new)
    return code


TASKS = {
    "task_1": Answers(
        correct=(
            BYTES,
            """
import numpy as np

def kept_bytes(config, length, itemsize=2):
    given = {name: value for name, value in config.items() if value is not None}
    layers, heads = given["num_hidden_layers"], given["num_attention_heads"]
    window = given.get("sliding_window", length)
    slides = [kind.startswith("sliding") for kind in given.get("layer_types", ["sliding"] * layers)]
    values = 2 * given.get("num_key_value_heads", heads) * given.get("head_dim", given["hidden_size"] // heads)
    if "kv_lora_rank" in given:
        values, slides = given["kv_lora_rank"] + given["qk_rope_head_dim"], [False] * layers
    return int(np.where(slides, min(window, length), length).sum()) * values * itemsize
""",
        ),
        wrong={
            "keys without values": variant(BYTES, "2 * kv_heads", "kv_heads"),
            "every attention head keeps state": variant(
                BYTES, 'config.get("num_key_value_heads") or heads', 'config["num_attention_heads"]'
            ),
            "the field head_dim is not read": variant(BYTES, 'config.get("head_dim") or ', ""),
            "hidden_size is shared by the heads that keep state": variant(
                BYTES, 'config["hidden_size"] // heads', 'config["hidden_size"] // kv_heads'
            ),
            "the window is not looked at": variant(BYTES, "window is not None and", "False and"),
            "all layers slide if there is a window": variant(BYTES, "(kinds is None or ", "(True or "),
            "no layer slides without layer_types": variant(BYTES, "(kinds is None or ", "(kinds is not None and "),
            "the window does not include the newest token": variant(
                BYTES, "min(length, window)", "min(length, window + 1)"
            ),
            "every head keeps a latent vector": variant(
                BYTES, 'return layers * (config["kv_lora_rank"]', 'return heads * layers * (config["kv_lora_rank"]'
            ),
            "the key that carries the position is left out": variant(BYTES, ' + config["qk_rope_head_dim"]', ""),
            "always two bytes a number": variant(BYTES, "total * itemsize", "total * 2"),
        },
    ),
    "task_2": Answers(
        correct=(
            LOOP,
            """
def continue_text(state, prompt, max_tokens):
    known = min(len(state.held), len(prompt) - 1)
    state.held, fresh, new = list(prompt[:known]), list(prompt[known:]), []
    for _ in range(max_tokens):
        token = state.compute(fresh, [known + place for place in range(len(fresh))])
        state.held, known = state.held + fresh, known + len(fresh)
        fresh = [token]
        new = new + fresh
    return new
""",
        ),
        wrong={
            "the last new token counts as held": variant(
                LOOP, "    return new", "    state.held = list(ids)\n    return new"
            ),
            "positions count from the first fresh token": variant(
                LOOP, "range(len(state.held), len(ids))", "range(len(fresh))"
            ),
            "a prompt that is fully held computes nothing": variant(
                LOOP, "len(state.held) >= len(ids)", "len(state.held) > len(ids)", "[: len(ids) - 1]", "[: len(ids)]"
            ),
            "a prompt that is fully held is computed from the beginning": variant(
                LOOP, "state.held = state.held[: len(ids) - 1]", "state.held = []"
            ),
            "what the reply left behind the prompt still counts as held": """
def continue_text(state, prompt, max_tokens):
    ids = list(prompt)
    for _ in range(max_tokens):
        first = min(len(state.held), len(ids) - 1)
        token = state.compute(ids[first:], range(first, len(ids)))
        state.held += ids[len(state.held) :]
        ids.append(token)
    return ids[len(prompt) :]
""",
            "tokens count as held before they are computed": variant(
                LOOP,
                "        new.append(state.compute(fresh, positions))\n        state.held.extend(fresh)\n",
                "        state.held.extend(fresh)\n        new.append(state.compute(fresh, positions))\n",
            ),
            "a failure forgets what was held before": variant(
                LOOP,
                "        new.append(state.compute(fresh, positions))\n",
                "        held, state.held = state.held, []\n"
                "        new.append(state.compute(fresh, positions))\n"
                "        state.held = held\n",
            ),
            "a failure is kept from the caller": variant(
                LOOP,
                "        new.append(state.compute(fresh, positions))\n",
                "        try:\n            new.append(state.compute(fresh, positions))\n"
                "        except MemoryError:\n            return new\n",
            ),
            "every turn begins with an empty state": variant(
                LOOP,
                "    if len(state.held) >= len(ids):\n        state.held = state.held[: len(ids) - 1]\n",
                "    state.held = []\n",
            ),
            "a second turn computes its last token only": variant(
                LOOP,
                "    while len(new)",
                "    state.held = ids[:-1] if state.held else []\n    while len(new)",
            ),
            "the prompt goes through the model token by token": """
def continue_text(state, prompt, max_tokens):
    ids = list(prompt)
    del state.held[len(ids) - 1 :]
    while len(ids) < len(prompt) + max_tokens:
        place = len(state.held)
        token = state.compute([ids[place]], [place])
        state.held.append(ids[place])
        if place == len(ids) - 1:
            ids.append(token)
    return ids[len(prompt) :]
""",
        },
    ),
    "task_3": Answers(
        correct=(
            RING,
            """
def ring_slots(window, chunk):
    return len(range(-(window - 1), chunk))

def slot_of(token, num_sinks, ring):
    while token >= num_sinks + ring:
        token -= ring
    return token

def slots_seen(token, num_sinks, window, ring):
    seen = set(range(min(num_sinks, token + 1)))
    seen |= {token - back for back in range(window) if back <= token}
    return {slot_of(other, num_sinks, ring) for other in seen}
""",
        ),
        wrong={
            "the chapter's ring, a slot for each token of the window": variant(RING, "window - 1 + chunk", "window"),
            "the window and the whole chunk": variant(RING, "window - 1 + chunk", "window + chunk"),
            "two windows, which is enough for chunks of a window": variant(
                RING, "window - 1 + chunk", "2 * window - 1"
            ),
            "the ring turns from token 0 on": variant(RING, "(token - num_sinks) % ring", "token % ring"),
            "the ring overwrites the sinks": variant(RING, "num_sinks + (token - num_sinks) % ring", "token % ring"),
            "sinks inside the window are seen twice": variant(
                RING,
                "[other for other in range(token + 1) if token - other < window or other < num_sinks]",
                "[*range(min(num_sinks, token + 1)), *range(max(0, token - window + 1), token + 1)]",
            ),
            "sinks are seen before they come": variant(
                RING,
                "range(token + 1) if token - other < window",
                "range(max(token + 1, num_sinks)) if 0 <= token - other < window",
            ),
            "sinks are not seen": variant(RING, " or other < num_sinks", ""),
            "the window does not count the token itself": variant(
                RING, "token - other < window", "token - other <= window"
            ),
            "sinks count for the window": variant(RING, "token - other < window", "token - other < window - num_sinks"),
            "the whole ring is read": variant(RING, "token - other < window", "token - other < ring"),
        },
    ),
    "task_4": Answers(
        correct=(
            PREFIX,
            """
import os

def usable_prefix(held, held_model, prompt, model, cut=1):
    names = {}
    rows = [[names.setdefault(token, len(names)) for token in row] for row in (held, prompt[:-1])]
    same = len(os.path.commonprefix(rows)) if held_model == model else 0
    places = {0} | {len(held)} | (set(range(0, same + 1, cut)) if cut else set())
    return max(place for place in places if place <= same)
""",
        ),
        wrong={
            "the name of the session decides": """
def usable_prefix(held, held_model, prompt, model, cut=1):
    return min(len(held), len(prompt) - 1)
""",
            "the weights are not looked at": variant(PREFIX, "held_model != model", "False"),
            "a name that begins alike is the same model": variant(
                PREFIX, "held_model != model", "not str(model).startswith(str(held_model))"
            ),
            "everything or nothing": """
def usable_prefix(held, held_model, prompt, model, cut=1):
    begins = len(held) < len(prompt) and list(prompt[: len(held)]) == list(held)
    return len(held) if held_model == model and begins else 0
""",
            "a prompt that is fully held leaves nothing to compute": variant(PREFIX, "len(prompt) - 1", "len(prompt)"),
            "tokens that agree anywhere count": """
def usable_prefix(held, held_model, prompt, model, cut=1):
    same = sum(kept == wanted for kept, wanted in zip(held, prompt[:-1])) if held_model == model else 0
    return same if same == len(held) else same // cut * cut if cut else 0
""",
            "state is cut anywhere": variant(PREFIX, "usable - usable % cut if cut else 0", "usable"),
            "state that cannot be cut is cut anywhere": variant(
                PREFIX, "usable - usable % cut if cut else 0", "usable - usable % cut if cut else usable"
            ),
            "pages are rounded up": variant(
                PREFIX, "usable - usable % cut", "min(-(-usable // cut) * cut, len(prompt) - 1)"
            ),
            "only whole pages, even where all of the state is used": variant(
                PREFIX, "if usable < len(held):", "if True:"
            ),
            "the last token is taken off after the cut": """
def usable_prefix(held, held_model, prompt, model, cut=1):
    if held_model != model:
        return 0
    same = next((i for i, pair in enumerate(zip(held, prompt)) if pair[0] != pair[1]), min(len(held), len(prompt)))
    if same < len(held):
        same = same // cut * cut if cut else 0
    return min(same, len(prompt) - 1)
""",
        },
    ),
    "task_5": Answers(
        correct=(
            # hyperbolic caching: uses by the time since it came (Blankstein et al. 2017)
            variant(VICTIM, "ORDER", "one.uses / (now - one.came + 1)"),
            """
def victim(sessions, now):
    once, again = [], []
    for session in sorted(sessions, key=lambda session: session.last_used):
        if not session.readers:
            (once if session.uses == 1 else again).append(session.name)
    return next(iter(once + again), None)
""",
        ),
        wrong={
            "LRU": variant(VICTIM, "ORDER", "one.last_used"),
            "FIFO": variant(VICTIM, "ORDER", "one.came"),
            "LFU that never forgets": variant(VICTIM, "ORDER", "(one.uses, one.last_used)"),
            "the largest goes": variant(VICTIM, "ORDER", "(-one.tokens, one.last_used)"),
            "the smallest goes, which is quickly computed again": variant(
                VICTIM, "ORDER", "(one.tokens, one.last_used)"
            ),
            "uses for each token kept": variant(VICTIM, "ORDER", "one.uses / one.tokens"),
            "nobody ever goes": "def victim(sessions, now):\n    return None",
            "state is taken away from readers": """
def victim(sessions, now):
    return min(sessions, key=lambda one: (one.uses > 1, one.last_used)).name
""",
            "state is taken away from readers if nobody is idle": """
def victim(sessions, now):
    idle = [session for session in sessions if not session.readers]
    return min(idle or sessions, key=lambda one: (one.uses > 1, one.last_used)).name
""",
            "one reader is not many": """
def victim(sessions, now):
    idle = [session for session in sessions if session.readers <= 1]
    return min(idle, key=lambda one: (one.uses > 1, one.last_used)).name if idle else None
""",
            "stops at the first in the order that is in use": """
def victim(sessions, now):
    first = min(sessions, key=lambda one: (one.uses > 1, one.last_used), default=None)
    return first.name if first and not first.readers else None
""",
        },
    ),
    "task_6": Answers(
        correct=(
            LIMITS,
            """
from minilib.numbers.price import Cost, price

def batch_limits(machine, shape, context, new_tokens=1):
    def arithmetic_decides(batch):
        flops = batch * new_tokens * (2 * shape.parameters + 4 * context * shape.width)
        moved = 2 * shape.parameters + 2 * batch * context * shape.kept
        flops_take = price(Cost(flops=flops, dtype="bf16"), machine).seconds
        return flops_take >= price(Cost(bytes=moved), machine).seconds

    few, many = 0, 1
    while not arithmetic_decides(many):
        few, many = many, 2 * many
        if many > 2**40:
            break
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if arithmetic_decides(middle) else (middle, many)
    room = max(0, machine.memory_bytes - 2 * shape.parameters)
    return many if many < 2**40 else None, int(room // (2 * context * shape.kept))
""",
        ),
        wrong={
            "the state is not read": variant(LIMITS, "state / machine.memory_bandwidth", "0"),
            "every new token reads the state again": variant(
                LIMITS, "state / machine.memory_bandwidth", "new_tokens * state / machine.memory_bandwidth"
            ),
            "the sequences share their state": """
import math

def batch_limits(machine, shape, context, new_tokens=1):
    state = 2 * context * shape.kept
    flops = new_tokens * (2 * shape.parameters + 4 * context * shape.width)
    turns = math.ceil(machine.ridge("bf16") * (2 * shape.parameters + state) / flops)
    return turns, max(0, int((machine.memory_bytes - 2 * shape.parameters) // state))
""",
            "attention computes nothing": variant(LIMITS, " + 4 * context * shape.width", ""),
            "numbers are taken for bytes": variant(LIMITS, "2 * context * shape.kept", "context * shape.kept"),
            "the batch is rounded down": variant(LIMITS, "math.ceil(weights", "int(weights"),
            "arithmetic must take longer": variant(LIMITS, "math.ceil(weights", "1 + math.floor(weights"),
            "never is infinity": variant(LIMITS, "turns = None", "turns = math.inf"),
            "what does not fit never turns": variant(
                LIMITS,
                "    return turns, max(fits, 0)",
                "    return (turns if turns and turns <= fits else None), max(fits, 0)",
            ),
            "the weights take no memory": variant(LIMITS, "machine.memory_bytes - weights", "machine.memory_bytes"),
            "less than no room": variant(LIMITS, "max(fits, 0)", "fits"),
        },
    ),
}
