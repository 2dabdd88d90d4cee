"""Quadrotor: from anywhere within 5 m and 70 degrees to hovering at the origin.

  x = (r, m, v, w)  dt = 0.05 s, 100 steps     deqmpc.dynamics.quadrotor
  cost c = sum Q x^2 / 200 + sum R u^2 / 20     Q = 10 (first six), 1 (last six), R = 1e-8
  reward = exp(2 - c / 2), or -c where c > 500: at most exp(2) a step
  start: r in +-5 m, Euler angles in +-70 deg, v in +-0.5 m/s, w in +-0.25 rad/s

Source: the DEQ-MPC authors' code. Their trajectories start in the shadow set of the MRPs (|m| > 1) and turn through
180 degrees; starts drawn here have |m| <= 1, unless `shadow` asks for the authors' set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deqmpc.dynamics.quadrotor import U_HIGH, U_HOVER, U_LOW
from deqmpc.dynamics.quadrotor import Quadrotor as Equations
from deqmpc.problem import Problem
from deqmpc.tasks.base import Spheres, Task, uniform

_Q = [10.0] * 6 + [1.0] * 6


@dataclass(frozen=True)
class Quadrotor(Task):
    """The task."""

    name = 'quadrotor'
    positions = 6
    steps: int = 100
    dt: float = 0.05
    horizon: int = 5
    hold: int = 0
    spheres: int = 0
    radius: float = 0.0
    u_high: float = U_HIGH  # motor command, the thrust limit
    velocity_weight: float = 1.0  # Q of v and w in the tracking problem; 10 for r and m
    shadow: bool = False  # starts in the set of MRPs that the released trajectories start in

    @property
    def equations(self) -> Equations:
        """Continuous dynamics."""
        return Equations()

    def problem(self, horizon: int | None = None) -> Problem:
        """Tracking with the task's weights."""
        return Problem(self.equations, self.dt, horizon or self.horizon, Q=[10.0] * 6 + [self.velocity_weight] * 6,
                       R=[1e-8] * 4, u_low=[U_LOW] * 4, u_high=[self.u_high] * 4)

    @property
    def u_ref(self) -> Tensor:
        """Hovering."""
        return torch.full((4,), U_HOVER, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task."""
        tilt = math.radians(70.0)
        x = uniform(count, [-5.0] * 3 + [-tilt] * 3 + [-0.5] * 3 + [-0.25] * 3,
                    [5.0] * 3 + [tilt] * 3 + [0.5] * 3 + [0.25] * 3, generator)
        m = mrp_from_euler(x[:, 3:6])
        if self.shadow:
            m = -m / m.square().sum(1, keepdim=True).clamp_min(1e-6)
        return torch.cat([x[:, :3], m, x[:, 6:]], dim=1), Spheres.none(count)

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """exp(2 - c/2), or -c where c > 500."""
        cost = (x.square() @ x.new_tensor(_Q)) / 200.0 + 1e-8 * u.square().sum(1) / 20.0
        return torch.where(cost > 500.0, -cost, torch.exp(2.0 - 0.5 * cost))

    @property
    def best_reward(self) -> float:
        """exp(2)."""
        return math.exp(2.0)


def mrp_from_euler(angles: Tensor) -> Tensor:
    """MRP (..., 3) with |m| <= 1 of roll, pitch, yaw (..., 3) in rad, turned about z, then y, then x."""
    half = 0.5 * angles
    (cr, cp, cy), (sr, sp, sy) = half.cos().unbind(-1), half.sin().unbind(-1)
    w = cr * cp * cy + sr * sp * sy
    v = torch.stack([sr * cp * cy - cr * sp * sy, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy], dim=-1)
    sign = torch.where(w < 0, -1.0, 1.0).unsqueeze(-1)
    return sign * v / (1.0 + w.abs().unsqueeze(-1))
