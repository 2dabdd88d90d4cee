"""Iterative LQR (single shooting) with an augmented Lagrangian for the constraints, batched.

Li and Todorov, ICINCO 2004; with the augmented Lagrangian as in Howell et al., Trajectory optimization with
optimization-based dynamics (RA-L 2022). The states of `deqmpc.problem` are rolled out, x_0 = x_init and
x_{t+1} = phi(x_t, u_t), so that the defects are zero and what is left is, with the rows of
deqmpc.solvers.interior_point,

  min over u of  f(x, u)   s.t.   e(x, u) = 0  (v),   g(x, u) <= 0  (z)

  L = f + v'e + mu/2 |e|^2 + sum [max(0, z + mu g)^2 - z^2] / (2 mu)      with one penalty mu a sample

An iteration linearises the dynamics along the rollout, F_t = [A_t B_t] = dphi/d(x, u), takes the gradient s_t of L and
its Gauss-Newton Hessian H_t, and solves for d_t = (dx_t, du_t)

  min  sum_t s_t' d_t + 1/2 d_t' H_t d_t     s.t.  dx_0 = 0,   dx_{t+1} = F_t d_t

which is the regulator of deqmpc.solvers.riccati with D = 0 and c = 0: `factor` gives the feedback K_t, `solve` the
step, and k_t = du_t - K_t dx_t the feedforward. D > 0 is of no use here: it would soften rows that the rollout then
fulfils anyway. A rollout of step length alpha is

  u_t <- u_t + alpha k_t + K_t (x_t' - x_t),   x_{t+1}' = phi(x_t', u_t)

and is accepted where L falls by a share of alpha times its slope sum_t s_t' d_t <= 0 (Armijo). With the pivots G_t of
the recursion, -G_t k_t = dL/du_t on the closed loop, which is zero exactly where the gradient of the rollout is.
Where the gradient or the change of L is small, or no step length is accepted,

  v <- v + mu e,   z <- max(0, z + mu g),   mu <- min(gamma mu, mu_max)

All weights of the inputs being positive and H Gauss-Newton's, every G_t is positive definite: nothing needs shifting.

Why shoot: phi is only asked for values at points that a rollout reaches and for first derivatives, both of which
dynamics that solve a program themselves (deqmpc.dynamics.optimization_based) can give; their evaluation and their
gradients may even belong to different relaxations. Each sample has its own penalty, step length and status.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deqmpc.problem import Instances, Problem
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import riccati
from deqmpc.solvers.augmented_lagrangian import STATUS, Status, WarmStart, select
from deqmpc.solvers.interior_point import Constraint, Function, Point, Rows, at_reference
from deqmpc.solvers.settings import check_numbers

_CONVERGED, _LIMIT, _INFEASIBLE, _SINGULAR, _NOT_FINITE, _RUNNING = range(6)


@dataclass(frozen=True)
class Settings:
    """Numbers of the method. Defaults are those of the authors' cart-pole."""

    iterations: int = 20  # AL iterations (multiplier updates) at most
    inner_steps: int = 100  # iLQR iterations at most in one AL iteration
    max_steps: int = 10_000  # iLQR iterations in all at most
    mu_0: float = 1.0  # first penalty
    gamma: float = 10.0  # its factor after an AL iteration
    mu_max: float = 1e8  # largest penalty
    feasibility: float = 5e-3  # tolerance on |e| and g+
    gradient: float = 1e-3  # an AL iteration ends where |dL/du| is below this ...
    change: float = 1e-5  # ... or L falls by less than this in one step
    armijo: float = 1e-4  # share of the slope that a step must gain
    halvings: int = 16  # of the step length at most
    linear_solver: str = 'sequential'  # Riccati recursion: sequential, parallel or auto, as in the AL solver

    def __post_init__(self):
        check_numbers(self)
        if self.gamma < 1 or self.mu_0 > self.mu_max or self.armijo >= 1:
            raise ValueError(f'gamma = {self.gamma}, mu_0 = {self.mu_0}, armijo = {self.armijo}; expected gamma >= 1, '
                             f'mu_0 <= mu_max = {self.mu_max} and armijo < 1')
        al.check_linear_solver(self.linear_solver)


