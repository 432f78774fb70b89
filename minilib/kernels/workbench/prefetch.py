"""Read compiled code for what a software pipeline is there for: copies of later blocks on their way during a product.

A loop over blocks copies them into shared memory and multiplies them. If no copy is on its way as a block's first
product begins, memory rests while the tensor cores work, and they rest while it works. How deep a pipeline must be for
that depends on where the compiler puts its copies, which `num_stages` does not say: with 2 stages, FlashAttention's
loop on Hopper has its copies after its last product, and waits for them at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_EVENTS = {  # PTX, in which all of these are instructions
    "product": r"\b(?:wgmma\.mma_async|mma\.sync)\b",
    "commit": r"\bcp\.async\.commit_group\b",  # ends a group of copies that the program's threads issue
    "wait": r"\bcp\.async\.wait_(?:group\s+(?P<left>\w+)|all)",  # until so many groups are left
    "expect": r"\bmbarrier\.arrive\.expect_tx\b",  # announces copies by the copy engine (TMA)
    "arrived": r"\bmbarrier\.try_wait\b",  # of the oldest of those
}
_EVENT = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _EVENTS.items()))
_LABEL, _BRANCH = re.compile(r"^\s*(\$L\w+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+)")

Event = tuple[str, int]  # its name and, of a wait, how many groups it leaves


def copies_in_flight(ptx: str) -> int | None:
    """Groups of asynchronous copies that are on their way as a block's first product begins, and not for that block.

    Args:
        ptx: a kernel's code for an NVIDIA GPU, sm_80 or later.

    Returns:
        The fewest of all innermost loops that multiply on tensor cores; 0 if one prefetches nothing, None if there is
        no such loop. K and V are two groups where the program's threads copy them, one where the copy engine does.
    """
    lines, found, before = ptx.splitlines(), [], 0
    loops = [loop for loop in _loops(lines) if any(name == "product" for name, _ in _events(lines[slice(*loop)]))]
    for begin, end in loops:
        if not any(begin <= other[0] and other[1] <= end for other in loops if other != (begin, end)):
            body = _events(lines[begin:end])
            found.append(_by_threads(body) + _by_engine(_events(lines[before:begin]), body))
            before = end
    return min(found, default=None)


def _events(lines: list[str]) -> list[Event]:
    matches = filter(None, map(_EVENT.search, lines))
    return [(match.lastgroup, int(match["left"] or "0", 0)) for match in matches]


def _loops(lines: list[str]) -> Iterator[tuple[int, int]]:
    """First line and the line after the last of each loop: from a label to the last branch back to it."""
    labels, ends = {}, {}
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = number
        elif (branch := _BRANCH.search(line)) and branch[1] in labels:
            ends[labels[branch[1]]] = number + 1
    return iter(sorted(ends.items()))


def _by_threads(body: list[Event]) -> int:
    """cp.async: in the steady state, groups that no wait before a block's last product waits for."""
    issued, done, at_first = 0, None, 0
    products = [i for i, (name, _) in enumerate(body) if name == "product"]
    for rounds in range(2):
        for i, (name, left) in enumerate(body):
            issued += name == "commit"
            if name == "wait":
                done = issued - left
            if rounds and i == products[0]:
                at_first = issued
            if rounds and i == products[-1]:
                return 0 if done is None else max(0, at_first - done)
    raise AssertionError("a loop without a product")


def _by_engine(before: list[Event], body: list[Event]) -> int:
    """TMA: what is announced before the loop and up to its first product, but for what is waited for up to its last."""
    names = [name for name, _ in body]
    first, last = names.index("product"), len(names) - names[::-1].index("product")
    ahead = [name for name, _ in before]
    announced = ahead.count("expect") - ahead.count("arrived") + names[:first].count("expect")
    return max(0, announced - names[:last].count("arrived")) if "expect" in names else 0
