"""The data sheets against figures from elsewhere: a check that knows the usual traps, and its own check.

A rate is recomputed from units × operations a clock × clock, a memory from its bus, a link from its lanes, a
processor from its cores. The constants here come from architecture papers and from what drivers report (only
capacity and power are the vendor's words typed twice), so that one slip or misread column cannot be in both.
"""

import copy
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "minilib" / "numbers" / "datasheets" / "datasheets.toml"
SHEETS = tomllib.loads(FILE.read_text(encoding="utf-8"))

# Vendors round to two or three digits. GiB for GB is already 7 %, and most traps are 100 %.
TOLERANCE = 0.03
MATRIX = ("tf32", "bf16", "fp16", "fp8", "int8", "fp4")


@dataclass(frozen=True)
class Chip:
    """What a GPU is made of.

    Args:
        units: streaming multiprocessors or compute units.
        per_clock: dense operations per unit and clock by dtype, accumulating in fp32 (int8 in int32).
        clocks: Hz of the ordinary units and of the matrix units, where the rates are computed with two.
        gigabytes: capacity as printed on the box.
        bus: (bits, bits per second and pin).
        links: bytes/s in one direction, lanes × rate.
        watts: board power.
    """

    units: int
    per_clock: dict[str, int]
    clocks: tuple[float, float]
    gigabytes: int
    bus: tuple[int, float]
    links: dict[str, float]
    watts: int


def pcie(generation: int, lanes: int = 16) -> float:
    """Bytes/s in one direction: 16 Gb/s a lane in generation 4, twice that in 5; 128 bits in 130 are data."""
    return 16e9 * 2 ** (generation - 4) * lanes / 8 * 128 / 130


# Dense operations per SM or compute unit and clock, from the vendors' papers about each architecture.
AMPERE = {"fp64": 64, "fp32": 128, "tf32": 1024, "bf16": 2048, "fp16": 2048, "int8": 4096}
HOPPER = {"fp64": 128, "fp32": 256, "tf32": 2048, "bf16": 4096, "fp16": 4096, "fp8": 8192, "int8": 8192}
BLACKWELL = {dtype: rate if dtype in ("fp64", "fp32") else 2 * rate for dtype, rate in HOPPER.items()}
BLACKWELL["fp4"] = 2 * BLACKWELL["fp8"]
ADA = {"fp64": 4, "fp32": 256, "tf32": 256, "bf16": 512, "fp16": 512, "fp8": 1024, "int8": 2048}
# Blackwell Ultra: fp4 at three times fp8; what is left of fp64 and int8 is in the notes of its sheet.
ULTRA = {dtype: rate for dtype, rate in BLACKWELL.items() if dtype not in ("fp64", "int8")} | {"fp4": 3 * 16384}
GEFORCE_BLACKWELL = {"fp32": 256, "tf32": 256, "bf16": 512, "fp16": 512, "fp8": 1024, "fp4": 4096}
CDNA3 = {"fp64": 128, "fp32": 256, "tf32": 1024, "bf16": 2048, "fp16": 2048, "fp8": 4096, "int8": 4096}

# HBM transfers twice a clock, and clocks are as drivers report them. NVLink: links × bytes/s, one way.
CHIPS = {
    "a100-80g-sxm": Chip(
        units=108,
        per_clock=AMPERE,
        clocks=(1.41e9, 1.41e9),
        gigabytes=5 * 16,
        bus=(5 * 1024, 2 * 1593e6),
        links={"nvlink": 12 * 25e9, "pcie": pcie(4)},
        watts=400,
    ),
    "h100-sxm": Chip(
        units=132,
        per_clock=HOPPER,
        clocks=(1.98e9, 1.83e9),
        gigabytes=5 * 16,
        bus=(5 * 1024, 2 * 2619e6),
        links={"nvlink": 18 * 25e9, "pcie": pcie(5)},
        watts=700,
    ),
    "h200": Chip(
        units=132,
        per_clock=HOPPER,
        clocks=(1.98e9, 1.83e9),
        gigabytes=141,  # of 6 × 24
        bus=(6 * 1024, 6.2e9),
        links={"nvlink": 18 * 25e9, "pcie": pcie(5)},
        watts=700,
    ),
    "b200": Chip(
        units=148,
        per_clock=BLACKWELL,
        clocks=(1.965e9, 1.83e9),
        gigabytes=180,  # of 8 × 24
        bus=(7680, 2 * 3996e6),
        links={"nvlink": 18 * 50e9, "pcie": pcie(5)},
        watts=1000,
    ),
    "gb200": Chip(
        units=148,
        per_clock=BLACKWELL,
        clocks=(2.1e9, 2.06e9),
        gigabytes=186,  # of 8 × 24
        bus=(8192, 2 * 3996e6),
        links={"nvlink": 18 * 50e9},
        watts=1200,
    ),
    "gb300": Chip(
        units=160,
        per_clock=ULTRA,
        clocks=(1.95e9, 1.92e9),
        gigabytes=279,  # of 8 × 36
        bus=(8192, 2 * 3996e6),
        links={"nvlink": 18 * 50e9},
        watts=1400,
    ),
    "rtx-4090": Chip(
        units=128,
        per_clock=ADA,
        clocks=(2.52e9, 2.52e9),
        gigabytes=24,
        bus=(384, 21e9),
        links={"pcie": pcie(4)},  # and no NVLink
        watts=450,
    ),
    "rtx-5090": Chip(
        units=170,
        per_clock=GEFORCE_BLACKWELL,
        clocks=(2.407e9, 2.407e9),
        gigabytes=32,
        bus=(512, 28e9),
        links={"pcie": pcie(5)},
        watts=575,
    ),
    "mi300x": Chip(
        units=304,
        per_clock=CDNA3,
        clocks=(2.1e9, 2.1e9),
        gigabytes=8 * 24,
        bus=(8 * 1024, 5.2e9),
        links={"infinity_fabric": 7 * 64e9, "pcie": pcie(5)},
        watts=750,
    ),
}


