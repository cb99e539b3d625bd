"""Medians of noisy timings, with intervals that assume no distribution."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Median:
    """A median with its 95 % interval by order statistics (infinite for fewer than 6 values)."""

    median: float
    low: float
    high: float

    def is_steady(self, tolerance: float) -> bool:
        """The interval reaches at most this share of the median to either side."""
        return max(self.high - self.median, self.median - self.low) <= tolerance * abs(self.median)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies, interpolated linearly between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(values: Sequence[float]) -> Median:
    """The median of independent values and an interval that holds the true one in at least 95 of 100 samples.

    The true median lies below the r-th smallest of n values only if fewer than r fall below it: Binomial(n, 1/2) < r.
    """
    ordered, n = sorted(values), len(values)
    tail, rank = 0.0, 0
    while rank < n and tail + math.comb(n, rank) / 2**n <= 0.025:
        tail += math.comb(n, rank) / 2**n
        rank += 1
    low, high = (ordered[rank - 1], ordered[n - rank]) if rank else (-math.inf, math.inf)
    return Median(percentile(ordered, 0.5), low, high)
