"""Pipeline parallelism: schedules as data, checked, priced, and run on ranks."""

from minilib.parallel.pipeline.checking import ScheduleDeadlock, UnsoundSchedule, check_schedule
from minilib.parallel.pipeline.pipeline_parallel import PipelineParallel, SchedulesDiffer
from minilib.parallel.pipeline.pricing import (
    SchedulePrice,
    StageTimes,
    expected_bubble,
    measured_timeline,
    price_schedule,
)
from minilib.parallel.pipeline.schedule import Action, PipelineSchedule
from minilib.parallel.pipeline.schedules import SCHEDULES, ImpossibleSchedule
from minilib.parallel.pipeline.stage import Microbatch, StageWithoutLayers, cut_batch, layers_per_stage

__all__ = [
    "SCHEDULES",
    "Action",
    "ImpossibleSchedule",
    "Microbatch",
    "PipelineParallel",
    "PipelineSchedule",
    "ScheduleDeadlock",
    "SchedulePrice",
    "SchedulesDiffer",
    "StageTimes",
    "StageWithoutLayers",
    "UnsoundSchedule",
    "check_schedule",
    "cut_batch",
    "expected_bubble",
    "layers_per_stage",
    "measured_timeline",
    "price_schedule",
]
