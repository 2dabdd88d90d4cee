"""Acrobot with a stop at the elbow: two links, a torque at the joint between them.

Coordinates q (2): q1 of the first link from hanging down, q2 of the elbow (rad). Input u (1): torque impulse at the
elbow (N m s). With inertias J about the links' centres at lc from their joints,

  M11 = J1 + J2 + m2 l1^2 + 2 m2 l1 lc2 cos q2     M12 = J2 + m2 l1 lc2 cos q2     M22 = J2
  V = -m1 g lc1 cos q1 - m2 g (l1 cos q1 + lc2 cos(q1 + q2))

(the paper's matrix: its J are what other texts call J + m lc^2.) Joints lose the impulse h b v. The stop keeps
phi = (pi/2 - q2, q2 + pi/2) >= 0 by impulses lambda >= 0 along dphi/dq with lambda o phi(q2) = mu.
w = (q(2), lambda(2), s(2)) with s = phi(q); w = q without the stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deqmpc.dynamics.equations import Scalars, cos
from deqmpc.dynamics.optimization_based.variational import Variational
from deqmpc.solvers.cone_program import Cones


@dataclass(frozen=True)
class Acrobot(Variational):
    """The equations above; constants of Howell et al."""

    stop: float | None = math.pi / 2  # rad, largest |q2|; None: the elbow turns freely
    m1: float = 1.0  # kg
    m2: float = 1.0  # kg
    J1: float = 0.333  # kg m^2
    J2: float = 0.333  # kg m^2
    l1: float = 1.0  # m
    lc1: float = 0.5  # m
    lc2: float = 0.5  # m
    g: float = 9.81  # m/s^2
    b: float = 0.5  # N m s, viscous friction of both joints
    nq = 2
    m = 1

    @property
    def size(self) -> int:
        """Entries of w."""
        return 2 if self.stop is None else 6

    @property
    def cones(self) -> Cones:
        """lambda and s."""
        return Cones() if self.stop is None else Cones(nonnegative=((2, 4), (3, 5)))

    def lagrangian(self, q: Scalars, v: Scalars) -> Any:
        """Kinetic minus potential energy, J."""
        c = self.m2 * self.l1 * self.lc2 * cos(q[1])
        M11, M12, M22 = self.J1 + self.J2 + self.m2 * self.l1 ** 2 + 2 * c, self.J2 + c, self.J2
        kinetic = (M11 * v[0] ** 2 + 2 * M12 * v[0] * v[1] + M22 * v[1] ** 2) / 2
        height = self.m1 * self.lc1 * cos(q[0]) + self.m2 * (self.l1 * cos(q[0]) + self.lc2 * cos(q[0] + q[1]))
        return kinetic + self.g * height

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """Balance of momentum, and s = phi."""
        q0, q1, u = self.split(theta)
        q2 = list(w[:2])
        d = self.momentum_balance(q0, q1, q2)
        d = [a - self.h * self.b * v for a, v in zip(d, self.velocity(q1, q2), strict=True)]
        d[1] += u[0]
        if self.stop is None:
            return d
        below, above, s_below, s_above = w[2:]
        d[1] += above - below
        return [*d, s_below - (self.stop - q2[1]), s_above - (q2[1] + self.stop)]

    def start(self, theta: Scalars) -> list:
        """The present configuration, 1 in the cones."""
        return [*theta[2:4], *[1.0] * (self.size - 2)]