@dataclass(frozen=True)
class Processor:
    """What a CPU is made of; the size of its DIMMs is this book's choice."""

    cores: int
    base_clock: float
    per_clock: dict[str, float]
    channels: int
    transfers: float
    watts: int
    links: dict[str, float] = field(default_factory=lambda: {"pcie": pcie(5)})


def vector(units: int, bits: int, width: int, products: int = 1) -> int:
    """FLOPs per cycle of multiply-add units; dot-product instructions do several products a lane."""
    return units * bits // width * products * 2


def tile(depth: int, rows: int = 16, columns: int = 16, cycles: int = 16) -> float:
    """FLOPs per cycle of AMX: a product of rows × depth by depth × columns every 16 cycles."""
    return rows * columns * depth * 2 / cycles


PROCESSORS = {
    "amd-epyc-9654": Processor(
        cores=96,
        base_clock=2.4e9,
        per_clock={
            "fp64": vector(2, 256, 64),
            "fp32": vector(2, 256, 32),
            "bf16": vector(2, 256, 32, products=2),
            "int8": vector(2, 256, 32, products=4),
        },
        channels=12,
        transfers=4.8e9,
        watts=360,
    ),
    "intel-xeon-8480plus": Processor(
        cores=56,
        base_clock=2.0e9,
        per_clock={
            "fp64": vector(2, 512, 64),
            "fp32": vector(2, 512, 32),
            "bf16": tile(depth=32),
            "int8": tile(depth=64),
        },
        channels=8,
        transfers=4.8e9,
        watts=350,
    ),
}

# Wide enough for any accelerator of the decade, narrow enough that a wrong prefix falls out.
PLAUSIBLE = {
    "flops": (1e12, 1e17),
    "memory_bytes": (16e9, 8e12),
    "memory_bandwidth": (100e9, 50e12),
    "links": (10e9, 2e12),
    "watts": (50, 2000),
}
TEXTS = ("title", "vendor", "kind", "year", "memory_bytes", "memory_bandwidth", "watts", "notes")
TABLES = ("flops", "links", "sources")
GROUPS = ("flops", "memory", "links", "watts")  # each with its source


def problems(datasheets: dict) -> list[str]:
    """Everything that looks wrong, a line each, beginning with the name of the device."""
    missing = sorted({*CHIPS, *PROCESSORS} - set(datasheets))
    found = [f"{name}: no such data sheet any more" for name in missing]
    for name, sheet in datasheets.items():
        absent = [key for key in TEXTS + TABLES if not sheet.get(key)]
        if absent:
            found.append(f"{name}: has no {', '.join(absent)}")
            continue
        lines = _ranges(sheet) + _sources(sheet) + _links(name, sheet)
        if name in CHIPS and sheet["kind"] == "gpu":
            lines += _gpu(CHIPS[name], sheet)
        elif name in PROCESSORS and sheet["kind"] == "cpu":
            lines += _cpu(PROCESSORS[name], sheet)
        else:
            lines.append(f"no figures to check a {sheet['kind']} by: add them to CHIPS or PROCESSORS")
        found += [f"{name}: {line}" for line in lines]
    return found


