"""Every kernel at its default configurations, compiled ahead of time for three GPUs: no spills, and tensor cores."""

import os
import platform

import pytest

from minilib.kernels.flash_attention import forward
from minilib.kernels.flash_attention.tiles import CASES, build_of
from minilib.kernels.workbench import compiled
from minilib.numbers import records

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles on Linux, uninterpreted"
)
if platform.system() == "Linux":
    BUILDS = [
        pytest.param(target, build, id=f"{target}-{module}-{build.name}")
        for target in compiled.TARGETS
        for module, builds in compiled.all_builds(target).items()
        for build in builds
    ]
else:
    BUILDS = []


def prefetches(target: str, build: compiled.Build, copies: int | None) -> bool:
    """True if the next block's copy is on its way during a block's products, where it can be.

    It cannot where rows are not aligned, and values come one by one; where no tensor core multiplies, nothing is asked.
    """
    asked = build.dots and target != "gfx942" and not build.unaligned
    return not asked or (copies or 0) > 0


@pytest.mark.parametrize(("target", "build"), BUILDS)
def test_it_compiles_without_spills_and_with_tensor_cores(target, build):
    report = compiled.report(target, build)
    assert report.spilled == 0, report
    assert report.shared <= compiled.SHARED_LIMIT[target], report
    assert report.matrix_instructions >= build.dots, report
    assert prefetches(target, build, report.copies_in_flight), report


@pytest.mark.parametrize("machine", records.machines("compiled"))
@pytest.mark.parametrize("target", compiled.TARGETS)
def test_what_is_recorded_is_every_default_configuration_and_none_spills(target, machine):
    """All that is too much to compile in a test run; `python -m tools.bench --cpu --only compiled` records it anew."""
    rows = [row for row in records.load(machine, "compiled").data["builds"] if row["target"] == target]
    builds = {(module, build.name): build for module, of in compiled.all_builds(target, True).items() for build in of}
    assert [(row["module"], row["name"]) for row in rows] == list(builds)
    troubled = [
        row for row in rows
        if "error" in row or row["spilled"] or row["shared"] > compiled.SHARED_LIMIT[target]
        or row["matrix_instructions"] < builds[row["module"], row["name"]].dots
    ]  # fmt: skip
    assert not troubled
    read = [row for row in rows if "copies_in_flight" in row]  # of older rows nobody read it
    assert all(prefetches(target, builds[row["module"], row["name"]], row["copies_in_flight"]) for row in read)


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_what_every_test_run_compiles_is_a_part_of_every_default_configuration(target):
    few, every = compiled.all_builds(target), compiled.all_builds(target, True)
    for module, builds in few.items():
        assert all(build in every[module] for build in builds)
        assert len({build.name for build in every[module]}) == len(every[module])


def test_a_limit_on_registers_is_for_nvidia_alone():
    build = next(build for build in compiled.all_builds("sm_90")["rowwise.rms_norm"] if build.maxnreg)
    assert f".maxnreg {build.maxnreg}" in compiled.compile_for("sm_90", build).asm["ptx"]
    assert compiled.report("gfx942", build).registers  # where it is no option


def test_a_candidates_limit_on_registers_reaches_the_compiler():
    """Two programs of FlashAttention on a multiprocessor of Hopper: half of its registers and shared memory each."""
    tile = next(tile for tile in forward.CANDIDATES if tile.get("maxnreg") == 128 and tile["num_stages"] == 2)
    build = build_of(forward.forward, "forward", CASES[0], tile, copied=("k", "v"))
    binary = compiled.compile_for("sm_90", build)
    report = compiled.read_report("sm_90", build.name, binary)
    assert ".maxnreg 128" in binary.asm["ptx"] and report.registers <= 128 and report.spilled == 0
    assert 2 * (report.shared + 1024) <= 228 * 1024


def test_an_unknown_target_is_refused():
    with pytest.raises(compiled.UnknownTarget, match="sm_80, sm_90, gfx942"):
        compiled.compile_for("sm_42", None)


SOURCE = """
@triton.jit
def double(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n, other=0.0), mask=at < n)
"""
DOUBLE = {
    "kernel": "double",
    "name": "double",
    "types": {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"},
    "constants": {"BLOCK": 1024},
}


def test_source_text_compiles_in_a_process_of_its_own():
    report = compiled.report_source("sm_90", SOURCE, DOUBLE)
    assert report.registers > 0 and report.spilled == report.shared == report.matrix_instructions == 0


def test_source_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="does not compile for sm_80: .*"):
        compiled.report_source("sm_80", SOURCE.replace("tl.load", "tl.lode"), DOUBLE)