@dataclass(frozen=True)
class Solution(al.Solution):
    """As of the augmented-Lagrangian solver, with `steps` the iLQR iterations, `defect` zero, and:"""

    gradient: Tensor  # (B,) largest |dL/du| at the last iteration
    iterations: Tensor  # (B,) AL iterations
    multipliers: tuple[Tensor, ...]  # of the constraints in their order, (B, P, c) each


def cold_start(problem: Problem, data: Instances, settings: Settings = Settings()) -> WarmStart:
    """The reference inputs, no multipliers, the first penalty. The states are rolled out by `solve`."""
    return al.cold_start(problem, data, al.Settings(mu_0=settings.mu_0, mu_max=settings.mu_max))


def guess(problem: Problem, data: Instances, u: Tensor, settings: Settings = Settings()) -> WarmStart:
    """A warm start from inputs (B, T, m) alone."""
    start = cold_start(problem, data, settings)
    return WarmStart(start.x, u.detach(), start.lam, start.eta, start.mu)


def solve(problem: Problem, data: Instances, warm_start: WarmStart | None = None, settings: Settings = Settings(),
          constraints: Sequence[Constraint] = ()) -> Solution:
    """Solve a batch, from the inputs, the multipliers of bounds and spheres and the penalty of `warm_start`. Never
    raises for numbers, only for shapes and for instances that require a gradient, which is not there (ValueError
    both); see `Solution.status`."""
    start = cold_start(problem, data, settings) if warm_start is None else warm_start
    al.check_warm_start(problem, data, start)
    if torch.is_grad_enabled() and any(v.requires_grad for v in data.tensors()):
        raise ValueError('an instance requires a gradient, which solutions of iLQR do not have; expected '
                         'torch.no_grad(), detached instances or the augmented-Lagrangian solver')
    with torch.no_grad():
        return _Solver(problem, data, start, settings, constraints).run()


def rollout(problem: Problem, x_init: Tensor, u: Tensor) -> Tensor:
    """States (B, T+1, n) from x_init (B, n) under the inputs u (B, T, m)."""
    x = [x_init]
    for t in range(u.shape[1]):
        x.append(problem.phi.step(x[-1], u[:, t]))
    return torch.stack(x, dim=1)


@dataclass
class _Direction:
    """A step of every sample, and the slope of L along it."""

    K: Tensor  # (B, T, m, n) feedback
    k: Tensor  # (B, T, m) feedforward
    y: Tensor  # (B, T+1, n) co-states
    slope: Tensor  # (B,)
    gradient: Tensor  # (B,) largest |dL/du|
    ok: Tensor  # (B,) all numbers are finite and every pivot positive


@dataclass
class _State:
    """What a sample carries from one iteration to the next, beside its trajectory."""

    z: Tensor  # (B, G) multipliers of g
    v: Tensor  # (B, E) multipliers of e
    mu: Tensor  # (B,)
    y: Tensor  # (B, T+1, n) co-states
    F: Tensor  # (B, T, n, n+m) of the trajectory
    fresh: Tensor  # (B,) bool: F belongs to the trajectory
    gradient: Tensor  # (B,)
    decrement: Tensor  # (B,)
    inner: Tensor  # (B,) steps in this AL iteration
    outer: Tensor  # (B,) AL iterations
    steps: Tensor  # (B,)

    def __getitem__(self, samples) -> _State:
        return _State(*(getattr(self, f.name)[samples] for f in fields(self)))


