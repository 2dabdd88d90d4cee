"""Two trajectory problems on which local solvers get stuck: a pendulum's swing-up, a unicycle in a U-shaped trap.

Swing-up. x = (theta, w), theta = 0 upright; u = torque, |u| <= 1 N m, too little to lift 1 kg on 1 m at once

  theta+ = theta + dt w   w+ = w + dt (g sin theta + u)              explicit Euler, dt = 0.1 s, from (3.1, 0)
  cost = sum dt 0.01 u^2 + 10 theta_T^2 + w_T^2

Maze. x = (px, py, psi); u = (v, w), |v| <= 1 m/s, |w| <= 1 rad/s, |px|, |py| <= 3 m

  px+ = px + dt v cos psi   py+ = py + dt v sin psi   psi+ = psi + dt w        dt = 0.1 s, from (-1, 0, 0)
  cost = sum dt |u|^2 + 10 |p_T - goal|^2,   goal = (1, 0)

The wall, 9 discs 0.5 m apart, is a U that opens away from the goal:

   o o o        y = 1
       o        y = 0.5
   s   o   g    y = 0
       o        y = -0.5
   o o o        y = -1

Here the discs are spheres of deqmpc.problem, closed to each other, and hold exactly. The way around takes more than
4.9 s at full speed: 50 knots leave no time for it where the wall is as soft as the paper's, 100 do.
Source: Kurtz, Burdick, Equality constrained diffusion for direct trajectory optimization, and its released code. There
the wall is a cost, dt 1000 exp(-5 |p - o|^2); deqmpc.solvers.langevin's hills are that for discs of RADIUS.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deqmpc.dynamics.equations import Scalars, cos, sin
from deqmpc.problem import INF, Instances, Problem

WALL = ((-1.0, 1.0), (-0.5, 1.0), (0.0, 1.0), (0.0, 0.5), (0.0, 0.0), (0.0, -0.5), (0.0, -1.0), (-0.5, -1.0),
        (-1.0, -1.0))  # m, centres
RADIUS = 0.35  # m, of the discs: more than half their distance
GOAL = (1.0, 0.0)  # m


@dataclass(frozen=True)
class SwingUp:
    """The pendulum's equations, for explicit Euler steps."""

    gravity: float = 9.81  # m/s^2
    integrator = 'euler'
    n = 2
    m = 1

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (2 scalars)."""
        return [x[1], self.gravity * sin(x[0]) + u[0]]


@dataclass(frozen=True)
class Unicycle:
    """The unicycle's equations, for explicit Euler steps."""

    integrator = 'euler'
    n = 3
    m = 2

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """dx/dt (3 scalars)."""
        return [u[0] * cos(x[2]), u[0] * sin(x[2]), u[1]]


def swing_up(x_init: Tensor, horizon: int = 49) -> tuple[Problem, Instances]:
    """The swing-up from x_init (B, 2)."""
    problem = Problem(SwingUp(), 0.1, horizon, Q=[0.0, 0.0], R=[0.002], Qf=[20.0, 2.0], u_low=[-1.0], u_high=[1.0],
                      position=[0])
    return problem, _at_origin(problem, x_init)


def maze(x_init: Tensor, horizon: int = 99) -> tuple[Problem, Instances]:
    """The maze from x_init (B, 3)."""
    problem = Problem(Unicycle(), 0.1, horizon, Q=[0.0] * 3, R=[0.2, 0.2], Qf=[20.0, 20.0, 0.0],
                      u_low=[-1.0, -1.0], u_high=[1.0, 1.0], x_low=[-3.0, -3.0, -INF], x_high=[3.0, 3.0, INF],
                      position=[0, 1])
    centers = x_init.new_tensor(WALL).expand(len(x_init), -1, -1)
    data = _at_origin(problem, x_init, centers, x_init.new_full((len(WALL),), RADIUS), goal=(*GOAL, 0.0))
    return problem, data


def _at_origin(problem, x_init, centers=None, radii=None, goal=None) -> Instances:
    B, T = len(x_init), problem.horizon
    goal = x_init.new_zeros(problem.n) if goal is None else x_init.new_tensor(goal)
    return problem.instances(x_init, goal.expand(B, T + 1, -1), x_init.new_zeros(B, T, problem.m), centers, radii)


def escaped(x: Tensor) -> Tensor:
    """(B,) whether trajectories x (B, T+1, 3) end within 0.3 m of the goal with every knot 0.9 RADIUS or more from each
    disc's centre. A way through the wall, between two discs, comes within 0.25 m of one, 0.71 RADIUS."""
    p = x[..., :2]
    near = (p[:, -1] - x.new_tensor(GOAL)).norm(dim=-1) < 0.3
    clear = (p.unsqueeze(-2) - x.new_tensor(WALL)).norm(dim=-1).amin((-1, -2)) > 0.9 * RADIUS
    return near & clear
