"""A block on a table, pushed by a round-cornered contact with a point, the pusher; seen from above.

Coordinates q (5): block x, y (m), angle (rad), pusher x, y (m). Inputs u (2): force impulses on the pusher (N s).
L = kinetic energy only. In the block's frame the pusher is at d = R(angle)' (pusher - block), and

  phi = (d_x^10 + d_y^10)^(1/10) - r        gamma >= 0, gamma o phi = mu, along N = dphi/dq

Friction impulses b against the velocities v of the points they act at, in second-order cones
(psi, b) o (s, v) = (mu, 0): of the table at the block's four corners, psi_i = friction m g h/4 (each carries a
quarter of the weight), and of the pusher along the tangent of its contact, psi_5 = friction gamma. All of it at the
new configuration.
w = (q(5), phi, gamma, psi(5), b(9), s(5), v(9)): b and v hold x, y of corners 1..4, then the tangent's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deqmpc.dynamics.equations import Scalars, cos, sin, sqrt
from deqmpc.dynamics.optimization_based.variational import Variational
from deqmpc.solvers.cone_program import Cones

_PSI, _B, _S, _V = 7, 12, 21, 26  # where they begin in w
_CORNERS = ((1, 1), (-1, 1), (1, -1), (-1, -1))


def _pair(contact, entries):
    """Indices of (psi, b) and (s, v) of a contact whose b has `entries`."""
    return (_PSI + contact, *(_B + i for i in entries)), (_S + contact, *(_V + i for i in entries))


@dataclass(frozen=True)
class PlanarPush(Variational):
    """The equations above; constants of Howell et al."""

    h: float = 0.1  # s, step
    r: float = 0.1  # m, half the block's side
    m_block: float = 1.0  # kg
    m_pusher: float = 10.0  # kg
    friction: float = 0.5  # coefficient of block on table
    friction_pusher: float = 0.5  # coefficient of pusher on block
    g: float = 9.81  # m/s^2
    nq = 5
    m = 2
    size = 35
    cones = Cones(nonnegative=((5, 6),), second_order=(*(_pair(i, (2 * i, 2 * i + 1)) for i in range(4)),
                                                       _pair(4, (8,))))

    @property
    def inertia(self) -> float:
        """Of the block about its centre, kg m^2."""
        return self.m_block * (2 * (2 * self.r) ** 2) / 12

    def lagrangian(self, q: Scalars, v: Scalars) -> Any:
        """Kinetic energy, J."""
        return (self.m_block * (v[0] ** 2 + v[1] ** 2) + self.inertia * v[2] ** 2
                + self.m_pusher * (v[3] ** 2 + v[4] ** 2)) / 2

    def distance(self, q: Scalars) -> tuple[Any, list]:
        """phi (m), and N = dphi/dq."""
        s, c, x, y = sin(q[2]), cos(q[2]), q[3] - q[0], q[4] - q[1]
        dx, dy = c * x + s * y, c * y - s * x
        p = dx ** 10 + dy ** 10
        length = sqrt(p) ** 0.2
        gx, gy = dx ** 9 * length / p, dy ** 9 * length / p  # gradient in the block's frame
        nx, ny = c * gx - s * gy, s * gx + c * gy
        return length - self.r, [-nx, -ny, gx * dy - gy * dx, nx, ny]

    def tangents(self, q: Scalars, normal: Scalars) -> list[list]:
        """Rows of the velocities of friction: x and y of the corners, then along the contact's tangent."""
        s, c = sin(q[2]), cos(q[2])
        rows = []
        for ex, ey in _CORNERS:
            rx, ry = self.r * (c * ex - s * ey), self.r * (s * ex + c * ey)
            rows += [[1, 0, -ry, 0, 0], [0, 1, rx, 0, 0]]
        length = sqrt(normal[3] ** 2 + normal[4] ** 2)
        tx, ty = -normal[4] / length, normal[3] / length
        moment = (q[3] - q[0]) * ty - (q[4] - q[1]) * tx
        return [*rows, [tx, ty, moment, -tx, -ty]]

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """Balance of momentum, distance, friction limits and velocities."""
        q0, q1, u = self.split(theta)
        q2, phi, gamma, psi, b, v = w[:5], w[5], w[6], w[_PSI:_B], w[_B:_S], w[_V:]
        distance, normal = self.distance(q2)
        rows, rates = self.tangents(q2, normal), self.velocity(q1, q2)
        d = self.momentum_balance(q0, q1, q2)
        d = [a + n * gamma + sum(row[i] * e for row, e in zip(rows, b, strict=True))
             for i, (a, n) in enumerate(zip(d, normal, strict=True))]
        d[3], d[4] = d[3] + u[0], d[4] + u[1]
        load = self.friction * self.m_block * self.g * self.h / 4
        return [*d, phi - distance, *(p - load for p in psi[:4]), psi[4] - self.friction_pusher * gamma,
                *(e - sum(a * rate for a, rate in zip(row, rates, strict=True))
                  for e, row in zip(v, rows, strict=True))]

    def start(self, theta: Scalars) -> list:
        """The present configuration and distance, some push, friction at its limit, nothing moving. From ones, as in
        the published code, 7 % of random pushers near the block's corners lead nowhere, from here 1 %, and none of
        2000 where the path begins at mu_0 = 1e-3."""
        q, push = list(theta[5:10]), 0.1  # N s
        distance, _ = self.distance(q)
        load = self.friction * self.m_block * self.g * self.h / 4
        return [*q, (distance + sqrt(distance ** 2 + 1e-6)) / 2, push, *[load] * 4, self.friction_pusher * push,
                *[0.0] * 9, *[1.0] * 5, *[0.0] * 9]
