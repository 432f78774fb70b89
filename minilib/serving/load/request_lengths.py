"""Request lengths as servers see them: most are short, a few are very long."""

from __future__ import annotations

import numpy as np


def long_tailed(requests: int, mean: float, longest: int, seed: int = 0) -> list[int]:
    """Lengths drawn from a log-normal distribution with sigma 1, cut to 1 … longest.

    Args:
        requests: how many.
        mean: of the distribution before it is cut, in tokens.
        longest: the model's longest sequence, in tokens.
        seed: same seed, same lengths.

    Source: the shape is that of the conversation lengths in Kwon et al. 2023, figure 11; the sigma is an assumption.
    """
    if requests < 0 or mean <= 0 or longest < 1:
        raise ValueError(f"requests ≥ 0, mean > 0 and longest ≥ 1 are needed, got {requests}, {mean} and {longest}")
    sigma = 1.0
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, requests)
    return np.clip(draws.round(), 1, longest).astype(int).tolist()
