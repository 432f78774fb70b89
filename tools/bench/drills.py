"""Score the training drills over seeded runs, and measure what the instruments take of a step.

Rules and thresholds were fixed on seeds below 1000. The scored seeds begin at SCORED; nobody tunes on them. Seeds from
1000 to 1219 were scored before the rule for slow links was changed, and have had their turn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.operations.diagnosis.heartbeat import Heartbeat
from minilib.operations.diagnosis.links import TimedTransport
from minilib.operations.diagnosis.recorder import StepRecorder
from minilib.operations.drills.score import HEALTHY, DrillScore, score_drills
from minilib.operations.drills.training.diagnose import diagnose
from minilib.operations.drills.training.drill import run_drill
from minilib.operations.drills.training.fault import KINDS
from minilib.operations.drills.training.runs import drill
from minilib.operations.flight_recorder import RecordedCommunicator, Recorder, read_dump
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport
from minilib.training.config import TrainConfig
from minilib.training.phases import PHASES
from minilib.training.trainer import Trainer

SCORED = 2000  # first of the seeds that are scored
RUNS = 220  # 10 of each kind, 100 healthy ones between
SHAPE = ModelConfig(512, 128, 344, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, max_position=128)
CONFIG = TrainConfig(steps=10**6, batch_size=8, context=64, evaluate_every=10**6)


def drills(runs: int = RUNS, turns: int = 30, steps: int = 10) -> dict:
    """Everything.

    Args:
        runs: to score.
        turns: of steps with instruments and without, that alternate.
        steps: of a turn.

    Returns:
        "score": of the diagnosis; "instruments": seconds of a step with and without.
    """
    run(int, 1)
    begun = time.perf_counter()
    seeds = tqdm(range(SCORED, SCORED + runs), desc="drills")
    found = score_drills(drill(seeds, lambda fault: diagnose(run_drill(fault))))
    seconds = (time.perf_counter() - begun) / runs
    return {"score": _plain(found) | {"seconds_per_run": seconds}, "instruments": instruments(turns, steps)}


def instruments(turns: int = 30, steps: int = 10) -> dict:
    """Seconds of a step on two ranks, with all instruments and without any, in turns A B B A …

    Returns:
        "wall" and "cpu" (of the process, all threads) by "off" and "on", medians over turns of rank 0; their "ratio",
        the median over neighbouring turns; and how many records a step writes.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run(_in_turns, 2, Path(folder), turns, steps, timeout=1800)[0]


def lines(found: dict) -> Iterable[str]:
    """What was found, in words."""
    score, cost = found["score"], found["instruments"]
    yield (f"{score['faulty']} faults: recall {score['recall']:.1%}, precision {score['precision']:.1%}; "
           f"{score['false_alarms']} false alarms in {score['healthy']} healthy runs; "
           f"{score['seconds_per_run']:.1f} s a run")  # fmt: skip
    for kind, row in score["confusion"].items():
        yield f"{kind}: " + ", ".join(f"{named} {count}" for named, count in row.items())
    for clock in ("wall", "cpu"):
        off, on = (cost[clock][side] * 1e3 for side in ("off", "on"))
        yield f"{clock}: a step takes {off:.2f} ms without instruments, {on:.2f} ms with: {cost[clock]['ratio']:.4f}"
    yield f"records a step: {cost['records_per_step']}"


def _plain(score: DrillScore) -> dict:
    table = {
        kind: {named: count for (injected, named), count in sorted(score.confusion.items()) if injected == kind}
        for kind in (*KINDS, HEALTHY)
    }
    return {
        "faulty": score.faulty,
        "healthy": score.healthy,
        "recall": score.recall,
        "precision": score.precision,
        "false_alarms": score.false_alarms,
        "confusion": {kind: row for kind, row in table.items() if row},
    }


def _in_turns(folder: Path, turns: int, steps: int) -> dict:
    """On each rank."""
    rank, tokens = dist.get_rank(), torch.arange(20_000) * 7919 % 509
    bare = Trainer(_model(), tokens, tokens, CONFIG, Communicator(SharedMemoryTransport()))
    model, timed = _model(), TimedTransport(SharedMemoryTransport())
    calls = Recorder(folder / f"{rank}.calls", rank)
    with (
        Heartbeat(folder / f"{rank}.beat") as heartbeat,
        StepRecorder(folder, rank, model, heartbeat=heartbeat) as recorder,
    ):
        comm = RecordedCommunicator(recorder.metered(Communicator(timed)), calls)
        seen = Trainer(model, tokens, tokens, CONFIG, comm, phases=recorder)
        before = _recorded(folder, rank, timed)

        def take(side: str) -> tuple[float, float]:
            trainer, options = (seen, {"after_step": recorder.end_step}) if side == "on" else (bare, {})
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.run(trainer.step + steps, **options, bar=False)
            return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps

        for side in ("off", "on"):
            take(side)  # the first steps make the optimizers' state
        taken: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
        for turn in range(turns):
            for side in ("off", "on") if turn % 2 else ("on", "off"):
                taken[side].append(take(side))
        after = _recorded(folder, rank, timed)
    found: dict = {"turns": turns, "steps": steps, "world_size": 2}
    for number, clock in enumerate(("wall", "cpu")):
        off, on = ([sample[number] for sample in taken[side]] for side in ("off", "on"))
        ratio = statistics.median(with_ / without for with_, without in zip(on, off, strict=True))
        found[clock] = {"off": statistics.median(off), "on": statistics.median(on), "ratio": ratio}
    a_step = {name: (after[name] - before[name]) / seen.step for name in after}
    return found | {"records_per_step": {"phases": len(PHASES), "steps": 1} | a_step}


def _recorded(folder: Path, rank: int, timed: TimedTransport) -> dict[str, int]:
    """What has been recorded so far."""
    dump = read_dump(folder / f"{rank}.calls")
    return {"collectives": len(dump.calls) + dump.lost, "message ends": len(timed.sent) + len(timed.received)}


def _model() -> Decoder:
    model = Decoder(SHAPE)
    model.initialize(0)
    return model
