"""Answers to 06_zero that its graders must tell apart."""

from tests.graders.answers import Answers

# What several answers have in common
LEDGER = """
def ledger(recipe, num_parameters, world_size, stage):
    share = SHARE
    state = STATE
    return {
        "parameters": BYTES[recipe.parameter] * (share if stage >= 3 else num_parameters),
        "gradients": BYTES[recipe.gradient] * (share if stage >= 2 else num_parameters),
        "optimizer": state * (share if stage >= 1 else num_parameters),
    }
"""
SHARE = "(num_parameters + world_size - 1) // world_size"
STATE = "4 * recipe.moments + 4 * recipe.masters"
FEWEST = """
def fewest_ranks(recipe, num_parameters, memory, activations):
    sizes = [BYTES[recipe.parameter], BYTES[recipe.gradient], 4 * (recipe.masters + recipe.moments)]
    found = []
    for stage in range(4):
        divided = sum(sizes[3 - stage :])
        room = memory - ACTIVATIONS - sum(sizes[: 3 - stage]) * num_parameters
        if divided == 0:
            found.append(1 if room >= 0 else None)
        elif room < divided:
            found.append(None)
        else:
            found.append(RANKS)
    return found
"""
RANKS = "-(-num_parameters // min(num_parameters, room // divided))"
SLICE = """
def own_slice(num_elements, rank, world_size):
    length = LENGTH
    return rank * length, (rank + 1) * length
"""
LENGTH = "(num_elements + world_size - 1) // world_size"
LOAD = """
def load(saved, rank, world_size):
    start, stop = own_slice(saved.num_elements, rank, world_size)
    length = own_slice(saved.num_elements, 0, saved.world_size)[1]
    end = min(stop, saved.num_elements)
    values, place = [], start
    while place < end:
        file, offset = divmod(place, length)
        count = min(length - offset, end - place)
        values += saved.read(file, offset, offset + count)
        place += count
    return values + [0.0] * (stop - start - len(values))
"""
STAGE_1 = """
def stage_1(comm, weights, gradient, steps, micro_batches, make_optimizer):
    n, size = comm.world_size, len(weights)
    length = -(-size // n)
    flat = torch.zeros(length * n, dtype=weights.dtype)
    flat[:size] = weights
    start, stop = comm.rank * length, (comm.rank + 1) * length
    owned = torch.nn.Parameter(OWNED)
    optimizer = make_optimizer([owned])
    for step in range(steps):
        row = torch.zeros_like(flat)
        for micro_batch in range(micro_batches):
            row[:size] += gradient(flat[:size], comm.rank, step, micro_batch)
        REDUCE
        optimizer.step()
        PUBLISH
    return flat[:RETURNED], optimizer
"""
OWNED = "flat[start:stop].clone()"
REDUCE = """row /= micro_batches
        comm.reduce_scatter(row, op="avg")
        owned.grad = row[start:stop].clone()"""
PUBLISH = """flat[start:stop] = owned.detach()
        comm.all_gather(flat)"""
FIXED = """
class Fixed(Draft):
    def __init__(self, comm, weights, make_optimizer):
        BEGIN
        super().__init__(comm, weights, make_optimizer)

    def reduce(self, gradient):
        row = self.padded(gradient)
        self.own.grad = REDUCED

    def clip(self, max_norm):
        NORM
        if norm > max_norm:
            self.own.grad *= max_norm / norm
        return norm

    def step(self, gradient, max_norm):
        self.reduce(gradient(self.weights()))
        norm = self.clip(max_norm)
        self.optimizer.step()
        END
        return norm
"""
BEGIN = "comm.broadcast(weights)"
REDUCED = 'self.comm.reduce_scatter(row, op="sum").clone() / self.comm.world_size'
NORM = """total = (self.own.grad**2).sum().reshape(1)
        self.comm.all_reduce(total)
        norm = total.item() ** 0.5"""
