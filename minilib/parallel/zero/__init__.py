"""ZeRO stages 0 to 3: parameters, gradients and optimizer state partitioned over ranks."""

from minilib.parallel.zero.elementwise import NotElementwise
from minilib.parallel.zero.guard import ParametersElsewhere
from minilib.parallel.zero.zero import StepWithoutBackward, Zero

__all__ = ["NotElementwise", "ParametersElsewhere", "StepWithoutBackward", "Zero"]
