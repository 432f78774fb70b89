"""Answers to 03_attention that its graders must tell apart."""

from tests.graders.answers import Answers

# What several answers have in common
SPLIT = """
def combine(a, b):
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count = count_a + count_b
    if count == 0:
        return 0, 0.0, 0.0
    apart = mean_b - mean_a
    mean = MEAN
    m2 = M2
    return count, mean, m2
"""
MEAN = "(count_a * mean_a + count_b * mean_b) / count"
MERGE = """
def merge(out_a, lse_a, out_b, lse_b):
    top = np.maximum(lse_a, lse_b)
    top = np.where(top == -np.inf, 0.0, top)
    a, b = np.exp(lse_a - top)[:, None], np.exp(lse_b - top)[:, None]
    total = np.where(a + b == 0, 1.0, a + b)
    OUT
    return out, LSE
"""
LSE = "np.log((a + b)[:, 0]) + top"
ATTEND = """
def attend(query, stream, value_dim):
    top, total, out = START, 0.0, np.zeros(value_dim)
    for keys, values in stream:
        scores = keys @ query / math.sqrt(len(query))
        new_top = max(top, scores.max())
        weights = np.exp(scores - new_top)
        shrink = np.exp(top - new_top)
        total = total * shrink + weights.sum()
        out = out * SHRINK + weights @ values
        top = new_top
    if total == 0:
        return out, -math.inf
    return out / total, LSE
"""
PLAN = """
def causal_plan(q_len, k_len, block_q, block_k):
    blocks, tiles = -(-k_len // block_k), []
    for first in range(0, q_len, block_q):
        last = min(q_len, first + block_q) - 1
        whole = max(0, OFFSET + first + 1)
        some = max(0, OFFSET + last + 1)
        tiles.append((FULL, END))
    return tiles, SKIPPED
"""
PRICE = """
def hbm_bytes(shape, q_len, k_len, block_q):
    heads, kv_heads = shape.batch * shape.num_heads, shape.batch * shape.num_kv_heads
    row = shape.head_dim * shape.itemsize
    pairs = heads * q_len * k_len * shape.itemsize
    programs = heads * -(-q_len // block_q)
    materialised = 2 * heads * q_len * row + 2 * kv_heads * k_len * row + 4 * pairs
    return materialised, 2 * heads * q_len * row + programs * 2 * k_len * row + 4 * heads * q_len

def longest_context(shape, memory_bytes):
    heads, kv_heads = shape.batch * shape.num_heads, shape.batch * shape.num_kv_heads
    tensors, pairs = 2 * (heads + kv_heads) * shape.head_dim * shape.itemsize, 2 * heads * shape.itemsize
    longest = int((math.sqrt(tensors**2 + 4 * pairs * memory_bytes) - tensors) / (2 * pairs))
    return longest, memory_bytes // (tensors + 4 * heads)
"""
BACKWARD = """
def backward(q, k, v, out, lse, dout, block):
    scale = 1 / math.sqrt(q.shape[1])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (dout * out).sum(1, keepdim=True)
    for begin in range(0, len(k), block):
        end = min(begin + block, len(k))
        hidden = torch.arange(begin, end) > torch.arange(len(q))[:, None] + len(k) - len(q)
        p = torch.exp(scale * q @ k[begin:end].T - lse[:, None]).masked_fill(hidden, 0)
        dv[begin:end] = p.T @ dout
        ds = p * (dout @ v[begin:end].T - delta)
        dq += scale * ds @ k[begin:end]
        dk[begin:end] = scale * ds.T @ q
    return dq, dk, dv
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


GOOD_PLAN = {
    "OFFSET": "k_len - q_len",
    "FULL": "whole // block_k",
    "END": "-(-some // block_k)",
    "SKIPPED": "sum(blocks - end for _, end in tiles)",
}
GOOD_MERGE = filled(MERGE, OUT="out = (a * out_a + b * out_b) / total", LSE=LSE)
GOOD_ATTEND = filled(ATTEND, START="-math.inf", SHRINK="shrink", LSE="top + math.log(total)")

TASKS = {
    "task_1": Answers(
        correct=(
            filled(
                SPLIT, MEAN=MEAN, M2="m2_a + m2_b + count_a * (mean_a - mean) ** 2 + count_b * (mean_b - mean) ** 2"
            ),
            """
