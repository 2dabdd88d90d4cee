"""Cart-pole: swing the pole up and stay near the middle of the rail.

  x = (x, theta, x', theta'), theta = 0 upright   u = force, |F| <= 100 N     deqmpc.dynamics.cartpole
  dt = 0.05 s, 200 steps
  reward = -(|theta| + |x| + 80 [|x| > 10 m]), theta in +-pi
  success: |theta| < 0.05; ten in a row end the episode
  start: all four in +-pi
  weights: Q = I, R = 1e-10

Source: the DEQ-MPC authors' code and data. The success that ends their recorded episodes is the one above: all 270
end with nine such states and lead to a tenth. Ending on it is kept, wherever the cart is, so that returns compare
with the released expert's mean of -129.9 (standard deviation 59.8); `hold=0` makes every episode last 200 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deqmpc.dynamics.cartpole import Cartpole as Equations
from deqmpc.problem import Problem
from deqmpc.tasks.base import Spheres, Task, uniform


@dataclass(frozen=True)
class Cartpole(Task):
    """The task."""

    name = 'cartpole'
    positions = 2
    spatial = 1
    period = (0.0, 2.0 * math.pi, 0.0, 0.0)
    steps: int = 200
    dt: float = 0.05
    horizon: int = 5
    hold: int = 10
    spheres: int = 0
    radius: float = 0.0
    u_high: float = 100.0  # N, largest force either way
    tolerance: float = 0.05  # rad, |theta| that counts as success

    @property
    def equations(self) -> Equations:
        """Continuous dynamics."""
        return Equations()

    def problem(self, horizon: int | None = None) -> Problem:
        """Tracking with the authors' weights."""
        return Problem(self.equations, self.dt, horizon or self.horizon, Q=[1.0] * 4, R=[1e-10],
                       u_low=[-self.u_high], u_high=[self.u_high], position=[0])

    @property
    def u_ref(self) -> Tensor:
        """No force."""
        return torch.zeros(1, dtype=torch.float64)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Spheres]:
        """See Task."""
        return uniform(count, [-math.pi] * 4, [math.pi] * 4, generator), Spheres.none(count, self.spatial)

    def reward(self, x: Tensor, u: Tensor) -> Tensor:
        """-(|theta| + |x| + 80 [|x| > 10])."""
        position, theta = x[:, 0].abs(), self.wrapped(x)[:, 1].abs()
        return -(theta + position + 80.0 * (position > 10.0))

    @property
    def best_reward(self) -> float:
        """0."""
        return 0.0

    def succeeded(self, x: Tensor) -> Tensor:
        """(B,) bool: the pole is upright."""
        return self.wrapped(x)[:, 1].abs() < self.tolerance
