"""Measure every kernel on a GPU beside its peers, and read what the compiler says of each on three GPUs without one.

Called by `make bench`; tools/kernel_jobs.py lists what is measured. A peer's time and ours come from alternated runs
in one process. An op or a peer that fails leaves its error in the record, and the others go on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch._functorch.config as functorch
from tqdm import tqdm

from minilib.kernels.workbench import compiled
from minilib.mechanisms.basics.format import si
from minilib.numbers.machine import Machine
from minilib.numbers.measure import Measurement, compare, measure
from minilib.numbers.price import price
from tools.kernel_jobs import Job, Sizes, jobs


def every_build(targets: tuple[str, ...] = tuple(compiled.TARGETS)) -> list[dict]:
    """A row for each default configuration and target: registers, spills, shared memory, tensor-core instructions."""
    builds = [
        (t, module, build) for t in targets for module, of in compiled.all_builds(t, True).items() for build in of
    ]
    rows = []
    for target, module, build in tqdm(builds, desc="compiling", leave=False):
        try:
            found = asdict(compiled.report(target, build))
        except Exception as error:  # whatever a compiler raises: the others go on
            found = {"name": build.name, "target": target, "error": _words(error)}
        rows.append({"module": module, **found})
    return rows


def kernels(machine: Machine, sizes: Sizes, compiler: Callable = torch.compile) -> Iterator[dict]:
    """Measure one op after another; yields a row for each, JSON values in SI units.

    A row has name, measured (median seconds), quartiles, predicted (seconds), bound, flops, bytes, flops_per_second,
    share_of_bandwidth (bytes over seconds and the machine's copy bandwidth), peers (name → median seconds, or None),
    ratios (name → the peer's time over ours) and errors (name → why there is none). Of an op that fails: name, errors.
    """
    for job in tqdm(jobs(sizes, compiler), desc="kernels", leave=False):
        torch.compiler.reset()
        gc.collect()
        if sizes.device == "cuda":
            torch.cuda.empty_cache()
        with functorch.patch(donated_buffer=False):  # else a compiled backward pass runs once only
            row = _row(job, machine, sizes.budget)
        yield row


def _row(job: Job, machine: Machine, budget: float) -> dict:
    prediction = price(job.cost, machine)
    row = {"name": job.name, "predicted": prediction.seconds, "bound": prediction.bound}
    row |= {"flops": job.cost.flops, "bytes": job.cost.bytes, "peers": {}, "ratios": {}, "errors": {}}
    try:
        calls, samples = {"ours": job.ours()}, []
        calls["ours"]()
    except Exception as error:  # whatever a compiler or a device raises: the others go on
        return row | {"errors": {"ours": _words(error)}}
    for name, make in job.peers.items():
        try:
            calls[name] = make()
            found = compare(calls[name], calls["ours"], budget=budget)
        except Exception as error:
            row["peers"][name], row["errors"][name] = None, _words(error)
            continue
        row["peers"][name], row["ratios"][name] = found.a.seconds, found.ratio
        samples += found.b.samples
    ours = Measurement(tuple(samples)) if samples else measure(calls["ours"], budget=budget)
    row |= {"measured": ours.seconds, "quartiles": ours.quartiles, "flops_per_second": job.cost.flops / ours.seconds}
    row["share_of_bandwidth"] = job.cost.bytes / ours.seconds / machine.memory_bandwidth
    return row | (job.figures(calls) if job.figures else {})


def line(row: dict) -> str:
    """One row in words."""
    if "measured" not in row:
        return f"{row['name']}: {row['errors']['ours']}"
    peers = ", ".join(f"{peer} {ratio:.2f}×" for peer, ratio in row["ratios"].items()) or "no peer"
    rate = f"{row['flops_per_second'] / 1e12:.1f} TFLOP/s, {row['share_of_bandwidth']:.0%} of the copy bandwidth"
    errors = "".join(f"; {peer}: {error}" for peer, error in row["errors"].items())
    return f"{row['name']}: {si(row['measured'], 's')}, {rate}; a peer's time over ours: {peers}{errors}"


def _words(error: Exception) -> str:
    """An error as one line without paths of this machine."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:300]