def combine(a, b):
    small, large = sorted((a, b), key=lambda shard: shard[0])
    if not small[0]:
        return large
    share = small[0] / (small[0] + large[0])
    apart = small[1] - large[1]
    return small[0] + large[0], large[1] + share * apart, small[2] + large[2] + share * large[0] * apart * apart
""",
        ),
        wrong={
            "adds up m2 as if the means were equal": filled(SPLIT, MEAN=MEAN, M2="m2_a + m2_b"),
            "the mean of the two means": filled(
                SPLIT, MEAN="(mean_a + mean_b) / 2", M2="m2_a + m2_b + apart**2 * count_a * count_b / count"
            ),
            "goes through sums of squares": filled(
                SPLIT, MEAN=MEAN, M2="m2_a + count_a * mean_a**2 + m2_b + count_b * mean_b**2 - count * mean**2"
            ),
            "divides by no values": changed(
                filled(SPLIT, MEAN=MEAN, M2="m2_a + m2_b + apart**2 * count_a * count_b / count"),
                "    if count == 0:\n        return 0, 0.0, 0.0\n",
                "",
            ),
            "averages variances": filled(
                SPLIT, MEAN=MEAN, M2="(count_a * m2_a + count_b * m2_b) / count + apart**2 * count_a * count_b / count"
            ),
            "forgets to divide by the count": filled(SPLIT, MEAN=MEAN, M2="m2_a + m2_b + apart**2 * count_a * count_b"),
            "takes a shard without values for a single 0": filled(
                SPLIT,
                MEAN="(max(1, count_a) * mean_a + max(1, count_b) * mean_b) / (max(1, count_a) + max(1, count_b))",
                M2="m2_a + m2_b + apart**2 * count_a * count_b / count",
            ),
            "moves the mean by the wrong share": filled(
                SPLIT,
                MEAN="mean_a + apart * count_a / count",
                M2="m2_a + m2_b + apart**2 * count_a * count_b / count",
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            """
def merge(out_a, lse_a, out_b, lse_b):
    lse = np.logaddexp(lse_a, lse_b)
    shares = [np.nan_to_num(np.exp(side - lse))[:, None] for side in (lse_a, lse_b)]
    return shares[0] * out_a + shares[1] * out_b, lse
""",
            """
def merge(out_a, lse_a, out_b, lse_b):
    out, lse = np.zeros_like(out_a), np.full(len(lse_a), -math.inf)
    for row in range(len(out)):
        high, low = max(lse_a[row], lse_b[row]), min(lse_a[row], lse_b[row])
        if high == -math.inf:
            continue
        lse[row] = high + math.log1p(math.exp(low - high))
        out[row] = math.exp(lse_a[row] - lse[row]) * out_a[row] + math.exp(lse_b[row] - lse[row]) * out_b[row]
    return out, lse
""",
        ),
        wrong={
            "exp of the whole lse": """
def merge(out_a, lse_a, out_b, lse_b):
    a, b = np.exp(lse_a)[:, None], np.exp(lse_b)[:, None]
    total = np.where(a + b == 0, 1.0, a + b)
    return (a * out_a + b * out_b) / total, np.log((a + b)[:, 0])
""",
            "NaN where nobody saw a key": """
def merge(out_a, lse_a, out_b, lse_b):
    top = np.maximum(lse_a, lse_b)
    a, b = np.exp(lse_a - top)[:, None], np.exp(lse_b - top)[:, None]
    return (a * out_a + b * out_b) / (a + b), top + np.log((a + b)[:, 0])
