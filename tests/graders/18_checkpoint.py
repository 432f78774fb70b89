"""Answers to 18_checkpoint that its graders must tell apart."""

from tests.graders.answers import Answers


def changed(answer: str, *swaps: tuple[str, str]) -> str:
    """A right answer, some steps of which a mistake replaces."""
    for step, mistake in swaps:
        assert answer.count(step) == 1, f"{step!r} stands {answer.count(step)} times in the answer"
        answer = answer.replace(step, mistake)
    return answer


# Right answers, in steps that mistakes replace
RECOVER = """
def recover(log):
    header = FIELDS.size + CRC.size

    def whole(at):
        if len(log) < at + header:
            return False
        number, durable, length = FIELDS.unpack_from(log, at)
        end = at + header + length
        if end > len(log):
            return False
        return frame(number, durable, log[at + header : end]) == log[at:end]

    bodies, cut = [], 0
    while cut < len(log):
        if not whole(cut):
            break
        number, _, length = FIELDS.unpack_from(log, cut)
        if number != len(bodies):
            break
        bodies.append(log[cut + header : cut + header + length])
        cut += header + length
    for at in range(cut, len(log)):
        if whole(at):
            durable = FIELDS.unpack_from(log, at)[1]
            if durable > len(bodies):
                raise Damaged("acknowledged once")
    return bodies, cut
"""

SAVE = """
def save_steps(folder, parts, manifest, old=None):
    final, temporary = f"{folder}/manifest", f"{folder}/new"
    steps = []
    steps.append(MakeFolder(folder))
    steps.append(SyncFolder(""))
    for name, data in parts.items():
        steps.append(CreateFile(f"{folder}/{name}"))
        steps.append(WriteFile(f"{folder}/{name}", data))
        steps.append(SyncFile(f"{folder}/{name}"))
    steps.append(SyncFolder(folder))  # parts
    steps.append(CreateFile(temporary))
    steps.append(WriteFile(temporary, manifest))
    steps.append(SyncFile(temporary))
    steps.append(RenameFile(temporary, final))
    steps.append(SyncFolder(folder))  # manifest
    steps.append(ACKNOWLEDGE)
    if old:
        steps.append(RemoveFile(f"{old[0]}/manifest"))
        steps.append(SyncFolder(old[0]))
        for name in old[1]:
            steps.append(RemoveFile(f"{old[0]}/{name}"))
    return steps
"""

PLAN = """
def plan_saves(job):
    M = job.gpu_hours * 3600 / job.gpus
    least = max(1, math.ceil(job.write / job.step))

    def goodput(steps):
        W = steps * job.step
        D = math.exp(-job.write / M) / (math.exp((W + job.stall) / M) - 1)
        return W * D / (M + job.restart)

    steps, stride = least, 1
    while goodput(steps + stride) > goodput(steps):
        steps, stride = steps + stride, 2 * stride
    while stride:
        nearby = [steps + way for way in (-stride, 0, stride) if steps + way >= least]
        better = max(nearby, key=goodput)
        steps, stride = better, stride if better != steps else stride // 2
    return steps, goodput(steps)
"""

NEWEST = """
def newest(folder):
    manifests = {}
    for name in folder.names():
        kind, _, number = name.partition("-")
        if kind == "manifest" and number.isdigit():
            manifests[int(number)] = name
    reasons = {}
    for step in sorted(manifests)[::-1]:
        why = refused(folder, step, manifests[step])
        if why is None:
            return step, reasons
        reasons[step] = why
    return None, reasons

def refused(folder, step, name):
    manifest = unpacked(folder.read(name))
    if manifest is None:
        return TORN
    if manifest.step != step:
        return RENAMED
    if manifest.ranks != len(manifest.parts):
        return INCOMPLETE
    for part in manifest.parts:
        if part.name not in folder.names():
            return MISSING
    for part in manifest.parts:
        if folder.size(part.name) != part.size:
            return SIZE
    for part in manifest.parts:
        if crc32(folder.read(part.name)) != part.crc:
            return CHANGED
    for rank, part in enumerate(manifest.parts):
        of_step, of_rank, of_ranks = LABEL.unpack_from(folder.read(part.name))
        if of_step != step:
            return MIXED
        if of_rank != rank:
            return MIXED
        if of_ranks != manifest.ranks:
            return MIXED
    return None
"""