END = "self.full = None"
SCHEDULE = """
def schedule(num_units, room):
    plan = [("gather", 0)]
    for unit in range(num_units):
        if unit + 1 < num_units:
            plan.append(("gather", unit + 1))
        plan.append(("compute", unit))
        if FREED:
            plan.append(("free", unit))
    for unit in reversed(range(num_units)):
        if FETCHED:
            plan.append(("gather", unit - 1))
        plan += [("compute", unit), ("free", unit)]
    return plan
"""
FREED = "unit + room < num_units"
FETCHED = "0 < unit < num_units - 1 and unit - 1 + room < num_units"
# Of the units that are held, drop the one that is wanted last, and only for one that is wanted earlier
BELADY = """
def schedule(num_units, room):
    uses = [*range(num_units), *reversed(range(num_units))]
    plan, held = [["gather", 0]], {0}
    for now, unit in enumerate(uses):
        later = uses[now + 1 :]
        AHEAD len(held) < room and set(later) - held:
            wanted = min(set(later) - held, key=later.index)
            plan.append(["gather", wanted])
            held.add(wanted)
        plan.append(["compute", unit])
        last = unit if unit not in later else max(held, key=later.index)
        missing = [later.index(other) for other in set(later) - held]
        if last not in later or (len(held) == room and missing and min(missing) < later.index(last)):
            plan.append(["free", last])
            held.remove(last)
    return plan
"""
STEP = """
def train_step(layers, batches):
    depth, count = len(layers.own), len(batches)
    kept = [[x] for x, _ in batches]
    for k in range(depth):
        W = layers.gather(k)
        for each in kept:
            each.append(forward(each[-1], W))
        if k + 1 < depth:
            layers.release(k)
    loss = sum(((each[-1] - t) ** 2).mean() for each, (_, t) in zip(kept, batches)) / count
    slopes = [2 * (each[-1] - t) / t.numel() / count for each, (_, t) in zip(kept, batches)]
    for k in reversed(range(depth)):
        W = layers.gather(k) if k not in layers.whole else layers.whole[k]
        total = torch.zeros_like(W)
        for m, each in enumerate(kept):
            gradient, slopes[m] = backward(each[k], each[k + 1], W, slopes[m])
            total += gradient
        layers.release(k)
        layers.reduce(k, total)
    layers.optimizer.step()
    return loss
"""
# One micro-batch after the other, as the colleague does it
BY_MICRO_BATCH = """
def train_step(layers, batches):
    depth, loss, totals = len(layers.own), 0, {}
    for x, target in batches:
        kept = [x]
        for k in range(depth):
            kept.append(forward(kept[-1], layers.gather(k)))
            if k + 1 < depth:
                layers.release(k)
        slope = 2 * (kept[-1] - target) / target.numel() / len(batches)
        loss += ((kept[-1] - target) ** 2).mean() / len(batches)
        for k in reversed(range(depth)):
            W = layers.whole[k] if k in layers.whole else layers.gather(k)
            gradient, slope = backward(kept[k], kept[k + 1], W, slope)
            totals[k] = totals.get(k, 0) + gradient
            layers.release(k)
    for k, total in totals.items():
        layers.reduce(k, total)
    layers.optimizer.step()
    return loss
"""


def variant(code: str, **parts: str) -> str:
    """A template with its parts filled in."""
    for name, part in parts.items():
        assert name in code, name
        code = code.replace(name, part)
    return code


def ledger(share: str = SHARE, state: str = STATE) -> str:
    return variant(LEDGER, SHARE=share, STATE=state)


def fewest(activations: str = "activations", ranks: str = RANKS) -> str:
    return variant(FEWEST, ACTIVATIONS=activations, RANKS=ranks)


def stage_1(owned: str = OWNED, reduce: str = REDUCE, publish: str = PUBLISH, returned: str = "size") -> str:
    return variant(STAGE_1, OWNED=owned, REDUCE=reduce, PUBLISH=publish, RETURNED=returned)


def fixed(begin: str = BEGIN, reduced: str = REDUCED, norm: str = NORM, end: str = END) -> str:
    return variant(FIXED, BEGIN=begin, REDUCED=reduced, NORM=norm, END=end)


def schedule(freed: str = FREED, fetched: str = FETCHED) -> str:
    return variant(SCHEDULE, FREED=freed, FETCHED=fetched)


