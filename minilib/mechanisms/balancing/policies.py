"""Balancing: which of several targets gets the next request. Targets are HTTP backends, or experts of a model.

    blind          round robin, random, weighted              needs to know nothing
    by load        least loaded, best of d random ones        needs the load of every target, or of d
    by key         sticky, consistent hashing with a bound    caches that a key finds again (by_key.py)
    by feedback    affinity of the key + bias of the target   learns the biases from what each target got

One protocol serves requests and tokens alike: `choose` says where the next one goes, `observe` hears what came of it. A
proxy counts requests in flight as loads (classic/http/proxy.py); a router counts the tokens that each expert has so far
(`assign`). A target that is down has the load math.inf, and no policy chooses it.

What the loads then look like is measured in numbers/load_metrics.py, and predicted in numbers/balls_in_bins.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

RULES = ("sign", "proportional")
Affinity = Callable[[Any], Sequence[float]]


class NoTarget(RuntimeError):
    """Fewer targets are up than are needed."""


class Policy(Protocol):
    """Decides where requests go."""

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """The target of the next request.

        Args:
            key: what is asked for; what it may be is up to the policy, and most do not look at it.
            loads: load of each target, 0 or more; math.inf for one that is down.

        Raises:
            NoTarget: if all are down.
            ValueError: if the policy was made for another number of targets.
        """

    def observe(self, loads: Sequence[float]) -> None:
        """Hear what each target got in the window that just ended, math.inf for one that is down."""


class Heedless:
    """A policy that learns nothing from what it hears."""

    def observe(self, loads: Sequence[float]) -> None:
        """Ignored."""


def up_among(loads: Sequence[float], num_targets: int | None = None, needed: int = 1) -> list[int]:
    """The targets that are up, ascending.

    Raises:
        NoTarget: if there are fewer than `needed`.
        ValueError: if the loads are not those of `num_targets` targets.
    """
    if num_targets is not None and len(loads) != num_targets:
        raise ValueError(f"this policy was made for {num_targets} targets, got the loads of {len(loads)}")
    up = [target for target, load in enumerate(loads) if load < math.inf]
    if len(up) < needed:
        raise NoTarget(f"{len(up)} of {len(loads)} targets are up, it takes {needed}")
    return up


class RoundRobin(Heedless):
    """One after the other.

    Cost: O(1), and one step more for each target that is down.
    """

    def __init__(self) -> None:
        self.turn = 0

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """The next one that is up."""
        for step in range(len(loads)):
            target = (self.turn + step) % len(loads)
            if loads[target] < math.inf:
                self.turn = target + 1
                return target
        return up_among(loads)[0]  # raises: none is up

    def check_invariants(self) -> None:
        """The turn is a target's, or one past the last."""
        assert self.turn >= 0, f"turn {self.turn}"


class Random(Heedless):
    """Any of them, all equally likely.

    Args:
        seed: the same choices for the same seed.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """One of those that are up."""
        return self._rng.choice(up_among(loads))


class LeastLoaded(RoundRobin):
    """The one with the smallest load; among equals the next in turn, or all of an idle system would go to the first.

    Cost: O(n).
    """

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """A target that no other undercuts."""
        target = min(up_among(loads), key=lambda target: (loads[target], (target - self.turn) % len(loads)))
        self.turn = target + 1
        return target


class TwoChoices(Heedless):
    """The less loaded of two random ones: almost as even as the least loaded of all, for two questions.

    Args:
        seed: the same choices for the same seed.
        d: how many different targets it looks at; all, if fewer are up.

    Raises:
        ValueError: if d is below 1.

    Source: Azar, Broder, Karlin and Upfal, "Balanced Allocations", SIAM Journal on Computing 1999; Mitzenmacher, "The
    Power of Two Choices in Randomized Load Balancing", IEEE TPDS 2001.
    """

    def __init__(self, seed: int, d: int = 2) -> None:
        if d < 1:
            raise ValueError(f"d must be at least 1 target, got {d!r}")
        self.d, self._rng = d, random.Random(seed)

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """The least loaded of d; among equals the one drawn first."""
        up = up_among(loads)
        return min(self._rng.sample(up, min(self.d, len(up))), key=loads.__getitem__)


class Weighted(Heedless):
    """Smooth weighted round robin: shares by weight, and a target's turns spread as evenly as that allows.

    Every target that is up earns its weight; the richest is chosen and pays what all of them earned.

    Args:
        weights: of each target, above 0.

    Raises:
        ValueError: if there is none, or one is not above 0.

    Cost: O(n). With whole weights, every sum(weights) choices give each target exactly its weight.

    Source: nginx, ngx_http_upstream_round_robin.c ("smooth weighted round-robin", 2012).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights are finite and above 0, one a target, got {list(weights)}")
        self.weights, self.credit = tuple(weights), [0] * len(weights)

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """The richest that is up; among equals the first."""
        up = up_among(loads, len(self.weights))
        for target in up:
            self.credit[target] += self.weights[target]
        chosen = max(up, key=self.credit.__getitem__)
        self.credit[chosen] -= sum(self.weights[target] for target in up)
        return chosen

    def check_invariants(self) -> None:
        """What is paid is what is earned."""
        assert abs(sum(self.credit)) <= 1e-9 * sum(self.weights), f"credits {self.credit} do not add up to 0"