def _ranges(sheet: dict) -> list[str]:
    """Positive, and of a size that the unit can have: TFLOP/s typed as 1e9 fall out here."""
    figures = [(key, key, sheet[key]) for key in ("memory_bytes", "memory_bandwidth", "watts")]
    figures += [("flops", f"flops.{dtype}", rate) for dtype, rate in sheet["flops"].items()]
    figures += [("links", f"links.{link}", entry["bandwidth"]) for link, entry in sheet["links"].items()]
    lines = []
    for kind, where, value in figures:
        low, high = PLAUSIBLE[kind]
        if not low <= value <= high:
            lines.append(f"{where} is {value:.4g}, outside {low:.0e} to {high:.0e}: is the SI prefix right?")
    if not 2018 <= sheet["year"] <= 2030:
        lines.append(f"year is {sheet['year']}")
    return lines


def _sources(sheet: dict) -> list[str]:
    sources = sheet["sources"]
    lines = [f"no source for {group}" for group in GROUPS if group not in sources]
    vague = [group for group, source in sources.items() if not source.startswith("https://")]
    return lines + [f"the source of {group} is no address: {sources[group]!r}" for group in vague]


def _links(name: str, sheet: dict) -> list[str]:
    """One direction of each link, although the vendor's words may be about both."""
    made_of = CHIPS.get(name) or PROCESSORS.get(name)
    expected = made_of.links if made_of else {}
    lines = _same(sheet["links"], expected, "links") if made_of else []
    for link, entry in sheet["links"].items():
        bandwidth, words = entry["bandwidth"], entry.get("quoted", "")
        if not words:
            lines.append(f"links.{link} does not say what the vendor prints")
        if entry.get("latency", 1e-6) <= 0:
            lines.append(f"links.{link}: leave latency out where nobody says")
        if link in expected and not _close(bandwidth, expected[link]):
            doubled = _close(bandwidth, 2 * expected[link])
            hint = ": both directions together?" if doubled else ""
            one_way = f"{expected[link]:.4g} one way"
            lines.append(f"links.{link} is {bandwidth:.4g}, its lanes make {one_way}{hint}")
        printed = _printed(words)
        if printed and not _close(2 * bandwidth, printed):
            lines.append(f"links.{link} is {bandwidth:.4g}, not half of what is printed: {words}")
    return lines


def _printed(words: str) -> float | None:
    """Bytes/s in words about both directions, such as "7 links of 128 GB/s, both directions together"."""
    match = re.search(r"(?:(\d+) links of )?([\d.]+) ([GT])B/s, both directions", words)
    if not match:
        return None
    count, number, prefix = match.groups()
    return int(count or 1) * float(number) * {"G": 1e9, "T": 1e12}[prefix]


def _gpu(chip: Chip, sheet: dict) -> list[str]:
    lines = _same(sheet["flops"], chip.per_clock, "flops")
    for dtype in sheet["flops"].keys() & chip.per_clock.keys():
        rate = sheet["flops"][dtype]
        dense = chip.units * chip.per_clock[dtype] * chip.clocks[dtype in MATRIX]
        if not _close(rate, dense):
            doubled = dtype in MATRIX and _close(rate, 2 * dense)
            hint = ": sparse, or accumulated in fp16?" if doubled else ""
            lines.append(f"flops.{dtype} is {rate:.4g}, its units make {dense:.4g} dense{hint}")
    if sheet["memory_bytes"] % 1e9:
        lines.append(f"memory_bytes is {sheet['memory_bytes']:.0f}, not whole GB of 1e9: GiB?")
    if sheet["memory_bytes"] != chip.gigabytes * 1e9:
        lines.append(f"memory_bytes is {sheet['memory_bytes']:.4g}, the box says {chip.gigabytes} GB")
    bandwidth, bus = sheet["memory_bandwidth"], chip.bus[0] / 8 * chip.bus[1]
    if not _close(bandwidth, bus):
        lines.append(f"memory_bandwidth is {bandwidth:.4g}, its bus makes {bus:.4g}")
    return lines + _same({"watts": sheet["watts"]}, {"watts": chip.watts}, "board", values=True)


