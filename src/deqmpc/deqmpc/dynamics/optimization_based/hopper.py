"""Raibert's hopper in the plane: a body, a leg that turns with it and changes its length, a foot.

Coordinates q (4): body x, z (m), angle a (rad, 0 upright), leg length r (m). Inputs u (2): moment impulse on the body
(N m s), force impulse along the leg (N s), applied as (-u2 sin a, u2 cos a, u1, u2) at the midpoint's angle, as in the
published code. That is 2 u2 on the body and -u2 on the foot, hence u2 from outside; a leg alone is (0, 0, u1, u2).

  foot = (x + r sin a, z - r cos a)
  L = m_b/2 (x'^2 + z'^2) + I_b/2 a'^2 - m_b g z + m_f/2 |foot'|^2 - m_f g foot_z
  phi = (z - R_b, foot_z - R_f, r - r_min, r_max - r)        normal impulses gamma >= 0, gamma o phi(q2) = mu

The impulses act along dphi/dq at the present configuration; friction b of body and foot opposes their tangential
velocity v at the new one, (psi, b) o (s, v) = (mu, 0) with psi = friction gamma. The body's also turns it by R_b b.
The leg's joint loses the impulse c r'.
w = (q(4), gamma(4), phi(4), psi(2), b(2), s(2), v(2)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deqmpc.dynamics.equations import Scalars, cos, sin
from deqmpc.dynamics.optimization_based.variational import Variational
from deqmpc.solvers.cone_program import Cones


@dataclass(frozen=True)
class Hopper(Variational):
    """The equations above; constants of RoboDojo.jl (thowell/RoboDojo.jl, src/robots/hopper/model.jl)."""

    m_b: float = 1.0  # kg, body
    m_f: float = 0.1  # kg, foot
    I_b: float = 0.1  # kg m^2, body
    R_b: float = 0.1  # m, radius of the body
    R_f: float = 0.05  # m, radius of the foot
    r_min: float = 0.25  # m, shortest leg
    r_max: float = 1.0  # m, longest leg
    c: float = 0.1  # N s^2/m, lost impulse of the leg's joint per velocity
    friction: float = 0.5  # coefficient of body and foot on the ground
    g: float = 9.81  # m/s^2
    nq = 4
    m = 2
    size = 20
    cones = Cones(nonnegative=((4, 8), (5, 9), (6, 10), (7, 11)),
                  second_order=(((12, 14), (16, 18)), ((13, 15), (17, 19))))

    def foot(self, q: Scalars) -> list:
        """Position of the foot, m."""
        return [q[0] + q[3] * sin(q[2]), q[1] - q[3] * cos(q[2])]

    def foot_velocity(self, q: Scalars, v: Scalars) -> list:
        """d foot/dt, m/s."""
        return [v[0] + q[3] * cos(q[2]) * v[2] + sin(q[2]) * v[3], v[1] + q[3] * sin(q[2]) * v[2] - cos(q[2]) * v[3]]

    def distances(self, q: Scalars) -> list:
        """phi, m."""
        return [q[1] - self.R_b, self.foot(q)[1] - self.R_f, q[3] - self.r_min, self.r_max - q[3]]

    def lagrangian(self, q: Scalars, v: Scalars) -> Any:
        """Kinetic minus potential energy, J."""
        fx, fz = self.foot_velocity(q, v)
        body = self.m_b * (v[0] ** 2 + v[1] ** 2) / 2 + self.I_b * v[2] ** 2 / 2 - self.m_b * self.g * q[1]
        return body + self.m_f * (fx ** 2 + fz ** 2) / 2 - self.m_f * self.g * self.foot(q)[1]

    def impulse(self, q1: Scalars, gamma: Scalars, b: Scalars) -> list:
        """Generalised impulse of the contacts and of friction."""
        s, c, r = sin(q1[2]), cos(q1[2]), q1[3]
        return [b[0] + b[1], gamma[0] + gamma[1], self.R_b * b[0] + r * c * b[1] + r * s * gamma[1],
                s * b[1] - c * gamma[1] + gamma[2] - gamma[3]]

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """Balance of momentum, distances, friction limits and tangential velocities."""
        q0, q1, u = self.split(theta)
        q2, gamma, phi, psi, b, slip = w[:4], w[4:8], w[8:12], w[12:14], w[14:16], w[18:20]
        v, a = self.velocity(q1, q2), (q1[2] + q2[2]) / 2
        control = [-sin(a) * u[1], cos(a) * u[1], u[0], u[1]]
        joint = [0, 0, 0, -self.c * v[3]]
        balance = zip(self.momentum_balance(q0, q1, q2), control, self.impulse(q1, gamma, b), joint, strict=True)
        tangential = [v[0] + self.R_b * v[2], self.foot_velocity(q2, v)[0]]
        return [*(sum(row) for row in balance), *(p - d for p, d in zip(phi, self.distances(q2), strict=True)),
                *(p - self.friction * g for p, g in zip(psi, gamma[:2], strict=True)),
                *(a - e for a, e in zip(slip, tangential, strict=True))]

    def start(self, theta: Scalars) -> list:
        """The present configuration, 1 in the cones and 0.1 beside the axes of those of second order."""
        return [*theta[4:8], *[1.0] * 10, 0.1, 0.1, 1.0, 1.0, 0.1, 0.1]
