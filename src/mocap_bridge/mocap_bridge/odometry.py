"""Pose samples -> position, attitude, velocity and body rates, or the reason why not.

A Kalman filter with white jerk on each axis, exact for any interval dt between samples:

    x = (p, v, a),  x' = F x + w,  F = [1 dt dt^2/2; 0 1 dt; 0 0 1],  z = p + n,
    E w w^T = q [dt^5/20 dt^4/8 dt^3/6; dt^4/8 dt^3/3 dt^2/2; dt^3/6 dt^2/2 dt],  E n n = r^2

The three axes have the same noise and so share one covariance P (3, 3). Attitude is the same filter in
the tangent space of the estimate, with w the body rates and b their derivative:

    Q' = Q Exp(w dt + b dt^2 / 2),  w' = w + b dt,  e = Log(Q'^-1 Q_measured),
    Q = Q' Exp(k_p e),  w = w' + k_v e,  b = b' + k_a e

(Exp, Log: rotation vector <-> quaternion.) Gains of an innovation e beyond `huber` standard deviations
are scaled by huber / |e| (Huber's influence function), so that one late or early stamp does not become a
velocity. A constant acceleration is followed without a lag.

A sample is refused when it says what cannot be: numbers that are not finite, a quaternion without a
direction, a time that does not advance, the same pose again and again, a motion beyond the limits

    |p - p_last| > max_speed dt + position_margin,    angle > max_rate dt + angle_margin,
    |p - (p_last + v dt)| > max_acceleration dt^2 / 2 + position_margin    (once v is known).

A place that is refused but consistent with itself for `reaccept` samples is taken as the truth, and the
filter starts again there.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from deqmpc.types import RigidBodyState

REASONS = ('not_finite', 'bad_quaternion', 'duplicate', 'out_of_order', 'frozen', 'jump', 'settling')


@dataclass(frozen=True)
class OdometrySettings:
    """What a Crazyflie can do and how well it is seen."""

    max_speed: float = 4.0  # m/s; faster motion between samples is a jump
    max_acceleration: float = 30.0  # m/s^2; more between samples is a jump
    position_margin: float = 0.03  # m added to both: noise, and stamp jitter times speed
    max_rate: float = 20.0  # rad/s; faster turning between samples is a jump
    angle_margin: float = 0.35  # rad added to it
    reaccept: int = 10  # samples in a row, consistent with each other, that make a jump the truth
    frozen: int = 10  # identical poses in a row from which on they are refused; 0 never refuses
    gap: float = 0.05  # s between accepted samples from which on it counts as a gap
    restart: float = 0.5  # s without an accepted sample after which the filter starts from nothing
    settle: int = 3  # samples after a start before a velocity is given
    position_noise: float = 3e-4  # m, standard deviation of a position sample
    angle_noise: float = 3e-3  # rad, standard deviation of an attitude sample
    jerk: float = 15.0  # m/s^3/sqrt(Hz), density of the white jerk
    angular_jerk: float = 150.0  # rad/s^3/sqrt(Hz), density of the white angular jerk
    huber: float = 3.0  # standard deviations beyond which an innovation loses weight


@dataclass(frozen=True)
class FilterResult:
    """What became of one sample."""

    state: RigidBodyState | None  # None when refused or settling
    reason: str = ''  # one of REASONS when there is no state
    accepted: bool = True  # the pose itself is believed (it is while settling)
    gap: float = 0.0  # s since the accepted sample before, when that is a gap
    flipped: bool = False  # the quaternion came with the other sign than the one before


@dataclass
class FilterStatistics:
    """Counts since the start."""

    accepted: int = 0
    rejected: Counter = field(default_factory=Counter)  # reason -> count
    gaps: int = 0
    longest_gap: float = 0.0  # s
    last_gap: float = 0.0  # s
    sign_flips: int = 0
    restarts: int = 0


class _Covariance:
    """P of the white-jerk model and the gains it gives. Plain floats: at this size NumPy is the cost."""

    def __init__(self, q: float, r: float, huber: float, v: float, a: float):
        self.q, self.r2, self.huber = q, r * r, huber
        self.pp, self.pv, self.pa = r * r, 0.0, 0.0  # upper triangle of P
        self.vv, self.va, self.aa = v * v, 0.0, a * a

    def predict(self, dt: float) -> None:
        """P = F P F^T + Q, row by row."""
        q, h = self.q, 0.5 * dt * dt
        pp, pv, pa = (self.pp + dt * self.pv + h * self.pa, self.pv + dt * self.vv + h * self.va,
                      self.pa + dt * self.va + h * self.aa)  # row p of F P
        vv, va = self.vv + dt * self.va, self.va + dt * self.aa  # row v of F P
        self.pp = pp + dt * pv + h * pa + q * dt ** 5 / 20.0
        self.pv = pv + dt * pa + q * dt ** 4 / 8.0
        self.pa = pa + q * dt ** 3 / 6.0
        self.vv = vv + dt * va + q * dt ** 3 / 3.0
        self.va = va + q * h
        self.aa += q * dt

    def correct(self, e: np.ndarray) -> tuple[float, float, float]:
        """Gains for position, velocity and acceleration given the innovation e (3,)."""
        s = self.pp + self.r2
        size = math.sqrt(float(e @ e) / (3.0 * s))
        weight = min(1.0, self.huber / size) / s if size > 0.0 else 1.0 / s
        kp, kv, ka = weight * self.pp, weight * self.pv, weight * self.pa
        self.vv -= kv * self.pv
        self.va -= kv * self.pa
        self.aa -= ka * self.pa
        self.pp, self.pv, self.pa = self.pp * (1.0 - kp), self.pv * (1.0 - kp), self.pa * (1.0 - kp)
        return kp, kv, ka


@dataclass(frozen=True)
class _Sample:
    stamp: float
    position: np.ndarray
    quaternion: np.ndarray


@dataclass
class _Run:
    """Refused samples in a row that are consistent with each other."""

    newest: _Sample | None = None
    length: int = 0

    def add(self, sample: _Sample, consistent: bool) -> int:
        self.newest, self.length = sample, self.length + 1 if consistent else 1
        return self.length


def _multiply(a, b):
    x, y, z, w = a.tolist()  # floats: arithmetic on NumPy scalars is several times slower
    p, q, r, s = b.tolist()
    return np.array([w * p + s * x + y * r - z * q, w * q + s * y + z * p - x * r,
                     w * r + s * z + x * q - y * p, w * s - x * p - y * q - z * r])


def _exp(v):
    x, y, z = v.tolist()
    angle = math.sqrt(x * x + y * y + z * z)
    k = math.sin(0.5 * angle) / angle if angle > 1e-9 else 0.5
    return np.array([k * x, k * y, k * z, math.cos(0.5 * angle)])


def _log(q):
    x, y, z, w = q.tolist() if q[3] >= 0.0 else (-q).tolist()
    sine = math.sqrt(x * x + y * y + z * z)
    k = 2.0 * math.atan2(sine, w) / sine if sine > 1e-9 else 2.0
    return np.array([k * x, k * y, k * z])


def _conjugate(q):
    return np.array([-q[0], -q[1], -q[2], q[3]])


def _angle(a, b):
    return 2.0 * math.acos(min(1.0, abs(float(a @ b))))


class OdometryFilter:
    """Feeds on the pose of one body, sample by sample. Takes stamps, never asks a clock."""

    def __init__(self, settings: OdometrySettings | None = None):
        self.settings = settings or OdometrySettings()
        self.statistics = FilterStatistics()
        self.reset()

    def reset(self) -> None:
        """Forget the motion, keep the statistics. The next sound sample is accepted where it is."""
        self._last: _Sample | None = None  # newest accepted
        self._jump, self._backward = _Run(), _Run()  # refused for their place, refused for their time
        self._same = 0  # identical poses in a row
        self._age = 0  # accepted samples since the filter started

    def update(self, stamp: float, position: np.ndarray, quaternion: np.ndarray) -> FilterResult:
        """One sample: stamp (s), position (3,) m in world, quaternion (4,) xyzw body -> world of any sign."""
        position, quaternion = np.asarray(position, dtype=float), np.asarray(quaternion, dtype=float)
        if not (math.isfinite(stamp) and math.isfinite(position.sum()) and math.isfinite(quaternion.sum())):
            return self._refuse('not_finite')
        norm = math.sqrt(quaternion @ quaternion)
        if not 0.9 < norm < 1.1:
            return self._refuse('bad_quaternion')
        quaternion = quaternion / norm
        sample, last = _Sample(float(stamp), position, quaternion), self._last
        if last is None:
            return self._start(sample, 0.0)
        dt = sample.stamp - last.stamp
        if dt <= 0.0:
            # A clock that was set back would otherwise silence the filter for as long.
            before = self._backward.newest
            consistent = before is not None and before.stamp < sample.stamp
            if self._backward.add(sample, consistent) >= self.settings.reaccept:
                return self._start(sample, 0.0)
            return self._refuse('duplicate' if dt == 0.0 else 'out_of_order')
        same = position.tolist() == last.position.tolist() and quaternion.tolist() == last.quaternion.tolist()
        self._same = self._same + 1 if same else 0
        if 0 < self.settings.frozen <= self._same:
            return self._refuse('frozen')
        if dt > self.settings.restart:
            return self._start(sample, dt)
        possible = self._reachable(last, sample) and self._expected(sample, dt)
        if not possible or self._nearer_to_jump(sample, dt):
            before = self._jump.newest
            consistent = (before is not None and before.stamp < sample.stamp
                          and self._reachable(before, sample))
            if self._jump.add(sample, consistent) >= self.settings.reaccept:
                return self._start(sample, dt)
            return self._refuse('jump')
        return self._accept(sample, dt)

    # --- judging a sample ---------------------------------------------------------------------------

    def _reachable(self, a: _Sample, b: _Sample) -> bool:
        s, dt, d = self.settings, b.stamp - a.stamp, b.position - a.position
        return (math.sqrt(d @ d) <= s.max_speed * dt + s.position_margin
                and _angle(a.quaternion, b.quaternion) <= s.max_rate * dt + s.angle_margin)

    def _expected(self, sample: _Sample, dt: float) -> bool:
        if self._age < self.settings.settle:
            return True
        s, d = self.settings, sample.position - self._p - dt * self._v
        return math.sqrt(d @ d) <= 0.5 * s.max_acceleration * dt * dt + s.position_margin

    def _nearer_to_jump(self, sample: _Sample, dt: float) -> bool:
        """True while a refused place explains the sample better than the motion before it does: the reach
        of the limits grows with time, and would let a jump in as a very fast flight."""
        jump = self._jump.newest
        if jump is None or jump.stamp >= sample.stamp or not self._reachable(jump, sample):
            return False
        expected = self._p + dt * self._v
        far, near = sample.position - expected, sample.position - jump.position
        turn_far = _angle(_multiply(self._q, _exp(dt * self._w)), sample.quaternion)
        turn_near = _angle(jump.quaternion, sample.quaternion)
        s = self.settings
        return (math.sqrt(near @ near) / s.position_margin + turn_near / s.angle_margin
                < math.sqrt(far @ far) / s.position_margin + turn_far / s.angle_margin)

    def _refuse(self, reason: str) -> FilterResult:
        self.statistics.rejected[reason] += 1
        return FilterResult(None, reason, accepted=False)

    # --- taking a sample ----------------------------------------------------------------------------

    def _start(self, sample: _Sample, dt: float) -> FilterResult:
        s = self.settings
        if self._last is not None:
            self.statistics.restarts += 1
        self.reset()
        self._p, self._v, self._a = sample.position, np.zeros(3), np.zeros(3)
        self._q, self._w, self._b = sample.quaternion, np.zeros(3), np.zeros(3)
        self._linear = _Covariance(s.jerk ** 2, s.position_noise, s.huber, s.max_speed, 10.0)
        self._angular = _Covariance(s.angular_jerk ** 2, s.angle_noise, s.huber, s.max_rate, 100.0)
        return self._result(sample, dt, False)

    def _accept(self, sample: _Sample, dt: float) -> FilterResult:
        flipped = float(self._last.quaternion @ sample.quaternion) < 0.0
        self.statistics.sign_flips += flipped

        self._linear.predict(dt)
        self._p = self._p + dt * self._v + 0.5 * dt * dt * self._a
        self._v = self._v + dt * self._a
        e = sample.position - self._p
        kp, kv, ka = self._linear.correct(e)
        self._p, self._v, self._a = self._p + kp * e, self._v + kv * e, self._a + ka * e

        self._angular.predict(dt)
        self._q = _multiply(self._q, _exp(dt * self._w + 0.5 * dt * dt * self._b))
        self._w = self._w + dt * self._b
        e = _log(_multiply(_conjugate(self._q), sample.quaternion))
        kp, kv, ka = self._angular.correct(e)
        q = _multiply(self._q, _exp(kp * e))
        self._q, self._w, self._b = q / math.sqrt(q @ q), self._w + kv * e, self._b + ka * e

        self._jump, self._backward = _Run(), _Run()
        s = self.settings
        if self._v @ self._v > (2.0 * s.max_speed) ** 2 or self._w @ self._w > (2.0 * s.max_rate) ** 2:
            # Samples within the limits, a motion far beyond them: the estimate has run away.
            return self._start(sample, dt)
        return self._result(sample, dt, flipped)

    def _result(self, sample: _Sample, dt: float, flipped: bool) -> FilterResult:
        t = self.statistics
        gap = dt if dt > self.settings.gap else 0.0
        if gap:
            t.gaps, t.last_gap, t.longest_gap = t.gaps + 1, gap, max(t.longest_gap, gap)
        t.accepted += 1
        self._last = sample
        self._age += 1
        if self._age < self.settings.settle:
            return FilterResult(None, 'settling', gap=gap, flipped=flipped)
        state = RigidBodyState(sample.stamp, self._p, self._q, self._v, self._w)
        return FilterResult(state, gap=gap, flipped=flipped)
