"""Say what is on this machine, what will be skipped here and why.

Usage: python tools/doctor.py [--refresh]       --refresh measures again instead of showing the cached result
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys

from minilib.numbers import records
from minilib.numbers.machine import Machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refresh", action="store_true", help="measure again")
    refresh = parser.parse_args().refresh
    versions = ", ".join(f"{name} {version}" for name, version in records.library_versions().items())
    print(f"{platform.system()} {platform.machine()}; {versions}\n")
    print(Machine.measure("cpu", refresh=refresh))
    if _has_gpu():
        print(f"\n{Machine.measure('cuda', refresh=refresh)}")
    print("\nskipped here:")
    print("\n".join(f"  {line}" for line in missing()) or "  nothing")
    print(f"\nrecorded machines: {', '.join(records.machines()) or 'none yet'}")
    return 0


def missing() -> list[str]:
    """What this machine lacks, and what follows from it; one line each."""
    lines = []
    if not _has_gpu():
        lines.append("no CUDA device: tests/gpu is skipped; chapters show recorded GPU figures beside live CPU ones")
    if platform.system() != "Linux":
        lines.append("not Linux: no Triton, no random-access probe, no cold disk reads")
    elif platform.machine() not in ("x86_64", "aarch64"):
        lines.append(f"{platform.machine()}: the random-access probe knows x86-64 and arm64 only")
    if shutil.which("git") is None:
        lines.append("no git: records made here cannot name their commit")
    absent = [program for program in ("nginx", "haproxy", "prometheus", "promtool") if shutil.which(program) is None]
    if absent:
        lines.append(f"no {', '.join(absent)}: chapter 17 leaves out their rows, and their tests are skipped")
    return lines


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
