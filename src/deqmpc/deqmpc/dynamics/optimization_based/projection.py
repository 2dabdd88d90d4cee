"""Limits of inputs as part of the dynamics: what acts is the allowed input nearest to the one that was asked for.

  x+ = phi(x, P(u)),      P(u) = argmin_F 1/2 |F - u|^2   s.t.   F allowed

  ThrustCone   |(F_1, F_2)| <= slope F_3,   F_3 <= highest     three inputs, the third along the engine: a cone program
  Box          low <= F <= high                                any inputs, each for itself, such as motors

P is taken at a point of the central path, mu > 0, which lies inside the limits: whatever u a solver tries, what acts is
allowed, strictly, and it needs no constraints on inputs. Its derivative at a mu_grad >= mu sees a limit before it is
reached, and beyond the limit it does not vanish at once, as that of a clipped input would. The distance from the limit
and the multiplier of it have the product mu: mu is in squared units of the input.

Beyond a limit nothing but the cost holds u back: give u a weight, R, in every cost.

Box in closed form. With F = c + w y, c and w the middle and half of the limits, a = (u - c)/w and e = mu/w^2,

  y - a + e/(1 - y) - e/(1 + y) = 0     <=>     y^3 - a y^2 - (1 + 2 e) y + a = 0

whose middle root is the one in (-1, 1); dF/du = 1/(1 + e/(1 - y)^2 + e/(1 + y)^2).
"""

from __future__ import annotations

import math
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


class ConeProjection:
    """P for inputs u (..., 3), float64, onto `cone`, by its cone program."""

    width = 3  # inputs that belong together

    def __init__(self, cone: ThrustCone = ThrustCone(), mu: float = 1e-4, mu_grad: float | None = None,
                 settings: Settings = Settings(), compiled: bool | None = None):
        self.cone, self.mu, self.mu_grad = cone, mu, mu if mu_grad is None else mu_grad
        self.solver = ConeSolver(cone, settings, compiled)

    def __call__(self, u: Tensor) -> Tensor:
        """P(u) at mu; NaN where u is not finite. Differentiable by torch, with the derivative of `linearize`."""
        return _Project.apply(u, self)

    def value(self, u: Tensor) -> Tensor:
        """P(u), without derivative."""
        return self._thrust(self.solver.solve(u, (self.mu,)), u)

    def linearize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P(u) (..., 3) at mu, dP/du (..., 3, 3) at mu_grad. Not differentiable."""
        u = u.detach()
        path = self.solver.solve(u, (self.mu, self.mu_grad))
        by_u = self.solver.sensitivity(path.at(self.mu_grad), u)[..., :3, :]
        return self._thrust(path, u), by_u * u.new_tensor(self.cone.scale).unsqueeze(1)

    def _thrust(self, path, u):
        return path.at(self.mu)[..., :3] * u.new_tensor(self.cone.scale)


class Box:
    """P for inputs u (..., m) between `low` and `high`, numbers or (m,). mu and mu_grad are relative to the squared
    half-width of the limits. ValueError where low >= high, or either is not finite."""

    def __init__(self, low: Tensor | float, high: Tensor | float, mu: float = 1e-4, mu_grad: float | None = None):
        low, high = (torch.as_tensor(v, dtype=torch.float64) for v in (low, high))
        if not (torch.isfinite(low) & torch.isfinite(high) & (low < high)).all():
            raise ValueError(f'low = {low.tolist()}, high = {high.tolist()}; expected finite numbers, low < high')
        self.mu, self.mu_grad, self.width = mu, mu if mu_grad is None else mu_grad, max(low.numel(), high.numel())
        self.middle, self.half = 0.5 * (low + high), 0.5 * (high - low)

    def __call__(self, u: Tensor) -> Tensor:
        """P(u) at mu; NaN where u is not finite. Differentiable by torch, with the derivative of `linearize`."""
        return _Project.apply(u, self)

    def value(self, u: Tensor) -> Tensor:
        """P(u), without derivative."""
        middle, half = self.middle.to(u), self.half.to(u)
        return middle + half * self._root((u - middle) / half, self.mu)

    def linearize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """P(u) (..., m) at mu, dP/du (..., m, m) at mu_grad. Not differentiable."""
        u = u.detach()
        y = self._root((u - self.middle.to(u)) / self.half.to(u), self.mu_grad)
        slope = 1.0 / (1.0 + self.mu_grad * ((1.0 - y) ** -2 + (1.0 + y) ** -2))
        return self.value(u), torch.diag_embed(slope)

    @staticmethod
    def _root(a: Tensor, e: float) -> Tensor:
        """y, by Viete's formula for the roots of cubics; beyond the limits its distance from them is sharpened."""
        square = a.square() / 9.0 + (1.0 + 2.0 * e) / 3.0  # y = a/3 + z,  z^3 - 3 square z + 2 half = 0
        half = a * ((1.0 - e) / 3.0 - a.square() / 27.0)
        angle = torch.acos((-half / square ** 1.5).clamp(-1.0, 1.0))
        y = a / 3.0 + 2.0 * square.sqrt() * torch.cos((angle - 2.0 * math.pi) / 3.0)
        d, beyond = 1.0 - y.abs(), a.abs() - 1.0
        d = torch.where(beyond > 1.0, e / (beyond + d + e / (2.0 - d)), d)
        return torch.sign(a) * (1.0 - d)


class _Project(torch.autograd.Function):
    """P, whose derivative is that at mu_grad."""

    @staticmethod
    def forward(ctx, u, projection):
        if ctx.needs_input_grad[0]:
            applied, by_u = projection.linearize(u)
            ctx.save_for_backward(by_u)
            return applied
        return projection.value(u)

    @staticmethod
    def backward(ctx, by_applied):
        by_u, = ctx.saved_tensors
        return (by_applied.unsqueeze(-2) @ by_u).squeeze(-2), None


class ProjectedInputs:
    """The step of `equations` over dt seconds under P(u): dynamics for deqmpc.problem.Problem."""

    def __init__(self, equations: Equations, dt: float, projection: ConeProjection | Box):
        if equations.m % projection.width:
            raise ValueError(f'{type(equations).__name__} has {equations.m} inputs; expected a multiple of '
                             f'{projection.width} for this {type(projection).__name__}')
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
