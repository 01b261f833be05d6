"""Differences between two groups of runs, seed by seed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
ROUNDING = 1e-9  # accuracies are multiples of one in the number of test images: below it nothing differs


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference and how well it is known.

    Args:
        num_seeds: those that both have, at least 2.
        mean: over them.
        low: end of the confidence interval.
        high: its other end.
    """

    num_seeds: int
    mean: float
    low: float
    high: float

    @property
    def constant(self) -> bool:
        """Whether all seeds differ alike, so that the interval has no width and says nothing."""
        return self.low == self.high


def paired_difference(ours: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """The mean of `ours` - `reference` over common seeds with a 95 % confidence interval; None below two of them.

    Student's t for pairs: with the n differences' mean m and standard deviation s (of a sample, n - 1), the interval is
    m ± t(0.975, n - 1) s / sqrt(n). What a seed does to both (its partition, its initial weights, its public images)
    cancels. It takes the differences to be about normal; at n = 2 the t is 12.7, at 3 it is 4.3, at 5 it is 2.8.

    Args:
        ours: a value for each seed.
        reference: likewise.
    """
    differences = np.array([ours[seed] - reference[seed] for seed in ours if seed in reference])
    n = len(differences)
    if n < 2:
        return None
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1)) if np.ptp(differences) > ROUNDING else 0.0
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(n)
    return Difference(num_seeds=n, mean=mean, low=mean - half, high=mean + half)
