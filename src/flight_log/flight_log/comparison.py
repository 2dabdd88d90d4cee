"""Policies beside each other: each with its intervals, and in pairs on equal starts.

Trials are grouped by a key of their bags' metadata (`policy`). Two trials of different groups are a pair when they
agree in everything that says how the trial was set up (START_KEYS): the same spheres, start pose and noise. Pairs take
the difference between starts out of the comparison.

  share of failures   Wilson's 95 % interval
  return              mean, 95 % bootstrap interval over trials
  difference          mean over pairs of return(first) - return(second), 95 % bootstrap interval over pairs
  failures in pairs   McNemar's exact test of those pairs in which only one failed
A trial that never engaged has earned nothing: its return is 0.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from deqmpc.statistics import bootstrap_mean, mcnemar, wilson
from flight_log import metrics
from flight_log.evaluation import Evaluation, earned

START_KEYS = ('mode', 'protocol', 'seed', 'start', 'obstacles', 'max_steps')


@dataclass(frozen=True)
class Group:
    """The trials of one policy."""

    name: str
    trials: int
    failures: int
    failure_share: float
    failure_low: float
    failure_high: float
    return_mean: float
    return_low: float
    return_high: float
    return_sd: float  # sample standard deviation
    normalised_mean: float  # of the largest possible return
    clearance_min: float  # m, the least of all trials
    final_mean: float  # m from the goal in the last second, mean over trials
    tracking_rms: float  # m
    solve_ms_p50: float  # median of the trials' medians
    solve_ms_p99: float  # largest of the trials' 99 % values
    deadline_misses: int


@dataclass(frozen=True)
class Pair:
    """Two policies on equal starts."""

    first: str
    second: str
    pairs: int
    difference: float  # mean return of the first less that of the second
    low: float
    high: float
    only_first_failed: int
    only_second_failed: int
    p: float  # McNemar's

    @property
    def verdict(self) -> str:
        """In words, at the 95 % level. Below six pairs no sign test could reach it, whatever the interval says."""
        if self.pairs < 6:
            return 'too few pairs'
        if self.low <= 0.0 <= self.high:
            return 'no difference shown'
        return f'{self.first if self.low > 0 else self.second} better'


def grouped(evaluations: list[Evaluation], by: str = 'policy') -> dict[str, list[Evaluation]]:
    """The trials under the value of `by` in their metadata ('' where it is missing), in the order of appearance."""
    groups: dict[str, list[Evaluation]] = {}
    for e in evaluations:
        if e.mode == 'trial':
            groups.setdefault(e.metadata.get(by, ''), []).append(e)
    return groups


def summary(name: str, trials: list[Evaluation]) -> Group:
    """One group. ValueError without trials."""
    if not trials:
        raise ValueError(f'{name}: no trials to summarise')
    failures = sum(e.failure is not None for e in trials)
    low, high = wilson(failures, len(trials))
    returns = np.array([earned(e) for e in trials])
    scale = np.array([metrics.MAX_REWARD * e.max_steps for e in trials])

    def over(name, f):
        values = np.array([getattr(e, name) for e in trials], dtype=float)
        values = values[np.isfinite(values)]
        return float(f(values)) if len(values) else math.nan
    return Group(
        name, len(trials), failures, failures / len(trials), low, high, float(returns.mean()), *bootstrap_mean(returns),
        float(returns.std(ddof=1)) if len(trials) > 1 else math.nan, float((returns / scale).mean()),
        over('min_clearance', np.min), over('final_mean', np.mean), over('tracking_rms', metrics.rms),
        over('solve_ms_p50', np.median), over('solve_ms_p99', np.max), sum(e.deadline_misses for e in trials))


def start_of(evaluation: Evaluation) -> tuple[str, ...] | None:
    """What identifies a trial's start; None where the bag says neither seed nor start."""
    m = evaluation.metadata
    return tuple(m.get(k, '') for k in START_KEYS) if m.get('seed') or m.get('start') else None


def pair(first: str, second: str, groups: dict[str, list[Evaluation]]) -> Pair:
    """Compare two groups on the starts that both have flown once or more (the first trial of each counts)."""
    def by_start(name):
        found: dict[tuple, Evaluation] = {}
        for e in groups[name]:
            if (start := start_of(e)) is not None:
                found.setdefault(start, e)
        return found
    a, b = by_start(first), by_start(second)
    starts = [s for s in a if s in b]
    difference = np.array([earned(a[s]) - earned(b[s]) for s in starts])
    failed = [(a[s].failure is not None, b[s].failure is not None) for s in starts]
    alone = failed.count((True, False)), failed.count((False, True))
    return Pair(first, second, len(starts), float(difference.mean()) if starts else math.nan,
                *bootstrap_mean(difference), *alone, mcnemar(*alone))


@dataclass(frozen=True)
class Comparison:
    """All groups, and every two of them."""

    by: str
    groups: list[Group]
    pairs: list[Pair]


def compare(evaluations: list[Evaluation], by: str = 'policy') -> Comparison:
    """Compare the trials by a key of their metadata."""
    groups = grouped(evaluations, by)
    return Comparison(by, [summary(name, trials) for name, trials in groups.items()],
                      [pair(a, b, groups) for a, b in itertools.combinations(groups, 2)])
