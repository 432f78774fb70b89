"""Hazards of the five-stage pipeline, with the counts of the textbook."""

import pytest

from minilib.mechanisms.pipelining import Instruction, instruction_plan, stalled_cycles, timeline_of

ADD = Instruction("add r1, r2, r3", "r1", ("r2", "r3"))
LOAD = Instruction("lw r1, 0(r2)", "r1", ("r2",), load=True)
USE = Instruction("sub r4, r1, r5", "r4", ("r1", "r5"))
STORE = Instruction("sw r4, 0(r1)", "", ("r4", "r1"))
OTHER = Instruction("and r8, r9, r9", "r8", ("r9",))


@pytest.mark.parametrize(
    ("program", "forwarding", "stalls"),
    [
        ([], True, 0),
        ([OTHER], False, 0),
        ([OTHER] * 9, False, 0),
        ([ADD, USE], False, 2),
        ([ADD, OTHER, USE], False, 1),
        ([ADD, OTHER, OTHER, USE], False, 0),  # written in the first half of the cycle, read in the second
        ([ADD, USE], True, 0),
        ([LOAD, USE], True, 1),
        ([LOAD, OTHER, USE], True, 0),
        ([LOAD, USE], False, 2),
        ([ADD, USE, STORE], False, 4),
        ([LOAD, USE, OTHER, LOAD, USE], True, 2),
        ([ADD, LOAD, USE], True, 1),  # the last writer counts
    ],
)
def test_bubbles(program, forwarding, stalls):
    assert stalled_cycles(program, forwarding) == stalls


def test_who_waits_keeps_everybody_behind_waiting():
    """Cycles of each stage: the use is fetched while the load is decoded, and waits one cycle before execute."""
    timeline = timeline_of(instruction_plan([LOAD, USE, OTHER]), lambda key: 1)
    begun = {span.key: span.start for span in timeline}
    assert [begun[stage, 1] for stage in range(5)] == [1, 2, 4, 5, 6]
    assert [begun[stage, 2] for stage in range(5)] == [2, 4, 5, 6, 7]
