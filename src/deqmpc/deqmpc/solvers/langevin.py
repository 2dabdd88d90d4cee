"""Constrained diffusion: many Langevin flows at once, to find starts from which a local solver succeeds.

  min c(z)   s.t.   h(z) = 0,   low <= z <= high        z (..., B, d) -> c (..., B), h (..., B, q)

With multipliers lambda (B, q), one penalty mu and a log barrier of weight rho on the finite bounds,

  L(z, lambda) = c + lambda' h + mu/2 |h|^2 - rho sum [log max(high - z, eps) + log max(z - low, eps)]
  dz = -1/2 grad_z L dt + sigma(t) dW        d lambda = mu h dt,   lambda(0) = 0

which for large enough mu and sigma -> 0 ends near a constrained minimiser (Kurtz, Burdick: Equality constrained
diffusion for direct trajectory optimization). In steps of alpha = dt/2, all from the same evaluation of grad L and h,

  z <- clip(z - alpha grad_z L + sigma_k sqrt(2 alpha) N(0, I))        lambda <- lambda + 2 alpha mu h
  sigma_k = sigma exp(-decay k / N) for the first N steps, then 0

The score is -grad L: exact, by autograd or by the derivatives that a program brings along (a trajectory's does, in
two thirds of the time), or estimated from S values of L alone,

  grad L ~ 1/(S s^2) sum_i [L(z + e_i) - L(z)] e_i,   e_i ~ N(0, s^2 I)        relative error sqrt((d + 1)/S)

No matrix is factored, so that thousands of starts run together, on CPU or GPU. What comes out is near a minimiser and
feasible to 1e-2 or so; another solver finishes it (`solve`). The interior point stays on the way that the flow found;
the AL solver, which breaks constraints at first, often leaves it (experiments/langevin.py: 18 and 1 of 24 escape the
maze). A trajectory of deqmpc.problem is z_t = (x_{t+1}, u_t), its h are the defects, and lambda is the AL solver's eta.
Its spheres, there constraints, are hills in c here, weight exp(-sharpness |p - o|^2 / r^2): a start may be inside and
is pushed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from deqmpc.problem import Instances, Problem
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import interior_point
from deqmpc.solvers.settings import check_numbers


@dataclass(frozen=True)
class Settings:
    """Numbers of the flow. alpha times the largest curvature of L, about mu |dh/dz|^2, must stay below 2; with
    alpha mu <= 0.25 the trajectory problems do."""

    steps: int = 5000  # of the flow, those without noise included; few explore more, many converge closer
    alpha: float = 0.01  # step, dt/2
    mu: float = 10.0  # penalty, and rate of the multipliers
    rho: float = 0.01  # weight of the barrier
    eps: float = 1e-4  # distance to a bound below which the barrier is flat, in units of z
    sigma: float = 1.0  # noise at the start; 0: gradient descent
    decay: float = 4.0  # the noise falls by exp(-decay)
    quiet: float = 0.25  # share of the steps, the last ones, that have no noise
    score: str = 'exact'  # or sampling
    samples: int = 128  # S, of a sampled score
    width: float = 0.01  # s, of a sampled score, in units of z
    hill: float = 100.0  # weight of a sphere in c, at a knot
    sharpness: float = 0.6  # of a hill: at the sphere's surface it has the share exp(-sharpness)

    def __post_init__(self):
        check_numbers(self, zero=True, finite=True)
        for name in ('alpha', 'eps', 'width'):
            if getattr(self, name) == 0:
                raise ValueError(f'{name} = 0; expected a number > 0')
        if self.quiet > 1:
            raise ValueError(f'quiet = {self.quiet!r}; expected a share of the steps, 0 to 1')
        if self.score not in ('exact', 'sampling'):
            raise ValueError(f'score = {self.score!r}; expected exact or sampling')

    def noise(self) -> list[float]:
        """sigma_k of every step."""
        noisy = round(self.steps * (1.0 - self.quiet))
        return [self.sigma * math.exp(-self.decay * k / noisy) for k in range(noisy)] + [0.0] * (self.steps - noisy)


# z (B, d) -> h (B, q), and the function of weights w (B, q) that gives grad c + (dh/dz)' w (B, d)
Derivative = Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Program:
    """The problem at the top of the file. A sample must not depend on another one."""

    cost: Callable[[Tensor], Tensor]  # z (..., B, d) -> c (..., B)
    equality: Callable[[Tensor], Tensor]  # z (..., B, d) -> h (..., B, q)
    low: Tensor  # (d,), -inf where there is none
    high: Tensor  # (d,), inf where there is none
    derivative: Derivative | None = None  # None: by autograd

    def __post_init__(self):
        if self.low.dim() != 1 or self.low.shape != self.high.shape or not (self.low < self.high).all():
            raise ValueError(f'low {tuple(self.low.shape)} and high {tuple(self.high.shape)} must be vectors of one '
                             f'length with low < high')


@dataclass(frozen=True)
class Flow:
    """Where B flows are."""

    z: Tensor  # (B, d)
    lam: Tensor  # (B, q) multipliers of h

    @property
    def finite(self) -> Tensor:
        """(B,) False where a flow diverged or started from NaN."""
        return torch.isfinite(self.z).all(dim=1) & torch.isfinite(self.lam).all(dim=1)


class Lagrangian:
    """L and its gradient."""

    def __init__(self, program: Program, settings: Settings):
        self.program, self.settings = program, settings
        self.below = torch.isfinite(program.low).nonzero()[:, 0]
        self.above = torch.isfinite(program.high).nonzero()[:, 0]
        self.low, self.high = program.low[self.below], program.high[self.above]

    def barrier(self, z: Tensor) -> Tensor:
        """The barrier (..., B); 0 without bounds."""
        s = self.settings
        room = torch.cat([z[..., self.below] - self.low, self.high - z[..., self.above]], dim=-1)
        return -s.rho * room.clamp_min(s.eps).log().sum(-1)

    def value(self, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """L (..., B) and h (..., B, q)."""
        h = self.program.equality(z)
        return self.program.cost(z) + ((lam + 0.5 * self.settings.mu * h) * h).sum(-1) + self.barrier(z), h

    def gradient(self, z: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        """grad_z L (B, d), and h (B, q)."""
        h, pull_back = (self.program.derivative or self._by_autograd)(z)
        gradient = pull_back(lam + self.settings.mu * h)
        gradient[..., self.below] -= self._push(z[..., self.below] - self.low)
        gradient[..., self.above] += self._push(self.high - z[..., self.above])
        return gradient, h

    def _push(self, room: Tensor) -> Tensor:
        """rho / room of a bound."""
        return torch.where(room > self.settings.eps, self.settings.rho / room, 0.0)

    def _by_autograd(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Program.derivative."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            cost, h = self.program.cost(z).sum(), self.program.equality(z)
        return h.detach(), lambda w: torch.autograd.grad((cost, h), z, (None, w))[0]

    def sampled_gradient(self, z: Tensor, lam: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """grad_z L (B, d) estimated from `samples` values of L, and h (B, q)."""
        s = self.settings
        value, h = self.value(z, lam)
        e = s.width * torch.randn(s.samples, *z.shape, generator=generator, dtype=z.dtype, device=z.device)
        rise = self.value(z + e, lam)[0] - value  # (S, B)
        return (rise.unsqueeze(-1) * e).mean(0) / s.width ** 2, h


def flow(program: Program, z: Tensor, settings: Settings, seed: int, lam: Tensor | None = None) -> Flow:
    """Run B flows from z (B, d), with multipliers from lam (B, q) or 0. The same seed gives the same bits on the same
    device. A flow that leaves the numbers is NaN and leaves the others alone. ValueError for a wrong shape."""
    if z.dim() != 2 or z.shape[1] != len(program.low):
        raise ValueError(f'z has shape {tuple(z.shape)}, expected (B, {len(program.low)})')
    lagrangian, generator = Lagrangian(program, settings), torch.Generator(z.device).manual_seed(seed)
    z = z.detach().clamp(program.low, program.high)
    with torch.no_grad(), np.errstate(invalid='ignore', over='ignore'):  # of flows that diverge
        lam = torch.zeros_like(program.equality(z)) if lam is None else lam.detach().clone()
        for sigma in settings.noise():
            if settings.score == 'exact':
                gradient, h = lagrangian.gradient(z, lam)
            else:
                gradient, h = lagrangian.sampled_gradient(z, lam, generator)
            z = z - settings.alpha * gradient
            if sigma > 0:
                noise = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
                z = z.add_(noise, alpha=sigma * math.sqrt(2.0 * settings.alpha))
            z = z.clamp_(program.low, program.high)
            lam = lam.add_(h, alpha=2.0 * settings.alpha * settings.mu)
    return Flow(z, lam)


def program_of(problem: Problem, data: Instances, settings: Settings) -> Program:
    """The program of B trajectories: z = (x_1, u_0, x_2, u_1, ...), x_0 = x_init; h (B, T n) are the defects 1..T."""
    hills = _Hills(problem, data, settings)

    def cost(z):
        x, u = unpack(problem, data, z)
        return problem.cost(data, x, u) + hills(x)

    def equality(z):
        x, u = unpack(problem, data, z)
        return (problem.phi.step(x[..., :-1, :], u) - x[..., 1:, :]).flatten(-2)

    low, high = (torch.cat(pair).to(data.x_init).repeat(problem.horizon) for pair in (
        (problem.x_low, problem.u_low), (problem.x_high, problem.u_high)))
    n, weight = problem.n, torch.cat([data.Q.unsqueeze(1).expand(-1, problem.horizon - 1, -1), data.Qf.unsqueeze(1)], 1)

    def derivative(z):
        x, u = unpack(problem, data, z)
        following, F = problem.phi.linearize(x[:, :-1], u)
        slope = hills.gradient(x)

        def pull_back(w):
            w = w.unflatten(-1, (problem.horizon, n))
            back = (w.unsqueeze(2) @ F).squeeze(2)  # (B, T, n+m), of x_t and u_t for t = 0..T-1
            gx = weight * (x[:, 1:] - data.x_ref[:, 1:]) - w
            gx[:, :-1] += back[:, 1:, :n]
            gx[..., problem.position] += slope
            return torch.cat([gx, data.R.unsqueeze(1) * (u - data.u_ref) + back[..., n:]], dim=-1).flatten(-2)
        return (following - x[:, 1:]).flatten(-2), pull_back
    return Program(cost, equality, low, high, derivative)


class _Hills:
    """The spheres as a cost of states x (..., B, T+1, n)."""

    def __init__(self, problem: Problem, data: Instances, settings: Settings):
        self.position, self.centers = problem.position, data.centers[:, 1:]
        present = data.radii > 0  # (B, K)
        self.rate = torch.where(present, settings.sharpness / data.radii.square(), 0.0).unsqueeze(1)  # (B, 1, K)
        self.weight = (settings.hill * present).unsqueeze(1)

    def _at(self, x):
        offset = x[..., 1:, self.position].unsqueeze(-2) - self.centers  # (..., B, T, K, d)
        return offset, self.weight * torch.exp(-self.rate * offset.square().sum(-1))

    def __call__(self, x: Tensor) -> Tensor:
        """The cost (..., B)."""
        return self._at(x)[1].sum((-1, -2))

    def gradient(self, x: Tensor) -> Tensor:
        """Its slope along the positions after x_0, (..., B, T, d)."""
        offset, height = self._at(x)
        return -2.0 * ((self.rate * height).unsqueeze(-2) @ offset).squeeze(-2)


def pack(x: Tensor, u: Tensor) -> Tensor:
    """x (..., B, T+1, n), u (..., B, T, m) -> z (..., B, T (n+m))."""
    return torch.cat([x[..., 1:, :], u], dim=-1).flatten(-2)


def unpack(problem: Problem, data: Instances, z: Tensor) -> tuple[Tensor, Tensor]:
    """z (..., B, T (n+m)) -> x (..., B, T+1, n) with x_0 = x_init, u (..., B, T, m)."""
    x, u = z.unflatten(-1, (problem.horizon, -1)).split((problem.n, problem.m), dim=-1)
    start = data.x_init.unsqueeze(-2).expand(*x.shape[:-2], 1, problem.n)
    return torch.cat([start, x], dim=-2), u


Polish = al.Settings | interior_point.Settings  # of the solver that finishes a flow, by its type


def _finisher(polish: Polish):
    return interior_point if isinstance(polish, interior_point.Settings) else al


def diffuse(problem: Problem, data: Instances, settings: Settings = Settings(), seed: int = 0,
            start: al.WarmStart | None = None, polish: Polish = al.Settings()) -> al.WarmStart:
    """Flows of a batch from the trajectories of `start` (default: at rest at x_init), as warm starts of the solver
    with the settings `polish`. Multipliers are not handed over: those of the flow know the hills, not the spheres.
    Where a flow diverged its start is returned."""
    method = _finisher(polish)
    start = method.cold_start(problem, data, polish) if start is None else start
    al.check_warm_start(problem, data, start)
    end = flow(program_of(problem, data, settings), pack(start.x, start.u), settings, seed)
    x, u = unpack(problem, data, end.z)
    finite = end.finite.view(-1, 1, 1)
    return method.guess(problem, data, torch.where(finite, x, start.x), torch.where(finite, u, start.u), polish)


def solve(problem: Problem, data: Instances, starts: int, settings: Settings = Settings(), seed: int = 0,
          polish: Polish = interior_point.Settings()) -> al.Solution:
    """The cheapest of `starts` solutions of every instance, each a flow finished as `polish` says; where none
    converged, the one with the smallest defect or violation. Not differentiable."""
    if starts < 1:
        raise ValueError(f'starts = {starts!r}; expected an integer >= 1')
    B = len(data.x_init)
    many = data[torch.arange(B, device=data.x_init.device).repeat_interleave(starts)]
    with torch.no_grad():
        start = diffuse(problem, many, settings, seed, polish=polish)
        found = _finisher(polish).solve(problem, many, start, polish)
    best = cheapest(found, starts)
    return al.Solution(*(getattr(found, f.name)[best] for f in fields(al.Solution)))


def cheapest(found: al.Solution, starts: int) -> Tensor:
    """(B,) rows of the best of each `starts` consecutive ones of (B starts): see `solve`."""
    worst = torch.maximum(found.defect, found.violation).nan_to_num(math.inf)
    first = torch.arange(0, len(worst), starts, device=worst.device)
    by_cost = torch.where(found.converged, found.cost, math.inf).view(-1, starts)
    by_residual = worst.view(-1, starts)
    known = torch.isfinite(by_cost).any(dim=1)
    return first + torch.where(known, by_cost.argmin(dim=1), by_residual.argmin(dim=1))
