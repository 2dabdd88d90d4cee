"""A cart with a pole on it, pushed along its rail.

State x (4): cart x (m), pole theta (rad, 0 upright), their rates x', theta' (m/s, rad/s). Input u (1): force F (N).

  M x'' - c cos(theta) theta'' + c sin(theta) theta'^2 = F
  I theta'' - c cos(theta) x'' = c g sin(theta)
  energy without force: M x'^2 / 2 + I theta'^2 / 2 - c cos(theta) x' theta' + c g cos(theta)

M is the mass of both, c the pole's mass times the distance of its centre from the pivot, I its inertia about the
pivot. Constants: the released environment of the DEQ-MPC authors; its trajectories are reproduced by RK4 with
dt = 0.05 s.
"""

from __future__ import annotations

from dataclasses import dataclass

from deqmpc.dynamics.equations import Scalars, cos, sin


@dataclass(frozen=True)
class Cartpole:
    """The equations above."""

    mass: float = 11.0  # kg, M
    moment: float = 1.0  # kg m, c
    inertia: float = 2.0  # kg m^2, I
    gravity: float = 9.81  # m/s^2
    n = 4
    m = 1

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (4 scalars) at state x and input u. Scalars are floats, arrays, tensors or symbols."""
        _, theta, speed, w = x
        s, c = sin(theta), self.moment * cos(theta)
        force = u[0] - self.moment * s * w * w
        torque = self.moment * self.gravity * s
        inverse = 1.0 / (self.mass * self.inertia - c * c)
        return [speed, w, inverse * (self.inertia * force + c * torque), inverse * (c * force + self.mass * torque)]