def _cpu(made: Processor, sheet: dict) -> list[str]:
    """A processor's peaks are in no data sheet: they must say how they were derived, and follow from it."""
    keys = ("cores", "base_clock", "channels", "transfers", "watts")
    stated = {key: sheet.get(key) for key in keys}
    lines = _same(stated, {key: getattr(made, key) for key in keys}, "processor", values=True)
    lines += _same(sheet.get("flops_per_cycle", {}), made.per_clock, "flops_per_cycle", values=True)
    lines += _same(sheet["flops"], made.per_clock, "flops")
    for dtype in sheet["flops"].keys() & made.per_clock.keys():
        derived = made.cores * made.base_clock * made.per_clock[dtype]
        if not math.isclose(sheet["flops"][dtype], derived):
            lines.append(f"flops.{dtype} is {sheet['flops'][dtype]:.6g}, derived {derived:.6g}")
    bandwidth, derived = sheet["memory_bandwidth"], made.channels * made.transfers * 8
    if not math.isclose(bandwidth, derived):
        lines.append(f"memory_bandwidth is {bandwidth:.4g}, derived {derived:.4g}")
    if sheet["memory_bytes"] != made.channels * 64e9:
        lines.append(f"memory_bytes is {sheet['memory_bytes']:.4g}, not 64 GB of 1e9 a channel: GiB?")
    if "cores × base clock × FLOPs per cycle" not in sheet.get("derived", ""):
        lines.append("does not say how its peaks are derived")
    return lines


def _same(stated: dict, expected: dict, what: str, *, values: bool = False) -> list[str]:
    """Lines for keys, and values if asked for, that differ."""
    if not values and set(stated) != set(expected):
        return [f"{what} has {sorted(stated)}, expected {sorted(expected)}"]
    keys = sorted({*stated, *expected}) if values else ()
    differ = [key for key in keys if stated.get(key) != expected.get(key)]
    return [f"{what}: {key} is {stated.get(key)}, expected {expected.get(key)}" for key in differ]


def _close(value: float, expected: float) -> bool:
    return abs(value / expected - 1) <= TOLERANCE


def test_the_data_sheets_have_no_problems():
    assert problems(SHEETS) == []


def test_the_devices_that_chapters_need_are_there():
    assert {*CHIPS, *PROCESSORS} <= set(SHEETS)


BRIDGE = {"bandwidth": 56e9, "quoted": "as a 3090 has it"}
NVLINK, XGMI, PCIE = (("links", name, "bandwidth") for name in ("nvlink", "infinity_fabric", "pcie"))

# what somebody did, the device, where, what they wrote (None: took it out), what the check should say
TRAPS = [
    ("sparse as dense", "h100-sxm", ("flops", "bf16"), 1979e12, "sparse"),
    ("sparse as dense", "h200", ("flops", "fp8"), 3958e12, "sparse"),
    ("sparse as dense", "a100-80g-sxm", ("flops", "tf32"), 312e12, "sparse"),
    ("sparse as dense", "mi300x", ("flops", "fp16"), 2614.9e12, "sparse"),
    ("sparse as dense", "b200", ("flops", "fp4"), 18e15, "sparse"),
    ("fp16 accumulation on GeForce", "rtx-4090", ("flops", "fp16"), 330.3e12, "accumulated in fp16"),
    ("fp16 accumulation on GeForce", "rtx-4090", ("flops", "fp8"), 660.6e12, "accumulated in fp16"),
    ("fp16 accumulation on GeForce", "rtx-5090", ("flops", "bf16"), 419e12, "accumulated in fp16"),
    ("sparse as dense", "rtx-5090", ("flops", "fp4"), 3352e12, "sparse"),
    ("the older chip's fp4", "gb300", ("flops", "fp4"), 10e15, "its units make"),
    ("the ordinary units for the matrix units", "a100-80g-sxm", ("flops", "fp16"), 78e12, "dense"),
    ("the PCIe card for the SXM module", "h100-sxm", ("flops", "bf16"), 756e12, "dense"),
    ("GB200 for B200", "b200", ("flops", "bf16"), 2.5e15, "dense"),
    ("TFLOP/s as 1e9", "h100-sxm", ("flops", "bf16"), 989.4e9, "SI prefix"),
    ("GB/s as 1e6", "rtx-4090", ("memory_bandwidth",), 1008e6, "SI prefix"),
    ("GiB for GB", "a100-80g-sxm", ("memory_bytes",), 80 * 2**30, "GiB"),
    ("GiB for GB", "amd-epyc-9654", ("memory_bytes",), 768 * 2**30, "GiB"),
    ("GiB/s for GB/s", "a100-80g-sxm", ("memory_bandwidth",), 2039 * 2**30, "bus"),
    ("another memory of the same card", "a100-80g-sxm", ("memory_bandwidth",), 1555e9, "bus"),
    ("the announced size", "b200", ("memory_bytes",), 192e9, "the box says 180"),
    ("eight GPUs for one", "b200", ("memory_bytes",), 1440e9, "the box says 180"),
    ("both directions of NVLink", "h100-sxm", NVLINK, 900e9, "both directions"),
    ("both directions of NVLink", "b200", NVLINK, 1.8e12, "both directions"),
    ("both directions of PCIe", "rtx-4090", PCIE, 64e9, "both directions"),
    ("both directions of PCIe", "intel-xeon-8480plus", PCIE, 128e9, "both directions"),
    ("both directions of xGMI", "mi300x", XGMI, 896e9, "both directions"),
    ("one xGMI link of seven", "mi300x", XGMI, 64e9, "lanes"),
    ("the NVLink of an older card", "h100-sxm", NVLINK, 300e9, "half of what is printed"),
    ("NVLink where there is none", "rtx-4090", ("links", "nvlink"), BRIDGE, "links has"),
    ("a latency of nothing", "h100-sxm", ("links", "nvlink", "latency"), 0.0, "leave latency out"),
    ("words lost", "h100-sxm", ("links", "nvlink", "quoted"), None, "what the vendor prints"),
    ("the limit for the rating", "rtx-4090", ("watts",), 600, "expected 450"),
    ("boost clock for base", "amd-epyc-9654", ("base_clock",), 3.7e9, "expected 2400000000.0"),
    ("boost clock for base", "amd-epyc-9654", ("flops", "fp32"), 96 * 3.55e9 * 32, "derived"),
    ("512-bit units on Zen 4", "amd-epyc-9654", ("flops_per_cycle", "fp32"), 64, "expected 32"),
    ("AVX-512 for AMX", "intel-xeon-8480plus", ("flops_per_cycle", "bf16"), 128, "expected 1024"),
    ("two sockets for one", "intel-xeon-8480plus", ("cores",), 112, "expected 56"),
    ("MT/s taken for a clock", "intel-xeon-8480plus", ("memory_bandwidth",), 614.4e9, "derived"),
    ("no word on derivation", "amd-epyc-9654", ("derived",), None, "how its peaks are derived"),
    ("no source", "mi300x", ("sources", "links"), None, "no source for links"),
    ("hearsay", "mi300x", ("sources", "flops"), "a colleague", "no address"),
    ("a dtype forgotten", "h100-sxm", ("flops", "fp8"), None, "flops has"),
    ("a dtype it has not got", "a100-80g-sxm", ("flops", "fp8"), 624e12, "flops has"),
    ("half a data sheet", "h200", ("links",), None, "has no links"),
    ("no word of warning", "h200", ("notes",), [], "has no notes"),
]