""",
            "the plain mean of both": filled(MERGE, OUT="out = (out_a + out_b) / 2", LSE=LSE),
            "adds outs that are normalised already": filled(MERGE, OUT="out = out_a + out_b", LSE=LSE),
            "does not divide by the new sum": filled(MERGE, OUT="out = a * out_a + b * out_b", LSE=LSE),
            "weighs by lse instead of its exponential": filled(
                MERGE,
                OUT="out = (lse_a[:, None] * out_a + lse_b[:, None] * out_b) / (lse_a + lse_b)[:, None]",
                LSE=LSE,
            ),
            "forgets to put the maximum back": filled(
                MERGE, OUT="out = (a * out_a + b * out_b) / total", LSE="np.log((a + b)[:, 0])"
            ),
            "adds the logarithms": filled(MERGE, OUT="out = (a * out_a + b * out_b) / total", LSE="lse_a + lse_b"),
            "writes into its first argument": filled(
                MERGE, OUT="out_a *= a; out_a += b * out_b; out_a /= total; out = out_a", LSE=LSE
            ),
            "one maximum for all rows": changed(
                GOOD_MERGE, "top = np.maximum(lse_a, lse_b)", "top = np.maximum(lse_a, lse_b).max(keepdims=True)"
            ),
            "an empty side empties the whole result": """
def merge(out_a, lse_a, out_b, lse_b):
    if np.isneginf(lse_a).any():
        return out_b.copy(), lse_b.copy()
    if np.isneginf(lse_b).any():
        return out_a.copy(), lse_a.copy()
    lse = np.logaddexp(lse_a, lse_b)
    return np.exp(lse_a - lse)[:, None] * out_a + np.exp(lse_b - lse)[:, None] * out_b, lse
""",
        },
    ),
    "task_3": Answers(
        correct=(
            """
def attend(query, stream, value_dim):
    out, lse = np.zeros(value_dim), -np.inf
    for keys, values in stream:
        scores = keys.dot(query) * len(query) ** -0.5
        block_lse = np.logaddexp.reduce(scores)
        block_out = np.exp(scores - block_lse) @ values
        new = np.logaddexp(lse, block_lse)
        out, lse = np.exp(lse - new) * out + np.exp(block_lse - new) * block_out, new
    return out, lse
""",
            """
def attend(query, stream, value_dim):
    top, total, out = None, 0.0, [0.0] * value_dim
    scaled = query / math.sqrt(len(query))
    for block in stream:
        for key, value in zip(*block):
            score = float(np.dot(key, scaled))
            if top is None or score > top:
                shrink = 0.0 if top is None else math.exp(top - score)
                total, out, top = total * shrink, [x * shrink for x in out], score
            weight = math.exp(score - top)
            total += weight
            out = [x + weight * y for x, y in zip(out, value)]
    return (np.array(out), -math.inf) if top is None else (np.array(out) / total, top + math.log(total))
""",
        ),
        wrong={
            "exp of the whole score": """
def attend(query, stream, value_dim):
    total, out = 0.0, np.zeros(value_dim)
    for keys, values in stream:
        weights = np.exp(keys @ query / math.sqrt(len(query)))
        total += weights.sum()
        out += weights @ values
    return (out / total, math.log(total)) if total else (out, -math.inf)
""",
            "corrects the sum but not the result": filled(
                ATTEND, START="-math.inf", SHRINK="1.0", LSE="top + math.log(total)"
            ),
            "a running maximum that starts at 0": filled(
                ATTEND, START="0.0", SHRINK="shrink", LSE="top + math.log(total)"
            ),
            "lse without the maximum": filled(ATTEND, START="-math.inf", SHRINK="shrink", LSE="math.log(total)"),
            "corrects by the inverse": changed(
                GOOD_ATTEND, "np.exp(top - new_top)", "(np.exp(new_top - top) if total else 0.0)"
            ),
            "the block's own maximum": changed(GOOD_ATTEND, "max(top, scores.max())", "scores.max()"),
            "scores are not scaled": changed(GOOD_ATTEND, " / math.sqrt(len(query))", ""),
            "the mean of the blocks' results": """
