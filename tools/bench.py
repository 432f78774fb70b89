"""Measure this machine and its workloads, and record them under results/<machine>/ with their provenance.

Usage: python tools/bench.py [--cpu]            --cpu leaves a GPU alone
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from minilib import records, workloads
from minilib.machine import Machine
from minilib.measure import check_table, median_ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    device = "cpu" if parser.parse_args().cpu else "auto"
    machine = Machine.measure(device, refresh=True)
    print(machine)
    _save(machine, "machine", machine.to_dict())
    _workloads(machine)
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


def _save(machine: Machine, name: str, data: dict) -> None:
    path = records.stamp(name, data, machine.title).save(machine.name)
    print(f"recorded {path.relative_to(records.ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
