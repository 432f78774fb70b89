"""Compile kernels ahead of time, with no GPU at hand, and read what the compiler says of them.

A kernel that spills registers, asks for more shared memory than a program may have, multiplies matrices without the
tensor cores, or has no copy on its way while it multiplies, is slow before it has run once. The compiler's output says
so on any machine.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minilib.kernels.workbench.prefetch import copies_in_flight
from minilib.mechanisms.basics.child import child_environment

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that one program may have
COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")  # what a tile says beside the kernel's constants
_MATRIX = {"sm_80": r"\bmma\.sync", "sm_90": r"\b(?:wgmma\.mma_async|mma\.sync)", "gfx942": r"\bv_mfma"}


class UnknownTarget(LookupError):
    """No such architecture; the message lists those there are."""


@dataclass(frozen=True)
class Build:
    """One kernel at one configuration, as a launch would compile it.

    Args:
        kernel: the `triton.jit` function.
        name: says which configuration this is, such as "forward, bf16, head_dim 128".
        types: type of each argument that is not a constant: "*bf16" for a pointer, "i32", "fp32".
        constants: value of each `tl.constexpr` argument.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        maxnreg: registers that a thread may have on an NVIDIA GPU; left out, the assembler trades some for occupancy.
        dots: how many matrix products at least must be found in the machine code.
        unaligned: arguments that are not known to be multiples of 16; pointers and strides usually are.
        aligned: further arguments that are known to be, as a launch finds them: sizes that are multiples of 16.
    """

    kernel: object
    name: str
    types: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    dots: int = 0
    unaligned: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, kernel: object, name: str, types: Mapping[str, str], options: Mapping[str, object], **others: object
    ) -> Build:
        """A build from what a launch is given by name, constants and compiler options; others: further fields."""
        compiler = {key: options[key] for key in COMPILER_OPTIONS if key in options}
        constants = {key: value for key, value in options.items() if key not in compiler}
        return cls(kernel, name, types, constants, **compiler, **others)


@dataclass(frozen=True)
class Report:
    """What the compiler made of one build for one target.

    Args:
        name: of the build.
        target: "sm_80", "sm_90" or "gfx942".
        registers: 32-bit registers per thread.
        spilled: bytes per thread of stack and local memory, where registers go for which there is no room.
        shared: bytes of shared memory per program.
        matrix_instructions: tensor-core instructions in the code (mma, wgmma or mfma).
        copies_in_flight: groups of copies for later blocks on their way as a block's first product begins, in the loop
            that has fewest; None where no loop multiplies on tensor cores, and for gfx942, which has no such copies.
    """

    name: str
    target: str
    registers: int
    spilled: int
    shared: int
    matrix_instructions: int
    copies_in_flight: int | None = None


def compile_for(target: str, build: Build):
    """Compile one build with no GPU there; returns Triton's compiled kernel, with `asm` and `metadata`.

    Raises:
        UnknownTarget: if this module does not know the architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise UnknownTarget(f"no target {target!r}; there are: {', '.join(TARGETS)}")
    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in names}
    multiples = {n for n in names if signature[n].startswith("*") or n.startswith("stride")} | set(build.aligned)
    multiples -= {*build.unaligned, *build.constants}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in sorted(multiples)}
    source = ASTSource(build.kernel, signature=signature, constexprs=dict(build.constants), attrs=aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    options |= {} if target == "gfx942" else {"maxnreg": build.maxnreg}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def report(target: str, build: Build) -> Report:
    """Compile one build for one target and read the assembler's report."""
    return read_report(target, build.name, compile_for(target, build))


def read_report(target: str, name: str, compiled) -> Report:
    """What the assembler says of a kernel that `compile_for` compiled."""
    if target == "gfx942":
        code = compiled.asm["amdgcn"]
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", code))
        registers = int(found["vgpr_count"])
        spilled = int(found["private_segment_fixed_size"]) + 4 * int(found["vgpr_spill_count"])
    else:
        code, usage = compiled.asm["ptx"], _cuda_usage(compiled.asm["cubin"])
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]
    in_flight = None if target == "gfx942" else copies_in_flight(code)
    dots = len(re.findall(_MATRIX[target], code))
    return Report(name, target, registers, spilled, compiled.metadata.shared, dots, in_flight)


def all_builds(target: str, every: bool = False) -> dict[str, list[Build]]:
    """Default configurations of every kernel in this package: module name → its builds for one target.

    With `every`, all that a user meets at the shapes that models have, too many to compile in a test run:
    `make bench` records what the compiler says of them. Else a few, hard ones among them.
    """
    package, found = importlib.import_module("minilib.kernels"), {}
    for info in pkgutil.walk_packages(package.__path__, "minilib.kernels."):
        module = importlib.import_module(info.name)
        if not info.ispkg and hasattr(module, "builds"):
            found[info.name.removeprefix("minilib.kernels.")] = module.builds(target, every)
    return found


def report_source(target: str, source: str, build: Mapping[str, object]) -> Report:
    """Compile a kernel given as source text, in a process of its own: works while this one runs the interpreter.

    Args:
        target: "sm_80", "sm_90" or "gfx942".
        source: Python text that defines the kernel, without its imports and decorator's module (they are put before).
        build: what `Build` takes, with the kernel's name as "kernel".

    Raises:
        RuntimeError: if it does not compile; the message is the compiler's last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.py"
        file.write_text(f"import triton\nimport triton.language as tl\n\n\n{source}\n", encoding="utf-8")
        request = json.dumps({"file": str(file), "target": target, "build": dict(build)})
        command = [sys.executable, "-m", "minilib.kernels.workbench.compiled"]
        uninterpreted = child_environment(TRITON_INTERPRET="0")
        done = subprocess.run(command, input=request, env=uninterpreted, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"the kernel does not compile for {target}: {done.stderr.strip().splitlines()[-1]}")
    return Report(**json.loads(done.stdout))


def _cuda_usage(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def _main() -> None:
    import runpy

    request = json.load(sys.stdin)
    build = request["build"]
    build["kernel"] = runpy.run_path(request["file"])[build["kernel"]]
    sys.stdout.write(json.dumps(asdict(report(request["target"], Build(**build)))))


if __name__ == "__main__":
    _main()
