"""A container by hand: namespaces, cgroup limits and a copy-on-write root, as the kernel gives them."""

from minilib.classic.container.container import Container, ContainerResult, run_in_container, run_with_rlimits
from minilib.classic.container.errors import CannotContain, ContainerLost, InvalidLimit, NotStarted
from minilib.classic.container.limits import Cgroup, ContainerLimits, Counted
from minilib.classic.container.namespaces import Surroundings, look_around, namespaces_of
from minilib.classic.container.root import OverlayRoot, RootChanges, lay_out
from minilib.classic.container.survey import PARTS, survey_kernel

__all__ = [
    "PARTS",
    "CannotContain",
    "Cgroup",
    "Container",
    "ContainerLimits",
    "ContainerLost",
    "ContainerResult",
    "Counted",
    "InvalidLimit",
    "NotStarted",
    "OverlayRoot",
    "RootChanges",
    "Surroundings",
    "lay_out",
    "look_around",
    "namespaces_of",
    "run_in_container",
    "run_with_rlimits",
    "survey_kernel",
]