def attend(query, stream, value_dim):
    outs, lses = [np.zeros(value_dim)], [-math.inf]
    for keys, values in stream:
        scores = keys @ query / math.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        outs.append(weights @ values / weights.sum())
        lses.append(scores.max() + math.log(weights.sum()))
    return np.mean(outs[1:] or outs, axis=0), np.logaddexp.reduce(lses)
""",
            "first a pass for the maximum, then one for the sum": """
def attend(query, stream, value_dim):
    top = max((keys @ query).max() for keys, values in stream) / math.sqrt(len(query))
    total, out = 0.0, np.zeros(value_dim)
    for keys, values in stream:
        weights = np.exp(keys @ query / math.sqrt(len(query)) - top)
        total += weights.sum()
        out += weights @ values
    return out / total, top + math.log(total)
""",
            "holds all blocks": """
def attend(query, stream, value_dim):
    blocks = list(stream)
    if not blocks:
        return np.zeros(value_dim), -math.inf
    keys, values = (np.concatenate(arrays) for arrays in zip(*blocks))
    scores = keys @ query / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), scores.max() + math.log(weights.sum())
""",
            "copies all blocks": """
def attend(query, stream, value_dim):
    keys, values = np.zeros((0, len(query))), np.zeros((0, value_dim))
    for more_keys, more_values in stream:
        keys, values = np.concatenate([keys, more_keys]), np.concatenate([values, more_values])
    if not len(keys):
        return np.zeros(value_dim), -math.inf
    scores = keys @ query / math.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), scores.max() + math.log(weights.sum())
""",
            "keeps every score for lse": changed(
                changed(GOOD_ATTEND, "top, total", "every = []\n    top, total"),
                "        new_top =",
                "        every.append(scores)\n        new_top =",
            ),
            "a stream without blocks gives NaN": changed(
                GOOD_ATTEND, "    if total == 0:\n        return out, -math.inf\n", "    total = np.float64(total)\n"
            ).replace("math.log(total)", "np.log(total)"),
        },
    ),
    "task_4": Answers(
        correct=(
            filled(
                PLAN,
                OFFSET="(k_len - q_len)",
                FULL="min(k_len, whole) // block_k",
                END="(some + block_k - 1) // block_k",
                SKIPPED="len(tiles) * blocks - sum(pair[1] for pair in tiles)",
            ),
            """
def causal_plan(q_len, k_len, block_q, block_k):
    tiles, skipped = [], 0
    for first in range(0, q_len, block_q):
        limits = [k_len - q_len + t for t in range(first, min(first + block_q, q_len))]
        full = end = 0
        for begin in range(0, k_len, block_k):
            full += begin + block_k - 1 <= min(limits) and begin + block_k <= k_len
            end += begin <= max(limits)
            skipped += begin > max(limits)
        tiles.append([full, end])
    return tiles, skipped
""",
        ),
        wrong={
            "aligns the first query with the first key": filled(
                PLAN,
                **GOOD_PLAN
                | {"OFFSET": "0", "FULL": "min(k_len, whole) // block_k", "END": "min(blocks, -(-some // block_k))"},
            ),
            "a block too many where a tile ends with a block": filled(
                PLAN, **GOOD_PLAN | {"END": "min(blocks, some // block_k + 1)"}
            ),
            "the last block is cut off": filled(PLAN, **GOOD_PLAN | {"END": "some // block_k"}),
            "full if the last query sees it": filled(PLAN, **GOOD_PLAN | {"FULL": "some // block_k"}),
            "a short last block counts as full": filled(
                PLAN, **GOOD_PLAN | {"FULL": "blocks if whole >= k_len else whole // block_k"}
            ),
            "every query sees the key after its own": filled(PLAN, **GOOD_PLAN | {"OFFSET": "k_len - q_len + 1"}),
            "negative counts for blind queries": changed(
                changed(filled(PLAN, **GOOD_PLAN), "max(0, k_len - q_len + first + 1)", "(k_len - q_len + first + 1)"),
                "max(0, k_len - q_len + last + 1)",
                "(k_len - q_len + last + 1)",
            ),
            "masks every block": filled(PLAN, **GOOD_PLAN | {"FULL": "0"}),
            "visits every block": filled(PLAN, **GOOD_PLAN | {"END": "blocks"}),
            "whole tiles only": changed(
                filled(PLAN, **GOOD_PLAN), "range(0, q_len, block_q)", "range(0, q_len - block_q + 1, block_q)"
            ),
            "counts skipped keys": filled(
                PLAN, **GOOD_PLAN | {"SKIPPED": "sum(k_len - end * block_k for _, end in tiles)"}
            ),
            "counts blocks without a mask as skipped": filled(
                PLAN, **GOOD_PLAN | {"SKIPPED": "sum(blocks - end + full for full, end in tiles)"}
            ),
            "the short last block of keys is no block": filled(
                PLAN, **GOOD_PLAN | {"SKIPPED": "sum(max(0, k_len // block_k - end) for _, end in tiles)"}
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            PRICE,
            """
