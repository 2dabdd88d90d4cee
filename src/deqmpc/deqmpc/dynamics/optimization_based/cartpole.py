"""Cart with a pole and Coulomb friction in its rail and its hinge.

Coordinates q (2): cart x (m), pole theta (rad, 0 hanging). Input u (1): force impulse on the cart (N s).

  L = (mc + mp)/2 x'^2 + mp l cos(theta) x' theta' + mp l^2/2 theta'^2 + mp g l cos(theta)

A joint's friction impulse b_i dissipates as much as it can within |b_i| <= psi_i: in second-order cones
(psi_i, b_i) o (s_i, v_i) = (mu_cone, 0) with v_i the joint's velocity over the step and limits
  psi_1 = friction (mc + mp) g h  (N s),   psi_2 = friction mp g l h  (N m s).
w = (q(2), psi(2), b(2), s(2), v(2)); w = q without friction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deqmpc.dynamics.equations import Scalars, cos, sin
from deqmpc.dynamics.optimization_based.variational import Variational
from deqmpc.solvers.cone_program import Cones


@dataclass(frozen=True)
class CartPole(Variational):
    """The equations above; constants of Howell et al."""

    friction: float = 0.35  # coefficient of both joints; 0: none
    mc: float = 1.0  # kg, cart
    mp: float = 0.2  # kg, pole
    l: float = 0.5  # m, hinge to the pole's mass  # noqa: E741
    g: float = 9.81  # m/s^2
    nq = 2
    m = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.friction < float('inf'):
            raise ValueError(f'friction = {self.friction!r}; expected a number >= 0')

    @property
    def size(self) -> int:
        """Entries of w."""
        return 10 if self.friction else 2

    @property
    def cones(self) -> Cones:
        """(psi_i, b_i) and (s_i, v_i)."""
        return Cones(second_order=(((2, 4), (6, 8)), ((3, 5), (7, 9)))) if self.friction else Cones()

    def lagrangian(self, q: Scalars, v: Scalars) -> Any:
        """Kinetic minus potential energy, J."""
        kinetic = ((self.mc + self.mp) * v[0] ** 2 / 2 + self.mp * self.l * cos(q[1]) * v[0] * v[1]
                   + self.mp * self.l ** 2 * v[1] ** 2 / 2)
        return kinetic + self.mp * self.g * self.l * cos(q[1])

    def bias(self, q: Scalars, v: Scalars) -> list:
        """b of the published code, whose centrifugal term has the wrong sign. Used by `published` alone."""
        return [self.mp * self.l * sin(q[1]) * v[1] ** 2, self.mp * self.g * self.l * sin(q[1])]

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """Balance of momentum, friction limits and velocities."""
        q0, q1, u = self.split(theta)
        q2 = list(w[:2])
        d = self.momentum_balance(q0, q1, q2)
        d[0] += u[0]
        if not self.friction:
            return d
        psi, b, v = w[2:4], w[4:6], w[8:10]
        limits = [self.friction * (self.mc + self.mp) * self.g * self.h,
                  self.friction * self.mp * self.g * self.l * self.h]
        return [*(a + f for a, f in zip(d, b, strict=True)), *(p - f for p, f in zip(psi, limits, strict=True)),
                *(a - e for a, e in zip(v, self.velocity(q1, q2), strict=True))]

    def start(self, theta: Scalars) -> list:
        """The present configuration, 1 on the axes of the cones and 0.1 beside them."""
        return [*theta[2:4], *([1.0, 1.0, 0.1, 0.1] * 2 if self.friction else [])]
