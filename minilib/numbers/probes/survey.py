"""Ask this machine every question once, with a progress bar, and remember the answers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

from minilib.mechanisms.basics.files import written_whole
from minilib.numbers import records
from minilib.numbers.neighbours import BUSY, Watch
from minilib.numbers.probes import chase, compute, cuda, memory, system

PROBES_VERSION = 3  # raise it when a probe changes what it measures: cached answers are then asked anew
CPU_CHAINS = tuple(2**k for k in (12, 14, 16, 18, 20, 22, 24, 25, 26, 28))  # bytes
OFF = 1.5  # a remembered figure that is off by more than this factor is not this machine's any more
CUDA_CHAINS = tuple(2**k for k in (14, 18, 22, 25, 28, 30))


def measure_or_recall(device: str, *, refresh: bool, progress: bool) -> dict:
    """A machine's figures as JSON values: from this user's cache if the same libraries measured it, else measured now.

    What is remembered was measured while others left the cores alone; a quick probe checks it before it is used.

    Raises:
        ValueError: if `device` is not "auto", "cpu" or "cuda", or is "cuda" without a GPU.
    """
    device = _resolve(device)
    path = _cache_path(device)
    if not refresh and path.is_file():
        try:
            remembered = json.loads(path.read_text())
        except ValueError:
            path.unlink()  # a cache that cannot be read is no cache
        else:
            if not _contradicted(remembered, device):
                return remembered
    watch = Watch()
    figures = _survey(device, progress)
    figures["busy"] = watch.busy
    if figures["busy"] > BUSY:
        return figures
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(figures))
    return figures


def _survey(device: str, progress: bool) -> dict:
    from tqdm import tqdm

    figures = _cuda_identity() if device == "cuda" else _cpu_identity()
    questions = _CUDA_QUESTIONS if device == "cuda" else _CPU_QUESTIONS
    bar = tqdm(questions.items(), desc="measuring this machine", disable=not progress, leave=False, unit="probe")
    for name, ask in bar:
        bar.set_postfix_str(name)
        try:
            answer = ask()
        except chase.UnsupportedProbe:
            continue  # a question this platform cannot answer leaves a gap in the table, never a guess
        for key, value in answer.items():
            figures[key] = figures.get(key, {}) | value if isinstance(value, dict) else value
    return figures


def _contradicted(figures: dict, device: str) -> bool:
    """True if a quick probe finds another machine than the one remembered, and others leave the cores alone."""
    watch = Watch()
    now = _QUICK_QUESTIONS[device]()
    known = {"memory_bandwidth": figures["memory_bandwidth"], "fp32": figures["flops"]["fp32"]}
    off = max(max(now[name] / known[name], known[name] / now[name]) for name in now)
    return off > OFF and watch.busy <= BUSY


def _main_memory() -> dict:
    rates = {"memory_read": memory.read_bandwidth(), "memory_first_touch": memory.first_touch_bandwidth()}
    return {"memory_bandwidth": memory.copy_bandwidth(), "bandwidths": rates}


def _loopback() -> dict:
    round_trip = system.loopback_round_trip()
    link = {"bandwidth": system.loopback_duplex_bandwidth(), "latency": round_trip / 2}
    return {
        "seconds": {"loopback_round_trip": round_trip},
        "bandwidths": {"loopback_one_way": system.loopback_bandwidth()},
        "links": {"loopback": link},
    }


def _disk() -> dict:
    directory = _cache_directory()
    rates = system.disk_bandwidths(directory)
    waits = {"write_fsync_4k": system.fsync_latency(directory)}
    if "disk_random_4k" in rates:
        waits["disk_random_4k"] = rates.pop("disk_random_4k")
    return {"seconds": waits, "bandwidths": rates}


_CPU_QUESTIONS: dict[str, Callable[[], dict]] = {
    "memory": _main_memory,
    "arithmetic": lambda: {"flops": compute.matmul_rates(budget=0.2)},  # the quickest sample counts
    "calls": lambda: {"call_overhead": compute.call_overhead()},
    "random access": lambda: {"random_access": [(size, chase.random_access(size)) for size in CPU_CHAINS]},
    "lock": lambda: {"seconds": {"lock_unlock": system.thread_lock()}},
    "process": lambda: {"seconds": {"process_start": system.process_start()}},
    "loopback": _loopback,
    "disk": _disk,
}


def _hbm() -> dict:
    rates = {"memory_read": cuda.hbm_read_bandwidth()}
    return {"memory_bandwidth": cuda.hbm_copy_bandwidth(), "bandwidths": rates}


def _pcie() -> dict:
    rates = cuda.pcie_bandwidths()
    return {"bandwidths": rates, "links": {"pcie": {"bandwidth": min(rates.values()), "latency": 0.0}}}


_CUDA_QUESTIONS: dict[str, Callable[[], dict]] = {
    "memory": _hbm,
    "arithmetic": lambda: {"flops": compute.matmul_rates("cuda")},
    "calls": lambda: {"call_overhead": compute.call_overhead("cuda"), "seconds": cuda.launch_latencies()},
    "pcie": _pcie,
    "random access": lambda: {"random_access": [(size, cuda.random_access(size)) for size in CUDA_CHAINS]},
}


_QUICK_QUESTIONS: dict[str, Callable[[], dict[str, float]]] = {
    "cpu": lambda: {"memory_bandwidth": memory.copy_bandwidth(budget=0.1), "fp32": compute.quick_rate()},
    "cuda": lambda: {"memory_bandwidth": cuda.hbm_copy_bandwidth(budget=0.1), "fp32": compute.quick_rate("cuda")},
}


def _cpu_identity() -> dict:
    import psutil

    title = f"{_cpu_title()}, {os.cpu_count()} cores"
    return _blank(title, "cpu", psutil.virtual_memory().total) | {"caches": memory.cache_sizes()}


def _cuda_identity() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(0)
    figures = _blank(properties.name, "gpu", properties.total_memory)
    return figures | {"caches": {"L2": properties.L2_cache_size}, "asynchronous": True}


def _blank(title: str, kind: str, memory_bytes: int) -> dict:
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return {
        "name": name,
        "title": title,
        "kind": kind,
        "origin": "measured",
        "memory_bytes": memory_bytes,
        "links": {},
        "seconds": {},
        "bandwidths": {},
        "random_access": [],
        "caches": {},
    }


def _cpu_title() -> str:
    """The processor's own name for itself, without trademarks and clock."""
    try:
        return cpu_title(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux: the platform's shorter name will do
        return cpu_title("")


def cpu_title(cpuinfo: str) -> str:
    """The processor's name out of what Linux has in /proc/cpuinfo.

    Some virtual machines say "AMD EPYC" and no more, whatever they run on; then family and model tell it from others.
    """
    facts = dict(re.findall(r"^(\w[\w ]*?)\s*: (.+)$", cpuinfo.split("\n\n")[0], re.M))
    name = facts.get("model name") or platform.processor() or platform.machine()
    name = " ".join(re.sub(r"\((R|TM|r|tm)\)|CPU|Processor|@.*|\d+-Core", " ", name).split())
    if "model name" in facts and "cpu family" in facts and not re.search(r"\d", name):
        return f"{name} family {facts['cpu family']} model {facts['model']}"
    return name


def _resolve(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU; use 'auto' or 'cpu'")
    return "cpu"


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infra-rephrased"


def _cache_path(device: str) -> Path:
    """One file per machine, device, thread count, library version and version of the probes."""
    import torch

    gpu = torch.cuda.get_device_name(0) if device == "cuda" else ""
    facts = (_cpu_title(), os.cpu_count(), torch.get_num_threads(), gpu, records.library_versions(), PROBES_VERSION)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return _cache_directory() / f"machine-{device}-{digest}.json"
