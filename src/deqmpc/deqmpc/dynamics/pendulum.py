"""A pendulum with a torque at its pivot, of mass 1 kg and length 1 m.

State x (2): angle theta (rad, 0 upright), rate w (rad/s). Input u (1): torque (N m).

  w+ = w + h (g sin theta + u)   theta+ = theta + h w+        semi-implicit Euler

Its f = (phi - x) / h knows the step h, see deqmpc.dynamics.integrators. Constants: the released environment of the
DEQ-MPC authors; its trajectories are reproduced with h = 0.05 s.
"""

from __future__ import annotations

from dataclasses import dataclass

from deqmpc.dynamics.equations import Scalars, sin


@dataclass(frozen=True)
class Pendulum:
    """The equations above."""

    dt: float = 0.05  # s, h
    gravity: float = 10.0  # m/s^2
    integrator = 'euler'
    n = 2
    m = 1

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """(phi - x) / h (2 scalars) at state x and input u. Scalars are floats, arrays, tensors or symbols."""
        theta, w = x
        a = self.gravity * sin(theta) + u[0]
        return [w + self.dt * a, a]
