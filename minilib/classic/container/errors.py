"""What can go wrong around a container, by name."""

from __future__ import annotations


class CannotContain(RuntimeError):
    """This kernel, or its administrator, does not let us have one part of a container.

    Args:
        part: which one: "namespaces", "overlay", "memory", "pids" or "cpu".
        reason: what the kernel said.
        remedy: how to get it.
    """

    def __init__(self, part: str, reason: str, remedy: str) -> None:
        super().__init__(part, reason, remedy)
        self.part, self.reason, self.remedy = part, reason, remedy

    def __str__(self) -> str:
        return f"{self.part}: {self.reason}. {self.remedy}."


class InvalidLimit(ValueError):
    """A limit that no process can be held to: a negative one, a fraction of a process, less than one page of memory,
    more than the kernel counts to.
    """


class NotStarted(RuntimeError):
    """A container died before the first line of its work, or was never entered; the message says which."""


class ContainerLost(RuntimeError):
    """The process that watched over a container is gone, and the container with it."""
