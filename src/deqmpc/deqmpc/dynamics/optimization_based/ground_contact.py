"""A rigid body's corners on the ground: contact and friction of one time step.

With the velocities (v, w) that the body would have after a step of h seconds without contact, world z up, rotation
matrix R, corners r_i in body axes at heights d_i over the ground, friction coefficient f, and impulses over the mass
lambda_i = (b_x, b_y, g)_i in m/s in the world, the step ends with (v+, w+) from

  v+ = v + sum_i lambda_i       w+ = w + m J^-1 sum_i r_i x R' lambda_i       c_i = v+ + R (w+ x r_i)
  normal:    gap_i = d_i/h + c_iz,   g_i gap_i = mu,   both > 0                  not below the ground after the step
  friction:  (psi_i, b_i) o (s_i, (c_ix, c_iy)) = (mu, 0),   psi_i = f g_i       most dissipation within |b| <= f g

Rigid, inelastic, with friction that sticks (deqmpc.solvers.cone_program). A body at rest on four corners stands
mu h / (gravity h / 4) above the ground and creeps as slowly as mu is small. Four corners, the lowest ones, are enough.

w of the program = (v+, w+, gap(4), g(4), psi(4), b(8), s(4), c(8)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deqmpc.dynamics.equations import Scalars
from deqmpc.solvers.cone_program import Cones, ConeSolver, Settings

CORNERS = 4
_GAP, _G, _PSI, _B, _S, _C = 6, 10, 14, 18, 26, 30  # where they begin in w


@dataclass(frozen=True)
class GroundContact:
    """Conditions of a step. theta = (v(3), w(3), R(9) row by row, d/h(4), corners(12))."""

    mass: float  # kg
    inertia: tuple[float, float, float]  # kg m^2, principal
    friction: float  # coefficient, f
    size = 38
    parameters = 31
    cones = Cones(nonnegative=tuple((_GAP + i, _G + i) for i in range(CORNERS)),
                  second_order=tuple(((_PSI + i, _B + 2 * i, _B + 2 * i + 1), (_S + i, _C + 2 * i, _C + 2 * i + 1))
                                     for i in range(CORNERS)))

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """Momentum, gaps, limits and tangential velocities."""
        R = [theta[6 + 3 * k:9 + 3 * k] for k in range(3)]
        linear, angular, rows = list(theta[:3]), list(theta[3:6]), []
        for i in range(CORNERS):
            r = theta[19 + 3 * i:22 + 3 * i]
            impulse = w[_B + 2 * i], w[_B + 2 * i + 1], w[_G + i]
            body = [sum(R[k][a] * impulse[k] for k in range(3)) for a in range(3)]
            arm = _cross(w[3:6], r)
            c = [w[k] + sum(R[k][a] * arm[a] for a in range(3)) for k in range(3)]
            linear = [a + b for a, b in zip(linear, impulse, strict=True)]
            angular = [a + self.mass / j * t for a, j, t in zip(angular, self.inertia, _cross(r, body), strict=True)]
            rows += [w[_GAP + i] - theta[15 + i] - c[2], w[_PSI + i] - self.friction * w[_G + i],
                     w[_C + 2 * i] - c[0], w[_C + 2 * i + 1] - c[1]]
        return [*(a - b for a, b in zip(w[:6], [*linear, *angular], strict=True)), *rows]

    def start(self, theta: Scalars) -> list:
        """The velocities without contact, and some impulse."""
        return [*theta[:6], *[0.1] * 12, *[0.0] * 8, *[0.1] * 4, *[0.0] * 8]


class ContactStep:
    """Steps of one body, one after another, on floats: 20 to 80 us. Raises NoCompiler where there is no C compiler."""

    def __init__(self, mass: float, inertia: tuple[float, float, float], friction: float, mu: float = 1e-8):
        settings = Settings(mu_0=1e-2, tolerance=1e-10)
        self._solver = ConeSolver(GroundContact(mass, inertia, friction), settings, compiled=True).single(mu)

    def velocities(self, v: Sequence[float], w: Sequence[float], R: Sequence[float], gaps: Sequence[float],
                   corners: Sequence[float], h: float) -> list[float]:
        """(v+, w+), six floats, from v (3) m/s in the world, w (3) rad/s in the body, R (9), gaps d (4) m and corners
        (12) m, after h s. Where the conditions cannot be solved the body stops."""
        solution = self._solver.solve((*v, *w, *R, *(d / h for d in gaps), *corners))
        return [0.0] * 6 if solution is None else solution[:6]


def _cross(a, b):
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
