"""Faults that are injected into a real training job, and a diagnosis that has to name them; scored over many seeds."""

from minilib.operations.drills.training.diagnose import diagnose
from minilib.operations.drills.training.drill import Evidence, run_drill
from minilib.operations.drills.training.fault import KINDS, SIZES, InjectedFault, drawn_fault, fault_of_seed
from minilib.operations.drills.training.runs import DrillRun, drill
from minilib.operations.drills.training.traces import unnamed_traces

__all__ = [
    "KINDS",
    "SIZES",
    "DrillRun",
    "Evidence",
    "InjectedFault",
    "diagnose",
    "drawn_fault",
    "drill",
    "fault_of_seed",
    "run_drill",
    "unnamed_traces",
]