def everything(shape, q_len, k_len):
    q = shape.batch * shape.num_heads * q_len * shape.head_dim * shape.itemsize
    k = shape.batch * shape.num_kv_heads * k_len * shape.head_dim * shape.itemsize
    s = shape.batch * shape.num_heads * q_len * k_len * shape.itemsize
    return q, k, s, 4 * shape.batch * shape.num_heads * q_len

def hbm_bytes(shape, q_len, k_len, block_q):
    q, k, s, lse = everything(shape, q_len, k_len)
    one = 2 * k_len * shape.head_dim * shape.itemsize
    tiles = len(range(0, q_len, block_q))
    return [2 * q + 2 * k + 4 * s, 2 * q + shape.batch * shape.num_heads * tiles * one + lse]

def longest_context(shape, memory_bytes):
    def search(fits):
        low, high = 0, memory_bytes + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(*everything(shape, middle, middle)) else (low, middle)
        return low

    return [
        search(lambda q, k, s, lse: 2 * (q + k + s) <= memory_bytes),
        search(lambda q, k, s, lse: 2 * (q + k) + lse <= memory_bytes),
    ]
""",
        ),
        wrong={
            "S and P cross once each": changed(PRICE, "4 * pairs\n", "2 * pairs\n"),
            "as many columns as queries": changed(PRICE, "heads * q_len * k_len", "heads * q_len * q_len"),
            "k and v for every query head": changed(PRICE, "2 * kv_heads * k_len * row", "2 * heads * k_len * row"),
            "tiled reads k and v once": changed(PRICE, "programs * 2 * k_len * row", "2 * kv_heads * k_len * row"),
            "programs of one kv head share what they read": changed(
                PRICE, "programs = heads *", "programs = kv_heads *"
            ),
            "a short last tile reads nothing": changed(PRICE, "-(-q_len // block_q)", "(q_len // block_q)"),
            "tiled writes no lse": changed(PRICE, " + 4 * heads * q_len\n", "\n"),
            "lse takes itemsize": changed(PRICE, "4 * heads * q_len\n", "shape.itemsize * heads * q_len\n"),
            "forgets the batch": changed(
                PRICE,
                "heads, kv_heads = shape.batch * shape.num_heads, shape.batch * shape.num_kv_heads",
                "heads, kv_heads = shape.num_heads, shape.num_kv_heads",
            ),
            "S alone must fit": changed(
                PRICE, "itemsize, 2 * heads * shape.itemsize", "itemsize, heads * shape.itemsize"
            ),
            "only the scores need room": changed(
                PRICE,
                "int((math.sqrt(tensors**2 + 4 * pairs * memory_bytes) - tensors) / (2 * pairs))",
                "math.isqrt(memory_bytes // pairs)",
            ),
            "rounds to the next length": changed(PRICE, "longest = int((", "longest = round(("),
        },
    ),
    "task_6": Answers(
        correct=(
            BACKWARD,
            """
