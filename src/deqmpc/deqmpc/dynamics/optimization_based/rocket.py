"""Rocket that lands on its engine: a rigid body whose thrust vector acts at its tail.

State x (12): position p (m, world), attitude r (MRP, body -> world), velocity v (m/s, world), rates w (rad/s, body).
Input F (3): thrust (N, body), the third along the rocket.

  p' = v
  r' = 1/4 ((1 - s) w + 2 r x w + 2 (r.w) r)                   s = r.r
  v' = R F / mass - g e_z
  J w' = (l F_2, -l F_1, 0) - w x J w
  R = E + (4 (1 - s) [r]x + 8 [r]x [r]x) / (1 + s)^2

The step is the implicit midpoint rule, x+ = x + h f((x + x+)/2, F): second order, and it keeps the momentum and the
energy of a free rotation. w of deqmpc.solvers.cone_program is x+ alone; the limits of the thrust are a projection
before it (deqmpc.dynamics.optimization_based.projection). Constants: Howell et al.
"""

from __future__ import annotations

from dataclasses import dataclass

from deqmpc.dynamics.equations import Scalars
from deqmpc.solvers.cone_program import Cones


@dataclass(frozen=True)
class Rocket:
    """The equations above."""

    h: float = 0.05  # s, step
    mass: float = 1.0  # kg
    length: float = 1.0  # m, from the engine to the centre of mass, l
    inertia: tuple[float, float, float] = (1.0 / 12.0, 1.0 / 12.0, 1e-5)  # kg m^2, principal, body axes
    gravity: float = 9.81  # m/s^2
    n = 12
    m = 3
    memory = 0
    size = 12
    parameters = 15
    cones = Cones()

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (12 scalars) under the thrust u."""
        rx, ry, rz, vx, vy, vz, wx, wy, wz = x[3:12]
        fx, fy, fz = u
        jx, jy, jz = self.inertia
        s, rw = rx * rx + ry * ry + rz * rz, rx * wx + ry * wy + rz * wz
        c, k = 1 - s, 1 / (self.mass * (1 + s) ** 2)
        ax, ay, az = ry * fz - rz * fy, rz * fx - rx * fz, rx * fy - ry * fx  # r x F
        bx, by, bz = ry * az - rz * ay, rz * ax - rx * az, rx * ay - ry * ax  # r x (r x F)
        return [
            vx, vy, vz,
            (c * wx + 2 * (ry * wz - rz * wy) + 2 * rw * rx) / 4,
            (c * wy + 2 * (rz * wx - rx * wz) + 2 * rw * ry) / 4,
            (c * wz + 2 * (rx * wy - ry * wx) + 2 * rw * rz) / 4,
            fx / self.mass + k * (4 * c * ax + 8 * bx),
            fy / self.mass + k * (4 * c * ay + 8 * by),
            fz / self.mass + k * (4 * c * az + 8 * bz) - self.gravity,
            (self.length * fy - (jz - jy) * wy * wz) / jx,
            (-self.length * fx - (jx - jz) * wz * wx) / jy,
            -(jy - jx) * wx * wy / jz,
        ]

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """x+ - x - h f((x + x+)/2, F)."""
        x, u = theta[:self.n], theta[self.n:]
        rate = self.derivative([(a + b) / 2 for a, b in zip(x, w, strict=True)], u)
        return [b - a - self.h * d for a, b, d in zip(x, w, rate, strict=True)]

    def start(self, theta: Scalars) -> list:
        """The present state."""
        return list(theta[:self.n])
