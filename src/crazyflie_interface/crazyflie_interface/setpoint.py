# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan at one instant, and the numbers of a full-state setpoint on the radio.

Between the plan's points i and i+1, h = t[i+1] - t[i], u = (t - t[i]) / h in [0, 1):

    p(u) = (2u^3 - 3u^2 + 1) p_i + (u^3 - 2u^2 + u) h v_i + (3u^2 - 2u^3) p_i+1 + (u^3 - u^2) h v_i+1
    v(u) = p'(u) / h                                  (the velocity of the sent path, v_i at the points)
    q(u) = q_i (q_i^-1 q_i+1)^u                       (slerp, the short way round)
    a(u) = (1 - u) a_i + u a_i+1,   w(u) likewise

Before the first point the plan stands at point 0; from the last point on it holds the last position,
level, with the last heading, at rest.

On the radio (crazyflie-firmware crtp_commander_generic.c, fullStateDecoder) position, velocity,
acceleration and body rates are int16 in mm, mm/s, mm/s^2 and mrad/s, so each ends at 32.767 SI units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deqmpc.dynamics import rotation
from deqmpc.types import Plan

INT16_MAX = 32767


@dataclass(frozen=True)
class Setpoint:
    """A full-state setpoint."""

    position: np.ndarray  # (3,) m, world
    velocity: np.ndarray  # (3,) m/s, world
    acceleration: np.ndarray  # (3,) m/s^2, world, kinematic (0 at hover)
    quaternion: np.ndarray  # (4,) x y z w, body -> world, unit norm
    rates: np.ndarray  # (3,) rad/s, body

    @property
    def yaw(self) -> float:
        """Heading (rad)."""
        return float(rotation.yaw(self.quaternion))

    def as_plan(self, stamp: float) -> Plan:
        """A plan of this one point at `stamp` (s), as /<robot>/setpoint carries it."""
        return Plan(stamp, np.zeros(1), self.position[None], self.quaternion[None], self.velocity[None],
                    self.rates[None], self.acceleration[None])


def plan_fault(plan: Plan) -> str:
    """Why `plan` cannot be followed; empty when it can."""
    for name in ('position', 'velocity', 'acceleration', 'quaternion', 'rates', 'time_from_start'):
        if not np.isfinite(getattr(plan, name)).all():
            return f'plan.{name} is not finite'
    if not np.isfinite(plan.stamp):
        return f'plan.stamp is {plan.stamp}'
    t = plan.time_from_start
    if len(t) == 0:
        return 'plan has no points'
    if abs(t[0]) > 1e-9 or (np.diff(t) <= 0).any():
        return f'plan.time_from_start must start at 0 and increase, got {t.tolist()}'
    norm = np.linalg.norm(plan.quaternion, axis=1)
    if (np.abs(norm - 1.0) > 0.01).any():
        return f'plan.quaternion has a norm of {norm[np.argmax(np.abs(norm - 1.0))]:.4g}, expected 1'
    return ''


def slerp(a: np.ndarray, b: np.ndarray, u: float) -> np.ndarray:
    """Rotation the fraction `u` of the short way from unit quaternion a (4,) to b (4,)."""
    cosine = float(a @ b)
    if cosine < 0.0:
        b, cosine = -b, -cosine
    angle = np.arccos(min(cosine, 1.0))
    if angle < 1e-6:  # sin(angle) loses its digits; the chord is the arc to 1e-12
        return rotation.normalize(a + u * (b - a))
    return (np.sin((1.0 - u) * angle) * a + np.sin(u * angle) * b) / np.sin(angle)


def setpoint_at(plan: Plan, t: float) -> Setpoint:
    """The setpoint of `plan` at the instant `t` (s, the plan's clock). The plan must have no
    `plan_fault`."""
    times = plan.time_from_start
    s = max(t - plan.stamp, 0.0)
    if s >= times[-1]:
        level = rotation.from_yaw(rotation.yaw(rotation.normalize(plan.quaternion[-1])))
        return Setpoint(plan.position[-1].copy(), np.zeros(3), np.zeros(3), level, np.zeros(3))
    i = int(np.searchsorted(times, s, side='right')) - 1
    h = times[i + 1] - times[i]
    u = (s - times[i]) / h
    p0, p1, v0, v1 = plan.position[i], plan.position[i + 1], plan.velocity[i], plan.velocity[i + 1]
    position = _hermite(p0, p1, v0, v1, h, u)
    velocity = ((6 * u**2 - 6 * u) * (p0 - p1) / h + (3 * u**2 - 4 * u + 1) * v0 + (3 * u**2 - 2 * u) * v1)
    quaternion = slerp(rotation.normalize(plan.quaternion[i]), rotation.normalize(plan.quaternion[i + 1]), u)
    return Setpoint(position, velocity, (1 - u) * plan.acceleration[i] + u * plan.acceleration[i + 1],
                    quaternion, (1 - u) * plan.rates[i] + u * plan.rates[i + 1])


def positions_at(plan: Plan, t: np.ndarray) -> np.ndarray:
    """Positions (n, 3) m of `plan` at the instants `t` (n,) s: those of `setpoint_at`."""
    times = plan.time_from_start
    s = np.clip(t - plan.stamp, 0.0, times[-1])
    if len(times) == 1:
        return np.tile(plan.position, (len(s), 1))
    i = np.clip(np.searchsorted(times, s, side='right') - 1, 0, len(times) - 2)
    h = (times[i + 1] - times[i])[:, None]
    u = (s - times[i])[:, None] / h
    return _hermite(plan.position[i], plan.position[i + 1], plan.velocity[i], plan.velocity[i + 1], h, u)


def _hermite(p0, p1, v0, v1, h, u):
    return ((2 * u**3 - 3 * u**2 + 1) * p0 + (u**3 - 2 * u**2 + u) * h * v0
            + (3 * u**2 - 2 * u**3) * p1 + (u**3 - u**2) * h * v1)


def setpoint_fault(setpoint: Setpoint) -> str:
    """Why `setpoint` cannot go on the radio; empty when it can.

    A position beyond the int16 range is a fault, because the nearest position the radio can say is
    another place. Velocity, acceleration and rates saturate instead (`si_to_int16_milli`).
    """
    for name in ('position', 'velocity', 'acceleration', 'quaternion', 'rates'):
        if not np.isfinite(getattr(setpoint, name)).all():
            return f'setpoint.{name} is not finite'
    if (np.abs(setpoint.position) > INT16_MAX / 1000).any():
        return f'setpoint position {np.round(setpoint.position, 2).tolist()} m is beyond 32.767 m'
    return ''


def si_to_int16_milli(values: np.ndarray) -> np.ndarray:
    """Finite SI values (m, m/s, m/s^2, rad/s) -> nearest int16 of a thousandth, saturated."""
    return np.clip(np.rint(np.asarray(values, float) * 1000.0), -INT16_MAX, INT16_MAX).astype(np.int16)


def int16_milli_to_cflib_si(milli: np.ndarray) -> list[float]:
    """int16 thousandths -> the SI floats that cflib 0.1.34 packs as exactly these integers.

    cflib computes int(x * 1000), which cuts towards zero: 1.001 becomes 1000. A tenth of a unit away
    from zero is out of reach of the rounding of x * 1000.
    """
    milli = np.asarray(milli, float)
    return [float(x) for x in (milli + 0.1 * np.sign(milli)) / 1000.0]
