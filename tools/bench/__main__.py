"""Measure this machine and its workloads, and record them under results/<machine>/ with their provenance.

Usage: python -m tools.bench [--cpu] [--only PART]; `--help` names the parts

--cpu leaves a GPU alone. "compiled" is thousands of kernels for GPUs that need not be there: half an hour on two cores.
"peers", "prefix-peers", "servers" and "placement-peers" install other engines, servers and schedulers into environments
of their own below build/, so they run only where they are asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable

from tqdm import tqdm

from minilib.kernels.workbench import compiled
from minilib.kernels.workbench.dispatch import interpreted, triton
from minilib.numbers import records, workloads
from minilib.numbers.machine import Machine
from minilib.numbers.measure import check_table, median_ratio
from tools.bench import (
    caching as bench_caching,
)
from tools.bench import (
    checkpointing as bench_checkpointing,
)
from tools.bench import (
    collectives as bench_collectives,
)
from tools.bench import (
    drills as bench_drills,
)
from tools.bench import (
    goodput as bench_goodput,
)
from tools.bench import (
    kernels as bench_kernels,
)
from tools.bench import (
    moe as bench_moe,
)
from tools.bench import (
    paging as bench_paging,
)
from tools.bench import (
    peers as bench_peers,
)
from tools.bench import (
    pipeline as bench_pipeline,
)
from tools.bench import (
    placement as bench_placement,
)
from tools.bench import (
    prefix_hits as bench_prefix_hits,
)
from tools.bench import (
    prefix_index as bench_prefix_index,
)
from tools.bench import (
    serving_http as bench_serving_http,
)
from tools.bench import (
    serving_load as bench_serving_load,
)
from tools.bench import (
    tensor_parallel as bench_tensor_parallel,
)
from tools.bench import (
    training as bench_training,
)
from tools.bench.peers import placement as bench_placement_peers
from tools.bench.peers import prefix as bench_prefix_peers
from tools.bench.peers import servers as bench_servers
from tools.kernel_jobs import Sizes

CHOICES = (
    "machine", "workloads", "caching", "paging", "serving-load", "prefix-hits", "collectives", "training",
    "tensor-parallel", "pipeline", "moe", "serving-http", "checkpointing", "goodput", "drills", "placement", "compiled",
    "kernels", "peers", "prefix-peers", "servers", "placement-peers",
)  # fmt: skip

# held against this machine's rates, which change with its neighbours
FRESH = (None, "machine", "workloads", "caching", "paging")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--only", choices=CHOICES, help="record one of them")
    parser.add_argument("--modules", nargs="+", metavar="MODULE", help="of compiled: only these, such as matmul.dense")
    parser.add_argument("--targets", nargs="+", choices=compiled.TARGETS, help="of compiled: only these")
    parser.add_argument("--peers", nargs="+", choices=bench_peers.PEERS, help="of peers: only these", metavar="PEER")
    parser.add_argument("--models", nargs="+", choices=bench_peers.models.NAMES, help="of peers: only these")
    parser.add_argument("--turns", type=int, default=5, help="of peers, servers and serving-http: turns of each")
    options = parser.parse_args()
    if options.only == "compiled" and (triton is None or interpreted()):
        parser.error("compiled needs Triton (on Linux) without TRITON_INTERPRET")
    machine = Machine.measure("cpu" if options.cpu else "auto", refresh=options.only in FRESH)
    if options.only in (None, "machine"):
        print(machine)
        _save(machine, "machine", machine.to_dict())
    if options.only in (None, "workloads"):
        _workloads(machine)
    if options.only in (None, "caching"):
        _caching(machine)
    if options.only in (None, "paging") and machine.kind == "cpu":
        _paging(machine)
    if options.only in (None, "serving-load") and machine.kind == "cpu":
        _serving_load(machine)
    if options.only in (None, "prefix-hits") and machine.kind == "cpu":
        _prefix_hits(machine)
    if options.only in (None, "collectives") and machine.kind == "cpu":
        _collectives(machine)
    if options.only in (None, "training") and machine.kind == "cpu":
        _training(machine)
    if options.only in (None, "tensor-parallel") and machine.kind == "cpu":
        _tensor_parallel(machine)
    if options.only in (None, "pipeline") and machine.kind == "cpu":
        found = bench_pipeline.pipeline()  # chapter 08
        _measured(machine, "pipeline", found, bench_pipeline.lines(found))
    if options.only in (None, "moe") and machine.kind == "cpu":
        _moe(machine)
    if options.only in (None, "serving-http") and machine.kind == "cpu":
        found = bench_serving_http.serving_http(turns=options.turns)  # chapter 17
        _measured(machine, "serving-http", found, bench_serving_http.lines(found))
    if options.only in (None, "checkpointing") and machine.kind == "cpu":
        found = bench_checkpointing.checkpointing()  # chapter 18
        _measured(machine, "checkpointing", found, bench_checkpointing.lines(found))
    if options.only in (None, "goodput") and machine.kind == "cpu":
        found = bench_goodput.goodput()  # chapter 18
        _measured(machine, "goodput", found, bench_goodput.lines(found))
    if options.only in (None, "drills") and machine.kind == "cpu":
        found = bench_drills.drills()  # chapter 19
        _measured(machine, "drills", found, bench_drills.lines(found))
    if options.only in (None, "placement") and machine.kind == "cpu":
        found = bench_placement.placement()  # chapter 20
        _measured(machine, "placement", found, bench_placement.lines(found))
    if options.only in (None, "compiled") and triton is not None and not interpreted():
        _compiled(machine, options.modules, options.targets)
    if options.only == "kernels" and machine.kind == "cpu":
        parser.error("kernels are measured on a GPU, and torch sees none (or --cpu leaves it alone)")
    if options.only in (None, "kernels") and machine.kind == "gpu":
        _kernels(machine)
    if options.only == "peers":
        _peers(machine, options.peers, options.models, options.turns)
    if options.only == "prefix-peers":
        _prefix_peers(machine)
    if options.only == "servers":
        found = bench_servers.servers(turns=options.turns)  # chapter 17
        _measured(machine, "servers", found, bench_servers.lines(found))
    if options.only == "placement-peers":
        found = bench_placement_peers.placement_peers()  # chapter 20
        _measured(machine, "placement-peers", found, bench_placement_peers.lines(found))
    return 0


def _workloads(machine: Machine) -> None:
    """Price and measure every operation of chapter 01."""
    device = "cuda" if machine.kind == "gpu" else "cpu"
    bar = tqdm(workloads.suite(machine.kind), desc="workloads", leave=False)
    checks = [workload.check(machine, device) for workload in bar]
    print(check_table(checks))
    print(f"median predicted / measured: {median_ratio(checks):.2f}")
    rows = [
        {
            "name": check.name,
            "bound": check.prediction.bound,
            "flops": check.prediction.cost.flops,
            "bytes": check.prediction.cost.bytes,
            "predicted": check.prediction.seconds,
            "measured": check.measurement.seconds,
            "quartiles": check.measurement.quartiles,
        }
        for check in checks
    ]
    _save(machine, "workloads", {"operations": rows})


def _caching(machine: Machine) -> None:
    """Chapter 11: with a KV cache and without, and where prefill and decode turn from memory to arithmetic."""
    found = bench_caching.caching(machine)
    for row in found["generation"]:
        print(f"{row['new']} new tokens: {row['ratio']:.1f}× as long without a cache")
    for phase in ("decode", "prompt"):
        print(
            f"{phase}: arithmetic from {found[f'{phase}_ridge']:.0f} rows on, predicted {found['predicted_ridge']:.0f}"
        )
    _save(machine, "caching", found)


def _paging(machine: Machine) -> None:
    """Chapter 12: the paged engine against transformers, its bare model, and this machine's memory."""
    found = bench_paging.paging(machine)
    for row in (*found["equal_lengths"], found["mixed_lengths"]):
        what = f"{row['batch']} requests of one length" if "batch" in row else "mixed lengths, with arrivals"
        print(f"{what}: {row['ours']:.0f} tokens/s, transformers {row['transformers']:.0f}, {row['ratio']:.2f}×")
    for row in (*found["steps"], found["big_step"]):
        share = f"{row['share_of_read_bandwidth']:.0%} of the read bandwidth"
        size = f"{row['parameters'] / 1e6:.0f} M parameters, batch {row['batch']}"
        print(f"{size}: a step is {row['over_bare_forward']:.2f}× its forward pass, at {share}")
    _save(machine, "paging", found)


