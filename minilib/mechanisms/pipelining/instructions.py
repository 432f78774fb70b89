"""A processor's pipeline: five stages of one cycle each, and bubbles where an instruction needs what is not there yet.

    add r1, r2, r3      fetch  decode  execute memory  write
    sub r4, r1, r5             fetch   decode  execute memory  write         with forwarding: no bubble
    sub r4, r1, r5             fetch   ─────── ─────── decode  execute …     without: r1 is written in the fifth cycle

There are no buffers between stages: who waits keeps everybody behind waiting.

Source: Patterson and Hennessy, "Computer Organization and Design", chapter 4: a register is written in the first half
of a cycle and read in the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minilib.mechanisms.pipelining.flow import flow
from minilib.mechanisms.pipelining.plan import Operation, timeline_of

STAGES = ("fetch", "decode", "execute", "memory", "write")
_DECODE, _EXECUTE, _MEMORY, _WRITE = range(1, 5)


@dataclass(frozen=True)
class Instruction:
    """What matters of an instruction for the pipeline.

    Args:
        text: as it is written.
        writes: the register that it writes; empty for none.
        reads: registers that it reads.
        load: whether what it writes comes from memory, so a stage later than from arithmetic.
    """

    text: str
    writes: str = ""
    reads: tuple[str, ...] = ()
    load: bool = False


def instruction_plan(program: Sequence[Instruction], forwarding: bool = True) -> list[list[Operation]]:
    """The plan of a program; keys are (stage, instruction), each takes one cycle.

    Args:
        program: instructions in order; there are no branches.
        forwarding: results go from the stage that has them straight to the execute stage of whoever reads them; if
            not, readers wait in decode until the register is written.
    """
    plan = flow(len(program), len(STAGES), capacity=0)
    last_writer: dict[str, int] = {}
    for number, instruction in enumerate(program):
        writers = sorted({last_writer[register] for register in instruction.reads if register in last_writer})
        stage = _EXECUTE if forwarding else _DECODE
        operation = plan[stage][number]
        if forwarding:
            made = tuple((_MEMORY if program[writer].load else _EXECUTE, writer) for writer in writers)
            plan[stage][number] = Operation(operation.key, (*operation.after, *made), operation.room)
        else:
            written = tuple((_WRITE, writer) for writer in writers)  # begun, which is when the register is written
            plan[stage][number] = Operation(operation.key, operation.after, (*operation.room, *written))
        if instruction.writes:
            last_writer[instruction.writes] = number
    return plan


def stalled_cycles(program: Sequence[Instruction], forwarding: bool = True) -> int:
    """Cycles that a program takes longer than one whose instructions do not need one another, n + 4."""
    cycles = timeline_of(instruction_plan(program, forwarding), lambda key: 1).makespan
    return int(cycles) - (len(program) + len(STAGES) - 1) if program else 0
