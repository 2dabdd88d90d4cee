"""Pendulum: swing up with a torque too small to lift it at once.

  x = (theta, w), theta = 0 upright   u = torque, |u| <= 3 N m (the paper says 5)     deqmpc.dynamics.pendulum
  dt = 0.05 s, 200 steps
  reward = -theta^2, theta in +-pi
  success: |theta| < 0.05; ten in a row end the episode
  start: theta in +-pi, w in +-1 rad/s
  weights: Q = (10, 1), R = 0.01

Source: the DEQ-MPC authors' code and data; the released expert's mean return is -159.9 (standard deviation 118.9).
Its longest episode has 128 steps and their time limit is not known: 200 as for the cart-pole, half as long again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deqmpc.dynamics.pendulum import Pendulum as Equations
from deqmpc.problem import Problem
from deqmpc.tasks.base import Spheres, Task, uniform


@dataclass(frozen=True)
class Pendulum(Task):
    """The task."""

    name = 'pendulum'
    positions = 1
    spatial = 1
    period = (2.0 * math.pi, 0.0)
    steps: int = 200
    dt: float = 0.05
    horizon: int = 5
    hold: int = 10
    spheres: int = 0
    radius: float = 0.0
    u_high: float = 3.0  # N m, largest torque either way; 5 in the paper, 3 in the released code and data
    tolerance: float = 0.05  # rad, |theta| that counts as success

    @property
    def equations(self) -> Equations:
        """Dynamics for steps of dt."""
        return Equations(dt=self.dt)

    def problem(self, horizon: int | None = None) -> Problem:
        """Tracking with the authors' weights."""
        return Problem(self.equations, self.dt, horizon or self.horizon, Q=[10.0, 1.0], R=[0.01],
                       u_low=[-self.u_high], u_high=[self.u_high], position=[0])

    @property
    def u_ref(self) -> Tensor:
        """No torque."""
        return torch.zeros(1, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task."""
        return uniform(count, [-math.pi, -1.0], [math.pi, 1.0], generator), Spheres.none(count, self.spatial)

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """-theta^2."""
        return -self.wrapped(x)[:, 0].square()

    @property
    def best_reward(self) -> float:
        """0."""
        return 0.0

    def succeeded(self, x: Tensor) -> Tensor:
        """(B,) bool: upright."""
        return self.wrapped(x)[:, 0].abs() < self.tolerance