def _serving_load(machine: Machine) -> None:
    """Chapter 13: latencies of an open loop, predicted and measured, and what two GPUs' data sheets say."""
    found = bench_serving_load.serving_load()
    fit = found["fit"]
    print(f"price of {fit['steps']} steps: predicted / measured {fit['least']:.2f} … {fit['most']:.2f}")
    for row in found["loads"]:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["predicted_over_measured"].items())
        busy = max(one["busy"] for one in row["tries"])
        print(f"load {row['utilization']:.2f}, CV {row['cv']:g}: predicted / measured {ratios}; others took {busy:.0%}")
    for row in found["elsewhere"]:
        ttft, itl = (row["predicted"][name]["p50"] * 1e3 for name in ("ttft", "itl"))
        print(
            f"{row['machine']}, load {row['utilization']:.2f}, CV {row['cv']:g}: TTFT {ttft:.1f} ms, ITL {itl:.2f} ms"
        )
    static, chunks, policies = (found["batching"][name] for name in ("static", "chunks", "policies"))
    print(f"continuous over static: {static['continuous_over_static']:.2f}× the tokens per second")
    print(
        f"chunks: p99 of ITL {chunks['itl_p99_over_whole']:.2f} of whole prompts, rate {chunks['rate_over_whole']:.3f}"
    )
    print("tokens/s over fcfs: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in policies.items()))
    _save(machine, "serving-load", found)


def _prefix_hits(machine: Machine) -> None:
    """Chapter 14: first tokens behind kept pages, pages that come back, pages kept in vain, and the indexes alone."""
    found = bench_prefix_hits.prefix_hits()
    for row in found["hits"]:
        whole, hit = (row[name]["median"] * 1e3 for name in ("whole", "hit"))
        print(f"{row['design']}, {row['cached']} tokens kept, {row['tail']} behind them: {whole:.0f} ms whole, "
              f"{hit:.1f} ms, {row['whole_over_hit']['median']:.1f}×")  # fmt: skip
    for row in found["tiers"]:
        back, computed = (row[f"{name}_seconds_per_page"] * 1e3 for name in ("back", "computed"))
        print(f"a page from {row['where']}: {back:.2f} ms, computed {computed:.1f} ms")
    for row in found["no_hits"]:
        ratio, (low, high) = (row["over_none"][name] for name in ("median", "quartiles"))
        print(f"{row['design']}, {row['load']} without hits: {ratio:.4f} ({low:.3f}–{high:.3f}), "
              f"{row['added_share']:.4f} added without a model")  # fmt: skip
    found |= {"lookups": bench_prefix_index.lookups(), "evictions": bench_prefix_index.evictions()}
    for row in found["lookups"]:
        print(f"{row['design']}, {row['shape']} of {row['pages']} pages: {row['match_seconds'] * 1e6:.2f} µs and "
              f"{row['index_bytes']:.0f} bytes a page, and {row['token_bytes']:.0f} of its tokens")  # fmt: skip
    for row in found["evictions"]["rows"]:
        print(f"{row['pages']} pages, {row['design']}, {row['policy']}: {row['hit_rate']:.3f} hit, "
              f"{row['over_belady']:.3f} of Belady's")  # fmt: skip
    _save(machine, "prefix-hits", found)


def _collectives(machine: Machine) -> None:
    """Chapter 04: every plan over every transport, beside gloo and, where it is installed, Open MPI."""
    found = bench_collectives.collectives()
    for row in found["all_reduce"]:
        if row["plan"] == "ring":
            where = f"{row['kind']}, {row['world_size']} ranks, {row['bytes']} bytes"
            print(f"ring, {where}: {row['seconds'] * 1e3:.2f} ms, gloo / this {row['gloo_over_this']:.2f}")
    for row in found["open_mpi"]:
        print(f"{row['version']}, {row['world_size']} ranks, {row['bytes']} bytes: {row['seconds'] * 1e3:.2f} ms")
    middle = statistics.median(row["predicted"] / row["seconds"] for row in found["all_reduce"])
    print(f"median predicted / measured: {middle:.2f}")
    _save(machine, "collectives", found)


def _training(machine: Machine) -> None:
    """Chapters 05 and 06: data parallelism and ZeRO on ranks, beside torch's own."""
    found = bench_training.training()
    groups = [(f"data parallel, {group['transport']}", group["methods"]) for group in found["data_parallel"]]
    for what, rows in (*groups, ("ZeRO", found["zero_steps"])):
        print(f"{what}: " + ", ".join(f"{row['method']} {row['seconds'] * 1e3:.0f} ms" for row in rows))
    for row in found["zero_bytes"]:
        print(f"stage {row['stage']}, {row['world_size']} ranks: {row['bytes'] / row['expected']:.4f} of the formula")
    _save(machine, "ranks", found)


def _tensor_parallel(machine: Machine) -> None:
    """Chapter 07: forward and step on two ranks, beside torch's own."""
    found = bench_tensor_parallel.tensor_parallel()
    for group in found["over_peer"]:
        for part in ("forward", "step"):
            rows = (f"{r['method']} {r['seconds'] * 1e3:.1f} ms ({r['over_peer']:.2f}×)" for r in group[part])
            print(f"{group['transport']}, {part}: " + ", ".join(rows))
    _save(machine, "tensor-parallel", found)


def _measured(machine: Machine, name: str, found: dict, lines: Iterable[str]) -> None:
    """Print what was found, and record it under a name."""
    for line in lines:
        print(line)
    _save(machine, name, found)


def _moe(machine: Machine) -> None:
    """Chapter 09: balancing real requests, experts against a loop, expert parallelism, and training."""
    found = bench_moe.moe()
    for name, row in found["http"].items():
        p99 = statistics.median(row["p99"])
        print(f"{name}: p99 {p99 * 1e3:.1f} ms, max/mean {row['max_over_mean']:.2f}, theory "
              f"{row['expected_max_over_mean']:.2f}")  # fmt: skip
    print(f"loop over experts / grouped: {found['grouped_matmul']['loop_over_grouped']:.2f}")
    for row in found["expert_parallel"]:
        ratio = row["predicted"] / row["seconds"]
        print(f"{row['world_size']} ranks, max/mean {row['max_over_mean']:.2f}: {row['seconds'] * 1e3:.1f} ms, "
              f"predicted / measured {ratio:.2f}")  # fmt: skip
    for row in found["training"]:
        loads = ", ".join(f"{load:.2f}" for load in row["held_out_max_over_mean"])
        print(f"{row['method']}, seed {row['seed']}: {row['validation_loss']:.4f} nats, max/mean held out {loads}")
    _save(machine, "moe", found)


def _compiled(machine: Machine, modules: list[str] | None, targets: list[str] | None) -> None:
    """What the compiler makes of every kernel's default configurations for three GPUs; needs none.

    Of some modules or targets alone: their rows are renewed in the record that there is.
    """
    rows = bench_kernels.every_build(targets or tuple(compiled.TARGETS), modules)
    troubled = [row for row in rows if row.get("error") or row["spilled"]]
    print(f"compiled {len(rows)} builds; {len(troubled)} fail or spill registers")
    for row in troubled:
        print(f"  {row['target']} {row['module']}: {row['name']}: {row.get('error', 'spills')}")
    idle = sum(row.get("copies_in_flight") == 0 for row in rows)
    print(f"{idle} multiply with no copy of a later block on its way")
    if not modules and not targets:
        return _save(machine, "compiled", {"builds": rows})
    (where,) = records.machines("compiled")
    provenance = records.stamp("compiled", {}, machine.title).provenance
    path = bench_kernels.renewed(records.load(where, "compiled"), rows, provenance).save(where)
    print(f"renewed {path.relative_to(records.ROOT)}")
    return None


def _kernels(machine: Machine) -> None:
    """Every kernel beside its peers. The record grows by an op at a time: what was measured outlives what crashes."""
    rows = []
    for row in bench_kernels.kernels(machine, Sizes()):
        rows.append(row)
        _save(machine, "kernels", {"ops": rows}, quiet=True)
        print(bench_kernels.line(row))
    print(f"{len(rows)} ops, {sum('measured' not in row for row in rows)} of them failed")


def _peers(machine: Machine, names: list[str] | None, model_names: list[str] | None, turns: int) -> None:
    """Chapter 12: the engine beside the engines that people use on a CPU. The record grows by a model at a time."""
    found = []
    for each in bench_peers.peers(names or tuple(bench_peers.PEERS), model_names or bench_peers.models.NAMES, turns):
        found.append(each)
        _save(machine, "peers", {"models": found}, quiet=True)
        print(f"{each['model']}, {each['parameters'] / 1e6:.0f} M parameters")
        for row in each["rows"]:
            print(f"  {bench_peers.line(row)}")
        for name, reason in each["failed"].items():
            print(f"  {name}: {reason}")


def _prefix_peers(machine: Machine) -> None:
    """Chapter 14: prefix hits beside other engines that keep pages on a CPU."""
    found = bench_prefix_peers.prefix_peers()
    for row in found["rows"]:
        whole, hit = (row[name]["median"] * 1e3 for name in ("whole", "hit"))
        print(f"{row['worker']}, {row['cached']} tokens kept, {row['tail']} behind them: {whole:.0f} ms whole, "
              f"{hit:.1f} ms, {row['whole_over_hit']['median']:.1f}×")  # fmt: skip
    for name, reason in found["failed"].items():
        print(f"{name}: {reason}")
    _save(machine, "prefix-peers", found)


def _save(machine: Machine, name: str, data: dict, quiet: bool = False) -> None:
    path = records.stamp(name, data, machine.title).save(machine.name)
    if not quiet:
        print(f"recorded {path.relative_to(records.ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
