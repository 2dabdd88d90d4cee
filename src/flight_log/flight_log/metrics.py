"""What a trial is worth, as pure functions of arrays.

Notation: N samples of the estimated state, K spheres, M obstacle messages, t in s, positions in m in the
world frame, quaternions (x, y, z, w) body -> world. Definitions with their sources are in README.md.

  x      = (p - g, m, v, w)   position error, MRP attitude, velocity, body rates        (12 numbers)
  cost   = sum_i Q_i x_i^2 / 200,   Q = 10 for the first six, 1 for the last six
  reward = exp(2 - cost / 2), or -cost where cost > 500;   at most e^2 = 7.389
  return = sum of the rewards at the policy ticks up to the first failure
The goal attitude is level with yaw 0, so the MRP itself is the attitude error. |v| is the same in world
and body frame and all its weights are equal, so either may be given. The task's control cost
(R = 1e-8) is left out: a bag holds no motor commands, and its share is below 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deqmpc.dynamics import rotation
from deqmpc.types import Obstacles

Q_POSE, Q_TWIST, COST_SCALE, COST_LIMIT = 10.0, 1.0, 200.0, 500.0
MAX_REWARD = float(np.exp(2.0))


def cost(position: np.ndarray, quaternion: np.ndarray, velocity: np.ndarray, rates: np.ndarray,
         goal: np.ndarray) -> np.ndarray:
    """Cost (N,) of the quadrotor task at states (N, 3), (N, 4), (N, 3), (N, 3) for `goal` (3,)."""
    def square(a):
        return np.sum(np.asarray(a)**2, axis=-1)
    mrp = rotation.mrp_from_quaternion(rotation.normalize(quaternion))
    return (Q_POSE * (square(position - goal) + square(mrp))
            + Q_TWIST * (square(velocity) + square(rates))) / COST_SCALE


def reward(cost: np.ndarray) -> np.ndarray:
    """Reward (N,) of a step with `cost` (N,)."""
    return np.where(cost > COST_LIMIT, -cost, np.exp(2.0 - 0.5 * np.minimum(cost, COST_LIMIT)))


@dataclass(frozen=True)
class SphereTrack:
    """Recorded spheres over time. Rows with fewer than K spheres are filled with NaN."""

    t: np.ndarray  # (M,) s, increasing
    position: np.ndarray  # (M, K, 3) m, world
    radius: np.ndarray  # (M, K) m

    @classmethod
    def of(cls, fields: list[Obstacles], t: list[float]) -> SphereTrack:
        """From M messages valid at `t`."""
        count = max((len(f.radius) for f in fields), default=0)
        position, radius = np.full((len(fields), count, 3), np.nan), np.full((len(fields), count), np.nan)
        for i, f in enumerate(fields):
            position[i, :len(f.radius)], radius[i, :len(f.radius)] = f.position, f.radius
        order = np.argsort(t, kind='stable')
        return cls(np.asarray(t, dtype=float)[order], position[order], radius[order])

    @property
    def moving(self) -> bool:
        """Whether any sphere moved by more than 1 mm."""
        return len(self.t) > 1 and bool(np.nanmax(np.ptp(self.position, axis=0), initial=0.0) > 1e-3)

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (N, K, 3) and radii (N, K) at times t (N,): linear between two messages, held
        before the first, after the last, and where a sphere is only in the earlier of the two."""
        t = np.asarray(t, dtype=float)
        if len(self.t) == 0 or self.position.shape[1] == 0:
            return np.zeros((len(t), 0, 3)), np.zeros((len(t), 0))
        i = np.clip(np.searchsorted(self.t, t, side='right') - 1, 0, len(self.t) - 1)
        j = np.minimum(i + 1, len(self.t) - 1)
        span = np.where(j > i, self.t[j] - self.t[i], 1.0)
        s = np.clip((t - self.t[i]) / np.maximum(span, 1e-9), 0.0, 1.0)[:, None, None]
        between = (1.0 - s) * self.position[i] + s * self.position[j]
        return np.where(np.isnan(between), self.position[i], between), self.radius[i]


def clearance(t: np.ndarray, position: np.ndarray, spheres: SphereTrack) -> tuple[np.ndarray, np.ndarray]:
    """Distance (N,) from each position to the nearest sphere's surface at that time, negative inside,
    and that sphere's index (N,). inf and -1 where there are no spheres."""
    centre, radius = spheres.at(t)
    if centre.shape[1] == 0:
        return np.full(len(t), np.inf), np.full(len(t), -1)
    d = np.linalg.norm(position[:, None, :] - centre, axis=-1) - radius
    d = np.where(np.isnan(d), np.inf, d)
    k = np.argmin(d, axis=1)
    nearest = d[np.arange(len(k)), k]
    return nearest, np.where(np.isfinite(nearest), k, -1)


def latest(t: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """For each of t (N,) the index of the last of `samples` (increasing) that is not later; -1 if none."""
    return np.searchsorted(samples, t, side='right') - 1


def interpolate(t: np.ndarray, samples: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (S, 3) at times `samples` (S,) linearly between samples, at t (N,); NaN outside."""
    inside = (t >= samples[0]) & (t <= samples[-1]) if len(samples) else np.zeros(len(t), bool)
    out = np.full((len(t), 3), np.nan)
    if inside.any():
        out[inside] = np.stack([np.interp(t[inside], samples, values[:, i]) for i in range(3)], axis=1)
    return out


def rms(x: np.ndarray) -> float:
    """Root mean square over finite entries; NaN when there are none."""
    x = x[np.isfinite(x)]
    return float(np.sqrt(np.mean(x**2))) if len(x) else float('nan')


def percentile(x: np.ndarray, q: float) -> float:
    """q-th percentile over finite entries; NaN when there are none."""
    x = x[np.isfinite(x)]
    return float(np.percentile(x, q)) if len(x) else float('nan')


def missed_ticks(t: np.ndarray, period: float) -> int:
    """Ticks that ought to lie between the ticks at t (N,) if they came every `period` s.

    A tick that is late and whose successor keeps the schedule was not missed: the lateness that the next,
    shorter interval gives back is taken off the longer one.
    """
    if len(t) < 2 or period <= 0:
        return 0
    intervals = np.diff(t)
    given_back = np.clip(period - np.append(intervals[1:], period), 0.0, None)
    late = np.clip(intervals - period, 0.0, None)
    return int(np.sum(np.maximum(np.round((intervals - np.minimum(late, given_back)) / period) - 1, 0)))


def gaps(t: np.ndarray, limit: float) -> tuple[int, float]:
    """How many pauses between samples at t (N,) exceed `limit` s, and the longest pause (s)."""
    if len(t) < 2:
        return 0, float('nan')
    pauses = np.diff(t)
    return int(np.sum(pauses > limit)), float(pauses.max())


def counted(counter: np.ndarray) -> int:
    """Increase of a counter (N,) from its first to its last value; a restart (fall) counts from zero."""
    c = counter[np.isfinite(counter)]
    if len(c) < 2:
        return 0
    steps = np.diff(c)
    return int(np.sum(np.where(steps < 0, c[1:], steps)))