def own_scores(key: Sequence[float]) -> Sequence[float]:
    """The affinity of a key that is its row of scores: what a router makes of a token."""
    return key


class Feedback:
    """A key has an affinity for every target, a target has a bias; the largest sum wins, and load moves the biases.

    Args:
        bias: of each target, or how many targets begin with 0.
        rate: how far one window moves a bias, 0 or more.
        rule: "sign" moves bias i by rate · sign(mean - load i), "proportional" by rate · (mean - load i) / mean.
        affinity: key → score of each target; by default the key is that row.

    Attributes:
        bias: as the windows so far have left it.

    Raises:
        ValueError: if there is no target, a bias is not finite, or a rate or a rule is none.

    Cost: O(n), plus the affinity.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024, arXiv:2408.15664,
    algorithm 1; DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    def __init__(
        self, bias: Sequence[float] | int, rate: float, rule: str = "sign", affinity: Affinity = own_scores
    ) -> None:
        self.bias = [0.0] * bias if isinstance(bias, int) else [float(value) for value in bias]
        if not self.bias or not all(map(math.isfinite, self.bias)):
            raise ValueError(f"bias has one finite number a target, or says how many targets there are; got {bias!r}")
        if rule not in RULES or not 0 <= rate < math.inf:
            raise ValueError(f"rule is one of {RULES} and rate finite and not negative, got {rule!r} and {rate!r}")
        self.rate, self.rule, self.affinity = rate, rule, affinity

    def choose(self, key: Any, loads: Sequence[float]) -> int:
        """The largest affinity + bias of those that are up; among equals the first."""
        return self.choose_many(key, loads, 1)[0]

    def choose_many(self, key: Any, loads: Sequence[float], k: int) -> list[int]:
        """The k largest of those that are up, largest first; among equals the first.

        Raises:
            NoTarget: if fewer than k are up.
            ValueError: if k is below 1, or the loads or the scores are not one a target.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k!r}")
        up, scores = up_among(loads, len(self.bias), k), self.affinity(key)
        if len(scores) != len(self.bias):
            raise ValueError(f"a key has one score for each of {len(self.bias)} targets, got {len(scores)}")
        total = [-(score + bias) for score, bias in zip(scores, self.bias, strict=True)]
        return [min(up, key=total.__getitem__)] if k == 1 else sorted(up, key=total.__getitem__)[:k]

    def observe(self, loads: Sequence[float]) -> None:
        """Move the biases of those that are up towards equal loads; without any load nothing moves.

        Counts are compared with their mean exactly, as long as n times the largest is below 2⁵³.

        Raises:
            ValueError: if the loads are not one a target.
        """
        if len(loads) != len(self.bias):
            raise ValueError(f"this policy was made for {len(self.bias)} targets, got the loads of {len(loads)}")
        seen = {target: float(load) for target, load in enumerate(loads) if load < math.inf}
        total = sum(seen.values())
        for target, load in seen.items() if total else ():
            excess = len(seen) * load - total  # n · (load - mean), without rounding
            step = (excess > 0) - (excess < 0) if self.rule == "sign" else excess / total
            self.bias[target] -= self.rate * step

    def check_invariants(self) -> None:
        """Biases are finite."""
        assert all(map(math.isfinite, self.bias)), f"biases {self.bias}"


def assign(policy: Policy, keys: Iterable[Any], num_targets: int, window: int | None = None) -> list[int]:
    """Send a stream of keys through a policy; the load of a target is what it was given so far.

    Args:
        policy: changed by what it does.
        keys: one a request or a token.
        num_targets: 1 or more.
        window: keys after which the policy observes what each target got of them; None for never.

    Returns:
        How many keys each target was given.

    Raises:
        ValueError: if window is below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window has 1 key or more, got {window!r}")
    counts, before = [0] * num_targets, [0] * num_targets
    for number, key in enumerate(keys, 1):
        counts[policy.choose(key, counts)] += 1
        if window and number % window == 0:
            policy.observe([now - then for now, then in zip(counts, before, strict=True)])
            before = counts.copy()
    return counts