RANGES = """
def ranges_to_read(stored, needed, itemsize):
    found = []
    for box, part, offset in sorted(stored, key=lambda each: each[1:]):
        top, left = (max(a, b) for a, b in zip(box.start, needed.start))
        bottom = min(box.start[0] + box.shape[0], needed.start[0] + needed.shape[0])
        right = min(box.start[1] + box.shape[1], needed.start[1] + needed.shape[1])
        if left >= right:
            continue
        for row in range(top, bottom):
            above = (row - box.start[0]) * box.shape[1]
            begin = offset + itemsize * (above + left - box.start[1])
            end = begin + itemsize * (right - left)
            if found and found[-1][0] == part and found[-1][2] == begin:
                found[-1] = part, found[-1][1], end
            else:
                found.append((part, begin, end))
    return found
"""

CORRUPT = """
def find_corruption(reports, checkpoints):
    after = 0
    for step, checksums in reports:
        values = list(checksums.values())
        if len(values) < 2:
            continue
        if len(set(values)) == 1:
            after = step
            continue
        majority = [value for value in values if values.count(value) > len(values) / 2]
        suspects = list(checksums)
        if majority:
            suspects = [rank for rank in checksums if checksums[rank] != majority[0]]
        good = [each for each in checkpoints if each <= after]
        return Finding(tuple(sorted(suspects)), bool(majority), after, step, max(good) if good else None)
    return None
"""

