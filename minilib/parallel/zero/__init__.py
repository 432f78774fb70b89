"""ZeRO stages 0 to 3: parameters, gradients and optimizer state partitioned over ranks."""

from minilib.parallel.zero.zero import StepWithoutBackward, Zero

__all__ = ["StepWithoutBackward", "Zero"]
