"""Intervals and tests of what was counted or measured. NumPy only: imported where torch is not."""

from __future__ import annotations

import math

import numpy as np


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927); z = 1.96 gives 95 %. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: np.ndarray, level: float = 0.95, resamples: int = 10000, seed: int = 0
                   ) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,) (Efron and Tibshirani 1993, ch. 13), the same at
    every call. NaN for fewer than two values. With fewer than about ten values it is too narrow."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // len(values))  # resamples at once: bounded memory for any N
    means = np.concatenate([values[rng.integers(len(values), size=(min(rows, resamples - done), len(values)))].mean(1)
                            for done in range(0, resamples, rows)])
    low, high = np.quantile(means, [0.5 - 0.5 * level, 0.5 + 0.5 * level])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: of the pairs in which exactly one of two failed, were both as likely to be
    the one? 1 where there is no such pair."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)
