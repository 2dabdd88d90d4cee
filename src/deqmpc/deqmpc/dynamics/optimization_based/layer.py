"""One step x+ = f(x, u) of a system whose next state solves conditions with cones, and its derivatives.

A `System` gives the conditions r(w; theta, mu) = 0 of deqmpc.solvers.cone_program with theta = (x, u). Its next state
is the last `memory` entries of x, moved to the front, followed by the first n - memory entries of w:

  x = (q_{t-1}, q_t), w = (q_{t+1}, ..):  x+ = (q_t, q_{t+1}), memory = n/2          no memory:  x+ = first n of w

A value is taken at the parameter mu of the central path, a derivative at mu_grad >= mu: the exact derivative of the
step at mu_grad, which sees a contact that is near and friction that sticks. mu_grad is a smoothing length, in the
units of the products (N s m for an impulse times a distance).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deqmpc.solvers import cone_program
from deqmpc.solvers.cone_program import ConeSolver, Path, Settings


class System(cone_program.Conditions, Protocol):
    """Conditions whose solution holds a next state. parameters = n + m."""

    n: int
    m: int
    memory: int  # entries of x that the next state keeps


class OptimizationBasedDynamics:
    """x (..., n), u (..., m), float64. `mu` and `mu_grad` may be set at any time."""

    def __init__(self, system: System, mu: float = 1e-4, mu_grad: float = 1e-3, settings: Settings = Settings(),
                 compiled: bool | None = None):
        if system.parameters != system.n + system.m:
            raise ValueError(f'{type(system).__name__} has {system.parameters} parameters; expected n + m = '
                             f'{system.n + system.m}')
        self.system, self.mu, self.mu_grad = system, mu, mu_grad
        self.n, self.m = system.n, system.m
        self.solver = ConeSolver(system, settings, compiled)

    def solve(self, x: Tensor, u: Tensor) -> Path:
        """The central path of the step from x (..., n) under u (..., m): impulses, status and steps beside the next
        state. Leading dimensions are broadcast."""
        return self.solver.solve(self._theta(x, u), (self.mu,))

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """f(x, u) (..., n) at mu; NaN where the conditions could not be solved. Differentiable by torch, with the
        derivatives of `linearize`."""
        return self._following(*_Step.apply(self._theta(x, u), self))

    def linearize(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(x, u) (..., n) at mu, A = df/dx (..., n, n) and B = df/du (..., n, m) at mu_grad. Not differentiable."""
        theta = self._theta(x, u).detach()
        path = self.solver.solve(theta, (self.mu, self.mu_grad))
        kept = self.system.memory
        F = theta.new_zeros(*theta.shape[:-1], self.n, self.n + self.m)
        F[..., :kept, self.n - kept:self.n] = torch.eye(kept, dtype=F.dtype, device=F.device)
        F[..., kept:, :] = self._sensitivity(path, theta)
        return self._following(theta, path.at(self.mu)[..., :self.n - kept]), F[..., :self.n], F[..., self.n:]

    def _sensitivity(self, path, theta):
        s = self.solver.sensitivity(path.at(self.mu_grad), theta)
        return s[..., :self.n - self.system.memory, :]

    def _following(self, theta, made):
        return torch.cat([theta[..., self.n - self.system.memory:self.n], made], dim=-1)

    def _theta(self, x, u):
        for name, value, size in (('x', x, self.n), ('u', u, self.m)):
            if value.dim() < 1 or value.shape[-1] != size:
                raise ValueError(f'{name} has shape {tuple(value.shape)}, expected (..., {size})')
        if x.shape[:-1] != u.shape[:-1]:
            shape = torch.broadcast_shapes(x.shape[:-1], u.shape[:-1])
            x, u = x.expand(*shape, self.n), u.expand(*shape, self.m)
        return torch.cat([x, u], dim=-1)


class _Step(torch.autograd.Function):
    """theta -> theta and the first n - memory entries of w at mu; the latter's derivative is that at mu_grad."""

    @staticmethod
    def forward(ctx, theta, dynamics):
        wanted = ctx.needs_input_grad[0]
        mus = (dynamics.mu, dynamics.mu_grad) if wanted else (dynamics.mu,)
        path = dynamics.solver.solve(theta, mus)
        if wanted:
            ctx.save_for_backward(dynamics._sensitivity(path, theta))
        return theta.clone(), path.at(dynamics.mu)[..., :dynamics.n - dynamics.system.memory]

    @staticmethod
    def backward(ctx, by_theta, by_made):
        s, = ctx.saved_tensors
        return by_theta + (s * by_made.unsqueeze(-1)).sum(-2), None