TASKS = {
    "task_1": Answers(
        correct=(
            ledger() + fewest(),
            """
from minilib.parallel.zero.ledger import expected_bytes

def ledger(recipe, num_parameters, world_size, stage):
    share = expected_bytes(num_parameters, world_size, 3, "fp32")["parameters"] // 4
    held = [num_parameters] * 3
    for kind in range(3 - stage, 3):
        held[kind] = share
    held[0] *= BYTES[recipe.parameter]
    held[1] *= BYTES[recipe.gradient]
    held[2] *= 4 * (int(recipe.masters) + recipe.moments)
    return dict(zip(["parameters", "gradients", "optimizer"], held))
"""
            + fewest(ranks="(num_parameters - 1) // (room // divided) + 1"),
        ),
        wrong={
            "the share is rounded down": ledger(share="num_parameters // world_size") + fewest(),
            "the share is not rounded": ledger(share="num_parameters / world_size") + fewest(),
            "a master copy in every recipe": ledger(state="4 * recipe.moments + 4") + fewest(),
            "no master copy": ledger(state="4 * recipe.moments") + fewest(),
            "moments are in the dtype of parameters": ledger(
                state="BYTES[recipe.parameter] * recipe.moments + 4 * recipe.masters"
            )
            + fewest(),
            "stages count from 0, one too early": variant(
                ledger(), **{"stage >= 3": "stage >= 2", "stage >= 2 ": "stage >= 1 "}
            )
            + fewest(),
            "activations are forgotten": ledger() + fewest(activations="0"),
            "activations are divided, too": ledger() + fewest(activations="0", ranks=f"{RANKS} + activations // room"),
            "bytes are divided, not whole parameters": ledger() + fewest(ranks="-(-divided * num_parameters // room)"),
            "always one rank more": ledger() + fewest(ranks="num_parameters * divided // room + 1"),
        },
    ),
    "task_2": Answers(
        correct=(
            variant(SLICE, LENGTH=LENGTH) + LOAD,
            """
from minilib.mechanisms.sharding.slicing import reslice, slices

def own_slice(num_elements, rank, world_size):
    return slices(num_elements, world_size)[rank]

def load(saved, rank, world_size):
    new = slices(saved.num_elements, world_size)
    values = torch.zeros(new[rank][1] - new[rank][0], dtype=torch.float64)
    for piece in reslice(saved.num_elements, slices(saved.num_elements, saved.world_size), new):
        if piece.new_shard == rank:
            part = saved.read(piece.old_shard, piece.old_start, piece.old_start + piece.length)
            values[piece.new_start : piece.new_start + piece.length] = torch.tensor(part)
    return values.tolist()
""",
        ),
        wrong={
            "slices are one place too long where they divide": variant(SLICE, LENGTH="num_elements // world_size + 1")
            + LOAD,
            "the last rank has what is left": """
def own_slice(num_elements, rank, world_size):
    length = num_elements // world_size
    return rank * length, num_elements if rank == world_size - 1 else (rank + 1) * length
"""
            + LOAD,
            "slices end with the elements, so they are not of one length": """
def own_slice(num_elements, rank, world_size):
    length = -(-num_elements // world_size)
    return min(num_elements, rank * length), min(num_elements, (rank + 1) * length)
"""
            + LOAD,
            "element by element": variant(SLICE, LENGTH=LENGTH)
            + LOAD.replace("min(length - offset, end - place)", "1"),
            "padding is read from the files": variant(SLICE, LENGTH=LENGTH)
            + LOAD.replace("min(stop, saved.num_elements)", "min(stop, length * saved.world_size)"),
            "whole files are read": variant(SLICE, LENGTH=LENGTH)
            + """
def load(saved, rank, world_size):
    start, stop = own_slice(saved.num_elements, rank, world_size)
    row = []
    for file in range(saved.world_size):
        first, last = own_slice(saved.num_elements, file, saved.world_size)
        if first < min(stop, saved.num_elements) and last > start:
            row += saved.read(file, 0, min(last, saved.num_elements) - first)
        else:
            row += [0.0] * (last - first)
    row = row[: saved.num_elements] + [0.0] * (stop + len(row))
    return row[start:stop]
""",
            "no padding at the end": variant(SLICE, LENGTH=LENGTH)
            + LOAD.replace(" + [0.0] * (stop - start - len(values))", ""),
            "padding at the beginning": variant(SLICE, LENGTH=LENGTH)
            + LOAD.replace(
                "values + [0.0] * (stop - start - len(values))", "[0.0] * (stop - start - len(values)) + values"
            ),
            "places in a file count from the beginning of the row": variant(SLICE, LENGTH=LENGTH)
            + LOAD.replace("saved.read(file, offset, offset + count)", "saved.read(file, place, place + count)"),
        },
    ),
    "task_3": Answers(
        correct=(
            stage_1(),
            """
def stage_1(comm, weights, gradient, steps, micro_batches, make_optimizer):
    # without padding: the communicator's own chunks, whose sizes differ by one
    flat = weights.clone()
    owned = torch.nn.Parameter(flat.tensor_split(comm.world_size)[comm.rank].clone())
    optimizer = make_optimizer([owned])
    for step in range(steps):
        each = [gradient(flat, comm.rank, step, m) for m in range(micro_batches)]
        owned.grad = comm.reduce_scatter(torch.stack(each).mean(0), op="avg")
        optimizer.step()
        flat.tensor_split(comm.world_size)[comm.rank].copy_(owned.detach())
        comm.all_gather(flat)
    return flat, optimizer
""",
        ),
        wrong={
            "every rank has the state of all weights": stage_1(
                owned="flat.clone()",
                reduce='row /= micro_batches\n        comm.all_reduce(row, op="avg")\n        owned.grad = row.clone()',
                publish="flat.copy_(owned.detach())",
            ),
            "all-reduce, then all-gather": stage_1(
                reduce=REDUCE.replace("reduce_scatter", "all_reduce"),
            ),
            "a reduce-scatter for every micro-batch": stage_1(
                reduce="""owned.grad = torch.zeros_like(owned)
        for micro_batch in range(micro_batches):
            row = torch.zeros_like(flat)
            row[:size] = gradient(flat[:size], comm.rank, step, micro_batch) / micro_batches
            owned.grad += comm.reduce_scatter(row, op="avg")"""
            ),
            "the sum of micro-batches": stage_1(reduce=REDUCE.replace("row /= micro_batches\n        ", "")),
            "the sum of ranks": stage_1(reduce=REDUCE.replace('"avg"', '"sum"')),
            "only the last micro-batch": variant(stage_1(), **{"row[:size] +=": "row[:size] ="}),
            "gradients of the step before are still there": variant(
                stage_1(), **{"row = torch.zeros_like(flat)\n": "row = torch.zeros_like(flat) if step == 0 else row\n"}
            ),
            "nobody gathers the new weights": stage_1(publish="flat[start:stop] = owned.detach()"),
            "weights are gathered once, at the end": stage_1(
                publish="flat[start:stop] = owned.detach()\n"
                "        if step == steps - 1:\n            comm.all_gather(flat)"
            ),
            "what is gathered is not what was updated": stage_1(publish="comm.all_gather(flat)"),
            "a new optimizer in every step": stage_1(
                reduce=REDUCE + "\n        optimizer = make_optimizer([owned])",
            ),
            "master weights in float32": stage_1(
                owned="flat[start:stop].float()", reduce=REDUCE.replace(".clone()", ".float()")
            ),
            "a row in float32": variant(stage_1(), **{"dtype=weights.dtype": "dtype=torch.float32"}),
            "returns float32": variant(stage_1(), **{"return flat[:size]": "return flat[:size].float()"}),
            "padding is returned as weights": stage_1(returned="length * n"),
            "another slice of gradients than of weights": stage_1(
                reduce=REDUCE.replace("row[start:stop]", "row[:length]")
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            fixed(),
            """
class Fixed(Draft):
    def __init__(self, comm, weights, make_optimizer):
        weights = weights if comm.rank == 0 else torch.zeros_like(weights)
        comm.all_reduce(weights)
        super().__init__(comm, weights, make_optimizer)

    def reduce(self, gradient):
        self.full = None
        super().reduce(gradient * self.comm.world_size)

    def clip(self, max_norm):
        squares = torch.zeros(self.comm.world_size, dtype=torch.float64)
        squares[self.comm.rank] = self.own.grad.pow(2).sum()
        self.comm.all_gather(squares)
        norm = float(squares.sum().sqrt())
        self.own.grad.mul_(min(1.0, max_norm / norm))
        return norm
""",
            # the norm in float32, and torch's own epsilon
            variant(
                fixed(norm=NORM.replace("self.own.grad**2", "self.own.grad.float() ** 2")),
                **{"max_norm / norm": "max_norm / (norm + 1e-6)"},
            ),
            # the norm as a tensor
            fixed(norm=NORM.replace("total.item() ** 0.5", "total.sqrt().squeeze()")),
        ),
        wrong={
            "each rank begins with its own weights": fixed(begin="pass"),
            "the mean of all ranks' weights": fixed(begin='comm.all_reduce(weights, op="avg")'),
            "averaged twice": fixed(reduced='self.comm.reduce_scatter(row, op="avg").clone() / self.comm.world_size'),
            "not averaged at all": fixed(reduced='self.comm.reduce_scatter(row, op="sum").clone()'),
            "the norm of the own slice": fixed(norm="norm = self.own.grad.norm().item()"),
            "norms are added, not their squares": fixed(
                norm="total = self.own.grad.norm().reshape(1)\n        self.comm.all_reduce(total)\n"
                "        norm = total.item()"
            ),
            "the mean of squares over ranks": fixed(
                norm=NORM.replace("all_reduce(total)", 'all_reduce(total, op="avg")')
            ),
            "the largest norm of a slice": fixed(
                norm='total = self.own.grad.norm().reshape(1)\n        self.comm.all_reduce(total, op="max")\n'
                "        norm = total.item()"
            ),
            "the global norm is asked for only where the local one is too long": fixed(
                norm="norm = self.own.grad.norm().item()\n        if norm > max_norm:\n"
                "            total = (self.own.grad**2).sum().reshape(1)\n"
                "            self.comm.all_reduce(total)\n            norm = total.item() ** 0.5"
            ),
            "the gradient is gathered for its norm": fixed(
                norm="row = self.padded(self.own.grad[:0])\n        row[self.mine] = self.own.grad\n"
                "        self.comm.all_gather(row)\n        norm = row.norm().item()"
            ),
            "clips value by value": variant(
                fixed(), **{"self.own.grad *= max_norm / norm": "self.own.grad.clamp_(-max_norm, max_norm)"}
            ),
            "an epsilon that shows": variant(fixed(), **{"max_norm / norm": "max_norm / (norm + 1e-3)"}),
            "returns the norm after clipping": variant(
                fixed(), **{"        return norm\n\n    def step": "        return min(norm, max_norm)\n\n    def step"}
            ),
            "weights are gathered once": fixed(end="pass"),
            "weights are gathered again at once, and held": fixed(end="self.full = None\n        self.weights()"),
        },
    ),
    "task_5": Answers(
        correct=(
            schedule(),
            BELADY.replace("AHEAD", "if"),
            BELADY.replace("AHEAD", "while"),
        ),
        wrong={
            "gathers everything and frees at the end": schedule(freed="False", fetched="False"),
            "frees every unit after the forward pass": schedule(freed="True", fetched="unit > 0").replace(
                "    for unit in reversed", '    plan.append(("gather", num_units - 1))\n    for unit in reversed'
            ),
            "keeps the last unit only, however much room there is": schedule(
                freed="unit + 1 < num_units", fetched="unit > 0"
            ),
            "fetches a unit when it is wanted": """
def schedule(num_units, room):
    plan = []
    for unit in range(num_units):
        plan += [("gather", unit), ("compute", unit)]
        if unit + room < num_units:
            plan.append(("free", unit))
    for unit in reversed(range(num_units)):
        if unit + room < num_units:
            plan.append(("gather", unit))
        plan += [("compute", unit), ("free", unit)]
    return plan
""",
            "fetches ahead in the forward pass only": """
def schedule(num_units, room):
    plan = [("gather", 0)]
    for unit in range(num_units):
        if unit + 1 < num_units:
            plan.append(("gather", unit + 1))
        plan.append(("compute", unit))
        if unit + room < num_units:
            plan.append(("free", unit))
    for unit in reversed(range(num_units)):
        if unit + room < num_units:
            plan.append(("gather", unit))
        plan += [("compute", unit), ("free", unit)]
    return plan
""",
            "keeps one unit more than there is room for": schedule(
                freed="unit + room + 1 < num_units",
                fetched="0 < unit < num_units - 1 and unit + room < num_units",
            ),
            "keeps the first units, as a cache that fills up once": """
def schedule(num_units, room):
    kept = room - 2
    plan = [("gather", 0)]
    for unit in range(num_units):
        if unit + 1 < num_units:
            plan.append(("gather", unit + 1))
        plan.append(("compute", unit))
        if kept <= unit < num_units - 1:
            plan.append(("free", unit))
    for unit in reversed(range(num_units)):
        if unit - 1 >= kept:
            plan.append(("gather", unit - 1))
        plan += [("compute", unit), ("free", unit)]
    return plan
""",
            "never frees in the backward pass": schedule().replace(
                'plan += [("compute", unit), ("free", unit)]', 'plan += [("compute", unit)]'
            ),
            "the gather comes after the computation that should hide it": schedule().replace(
                """        if unit + 1 < num_units:
            plan.append(("gather", unit + 1))
        plan.append(("compute", unit))
""",
                """        plan.append(("compute", unit))
        if unit + 1 < num_units:
            plan.append(("gather", unit + 1))
""",
            ),
        },
    ),
    "task_6": Answers(
        correct=(
            STEP,
            """
def train_step(layers, batches):
    # autograd inside a layer, whose forward pass is computed again
    depth, count = len(layers.own), len(batches)
    inputs = [[x for x, _ in batches]]
    for k in range(depth - 1):
        W = layers.gather(k)
        inputs.append([forward(x, W) for x in inputs[-1]])
        layers.release(k)
    slopes, loss = None, 0.0
    for k in range(depth - 1, -1, -1):
        W = layers.gather(k).clone().requires_grad_()
        layers.release(k)
        xs = [x.clone().requires_grad_() for x in inputs[k]]
        ys = [forward(x, W) for x in xs]
        if slopes is None:
            errors = torch.stack([(y - target).square().mean() for y, (_, target) in zip(ys, batches)])
            loss = errors.mean()
            gradient, *slopes = torch.autograd.grad(loss, [W, *xs])
        else:
            gradient, *slopes = torch.autograd.grad(ys, [W, *xs], slopes)
        layers.reduce(k, gradient)
    layers.optimizer.step()
    return loss.detach()
""",
        ),
        wrong={
            "every micro-batch gathers the layers anew": BY_MICRO_BATCH,
            "the last layer is dropped at the turn": STEP.replace("if k + 1 < depth:", "if True:"),
            "no layer is dropped in the forward pass": STEP.replace("if k + 1 < depth:", "if False:"),
            "the next layer is fetched while this one is whole": STEP.replace(
                "        W = layers.gather(k)\n        for",
                "        W = layers.whole[k] if k in layers.whole else layers.gather(k)\n"
                "        if k + 1 < depth:\n            layers.gather(k + 1)\n        for",
            ),
            "the first layer stays whole": STEP.replace(
                "        layers.release(k)\n        layers.reduce",
                "        k and layers.release(k)\n        layers.reduce",
            ),
            "dropped before it is used": STEP.replace(
                "        total = torch.zeros_like(W)", "        total = torch.zeros_like(W)\n        layers.release(k)"
            ).replace("        layers.release(k)\n        layers.reduce", "        layers.reduce"),
            "every micro-batch is reduced": STEP.replace(
                "            total += gradient", "            layers.reduce(k, gradient)"
            ).replace("        layers.reduce(k, total)\n", ""),
            "the gradients of micro-batches are added, not averaged": STEP.replace(
                "t.numel() / count for", "t.numel() for"
            ),
            "only the last micro-batch counts": STEP.replace("total += gradient", "total = gradient"),
            "all rows count the same, not all micro-batches": STEP.replace(
                "    depth, count",
                "    batches = [tuple(torch.cat(parts) for parts in zip(*batches))]\n    depth, count",
            ),
            "the gradient goes past the layers, not through them": STEP.replace(
                "gradient, slopes[m] = backward", "gradient, _ = backward"
            ),
            "inputs are taken for outputs": STEP.replace("each[k], each[k + 1], W", "each[k], each[k], W"),
            "a sum of losses": STEP.replace("zip(kept, batches)) / count\n", "zip(kept, batches))\n"),
            "no step": STEP.replace("    layers.optimizer.step()\n", ""),
        },
    ),
}
