"""Measure every kernel on a GPU beside its peers, and read what the compiler says of each on three GPUs without one.

Called by `make bench`; tools/kernel_jobs.py lists what is measured. A peer's time and ours come from alternated runs
in one process. An op or a peer that fails leaves its error in the record, and the others go on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
import torch._functorch.config as functorch
from tqdm import tqdm

from minilib.kernels.workbench import compiled
from minilib.mechanisms.basics.format import si
from minilib.numbers.machine import Machine
from minilib.numbers.measure import Measurement, compare, measure
from minilib.numbers.price import price
from minilib.numbers.records import Record
from tools.kernel_jobs import Job, Sizes, jobs


def every_build(targets: Sequence[str] = tuple(compiled.TARGETS), modules: Sequence[str] | None = None) -> list[dict]:
    """A row for each default configuration and target, of these modules or all: the fields of `compiled.Report`."""
    rows, chosen = [], [build for build in _builds(targets) if modules is None or build[1] in modules]
    for target, module, build in tqdm(chosen, desc="compiling", leave=False):
        try:
            found = asdict(compiled.report(target, build))
        except Exception as error:  # whatever a compiler raises: the others go on
            found = {"name": build.name, "target": target, "error": _words(error)}
        rows.append({"module": module, **found})
    return rows


def _builds(targets: Sequence[str]) -> Iterator[tuple[str, str, compiled.Build]]:
    for target in targets:
        for module, builds in compiled.all_builds(target, True).items():
            yield from ((target, module, build) for build in builds)


def renewed(record: Record, rows: list[dict], provenance: Mapping[str, object]) -> Record:
    """A record of compiled builds with these rows for those of the same name, and what they were compiled with.

    Rows stand in the order of `every_build`; one that no build has any more is left out.

    Raises:
        ValueError: if a build has no row, neither an old one nor a new one.
    """
    by_build = {(row["target"], row["module"], row["name"]): row for row in [*record.data["builds"], *rows]}
    builds = [(target, module, build.name) for target, module, build in _builds(tuple(compiled.TARGETS))]
    if missing := [build for build in builds if build not in by_build]:
        raise ValueError(f"{len(missing)} builds have no row, such as {missing[0]}: compile their modules, too")
    added = {key: provenance[key] for key in ("machine", "commit", "date", "versions")}
    added |= {key: sorted({row[key[:-1]] for row in rows}) for key in ("modules", "targets")}
    extended = [*record.provenance.get("extended", []), added]
    data = {"builds": [by_build[build] for build in builds]}
    return Record(record.name, data, {**record.provenance, "extended": extended})


def kernels(machine: Machine, sizes: Sizes, compiler: Callable = torch.compile) -> Iterator[dict]:
    """Measure one op after another; yields a row for each, JSON values in SI units.

    A row has name, measured (median seconds), quartiles, predicted (seconds), bound, flops, bytes, flops_per_second,
    share_of_bandwidth (bytes over seconds and the machine's copy bandwidth), peers (name → median seconds, or None),
    ratios (name → the peer's time over ours) and errors (name → why there is none). Of an op that fails: name, errors.
    """
    for job in tqdm(jobs(sizes, compiler), desc="kernels", leave=False):
        if compiler is torch.compile:
            torch.compiler.reset()
        if sizes.device == "cuda":
            gc.collect()
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