class _Solver:
    """One batch on its way. Finished samples leave it; `out` collects them."""

    def __init__(self, problem, data, start, settings, constraints):
        self.problem, self.settings = problem, settings
        self.lqr = al.linear_solver(settings, data, problem.horizon)
        B, T, n = data.x_init.shape[0], problem.horizon, problem.n
        self.eps = torch.finfo(data.x_init.dtype).eps
        self.rows = Rows(problem, data, constraints)
        x = rollout(problem, data.x_init, start.u)
        given = torch.stack([torch.isfinite(w).reshape(B, -1).all(dim=1) for w in (x, start.u, start.lam, start.mu)])
        finite = data.is_finite() & given.all(dim=0)
        self.out = al.Results(start, finite, numbers=('gradient',), counts=('iterations',),
                              multipliers=self.rows.blank(start.mu))
        self.index = finite.nonzero()[:, 0]
        self.data, start = data[self.index], start[self.index]
        self.point = self.at(slice(None), x[self.index], start.u)
        zero, count = torch.zeros_like(start.mu), torch.zeros(len(self.index), dtype=torch.long, device=x.device)
        z = torch.zeros_like(self.point.g)
        z[:, :self.rows.own] = start.lam.flatten(1)
        self.state = _State(z, torch.zeros_like(self.point.e), start.mu, torch.zeros_like(start.x),
                            x.new_zeros(len(count), T, n, n + problem.m), torch.zeros_like(count, dtype=torch.bool),
                            zero + float('inf'), zero + float('inf'), count, count.clone(), count.clone())

    def run(self) -> Solution:
        while len(self.index):
            finished = self.iterate()
            if finished.any():
                self.retire(finished)
        return self.out.solution(Solution, multipliers=self.out.multipliers)

    def retire(self, finished):
        """Write the finished samples to `out` and drop them."""
        p, state = self.point, self.state
        lam, multipliers = self.rows.split(state.z, state.v)
        self.out.write(self.index[finished], finished, self.status, WarmStart(p.x, p.u, lam, state.y, state.mu),
                       multipliers, cost=p.cost, defect=torch.zeros_like(p.cost), violation=violation(p),
                       decrement=state.decrement, gradient=state.gradient, steps=state.steps, iterations=state.outer)
        keep = ~finished
        self.index = self.index[keep]
        self.data, self.state, self.point = self.data[keep], self.state[keep], p.map(lambda w: w[keep])

    def at(self, samples, x, u) -> Point:
        """The point of rollouts, which have no defects."""
        return self.rows.at(self.data[samples], x, u, torch.zeros_like(x))

    def merit(self, samples, point: Point) -> Tensor:
        """L, (B,)."""
        state = self.state[samples]
        mu = state.mu.unsqueeze(1)
        z = (state.z + mu * point.g).clamp_min(0.0)
        return (point.cost + ((state.v + 0.5 * mu * point.e) * point.e).sum(1)
                + ((z.square() - state.z.square()) / (2.0 * mu)).sum(1))

    def linearize(self):
        """F of the trajectories that are new."""
        new = (~self.state.fresh).nonzero()[:, 0]
        if len(new):
            _, self.state.F[new] = self.problem.phi.linearize(self.point.x[new, :-1], self.point.u[new])
            self.state.fresh[new] = True

    def direction(self) -> _Direction:
        """Feedback and feedforward of the regulator above."""
        p, state, T, n = self.point, self.state, self.problem.horizon, self.problem.n
        self.linearize()
        mu = state.mu.unsqueeze(1)
        z = state.z + mu * p.g
        s, H = self.rows.terms(self.data, p, self.rows.jacobians(self.data, p), (z.clamp_min(0.0), state.v + mu * p.e),
                               (mu * (z > 0), mu.expand_as(p.e)))
        factors = self.lqr.factor(H[:, :T], H[:, T, :n, :n], state.F, torch.zeros_like(p.x))
        dx, du, y = (w.squeeze(3) for w in riccati.solve(factors, s[:, :T].unsqueeze(3), s[:, T, :n].unsqueeze(2),
                                                         torch.zeros_like(p.x).unsqueeze(3)))
        k = du - (factors.K @ dx[:, :T].unsqueeze(3)).squeeze(3)
        slope = (s[..., :n] * dx).sum((1, 2)) + (s[:, :T, n:] * du).sum((1, 2))
        by_u = factors.G @ (factors.G.transpose(2, 3) @ k.unsqueeze(3))
        ok = factors.ok & torch.isfinite(slope) & (slope <= self.eps * p.cost.abs().clamp_min(1.0))
        return _Direction(factors.K, k, y, slope, by_u.flatten(1).abs().amax(dim=1), ok)

    def shoot(self, samples, alpha: Tensor, d: _Direction) -> Point:
        """The rollouts of `samples` with step lengths alpha (count,)."""
        x, u, x_new, u_new = self.point.x[samples], self.point.u[samples], [self.point.x[samples, 0]], []
        K, k = d.K[samples], alpha.view(-1, 1, 1) * d.k[samples]
        for t in range(self.problem.horizon):
            u_new.append(u[:, t] + k[:, t] + (K[:, t] @ (x_new[t] - x[:, t]).unsqueeze(2)).squeeze(2))
            x_new.append(self.problem.phi.step(x_new[t], u_new[t]))
        return self.at(samples, torch.stack(x_new, dim=1), torch.stack(u_new, dim=1))

    def line_search(self, d: _Direction, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Move the samples `wanted` to the first rollout that is good enough; which ones moved, and by how much L
        fell, (B,) both."""
        before = self.merit(slice(None), self.point)
        limit = before + 10.0 * self.eps * (before.abs() + self.point.cost.abs() + 1.0)  # rounding must not stop it
        took, fall = torch.zeros_like(wanted), torch.zeros_like(before)
        left, alpha = wanted.nonzero()[:, 0], 1.0
        moved = self.point.map(torch.clone)
        for _ in range(self.settings.halvings + 1):
            if not len(left):
                break
            trial = self.shoot(left, before.new_full((len(left),), alpha), d)
            merit = self.merit(left, trial)
            good = merit <= limit[left] + self.settings.armijo * alpha * d.slope[left]
            at = left[good]
            took[at], fall[at] = True, before[at] - merit[good]
            for f in fields(moved):
                getattr(moved, f.name)[at] = getattr(trial, f.name)[good]
            left, alpha = left[~good], 0.5 * alpha
        self.point = moved
        return took, fall

    def iterate(self) -> Tensor:
        """One step of every sample; returns which ones are finished, with their status set."""
        state, settings = self.state, self.settings
        d = self.direction()
        state.gradient, state.y = torch.where(d.ok, d.gradient, state.gradient), select(d.ok, d.y, state.y)
        flat = d.ok & (d.gradient <= settings.gradient)
        took, fall = self.line_search(d, d.ok & ~flat)
        state.fresh = state.fresh & ~took
        state.decrement = torch.where(d.ok, (-d.slope).clamp_min(0.0) / (1e-2 + self.point.cost.abs()), state.decrement)
        searched = (~flat).long()
        state.steps, state.inner = state.steps + searched, state.inner + searched
        return self.update_multipliers(flat | ~took | (fall <= settings.change), d.ok)

    def update_multipliers(self, still: Tensor, ok: Tensor) -> Tensor:
        """Multipliers and penalty of the samples whose inner problem is done; the finished ones."""
        settings, p, state = self.settings, self.point, self.state
        out_of_steps = state.steps >= settings.max_steps
        due = still | (state.inner >= settings.inner_steps) | out_of_steps
        mu = state.mu.unsqueeze(1)
        state.z = select(due, (state.z + mu * p.g).clamp_min(0.0), state.z)
        state.v = select(due, state.v + mu * p.e, state.v)
        state.outer, state.inner = state.outer + due, torch.where(due, 0, state.inner)
        feasible = violation(p) <= settings.feasibility
        done = still & ok & feasible
        limit = due & ~done & ((state.outer >= settings.iterations) | out_of_steps)
        self.status = torch.where(done, _CONVERGED, torch.where(~ok, _SINGULAR, torch.where(
            ~feasible & (state.mu >= settings.mu_max), _INFEASIBLE, _LIMIT)))
        state.mu = torch.where(due & ~(done | limit), (settings.gamma * state.mu).clamp_max(settings.mu_max), state.mu)
        return done | limit | ~ok


def violation(point: Point) -> Tensor:
    """(B,) the largest |e| and g of a trajectory, at least 0."""
    rows = torch.cat([point.e.abs(), point.g], dim=1)
    return rows.amax(dim=1).clamp_min(0.0) if rows.shape[1] else torch.zeros_like(point.cost)


__all__ = ['STATUS', 'Constraint', 'Function', 'Settings', 'Solution', 'Status', 'WarmStart', 'at_reference',
           'cold_start', 'guess', 'rollout', 'solve']
