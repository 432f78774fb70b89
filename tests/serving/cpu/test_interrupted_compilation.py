"""Kernels that an earlier process kept serve one that compiles the rest: the earlier one may have been stopped."""

import subprocess
import sys
from textwrap import dedent

from minilib.mechanisms.basics.child import child_environment

PATIENCE = 120
KEPT = """
    import sys
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic
    from minilib.serving.cpu import machine_code

    machine_code._FOLDER = sys.argv[1]

    @intrinsic
    def of_assembly(typing, number):
        def generate(context, builder, signature, arguments):
            builder.asm(ir.FunctionType(ir.VoidType(), []), "nop", "", (), side_effect=True)
            return arguments[0]
        return number(number), generate

    @machine_code.kernel(types.int64(types.int64), parallel=False)
    def inner(number):
        return of_assembly(number) + 1
"""
THE_REST = """
    from kept import inner, machine_code, types

    @machine_code.kernel(types.int64(types.int64), parallel=False)
    def outer(number):
        return inner(number) + 1

    print(outer(40), *(sum(each.stats.cache_hits.values()) for each in (inner, outer)))
"""


def test_kept_assembly_is_compiled_into_a_new_kernel(tmp_path):
    """LLVM ends the process where it has no parser of assembly, however often it is started again."""
    said = []
    for name, text in (("kept", KEPT), ("rest", THE_REST), ("rest", None)):
        script = tmp_path / f"{name}.py"
        if text:
            script.write_text(dedent(text))
        command = [sys.executable, str(script), str(tmp_path / "cache")]
        ran = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=PATIENCE)
        assert ran.returncode == 0, ran.stderr
        said.append(ran.stdout.split())
    assert said == [[], ["42", "1", "0"], ["42", "1", "1"]]
