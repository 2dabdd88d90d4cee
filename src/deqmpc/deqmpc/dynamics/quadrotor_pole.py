"""A quadrotor that carries a pole on a hinge, which swings in a plane and does not act back on the quadrotor.

State x (14): position r (m, world), attitude m (MRP, body -> world), pole angle theta (rad, 0 hanging, pi upright),
velocity v (m/s, body), rates w (rad/s, body), pole rate theta' (rad/s). Input u (4): motor commands, hovering at 0.

  (r, m, v, w)' as in deqmpc.dynamics.quadrotor, with F_i = k u_i + mass g / 4
  theta'' = (a_x cos theta - g sin theta) / l
  a_x = (R e_z)_x sum F / mass                   acceleration of the hinge along world x

Constants: the environment of the DEQ-MPC authors, of which no trajectories were released. Theirs takes the x component
of R v' for a_x. With v in body axes that lacks R (w x v) and is no acceleration; here a_x is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deqmpc.dynamics.equations import Scalars, cos, sin
from deqmpc.dynamics.quadrotor import Quadrotor

_MASS, _GRAVITY = 2.1, 9.81  # kg with the pole, m/s^2


def _quadrotor() -> Quadrotor:
    return Quadrotor(mass=_MASS, inertia=(0.0023, 0.0, 0.0023, 0.004), arm=0.175, thrust_slope=10.0,
                     thrust_offset=_MASS * _GRAVITY / 4.0, torque_slope=0.25, gravity=_GRAVITY)


@dataclass(frozen=True)
class QuadrotorPole:
    """The equations above."""

    quadrotor: Quadrotor = field(default_factory=_quadrotor)
    length: float = 0.5  # m, l
    n = 14
    m = 4

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (14 scalars) at state x and input u. Scalars are floats, arrays, tensors or symbols."""
        mx, my, mz, theta = x[3:7]
        quad = self.quadrotor
        rate = quad.derivative([*x[:6], *x[7:13]], u)
        s = mx * mx + my * my + mz * mz
        tilt = (8.0 * mx * mz + 4.0 * (1.0 - s) * my) / ((1.0 + s) * (1.0 + s))  # (R e_z)_x
        thrust = quad.thrust_slope * (u[0] + u[1] + u[2] + u[3]) + 4.0 * quad.thrust_offset
        ax = tilt * thrust * (1.0 / quad.mass)
        swing = (ax * cos(theta) - quad.gravity * sin(theta)) * (1.0 / self.length)
        return [*rate[:6], x[13], *rate[6:12], swing]
