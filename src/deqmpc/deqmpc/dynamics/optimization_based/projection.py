"""Limits of inputs as part of the dynamics: what acts is the allowed input nearest to the one that was asked for.

  x+ = phi(x, P(u)),      P(u) = argmin_F 1/2 |F - u|^2   s.t.   F allowed

  ThrustCone   |(F_1, F_2)| <= slope F_3,   F_3 <= highest         three inputs, the third along the engine
  Interval     low <= F <= high                                     one input, a motor

A solver then needs no constraints on inputs: whatever u it tries, what acts is allowed, strictly, since P is taken at a
point of the central path, mu > 0, which lies inside. Its derivative at a mu_grad >= mu sees a limit before it is
reached, and beyond the limit it does not vanish at once, as that of a clipped input would. The distance from the limit
and the multiplier of it have the product mu: mu is in squared units of the input.

Derivatives beyond a limit are small but u is free to go there: give u a weight, R, in every cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqmpc.dynamics.equations import Equations, Scalars
from deqmpc.dynamics.integrators import kind_of
from deqmpc.solvers.cone_program import ConeSolver, Program, Settings


@dataclass(frozen=True)
class ThrustCone(Program):
    """z = (F_1, F_2, slope F_3, highest - F_3); theta the three inputs that were asked for. F_3 >= 0 follows."""

    slope: float = 1.0  # tangent of the largest angle between thrust and engine
    highest: float = 12.5  # N
    variables = 4
    parameters = 3
    nonnegative = (3,)
    second_order = ((2, 0, 1),)

    def objective(self, z: Scalars, theta: Scalars) -> Any:
        """Half the squared distance."""
        F = z[0], z[1], z[2] / self.slope
        return sum((a - b) ** 2 for a, b in zip(F, theta, strict=True)) / 2

    def constraints(self, z: Scalars, theta: Scalars) -> list:
        """The definition of the fourth entry."""
        return [z[2] / self.slope + z[3] - self.highest]

    @property
    def scale(self) -> tuple[float, ...]:
        """F divided by the first entries of z."""
        return 1.0, 1.0, 1.0 / self.slope


@dataclass(frozen=True)
class Interval(Program):
    """z = (F, high - F, F - low); theta the input that was asked for."""

    low: float
    high: float
    variables = 3
    parameters = 1
    nonnegative = (1, 2)
    scale = (1.0,)

    def __post_init__(self):
        if not -float('inf') < self.low < self.high < float('inf'):
            raise ValueError(f'low = {self.low!r}, high = {self.high!r}; expected finite numbers, low < high')

    def objective(self, z: Scalars, theta: Scalars) -> Any:
        """Half the squared distance."""
        return (z[0] - theta[0]) ** 2 / 2

    def constraints(self, z: Scalars, theta: Scalars) -> list:
        """The definitions of the other entries."""
        return [z[0] + z[1] - self.high, z[0] - z[2] - self.low]


class Projection:
    """P for inputs u (..., m), float64: m inputs are m / parameters groups, each with the limits of `program`."""

    def __init__(self, program: ThrustCone | Interval, mu: float = 1e-4, mu_grad: float | None = None,
                 settings: Settings = Settings(), compiled: bool | None = None):
        self.program, self.mu, self.mu_grad = program, mu, mu if mu_grad is None else mu_grad
        self.solver = ConeSolver(program, settings, compiled)

    def __call__(self, u: Tensor) -> Tensor:
        """P(u) at mu; NaN where u is not finite. Differentiable by torch, with the derivative of `linearize`."""
        return _Project.apply(u, self)

    def linearize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P(u) (..., m) at mu, dP/du (..., m, m) at mu_grad. Not differentiable."""
        theta = self._groups(u.detach())
        path = self.solver.solve(theta, (self.mu, self.mu_grad))
        width = self.program.parameters
        scale = theta.new_tensor(self.program.scale)
        blocks = self.solver.sensitivity(path.at(self.mu_grad), theta)[..., :width, :] * scale.unsqueeze(1)
        by_u = torch.zeros(*u.shape, u.shape[-1], dtype=u.dtype, device=u.device)
        for i in range(u.shape[-1] // width):
            at = slice(i * width, (i + 1) * width)
            by_u[..., at, at] = blocks[..., i, :, :]
        return self._applied(path, theta).reshape(u.shape), by_u

    def _groups(self, u):
        width = self.program.parameters
        if u.dim() < 1 or u.shape[-1] % width:
            raise ValueError(f'u has shape {tuple(u.shape)}, expected (..., a multiple of {width}) for a '
                             f'{type(self.program).__name__}')
        return u.reshape(*u.shape[:-1], -1, width)

    def _applied(self, path, theta):
        return path.at(self.mu)[..., :self.program.parameters] * theta.new_tensor(self.program.scale)


class _Project(torch.autograd.Function):
    """P, whose derivative is that at mu_grad."""

    @staticmethod
    def forward(ctx, u, projection):
        if ctx.needs_input_grad[0]:
            applied, by_u = projection.linearize(u)
            ctx.save_for_backward(by_u)
            return applied
        theta = projection._groups(u)
        return projection._applied(projection.solver.solve(theta, (projection.mu,)), theta).reshape(u.shape)

    @staticmethod
    def backward(ctx, by_applied):
        by_u, = ctx.saved_tensors
        return (by_applied.unsqueeze(-2) @ by_u).squeeze(-2), None


class ProjectedInputs:
    """The step of `equations` over dt seconds under P(u): dynamics for deqmpc.problem.Problem."""

    def __init__(self, equations: Equations, dt: float, projection: Projection):
        if equations.m % projection.program.parameters:
            raise ValueError(f'{type(equations).__name__} has {equations.m} inputs; expected a multiple of '
                             f'{projection.program.parameters} for a {type(projection.program).__name__}')
        self.phi, self.projection = kind_of(equations)(equations, dt), projection
        self.n, self.m, self.dt = equations.n, equations.m, float(dt)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """phi(x, P(u)) (..., n). Differentiable by torch."""
        return self.phi.step(x, self.projection(u))

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(x, P(u)) (..., n), A (..., n, n) and B (..., n, m), with dP/du at the projection's mu_grad."""
        applied, by_u = self.projection.linearize(u)
        following, F = self.phi.linearize(x, applied)
        return following, F[..., :self.n], F[..., self.n:] @ by_u