TASKS = {
    "task_1": Answers(
        correct=(
            RECOVER,
            """
def recover(log):
    found = {}
    for at in range(len(log) - FIELDS.size - CRC.size + 1):
        number, durable, length = FIELDS.unpack_from(log, at)
        body = log[at + 16 : at + 16 + length]
        if len(body) == length and log[at + 12 : at + 16] == CRC.pack(checksum(number, durable, body)):
            found[at] = number, durable, body
    at, bodies = 0, []
    while at in found and found[at][0] == len(bodies):
        bodies.append(found[at][2])
        at += 16 + len(bodies[-1])
    if max((durable for place, (_, durable, _) in found.items() if place >= at), default=0) > len(bodies):
        raise Damaged(len(bodies))
    return bodies, at
""",
        ),
        wrong={
            "only the length is checked": changed(
                RECOVER, ("return frame(number, durable, log[at + header : end]) == log[at:end]", "return True")
            ),
            "a header that is torn is read": changed(RECOVER, ("if len(log) < at + header", "if len(log) < at")),
            "what was acknowledged is cut off in silence": changed(RECOVER, ("if durable > len(bodies)", "if False")),
            "every torn tail is refused": changed(
                RECOVER,
                ("    for at in range(cut", "    if cut < len(log):\n        raise Damaged\n    for at in range(cut"),
            ),
            "a whole record behind the damage is enough": changed(RECOVER, ("if durable > len(bodies)", "if True")),
            "a record counts itself as durable": changed(RECOVER, ("durable > len", "durable >= len")),
            "only the next whole record is asked": changed(
                RECOVER,
                (
                    '                raise Damaged("acknowledged once")\n',
                    '                raise Damaged("acknowledged once")\n            break\n',
                ),
            ),
            "a damaged length tells where the next record is": changed(
                RECOVER,
                (
                    "    for at in range(cut, len(log)):\n",
                    "    at = cut\n    while at + header <= len(log):\n",
                ),
                (
                    '                raise Damaged("acknowledged once")\n',
                    '                raise Damaged("acknowledged once")\n'
                    "        at += header + FIELDS.unpack_from(log, at)[2]\n",
                ),
            ),
            "records behind the damage are served": changed(
                RECOVER,
                (
                    "        if not whole(cut):\n            break\n",
                    "        if not whole(cut):\n            cut += 1\n            continue\n",
                ),
                ("        if number != len(bodies):\n            break\n", ""),
            ),
            "numbers are not looked at": changed(
                RECOVER, ("        if number != len(bodies):\n            break\n", "")
            ),
            "the torn tail stays in the log": changed(
                RECOVER, ("    return bodies, cut", "    return bodies, len(log)")
            ),
            "the length of bodies alone is counted": changed(
                RECOVER, ("    return bodies, cut", "    return bodies, sum(map(len, bodies))")
            ),
            "damage is told from a torn tail by the records that were read": changed(
                RECOVER,
                ("        if whole(at):\n            durable = FIELDS.unpack_from(log, at)[1]\n", ""),
                ("    bodies, cut = [], 0\n", "    bodies, cut, durable = [], 0, 0\n"),
                ("        number, _, length = FIELDS", "        number, durable, length = FIELDS"),
                ("            if durable >", "        if durable >"),
                ("                raise", "            raise"),
            ),
        },
    ),
    "task_2": Answers(
        correct=(
            SAVE,
            """
def save_steps(folder, parts, manifest, old=None):
    from minilib.mechanisms.journaling import commit, retire

    above = [MakeFolder(folder), SyncFolder("")]
    files = {f"{folder}/{name}": data for name, data in parts.items()}
    gone = retire(f"{old[0]}/manifest", [f"{old[0]}/{name}" for name in old[1]]) if old else []
    return [*above, *commit(f"{folder}/manifest", manifest, files), ACKNOWLEDGE, *gone]
""",
            """
def save_steps(folder, parts, manifest, old=None):
    everything = {**parts, "manifest.tmp": manifest}
    yield MakeFolder(folder)
    for name, data in everything.items():
        yield CreateFile(f"{folder}/{name}")
    for name, data in everything.items():
        yield WriteFile(f"{folder}/{name}", data)
    for name in everything:
        yield SyncFile(f"{folder}/{name}")
    yield SyncFolder(folder)
    yield RenameFile(f"{folder}/manifest.tmp", f"{folder}/manifest")
    yield SyncFolder(folder)
    yield SyncFolder("")
    yield ACKNOWLEDGE
    if old is not None:
        yield RemoveFile(f"{old[0]}/manifest")
        yield SyncFolder(old[0])
        yield from (RemoveFile(f"{old[0]}/{name}") for name in old[1])
""",
        ),
        wrong={
            "parts are not synced": changed(SAVE, ('        steps.append(SyncFile(f"{folder}/{name}"))\n', "")),
            "names of parts are not synced before the manifest": changed(
                SAVE, ("    steps.append(SyncFolder(folder))  # parts\n", "")
            ),
            "the manifest is not synced": changed(SAVE, ("    steps.append(SyncFile(temporary))\n", "")),
            "the manifest's bytes are synced after it has its name": changed(
                SAVE,
                ("    steps.append(SyncFile(temporary))\n", ""),
                (
                    "    steps.append(RenameFile(temporary, final))\n",
                    "    steps.append(RenameFile(temporary, final))\n    steps.append(SyncFile(final))\n",
                ),
            ),
            "the manifest is written under its own name": changed(
                SAVE,
                ('final, temporary = f"{folder}/manifest", f"{folder}/new"', 'temporary = f"{folder}/manifest"'),
                ("    steps.append(RenameFile(temporary, final))\n", ""),
            ),
            "the new name of the manifest is not synced": changed(
                SAVE, ("    steps.append(SyncFolder(folder))  # manifest\n", "")
            ),
            "somebody is told before the name of the manifest is durable": changed(
                SAVE,
                ("    steps.append(ACKNOWLEDGE)\n", ""),
                (
                    "    steps.append(SyncFolder(folder))  # manifest\n",
                    "    steps.append(ACKNOWLEDGE)\n    steps.append(SyncFolder(folder))  # manifest\n",
                ),
            ),
            "the name of the folder is never synced": changed(SAVE, ('    steps.append(SyncFolder(""))\n', "")),
            "the name of the folder is synced when somebody was told": changed(
                SAVE,
                ('    steps.append(SyncFolder(""))\n', ""),
                (
                    "    steps.append(ACKNOWLEDGE)\n",
                    '    steps.append(ACKNOWLEDGE)\n    steps.append(SyncFolder(""))\n',
                ),
            ),
            "the manifest comes first": """
def save_steps(folder, parts, manifest, old=None):
    steps = [MakeFolder(folder), SyncFolder("")]
    for name, data in {"new": manifest, **parts}.items():
        file = f"{folder}/{name}"
        steps += [CreateFile(file), WriteFile(file, data), SyncFile(file)]
        if name == "new":
            steps += [RenameFile(file, f"{folder}/manifest"), SyncFolder(folder)]
    steps += [SyncFolder(folder), ACKNOWLEDGE]
    if old:
        gone = [RemoveFile(f"{old[0]}/{name}") for name in ["manifest", *old[1]]]
        steps += [gone[0], SyncFolder(old[0]), *gone[1:]]
    return steps
""",
            "the old parts go before their manifest": changed(
                SAVE,
                ('        steps.append(RemoveFile(f"{old[0]}/manifest"))\n', ""),
                ("        steps.append(SyncFolder(old[0]))\n", ""),
                (
                    "    return steps\n",
                    '        steps += [RemoveFile(f"{old[0]}/manifest"), SyncFolder(old[0])]\n    return steps\n',
                ),
            ),
            "the old parts go before their manifest is gone for good": changed(
                SAVE, ("        steps.append(SyncFolder(old[0]))\n", "")
            ),
            "the old one goes before somebody is told": changed(
                SAVE,
                ("    steps.append(ACKNOWLEDGE)\n", ""),
                ("    return steps\n", "    steps.append(ACKNOWLEDGE)\n    return steps\n"),
            ),
            "room is made first": changed(
                SAVE,
                (
                    "    return steps\n",
                    "    at = steps.index(ACKNOWLEDGE)\n    return steps[at + 1 :] + steps[: at + 1]\n",
                ),
            ),
            "the old one stays": changed(SAVE, ("    if old:", "    if False:")),
            "the old manifest alone goes": changed(SAVE, ("for name in old[1]", "for name in ()")),
            "the folder is synced behind every part": changed(
                SAVE,
                (
                    '        steps.append(SyncFile(f"{folder}/{name}"))\n',
                    '        steps.append(SyncFile(f"{folder}/{name}"))\n        steps.append(SyncFolder(folder))\n',
                ),
                ("    steps.append(SyncFolder(folder))  # parts\n", ""),
            ),
            "everything is renamed and synced one by one": changed(
                SAVE,
                (
                    '        steps.append(CreateFile(f"{folder}/{name}"))\n'
                    '        steps.append(WriteFile(f"{folder}/{name}", data))\n'
                    '        steps.append(SyncFile(f"{folder}/{name}"))\n',
                    "        steps.append(CreateFile(temporary))\n"
                    "        steps.append(WriteFile(temporary, data))\n"
                    "        steps.append(SyncFile(temporary))\n"
                    '        steps.append(RenameFile(temporary, f"{folder}/{name}"))\n'
                    "        steps.append(SyncFolder(folder))\n",
                ),
            ),
        },
    ),
    "task_3": Answers(
        correct=(
            PLAN,
            """
def plan_saves(job):
    mtbf = 3600 * job.gpu_hours / job.gpus
    costs = CheckpointCosts(job.stall, job.restart, mtbf, job.write, failing_restarts=False)
    steps = max(1, round(best_interval(costs) / job.step), -int(-job.write // job.step))
    around = [each for each in range(max(1, steps - 2), steps + 3) if each * job.step >= job.write]
    return max((expected_goodput(each * job.step, costs), each) for each in around)[::-1]
""",
        ),
        wrong={
            "one GPU fails as often as the job": changed(PLAN, ("3600 / job.gpus", "3600")),
            "hours are taken for seconds": changed(PLAN, ("job.gpu_hours * 3600 /", "job.gpu_hours /")),
            "saves come before the last one is written": changed(
                PLAN, ("max(1, math.ceil(job.write / job.step))", "1")
            ),
            "the time to write is rounded down": changed(PLAN, ("math.ceil(job.write", "int(job.write")),
            "the stall counts as time to write": changed(
                PLAN, ("math.ceil(job.write / job.step)", "math.ceil((job.write - job.stall) / job.step)")
            ),
            "an interval has no step": changed(
                PLAN,
                ("max(1, math.ceil(job.write / job.step))", "math.ceil(job.write / job.step)"),
                ("        W = steps * job.step\n", "        W = max(steps, 0.01) * job.step\n"),
            ),
            "a save that is not durable yet counts": changed(PLAN, ("math.exp(-job.write / M) / (", "1 / (")),
            "the stall is for nothing": changed(PLAN, ("(W + job.stall) / M", "W / M")),
            "the time to write holds the steps up": changed(
                PLAN, ("(W + job.stall) / M", "(W + job.stall + job.write) / M")
            ),
            "a restart takes no time": changed(PLAN, ("/ (M + job.restart)", "/ M")),
            "the stall counts as progress": changed(PLAN, ("return W * D", "return (W + job.stall) * D")),
            "seconds are returned": changed(PLAN, ("return steps, goodput", "return steps * job.step, goodput")),
            "Young's interval, whatever the stall": changed(
                PLAN,
                (
                    "    return steps,",
                    "    steps = max(least, round((2 * job.stall * M) ** 0.5 / job.step))\n    return steps,",
                ),
            ),
            "Young's interval is not held against the time to write": changed(
                PLAN,
                (
                    "    return steps,",
                    "    steps = max(1, round((2 * job.stall * M) ** 0.5 / job.step))\n    return steps,",
                ),
            ),
            "the goodput of the first order": changed(
                PLAN,
                (
                    "    return steps, goodput(steps)",
                    "    W = steps * job.step\n"
                    "    return steps, 1 - job.stall / W - (W / 2 + job.write + job.restart) / M",
                ),
            ),
        },
    ),
    "task_4": Answers(
        correct=(
            NEWEST,
            """
def newest(folder):
    def tell(step, name):
        said = unpacked(folder.read(name))
        if not said or said.step != step or len(said.parts) != said.ranks:
            return (INCOMPLETE if said.step == step else RENAMED) if said else TORN
        sizes = {each: folder.size(each) for each in folder.names()}
        if not {part.name for part in said.parts} <= sizes.keys():
            return MISSING
        if sum(sizes[part.name] != part.size for part in said.parts):
            return SIZE
        files = {part.name: folder.read(part.name) for part in said.parts}
        if any(part.crc != crc32(files[part.name]) for part in said.parts):
            return CHANGED
        right = [LABEL.pack(step, rank, said.ranks) for rank in range(said.ranks)]
        return None if [files[part.name][:12] for part in said.parts] == right else MIXED

    manifests = {}
    for name in folder.names():
        if name[:9] == "manifest-" and name[9:].isdigit():
            manifests[int(name[9:])] = name
    reasons = {}
    while manifests:
        step = max(manifests)
        reason = tell(step, manifests.pop(step))
        if reason is None:
            return step, reasons
        reasons[step] = reason
    return None, reasons
""",
        ),
        wrong={
            "steps are compared as text": changed(
                NEWEST, ("sorted(manifests)[::-1]", "sorted(manifests, key=str)[::-1]")
            ),
            "a manifest that is not published yet counts": changed(
                NEWEST, ('name.partition("-")', 'name.removesuffix(".partial").partition("-")')
            ),
            "every name that ends like a manifest's is one": changed(
                NEWEST,
                ('name.partition("-")', 'name.rpartition("-")'),
                ('kind == "manifest"', 'kind.endswith("manifest")'),
            ),
            "a manifest is always whole": changed(NEWEST, ("        return TORN\n", "        return None\n")),
            "the name of a manifest is not held against it": changed(
                NEWEST,
                ("    if manifest.step != step:\n        return RENAMED\n", ""),
                ("if of_step != step", "if of_step != manifest.step"),
            ),
            "parts are not counted": changed(
                NEWEST, ("    if manifest.ranks != len(manifest.parts):\n        return INCOMPLETE\n", "")
            ),
            "only too few parts are incomplete": changed(
                NEWEST, ("manifest.ranks != len(manifest.parts)", "manifest.ranks > len(manifest.parts)")
            ),
            "only checkpoints of two ranks are read": changed(
                NEWEST, ("manifest.ranks != len(manifest.parts)", "2 != len(manifest.parts)")
            ),
            "sizes are not looked at": changed(
                NEWEST, ("        if folder.size(part.name) != part.size:\n            return SIZE\n", "        pass\n")
            ),
            "a part may be longer": changed(
                NEWEST, ("folder.size(part.name) != part.size", "folder.size(part.name) < part.size")
            ),
            "checksums are not compared": changed(NEWEST, ("if crc32(folder.read(part.name)) != part.crc", "if False")),
            "labels are not looked at": changed(
                NEWEST, ("    for rank, part in enumerate(manifest.parts):", "    for rank, part in ():")
            ),
            "the step of a part is not looked at": changed(
                NEWEST, ("        if of_step != step:\n            return MIXED\n", "")
            ),
            "only older parts are mixed": changed(NEWEST, ("if of_step != step", "if of_step < step")),
            "the rank of a part is not looked at": changed(
                NEWEST, ("        if of_rank != rank:\n            return MIXED\n", "")
            ),
            "the ranks of a save are not looked at": changed(
                NEWEST, ("        if of_ranks != manifest.ranks:\n            return MIXED\n", "")
            ),
            "parts need only agree with each other": changed(
                NEWEST,
                ("if of_step != step", "if of_step != LABEL.unpack_from(folder.read(manifest.parts[0].name))[0]"),
            ),
            "the first part with a reason decides": changed(
                NEWEST,
                ("            return MISSING\n    for part in manifest.parts:\n", "            return MISSING\n"),
                ("            return SIZE\n    for part in manifest.parts:\n", "            return SIZE\n"),
            ),
            "parts are read before their sizes": changed(
                NEWEST,
                (
                    "    for part in manifest.parts:\n        if folder.size",
                    "    for part in manifest.parts:\n        crc32(folder.read(part.name))\n        if folder.size",
                ),
            ),
            "all checkpoints are looked at": changed(
                NEWEST,
                (
                    "    reasons = {}\n",
                    "    reasons = {}\n    for step, name in manifests.items():\n        refused(folder, step, name)\n",
                ),
            ),
            "older ones are listed as well": changed(
                NEWEST,
                ("    reasons = {}\n", "    reasons, best = {}, None\n"),
                ("            return step, reasons\n", "            best = step if best is None else best\n"),
                ("        reasons[step] = why\n", "        else:\n            reasons[step] = why\n"),
                ("    return None, reasons\n", "    return best, reasons\n"),
            ),
            "only the newest is looked at": changed(
                NEWEST, ("        reasons[step] = why\n", "        reasons[step] = why\n        break\n")
            ),
            "a checkpoint of step 0 is none": changed(
                NEWEST, ("        if why is None:\n", "        if why is None and step:\n")
            ),
        },
    ),
    "task_5": Answers(
        correct=(
            RANGES,
            """
def ranges_to_read(stored, needed, itemsize):
    places = bytes_in(stored, itemsize)
    cells_needed = set(cells(needed))
    wanted = sorted(place for place, (row, column, _) in places.items() if (row, column) in cells_needed)
    ranges = []
    for part, at in wanted:
        if ranges and ranges[-1][0] == part and ranges[-1][2] == at:
            ranges[-1] = (part, ranges[-1][1], at + 1)
        else:
            ranges.append((part, at, at + 1))
    return ranges
""",
        ),
        wrong={
            "every box begins at byte 0": changed(RANGES, ("offset + itemsize * (", "itemsize * (")),
            "rows are as long as those of the needed box": changed(
                RANGES, ("(row - box.start[0]) * box.shape[1]", "(row - box.start[0]) * needed.shape[1]")
            ),
            "rows are as long as those of the matrix": changed(
                RANGES,
                (
                    "(row - box.start[0]) * box.shape[1]",
                    "(row - box.start[0]) * max(each.box.start[1] + each.box.shape[1] for each in stored)",
                ),
            ),
            "places are counted from the matrix's first column": changed(
                RANGES, ("above + left - box.start[1]", "above + left")
            ),
            "places are counted from the matrix's first row": changed(
                RANGES, ("(row - box.start[0]) * box", "row * box")
            ),
            "elements have one byte": changed(
                RANGES, ("offset + itemsize * (", "offset + ("), ("begin + itemsize * (", "begin + (")
            ),
            "elements have four bytes": changed(
                RANGES, ("offset + itemsize * (", "offset + 4 * ("), ("begin + itemsize * (", "begin + 4 * (")
            ),
            "whole rows are read": changed(
                RANGES,
                ("(above + left - box.start[1])", "above"),
                ("itemsize * (right - left)", "itemsize * box.shape[1]"),
            ),
            "whole boxes are read": changed(
                RANGES,
                (
                    "        for row in range(top, bottom):\n",
                    "        for row in [box.start[0]] if top < bottom else []:\n",
                ),
                ("(above + left - box.start[1])", "above"),
                ("itemsize * (right - left)", "itemsize * box.shape[0] * box.shape[1]"),
            ),
            "from the first needed element to the last": changed(
                RANGES,
                ("in range(top, bottom):", "in range(top, bottom)[:1]:"),
                ("itemsize * (right - left)", "itemsize * (right - left + (bottom - top - 1) * box.shape[1])"),
            ),
            "every row is a range": changed(RANGES, ("if found and found[-1][0]", "if False and found[-1][0]")),
            "ranges of two boxes are never one": changed(
                RANGES,
                ("        for row in range(top", "        first = len(found)\n        for row in range(top"),
                ("if found and found[-1][0]", "if len(found) > first and found[-1][0]"),
            ),
            "ranges of two parts become one": changed(RANGES, ("found[-1][0] == part and ", "")),
            "gaps are read, too": changed(RANGES, ("found[-1][2] == begin", "found[-1][2] >= begin - 2 * itemsize")),
            "boxes are read in the order of the table": changed(
                RANGES, ("sorted(stored, key=lambda each: each[1:])", "stored")
            ),
            "ranges are in the order of the matrix": changed(
                RANGES, ("key=lambda each: each[1:]", "key=lambda each: each[0]")
            ),
            "a box that is not needed has empty ranges": changed(
                RANGES, ("        if left >= right:\n            continue\n", "")
            ),
            "the last column is left out": changed(
                RANGES, ("itemsize * (right - left)", "itemsize * (right - left - 1)")
            ),
            "the first box that has something is enough": changed(
                RANGES,
                ("        for row in range(top", "        if found:\n            break\n        for row in range(top"),
            ),
        },
    ),
    "task_6": Answers(
        correct=(
            CORRUPT,
            """
def find_corruption(reports, checkpoints):
    after, good = 0, [step for step in checkpoints if step == 0]
    for step, sent in reports:
        votes = Counter(sent.values())
        if len(votes) == 1 and len(sent) > 1:
            after, good = step, [each for each in checkpoints if each <= step]
        elif len(votes) > 1:
            value, count = max(votes.items(), key=lambda vote: vote[1])
            sure = count > len(sent) - count
            who = tuple(sorted(rank for rank in sent if not sure or sent[rank] != value))
            return who, sure, after, step, max(good, default=None)
    return None
""",
        ),
        wrong={
            "the most are right, majority or not": changed(
                CORRUPT,
                ("values.count(value) > len(values) / 2", "values.count(value) == max(map(values.count, values))"),
            ),
            "half is a majority": changed(CORRUPT, ("> len(values) / 2", ">= len(values) / 2")),
            "rank 0 is right": changed(
                CORRUPT,
                ("if checksums[rank] != majority[0]", "if checksums[rank] != checksums[min(checksums)]"),
            ),
            "of two the second is wrong": changed(
                CORRUPT, ("        suspects = list(checksums)\n", "        suspects = list(checksums)[-1:]\n")
            ),
            "without a majority nobody is a suspect": changed(
                CORRUPT, ("        suspects = list(checksums)\n", "        suspects = []\n")
            ),
            "all are named": changed(CORRUPT, ("bool(majority)", "True")),
            "the majority is of all ranks that ever were": changed(
                CORRUPT, ("> len(values) / 2", "> len({rank for _, each in reports for rank in each}) / 2")
            ),
            "one checksum alone agrees": changed(CORRUPT, ("if len(values) < 2", "if len(values) < 1")),
            "a report that says nothing is one that agrees": changed(
                CORRUPT,
                (
                    "            continue\n        if len(set",
                    "            after = step\n            continue\n        if len(set",
                ),
            ),
            "the last failure counts": changed(
                CORRUPT,
                ("    after = 0\n", "    after, last = 0, None\n"),
                ("        return Finding", "        last = Finding"),
                ("    return None\n", "    return last\n"),
            ),
            "the report before was the last to agree": changed(
                CORRUPT,
                (
                    "        good =",
                    "        after = max((each for each, _ in reports if each < step), default=0)\n        good =",
                ),
            ),
            "the interval begins with the first report": changed(
                CORRUPT, ("    after = 0\n", "    after = reports[0][0] if reports else 0\n")
            ),
            "the newest checkpoint before the failure is good": changed(
                CORRUPT, ("if each <= after", "if each < step")
            ),
            "a healthy rank's checkpoint of the same step is good": changed(
                CORRUPT, ("if each <= after", "if each <= step")
            ),
            "a checkpoint of the step where they agreed is none": changed(
                CORRUPT, ("if each <= after", "if each < after")
            ),
            "checkpoints are in order": changed(CORRUPT, ("max(good) if good", "good[-1] if good")),
            "without a good one it is step 0": changed(
                CORRUPT, ("max(good) if good else None", "max(good) if good else 0")
            ),
            "suspects are in the order of the report": changed(CORRUPT, ("tuple(sorted(suspects))", "tuple(suspects)")),
            "all ranks agree in the end": changed(
                CORRUPT,
                ("    return None\n", "    return Finding((), False, after, after, max(checkpoints, default=None))\n"),
            ),
        },
    ),
}