def changed(device: str, path: tuple[str, ...], value) -> dict:
    """A copy of the data sheets with one thing in it changed, or taken out if the value is None."""
    sheets = copy.deepcopy(SHEETS)
    table = sheets[device]
    for key in path[:-1]:
        table = table[key]
    if value is None:
        del table[path[-1]]
    else:
        table[path[-1]] = value
    return sheets


@pytest.mark.parametrize(
    ("device", "path", "value", "complaint"),
    [trap[1:] for trap in TRAPS],
    ids=[f"{trap[0]}: {trap[1]} {'.'.join(trap[2])}" for trap in TRAPS],
)
def test_the_check_catches(device, path, value, complaint):
    found = problems(changed(device, path, value))
    assert any(complaint in line for line in found), found
    assert all(line.startswith(f"{device}: ") for line in found)


def numbers(table: dict, path: tuple[str, ...] = ()):
    """Paths of all numbers in a data sheet, however deep."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from numbers(value, (*path, key))
        elif isinstance(value, int | float):
            yield (*path, key), value


@pytest.mark.parametrize("factor", [0.5, 1.0737, 2, 1e-3, 1e3, -1])
def test_no_number_can_change_unnoticed(factor):
    unnoticed = [
        (device, path)
        for device, sheet in SHEETS.items()
        for path, value in numbers(sheet)
        if path != ("year",) and not problems(changed(device, path, factor * value))
    ]
    assert unnoticed == []


def test_a_new_device_needs_figures_to_be_checked_by():
    sheets = copy.deepcopy(SHEETS)
    sheets["h100-nvl"] = sheets["h100-sxm"]
    assert any(line.startswith("h100-nvl: ") and "add them" in line for line in problems(sheets))


def test_a_lost_device_is_noticed():
    sheets = copy.deepcopy(SHEETS)
    del sheets["mi300x"]
    assert problems(sheets) == ["mi300x: no such data sheet any more"]


@pytest.mark.parametrize(("generation", "gigabytes"), [(3, 15.75), (4, 31.5), (5, 63.0)])
def test_pcie_is_what_tables_of_the_standard_say(generation, gigabytes):
    assert pcie(generation) == pytest.approx(gigabytes * 1e9, rel=1e-3)
