"""The firmware's high-level commander: take-off, landing and go-to along 7th-order polynomials.

Each axis and the yaw follow p(t) with given position, velocity and acceleration at both ends and zero jerk at
them (crazyflie-firmware planner.c, pptraj.c). With u = t/T the boundary conditions are solved as a sum
of three basis pairs; body rates come from the jerk by differential flatness (Mellinger and Kumar, 2011):
  f = a + g e3,  bz = f/|f|,  h = (j - (bz . j) bz)/|f|,  w = (-h . by, h . bx, bz_z dyaw/dt).
"""

from __future__ import annotations

import math

from deqmpc.airframe import GRAVITY
from sim_env.commander import NULL, Setpoint

EBUSY = 16  # the supervisor does not allow flight
REFUSED = 1  # the planner's state does not allow the command

IDLE, FLYING, LANDING, DISABLED = 0, 1, 3, 4  # planner states


def polynomial(T: float, x0: float, v0: float, a0: float, x1: float, v1: float, a1: float) -> list[float]:
    """Coefficients c0..c7 of the 7th-order polynomial on [0, T] with position, velocity and acceleration
    (x0, v0, a0) at 0 and (x1, v1, a1) at T, jerk zero at both ends. T <= 0 jumps to the end."""
    if T <= 0.0:
        return [x1, v1, 0.5 * a1, 0.0, 0.0, 0.0, 0.0, 0.0]
    # What c0 + c1 t + c2 t^2 leaves to c4..c7 at t = T, in units of u = t/T.
    r0 = x1 - (x0 + v0 * T + 0.5 * a0 * T * T)
    r1 = (v1 - v0 - a0 * T) * T
    r2 = (a1 - a0) * T * T
    # Solve [1 1 1 1; 4 5 6 7; 12 20 30 42; 24 60 120 210] (c4..c7) = (r0, r1, r2, 0).
    c4 = 35.0 * r0 - 15.0 * r1 + 2.5 * r2
    c5 = -84.0 * r0 + 39.0 * r1 - 7.0 * r2
    c6 = 70.0 * r0 - 34.0 * r1 + 6.5 * r2
    c7 = -20.0 * r0 + 10.0 * r1 - 2.0 * r2
    return [x0, v0, 0.5 * a0, 0.0, c4 / T ** 4, c5 / T ** 5, c6 / T ** 6, c7 / T ** 7]


def derivatives(c: list[float], t: float) -> tuple[float, float, float, float]:
    """Value and first three derivatives of the polynomial `c` at `t`."""
    x = v = a = j = 0.0
    for k in reversed(c):  # Horner's scheme for all four at once
        j = j * t + 3.0 * a
        a = a * t + 2.0 * v
        v = v * t + x
        x = x * t + k
    return x, v, a, j


