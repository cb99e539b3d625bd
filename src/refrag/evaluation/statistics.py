"""Intervals that assume no distribution: of medians of noisy timings by order statistics, of means of scores by the bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


def mean_interval(values: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean with the bounds of its 95 % interval: percentiles of the means of `resamples` samples with replacement. NaN without values."""
    if not values:
        return float("nan"), float("nan"), float("nan")
    given, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = np.concatenate([given[rng.integers(0, len(given), (size, len(given)))].mean(1) for size in _portions(resamples, len(given))])
    return float(given.mean()), float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def _portions(resamples: int, count: int) -> list[int]:
    """Samples to draw at a time, so that a million values need no gigabytes."""
    size = max(1, 2_000_000 // count)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def paired_difference(values: Sequence[float], others: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` less mean of `others`, entry i of both about the same question, with its 95 % interval.

    Questions are resampled, each with both of its values: far narrower than from two intervals where the systems err alike.
    """
    assert len(values) == len(others), "a pair a question"
    return mean_interval([a - b for a, b in zip(values, others, strict=True)], resamples=resamples, seed=seed)