def backward(q, k, v, out, lse, dout, block):
    scale, before = q.shape[1] ** -0.5, len(k) - len(q)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for first in range(max(0, -before), len(q), block):
        rows = slice(first, first + block)
        delta = torch.einsum("td,td->t", dout[rows], out[rows])
        for begin in range(0, min(len(k), before + first + block), block):
            keys = slice(begin, begin + block)
            s = q[rows] @ k[keys].T * scale
            visible = torch.ones_like(s).tril(before + first - begin)
            p = torch.exp(torch.where(visible == 1, s - lse[rows, None], -torch.inf))
            ds = p * (dout[rows] @ v[keys].T - delta[:, None])
            dv[keys] += p.T @ dout[rows]
            dk[keys] += scale * (ds.T @ q[rows])
            dq[rows] += scale * (ds @ k[keys])
    return dq, dk, dv
""",
        ),
        wrong={
            "leaves D out": changed(BACKWARD, " - delta)", ")"),
            "D of each block on its own": changed(
                BACKWARD,
                "(dout @ v[begin:end].T - delta)",
                "(dout @ v[begin:end].T - (p * (dout @ v[begin:end].T)).sum(1, keepdim=True))",
            ),
            "dq and dk are not scaled": changed(changed(BACKWARD, "scale * ds @", "ds @"), "scale * ds.T @", "ds.T @"),
            "softmax of each block on its own": changed(
                BACKWARD,
                "torch.exp(scale * q @ k[begin:end].T - lse[:, None]).masked_fill(hidden, 0)",
                "(scale * q @ k[begin:end].T).masked_fill(hidden, -1e30).softmax(1).masked_fill(hidden, 0)",
            ),
            "exp before lse is taken away": changed(
                BACKWARD,
                "torch.exp(scale * q @ k[begin:end].T - lse[:, None])",
                "(torch.exp(scale * q @ k[begin:end].T) / torch.exp(lse)[:, None])",
            ),
            "all scores at once": changed(
                BACKWARD,
                "for begin in range(0, len(k), block):",
                "block = max(1, len(k))\n    for begin in range(0, len(k), block):",
            ),
            "the gradient of all scores by autograd": """
def backward(q, k, v, out, lse, dout, block):
    return by_autograd(q, k, v, dout)
""",
            "keeps every block of probabilities": """
def backward(q, k, v, out, lse, dout, block):
    scale, delta = 1 / math.sqrt(q.shape[1]), (dout * out).sum(1, keepdim=True)
    starts, kept = range(0, len(k), block), []
    for begin in starts:
        s = scale * q @ k[begin : begin + block].T - lse[:, None]
        hidden = torch.ones_like(s, dtype=torch.bool).triu(len(k) - len(q) + 1 - begin)
        kept.append(torch.exp(s).masked_fill(hidden, 0))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for begin, p in zip(starts, kept):
        keys = slice(begin, begin + block)
        ds = scale * p * (dout @ v[keys].T - delta)
        dq += ds @ k[keys]
        dk[keys], dv[keys] = ds.T @ q, p.T @ dout
    return dq, dk, dv
""",
            "returns dv first": changed(BACKWARD, "return dq, dk, dv", "return dv, dq, dk"),
            "dq keeps the last block only": changed(BACKWARD, "dq += scale", "dq[:] = scale"),
            "whole blocks only": changed(BACKWARD, "range(0, len(k), block)", "range(0, len(k) - block + 1, block)"),
            "no mask": changed(BACKWARD, ".masked_fill(hidden, 0)", ""),
            "aligns the first query with the first key": changed(BACKWARD, " + len(k) - len(q)", ""),
            "gradients in float32": changed(
                BACKWARD,
                "torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)",
                "torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)",
            ),
            "blocks of 8 whatever block is": changed(BACKWARD, "    scale =", "    block = 8\n    scale ="),
            "writes into dout": changed(BACKWARD, "    delta =", "    dout[torch.isneginf(lse)] = 0.0\n    delta ="),
            "masks by multiplying, infinity times 0": changed(BACKWARD, ".masked_fill(hidden, 0)", " * ~hidden"),
            "the mask hides the query's own key": changed(BACKWARD, "arange(begin, end) >", "arange(begin, end) >="),
        },
    ),
}