class HighLevelCommander:
    """Planner state. Times are seconds of simulated time."""

    def __init__(self):
        self.state = IDLE
        self.blocked = True  # by `block`: the drone cannot fly
        self._last = ((0.0,) * 3, (0.0,) * 3, 0.0)  # position, velocity, yaw that a new plan starts from
        self._polynomials = None
        self._begin = self._duration = 0.0

    def stop(self) -> int:
        """Forget the trajectory; while nothing else streams, the motors stop."""
        self.state = IDLE
        return 0

    def block(self, on: bool) -> None:
        """While `on`, the supervisor does not allow flight: commands are refused and the trajectory is forgotten, so
        that a drone that may fly again does not go on with it."""
        if on and self.state != DISABLED:
            self.stop()
        self.blocked = on

    def finished(self, now: float) -> bool:
        """True when there is no trajectory or its time is over."""
        return self._polynomials is None or now - self._begin >= self._duration

    def tell_state(self, estimate) -> None:
        """Start the next plan from the estimate."""
        e = estimate
        self._last = ((e.x, e.y, e.z), (e.vx, e.vy, e.vz), e.yaw)

    def takeoff(self, now: float, height: float, duration: float, yaw: float | None) -> int:
        """Climb to `height` (m, absolute) at the present x and y; only from idle."""
        if self.blocked:
            return EBUSY
        return REFUSED if self.state != IDLE else self._vertical(now, height, duration, yaw, FLYING)

    def land(self, now: float, height: float, duration: float, yaw: float | None) -> int:
        """Descend to `height` (m, absolute), then stop."""
        if self.blocked:
            return EBUSY
        return REFUSED if self.state == LANDING else self._vertical(now, height, duration, yaw, LANDING)

    def go_to(self, now: float, target, yaw: float, duration: float, relative: bool) -> int:
        """Fly to `target` and `yaw`, from the present setpoint or, when idle, from the estimate."""
        if self.blocked:
            return EBUSY
        zero = (0.0, 0.0, 0.0)
        if self.state == IDLE or self.state == DISABLED:
            (position, velocity, heading), acceleration, turn = self._last, zero, 0.0
        else:
            goal = self._evaluate(now)
            position, velocity, acceleration = goal.position, goal.velocity, goal.acceleration
            heading, turn = goal.yaw, goal.rates[2]
        if relative:
            target, yaw = [a + b for a, b in zip(target, position, strict=True)], yaw + heading
        self._plan(now, duration, (position, velocity, acceleration, heading, turn), target, yaw, FLYING)
        return 0

    def setpoint(self, now: float, estimate) -> Setpoint | None:
        """The present setpoint; the null setpoint when idle; None from a trajectory that is not a number, which
        disables the planner until its next command: the last setpoint then grows old."""
        if self.state == LANDING and self.finished(now):
            self.state = IDLE
        if self.state == IDLE:
            self.tell_state(estimate)
            return NULL
        goal = self._evaluate(now)
        if not all(map(math.isfinite, goal.position)):
            self.state = DISABLED
            return None
        self._last = (goal.position, goal.velocity, goal.yaw)
        return goal

    def _vertical(self, now, height, duration, yaw, state):
        position, _, heading = self._last
        zero = (0.0, 0.0, 0.0)
        self._plan(now, duration, (position, zero, zero, heading, 0.0), (position[0], position[1], height),
                   heading if yaw is None else yaw, state)
        return 0

    def _plan(self, now, duration, start, target, yaw, state):
        position, velocity, acceleration, heading, turn = start
        heading = math.remainder(heading, 2.0 * math.pi)
        goal_yaw = heading + math.remainder(yaw - heading, 2.0 * math.pi)  # the short way round
        self._polynomials = [
            polynomial(duration, position[i], velocity[i], acceleration[i], float(target[i]), 0.0, 0.0)
            for i in range(3)]
        self._polynomials.append(polynomial(duration, heading, turn, 0.0, goal_yaw, 0.0, 0.0))
        self._begin, self._duration, self.state = now, max(0.0, duration), state

    def _evaluate(self, now) -> Setpoint:
        t = now - self._begin
        over = t > self._duration
        (x, vx, ax, jx), (y, vy, ay, jy), (z, vz, az, jz), (yaw, turn, _, _) = (
            derivatives(c, min(t, self._duration)) for c in self._polynomials)
        if over:
            vx = vy = vz = ax = ay = az = jx = jy = jz = turn = 0.0
        fz = az + GRAVITY
        f = math.sqrt(ax * ax + ay * ay + fz * fz) or 1.0
        bz = (ax / f, ay / f, fz / f)
        c, s = math.cos(yaw), math.sin(yaw)
        by = (-bz[2] * s, bz[2] * c, bz[0] * s - bz[1] * c)
        n = math.sqrt(by[0] ** 2 + by[1] ** 2 + by[2] ** 2) or 1.0
        by = (by[0] / n, by[1] / n, by[2] / n)
        bx = (by[1] * bz[2] - by[2] * bz[1], by[2] * bz[0] - by[0] * bz[2], by[0] * bz[1] - by[1] * bz[0])
        along = bz[0] * jx + bz[1] * jy + bz[2] * jz
        h = ((jx - along * bz[0]) / f, (jy - along * bz[1]) / f, (jz - along * bz[2]) / f)
        rates = (-(h[0] * by[0] + h[1] * by[1] + h[2] * by[2]), h[0] * bx[0] + h[1] * bx[1] + h[2] * bx[2],
                 bz[2] * turn)
        return Setpoint(track_position=True, track_height=True, yaw_mode='angle', position=(x, y, z),
                        velocity=(vx, vy, vz), acceleration=(ax, ay, az), rates=rates, yaw=yaw)
