"""Augmented-Lagrangian Gauss-Newton solver for `deqmpc.problem`, batched, with an implicit gradient.

With defects k(tau) = 0, residuals h(tau) <= 0 and trajectories tau = (x_0..x_T, u_0..u_{T-1}) (multiple shooting),
multipliers eta and lambda >= 0 and one penalty mu a sample, an AL iteration minimises over tau

  L(tau) = cost + eta' k + mu/2 |k|^2 + psi(h)
  psi(h) = max_{0 <= v <= rho}  v' h - |v - lambda|^2 / (2 mu)          at v = clip(lambda + mu h, 0, rho)

and then sets eta <- eta + mu k, lambda <- v. With rho = inf, psi is the Powell-Hestenes-Rockafellar term, active
where lambda + mu h > 0. A finite rho (`elastic`) makes the constraints on the state soft by the exact l1 penalty
rho |h+|: they hold exactly wherever a multiplier below rho suffices, and give way where nothing feasible exists.

One Gauss-Newton step is a dual-regularised LQR (deqmpc.solvers.riccati) with D = I/mu, c = k + eta/mu, and
mu (dh/dtau)' (dh/dtau) of the active residuals in the stage Hessians; its co-state y is eta + mu (k + k' d), so that

  slope of L along d = s' d + (eta + mu k)' ((y - eta)/mu - k) <= 0     the Newton decrement, with its sign

Nothing is squared, so large mu costs no accuracy. Each sample has its own line search, multipliers, penalty,
regularisation, iteration count and status; a sample never sees another one.

Gradient. At a stationary tau* the implicit function theorem gives d tau*/d theta from the same KKT matrix, with
the exact Hessian of the Lagrangian (curvature of dynamics and spheres included): [tau; y] <- K^-1 applied to the
loss gradient, one factorisation and one solve. Converged samples use D = 0, the others D = I/mu (the derivative
of the AL iteration they stopped in; DEQ-MPC's smoothed gradient).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from deqmpc.problem import Instances, Problem, radius_and_inverse
from deqmpc.solvers import riccati, riccati_scan
from deqmpc.solvers.settings import check_numbers


class Status(enum.Enum):
    """How a sample ended. The value is the sentence a human reads."""

    CONVERGED = 'converged: constraints and optimality within tolerance'
    ITERATION_LIMIT = 'iteration limit reached before the tolerances'
    INFEASIBLE = 'infeasible: constraints stay violated at the largest penalty'
    SINGULAR = 'singular: no regularisation gave a step that improves'
    NOT_FINITE = 'not finite: the instance or its warm start holds NaN or infinity'


LINEAR_SOLVERS = {'sequential': riccati, 'parallel': riccati_scan}
STATUS = tuple(Status)  # a status tensor holds indices into this tuple
_CONVERGED, _LIMIT, _INFEASIBLE, _SINGULAR, _NOT_FINITE, _RUNNING = range(6)


def check_linear_solver(name: str) -> None:
    """ValueError where it is not one of `LINEAR_SOLVERS` or auto."""
    if name not in ('auto', *LINEAR_SOLVERS):
        raise ValueError(f'linear_solver = {name!r}; expected auto, {" or ".join(LINEAR_SOLVERS)}')


@dataclass(frozen=True)
class Settings:
    """Numbers of the solver. Defaults are for float64 and metres, seconds, hover thrusts."""

    iterations: int = 30  # AL iterations (multiplier updates) at most
    gn_steps: int = 15  # Gauss-Newton steps at most in one AL iteration
    max_steps: int = 10_000  # Gauss-Newton steps in all at most, for a bounded solve time
    mu_0: float = 1000.0  # penalty of a cold start
    gamma: float = 10.0  # factor of the penalty after an AL iteration that left too much violation
    mu_max: float = 1e6  # largest penalty
    progress: float = 0.25  # the penalty is kept where the violation fell below this share of the last one
    feasibility: float = 1e-4  # tolerance on |k|, h+ and complementarity
    optimality: float = 1e-4  # tolerance on the Newton decrement relative to 1e-2 + cost
    elastic: float = float('inf')  # largest multiplier of a constraint on the state; finite = soft constraints
    newton_below: float = 0.0  # decrement from which on the exact Hessian is tried, for tolerances below 1e-6
    armijo: float = 1e-4  # share of the slope that a step must gain
    halvings: int = 12  # of the step length at most
    exact_gradient: bool = True  # implicit gradient with the exact Hessian; False: Gauss-Newton's
    linear_solver: str = 'sequential'  # Riccati recursion: sequential, parallel (a scan, for long horizons), or auto:
    #                                    the faster one for batch, horizon and device (riccati_scan.is_faster)

    def __post_init__(self):
        check_numbers(self, zero=True)
        check_linear_solver(self.linear_solver)
        if self.gamma < 1 or not 0 < self.mu_0 <= self.mu_max:
            raise ValueError(f'gamma = {self.gamma}, mu_0 = {self.mu_0}; expected gamma >= 1 and 0 < mu_0 <= mu_max')


@dataclass(frozen=True)
class WarmStart:
    """The solver's whole state: what goes in is where it starts, what comes out can go in again."""

    x: Tensor  # (B, T+1, n)
    u: Tensor  # (B, T, m)
    lam: Tensor  # (B, T, C) multipliers of h
    eta: Tensor  # (B, T+1, n) multipliers of k
    mu: Tensor  # (B,) penalty

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return self.x, self.u, self.lam, self.eta, self.mu

    def __getitem__(self, samples) -> WarmStart:
        """The samples (indices or mask over B)."""
        return WarmStart(*(v[samples] for v in self.tensors()))

    def shifted(self, steps: int = 1) -> WarmStart:
        """Advanced by `steps` knots, the last knot repeated."""
        def shift(v):
            return torch.cat([v[:, steps:], v[:, -1:].expand(-1, min(steps, v.shape[1]), -1)], dim=1)
        return replace(self, x=shift(self.x), u=shift(self.u), lam=shift(self.lam), eta=shift(self.eta))


@dataclass(frozen=True)
class Solution:
    """Result of a solve. x and u carry the implicit gradient where an input required one."""

    x: Tensor  # (B, T+1, n); NaN where the status is NOT_FINITE
    u: Tensor  # (B, T, m)
    warm_start: WarmStart  # detached; pass it back to continue from here
    status: Tensor  # (B,) index into STATUS
    defect: Tensor  # (B,) largest |k|
    violation: Tensor  # (B,) largest h, 0 where all hold
    decrement: Tensor  # (B,) last Newton decrement, relative to 1e-2 + cost
    cost: Tensor  # (B,)
    steps: Tensor  # (B,) Gauss-Newton steps taken
    differentiable: Tensor  # (B,) False where the gradient is zero because its KKT matrix was singular

    def status_of(self, sample: int) -> Status:
        """The status of one sample."""
        return STATUS[int(self.status[sample])]

    @property
    def converged(self) -> Tensor:
        """(B,) bool."""
        return self.status == _CONVERGED


def cold_start(problem: Problem, data: Instances, settings: Settings) -> WarmStart:
    """x_init at every knot, the reference inputs, no multipliers."""
    B, T = data.x_init.shape[0], problem.horizon
    x = data.x_init.detach().unsqueeze(1).repeat(1, T + 1, 1)
    C = len(problem.limit) + data.radii.shape[1]
    return WarmStart(x, data.u_ref.detach().clone(), x.new_zeros(B, T, C), torch.zeros_like(x),
                     x.new_full((B,), settings.mu_0))


def guess(problem: Problem, data: Instances, x: Tensor, u: Tensor, settings: Settings) -> WarmStart:
    """A warm start from trajectories alone: no multipliers, first penalty."""
    return replace(cold_start(problem, data, settings), x=x.detach(), u=u.detach())


def solve(problem: Problem, data: Instances, warm_start: WarmStart | None = None,
          settings: Settings = Settings()) -> Solution:
    """Solve a batch. Never raises for numbers, only (ValueError) for shapes; see `Solution.status`."""
    start = cold_start(problem, data, settings) if warm_start is None else warm_start
    check_warm_start(problem, data, start)
    wanted = torch.is_grad_enabled() and any(v.requires_grad for v in data.tensors())
    with torch.no_grad():
        plain = Instances(*(v.detach() for v in data.tensors()))
        solution = _Solver(problem, plain, start, settings).run()
    if not wanted:
        return solution
    with torch.no_grad():
        gradient = ImplicitGradient(problem, plain, solution, settings)
    return attach_gradient(data, solution, gradient)


def attach_gradient(data: Instances, solution: Solution, gradient) -> Solution:
    """`solution` of `data` with x and u that hand a loss's gradients back to the fields of `data`, as
    `gradient.pull_back` does (an ImplicitGradient, or one like it); `gradient.ok` (B,) says for which samples."""
    x, u = _Attach.apply(gradient, solution.x, solution.u, *data.tensors())
    return replace(solution, x=x, u=u, differentiable=gradient.ok)


def check_warm_start(problem: Problem, data: Instances, start: WarmStart) -> None:
    """ValueError where a field of `start` does not have the shape and type that `data` asks for."""
    B, T = data.x_init.shape[0], problem.horizon
    C = len(problem.limit) + data.radii.shape[1]
    for f, shape in zip(fields(start), ((B, T + 1, problem.n), (B, T, problem.m), (B, T, C), (B, T + 1, problem.n),
                                        (B,)), strict=True):
        got = getattr(start, f.name)
        if tuple(got.shape) != shape or got.dtype != data.x_init.dtype:
            raise ValueError(f'warm_start.{f.name} is {got.dtype} of shape {tuple(got.shape)}, expected '
                             f'{data.x_init.dtype} of shape {shape}')


def linear_solver(settings, data: Instances, horizon: int):
    """The module that `settings.linear_solver` names. Chosen by the whole batch: a sample's numbers must not depend on
    when others finish."""
    name = settings.linear_solver
    if name == 'auto':
        batch, device = data.x_init.shape[0], data.x_init.device
        name = 'parallel' if riccati_scan.is_faster(batch, horizon, device) else 'sequential'
    return LINEAR_SOLVERS[name]


def select(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new where mask (B,) else old."""
    return torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, old)


@dataclass
class Point:
    """A trajectory and what the merit needs of it."""

    x: Tensor
    u: Tensor
    cost: Tensor  # (B,)
    k: Tensor  # (B, T+1, n)
    h: Tensor  # (B, T, C)
    offset: Tensor  # (B, T, K, d) p - o

    @classmethod
    def at(cls, problem, data, x, u):
        h, offset = problem.residuals_and_offsets(data, x, u)
        return cls(x, u, problem.cost(data, x, u), problem.defects(data, x, u), h, offset)

    def map(self, function):
        return type(self)(*(function(getattr(self, f.name)) for f in fields(self)))

    def merged(self, mask, new):
        return type(self)(*(select(mask, getattr(new, f.name), getattr(self, f.name)) for f in fields(self)))


def _split(H: Tensor, T: int, n: int) -> tuple[Tensor, Tensor]:
    """Stage Hessians and the terminal one."""
    return H[:, :T], H[:, T, :n, :n]


def row_limits(problem: Problem, K: int, elastic: float, like: Tensor) -> Tensor:
    """rho of every residual (C,): inputs can always be kept within bounds, so those rows stay hard."""
    on_input = problem.sign[:, problem.n:].abs().sum(dim=1) > 0
    rho = torch.full((len(on_input) + K,), elastic, dtype=like.dtype, device=like.device)
    rho[:len(on_input)][on_input.to(like.device)] = float('inf')
    return rho


def stage_terms(problem: Problem, data: Instances, point: Point, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient s (B, T+1, n+m) and Gauss-Newton Hessian H (B, T+1, n+m, n+m) of cost + psi, for multipliers
    v (B, T, C) and weights a (B, T, C) of the residuals' outer products. Inputs of stage T are empty."""
    B, T, n, m = point.x.shape[0], problem.horizon, problem.n, problem.m
    sign, limit = problem.constants(point.x)
    bounds = len(limit)
    s, weight = point.x.new_zeros(B, T + 1, n + m), point.x.new_zeros(B, T + 1, n + m)
    weight[:, :T, :n] = data.Q.unsqueeze(1)
    weight[:, T, :n] = data.Qf
    weight[:, :T, n:] = data.R.unsqueeze(1)
    torch.sub(point.x, data.x_ref, out=s[:, :, :n])
    torch.sub(point.u, data.u_ref, out=s[:, :T, n:])
    s *= weight
    if bounds:
        push, stiff = v[..., :bounds] @ sign, a[..., :bounds] @ sign.abs()
        s[:, 1:, :n] += push[..., :n]
        s[:, :T, n:] += push[..., n:]
        weight[:, 1:, :n] += stiff[..., :n]
        weight[:, :T, n:] += stiff[..., n:]
    H = torch.diag_embed(weight)
    if data.radii.shape[1]:
        _, inverse = radius_and_inverse(data.radii)
        slope = point.offset * (-2.0 * inverse).unsqueeze(-1)  # dh/dp
        s[:, 1:, problem.position] += (v[..., bounds:].unsqueeze(-2) @ slope).squeeze(-2)
        H[:, 1:, problem.position, problem.position] += (
            slope * a[..., bounds:].unsqueeze(-1)).transpose(-1, -2) @ slope
    return s, H


def _merit(point: Point, lam: Tensor, eta: Tensor, mu: Tensor, rho: Tensor) -> Tensor:
    """L, (..., B)."""
    mu = mu.view(-1, 1, 1)
    v = torch.minimum((lam + mu * point.h).clamp_min_(0.0), rho)
    psi = v * point.h - (v - lam).square() / (2.0 * mu)
    return point.cost + (point.k * (eta + (0.5 * mu) * point.k)).sum((-1, -2)) + psi.sum((-1, -2))


def curvature(problem: Problem, data: Instances, point: Point, v: Tensor, y: Tensor) -> Tensor:
    """(B, T+1, n+m, n+m): what the Gauss-Newton Hessian leaves out, d^2(y' phi + v' h)/dtau^2."""
    T = problem.horizon
    C = torch.zeros_like(torch.diag_embed(torch.cat([point.x, point.x[..., :1].expand(-1, -1, problem.m)], dim=-1)))
    C[:, :T] = problem.phi.curvature(point.x[:, :T], point.u, y[:, 1:])
    _, inverse = radius_and_inverse(data.radii)
    bend = (-2.0 * inverse * v[..., len(problem.limit):]).sum(-1)  # d^2h/dp^2 = -I/r
    C[:, 1:, problem.position, problem.position].diagonal(dim1=2, dim2=3).add_(bend.unsqueeze(-1))
    return C


class Results:
    """What a solver collects of the samples that are finished. Of the others numbers are NaN and counts 0."""

    def __init__(self, start: WarmStart, finite: Tensor, numbers: Sequence[str] = (), counts: Sequence[str] = (),
                 multipliers: Sequence[Tensor] = ()):
        B, nan = len(finite), float('nan')
        self.status = torch.where(finite, _RUNNING, _NOT_FINITE)
        self.warm_start = WarmStart(*(v.new_full(v.shape, nan) for v in start.tensors()))
        self.values = {name: start.mu.new_full((B,), nan)
                       for name in ('defect', 'violation', 'decrement', 'cost', *numbers)}
        self.values |= {name: torch.zeros(B, dtype=torch.long, device=finite.device) for name in ('steps', *counts)}
        self.multipliers = tuple(torch.full_like(v, nan) for v in multipliers)

    def write(self, at: Tensor, finished: Tensor, status: Tensor, warm_start: WarmStart,
              multipliers: Sequence[Tensor] = (), **values: Tensor):
        """Of the samples that a solver still has, the `finished` ones (a mask), samples `at` of the batch."""
        self.status[at] = status[finished]
        for out, value in zip((*self.warm_start.tensors(), *self.multipliers), (*warm_start.tensors(), *multipliers),
                              strict=True):
            out[at] = value[finished]
        for name, value in values.items():
            self.values[name][at] = value[finished]

    def solution(self, kind: type[Solution] = Solution, **more) -> Solution:
        """A solution without a gradient."""
        start = self.warm_start
        return kind(x=start.x, u=start.u, warm_start=start, status=self.status,
                    differentiable=torch.zeros_like(self.status, dtype=torch.bool), **self.values, **more)


class _Solver:
    """One batch on its way. Finished samples leave the batch; `out` collects them."""

    def __init__(self, problem: Problem, data: Instances, start: WarmStart, settings: Settings):
        self.problem, self.settings = problem, settings
        self.lqr = linear_solver(settings, data, problem.horizon)
        B = data.x_init.shape[0]
        self.rho = row_limits(problem, data.radii.shape[1], settings.elastic, data.x_init)
        finite = data.is_finite() & torch.stack(
            [torch.isfinite(v).reshape(B, -1).all(dim=1) for v in start.tensors()]).all(dim=0)
        self.out = Results(start, finite)
        self.index = finite.nonzero()[:, 0]
        keep = self.index if len(self.index) < B else slice(None)
        self.data, start = data[keep], start[keep]
        self.lam, self.eta, self.mu = start.lam, start.eta, start.mu
        self.point = Point.at(problem, self.data, start.x, start.u)
        count = len(self.index)
        like = data.x_init
        self.reg = like.new_zeros(count)
        self.inner, self.outer, self.steps, self.failures = (
            torch.zeros(count, dtype=torch.long, device=like.device) for _ in range(4))
        self.last = like.new_full((count,), float('inf'))  # violation at the last multiplier update
        self.decrement = self.last.clone()
        self.eps = torch.finfo(like.dtype).eps
        self.fractions = 0.5 ** torch.arange(1, settings.halvings + 1, dtype=like.dtype, device=like.device)

    def run(self) -> Solution:
        while len(self.index):
            finished = self.iterate()
            if finished.any():
                self.retire(finished)
        return self.out.solution()

    def retire(self, finished):
        """Write the finished samples to `out` and drop them."""
        p, h = self.point, self.point.h.flatten(1)
        self.out.write(self.index[finished], finished, self.status, WarmStart(p.x, p.u, self.lam, self.eta, self.mu),
                       cost=p.cost, steps=self.steps, decrement=self.decrement,
                       defect=p.k.flatten(1).abs().amax(dim=1),
                       violation=h.amax(dim=1).clamp_min(0.0) if h.shape[1] else torch.zeros_like(p.cost))
        keep = ~finished
        self.index = self.index[keep]
        if len(self.index):
            self.data, self.point = self.data[keep], p.map(lambda v: v[keep])
            for name in ('lam', 'eta', 'mu', 'reg', 'inner', 'outer', 'steps', 'failures', 'last', 'decrement'):
                setattr(self, name, getattr(self, name)[keep])

    def direction(self):
        """dx, du, slope and whether the factorisation exists, at the current point."""
        problem, point = self.problem, self.point
        T, n = problem.horizon, problem.n
        mu = self.mu.view(-1, 1, 1)
        v = self.lam + mu * point.h
        a = mu * ((v > 0) & (v < self.rho))
        v = torch.minimum(v.clamp_min_(0.0), self.rho)
        s, H = stage_terms(problem, self.data, point, v, a)
        if (self.reg > 0).any():
            H.diagonal(dim1=2, dim2=3).add_(self.reg.view(-1, 1, 1))
        _, F = problem.phi.linearize(point.x[:, :T], point.u)
        D = (1.0 / mu).expand(-1, T + 1, n)
        newton = self.decrement <= self.settings.newton_below
        if newton.any():
            C = curvature(problem, self.data, point, v, self.eta + mu * point.k)
            factors = self.lqr.factor(*_split(select(newton, H + C, H), T, n), F, D)
            if not factors.ok.all():
                factors = self.lqr.factor(*_split(select(newton & factors.ok, H + C, H), T, n), F, D)
        else:
            factors = self.lqr.factor(*_split(H, T, n), F, D)
        c = point.k + self.eta / mu
        dx, du, y = self.lqr.solve(factors, s[:, :T].unsqueeze(-1), s[:, T, :n].unsqueeze(-1), c.unsqueeze(-1))
        dx, du, y = dx.squeeze(-1), du.squeeze(-1), y.squeeze(-1)
        slope = ((s[..., :n] * dx).sum((1, 2)) + (s[:, :T, n:] * du).sum((1, 2))
                 + ((self.eta + mu * point.k) * ((y - self.eta) / mu - point.k)).sum((1, 2)))
        ok = factors.ok & torch.isfinite(slope) & (slope <= self.eps * point.cost.abs().clamp_min(1.0))
        return dx, du, slope, ok

    def iterate(self) -> Tensor:
        """One Gauss-Newton step of every sample; returns which ones are finished, with their status set."""
        problem, settings, point = self.problem, self.settings, self.point
        dx, du, slope, ok = self.direction()
        merit = _merit(point, self.lam, self.eta, self.mu, self.rho)
        limit = merit + 10.0 * self.eps * (merit.abs() + point.cost.abs() + 1.0)  # rounding must not stop it
        moved = Point.at(problem, self.data, point.x + dx, point.u + du)
        took = ok & (_merit(moved, self.lam, self.eta, self.mu, self.rho) <= limit + settings.armijo * slope)
        self.point = point.merged(took, moved) if not took.all() else moved
        short = (~took & ok).nonzero()[:, 0]
        if len(short):
            self.backtrack(short, point, dx, du, slope, limit, took)
        self.steps += 1
        self.inner += 1
        self.decrement = torch.where(ok, (-slope).clamp_min(0.0) / (1e-2 + self.point.cost.abs()), self.decrement)
        # Levenberg: more regularisation where there was no factorisation or no step, less where there was one
        self.reg = torch.where(took, torch.where(self.reg > 1e-3, 0.1 * self.reg, 0.0),
                               (10.0 * self.reg).clamp_min(1e-2))
        self.failures = torch.where(took, 0, self.failures + 1)
        return self.update_multipliers(ok)

    def backtrack(self, short, point, dx, du, slope, limit, took):
        """Step lengths 1/2, 1/4, ... of the samples `short`, all at once; the longest accepted one is taken."""
        f = self.fractions.view(-1, 1, 1, 1)
        trial = Point.at(self.problem, self.data[short], point.x[short] + f * dx[short],
                          point.u[short] + f * du[short])
        merit = _merit(trial, self.lam[short], self.eta[short], self.mu[short], self.rho)  # (fractions, short)
        good = merit <= limit[short] + self.settings.armijo * self.fractions.view(-1, 1) * slope[short]
        any_good = good.any(dim=0)
        first = good.to(torch.int8).argmax(dim=0)
        rows = torch.arange(len(short), device=first.device)
        chosen = trial.map(lambda v: v[first, rows])
        at = short[any_good]
        took[at] = True
        for field in fields(Point):
            getattr(self.point, field.name)[at] = getattr(chosen, field.name)[any_good]

    def update_multipliers(self, ok):
        """Multipliers and penalty of the samples whose inner problem is done; the finished ones."""
        settings, p = self.settings, self.point
        flat = ok & (self.decrement <= max(settings.optimality, self.eps))  # less is rounding
        stuck = self.failures >= 8
        due = flat | stuck | (self.inner >= settings.gn_steps) | (self.steps >= settings.max_steps)
        if not due.any():
            return due
        mu = self.mu.view(-1, 1, 1)
        v = torch.minimum((self.lam + mu * p.h).clamp_min_(0.0), self.rho)
        # |v - lambda| / mu = |max(h, -lambda/mu)| measures violation and complementarity together; a multiplier at
        # rho is where the soft constraint gives way
        gap = torch.where(v >= self.rho, 0.0, (v - self.lam).abs() / mu).flatten(1)
        violation = p.k.flatten(1).abs().amax(dim=1)
        if gap.shape[1]:
            violation = torch.maximum(violation, gap.amax(dim=1))
        self.eta = select(due, self.eta + mu * p.k, self.eta)
        self.lam = select(due, v, self.lam)
        self.outer = self.outer + due
        self.inner = torch.where(due, 0, self.inner)
        done = due & flat & (violation <= settings.feasibility)
        # of the finished: soft constraints that gave way
        broken = (p.h.flatten(1).amax(dim=1) > settings.feasibility) if p.h.shape[2] else torch.zeros_like(done)
        limit = due & ~done & ((self.outer >= settings.iterations) | (self.steps >= settings.max_steps))
        hopeless = (self.mu >= settings.mu_max) & (violation > settings.feasibility) & (violation > 0.5 * self.last)
        self.status = torch.where(done, torch.where(broken, _INFEASIBLE, _CONVERGED),
                                  torch.where(stuck, _SINGULAR, torch.where(hopeless, _INFEASIBLE, _LIMIT)))
        grow = due & (violation > settings.feasibility) & (violation > settings.progress * self.last)
        self.mu = torch.where(grow & ~(done | limit), (self.mu * settings.gamma).clamp_max(settings.mu_max), self.mu)
        self.last = torch.where(due, violation, self.last)
        return done | limit | stuck


class ImplicitGradient:
    """The factorised KKT matrix at a solution, and the vector-Jacobian product with it."""

    def __init__(self, problem: Problem, data: Instances, solution: Solution, settings: Settings):
        self.problem = problem
        self.known = solution.status != _NOT_FINITE
        self.data = data
        T, n = problem.horizon, problem.n
        x, u = torch.nan_to_num(solution.x), torch.nan_to_num(solution.u)
        start = solution.warm_start
        self.lam, eta = torch.nan_to_num(start.lam), torch.nan_to_num(start.eta)
        mu = torch.where(self.known, start.mu, 1.0)
        self.data = Instances(*(select(self.known, v, torch.ones_like(v)) for v in data.tensors()))
        self.point = Point.at(problem, self.data, x, u)
        converged = solution.converged
        rho = row_limits(problem, data.radii.shape[1], settings.elastic, x)
        # an active residual holds as an equation to first order: its weight is as large as the precision bears
        stiff = torch.where(converged, mu.clamp_min(1e8 if x.dtype == torch.float64 else 1e5), mu).view(-1, 1, 1)
        self.a = stiff * ((self.lam > 0) & (self.lam < rho))
        _, H = stage_terms(problem, self.data, self.point, self.lam, self.a)
        _, F = problem.phi.linearize(x[:, :T], u)
        D = torch.where(converged, 0.0, 1.0 / mu).view(-1, 1, 1).expand(-1, T + 1, n)
        lqr = linear_solver(settings, data, T)
        self.factors = lqr.factor(*_split(H, T, n), F, D)
        if settings.exact_gradient:
            exact = lqr.factor(*_split(H + curvature(problem, self.data, self.point, self.lam, eta), T, n), F, D)
            # a saddle has no derivative of its minimiser; Gauss-Newton's matrix still gives a descent direction
            self.factors = lqr.Factors(*(select(exact.ok, getattr(exact, f.name), getattr(self.factors, f.name))
                                         for f in fields(exact)))
        self.ok = self.factors.ok & self.known

    def pull_back(self, gx: Tensor, gu: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of the loss with respect to the fields of Instances, for gx = dloss/dx (B, T+1, n) and
        gu = dloss/du (B, T, m); `wanted` says of which, the others are None where that saves work."""
        T, n = self.problem.horizon, self.problem.n
        data, point = self.data, self.point
        gx, gu = select(self.ok, gx, torch.zeros_like(gx)), select(self.ok, gu, torch.zeros_like(gu))
        s = torch.cat([gx[:, :T], gu], dim=-1).unsqueeze(-1)
        # K [v; y] = [g; 0], hence s = -g; the loss changes by v'(-dL_tau/dtheta) dtheta - y'(dk/dtheta) dtheta
        vx, vu, y = riccati.solve(self.factors, -s, -gx[:, T].unsqueeze(-1), gx.new_zeros(*gx.shape, 1))
        vx, vu, y = (select(self.ok, v.squeeze(-1), torch.zeros_like(v.squeeze(-1))) for v in (vx, vu, y))
        ex, eu = point.x - data.x_ref, point.u - data.u_ref
        weight = torch.cat([data.Q.unsqueeze(1).expand(-1, T, n), data.Qf.unsqueeze(1)], dim=1)
        tracking = (-y[:, 0], weight * vx, data.R.unsqueeze(1) * vu, -(ex[:, :T] * vx[:, :T]).sum(1),
                    -(eu * vu).sum(1), -ex[:, T] * vx[:, T])
        return *tracking, *(self._pull_back_spheres(vx) if any(wanted[6:]) else (None, None))

    def _pull_back_spheres(self, vx):
        """Gradients with respect to centers and radii."""
        data, point = self.data, self.point
        _, inverse = radius_and_inverse(data.radii)
        lam = self.lam[..., len(self.problem.limit):]
        a = self.a[..., len(self.problem.limit):]
        vp = vx[:, 1:, self.problem.position].unsqueeze(-2)
        slope = point.offset * (-2.0 * inverse).unsqueeze(-1)  # dh/dp = -dh/do
        along = (slope * vp).sum(-1)
        g_centers = a.unsqueeze(-1) * along.unsqueeze(-1) * slope - (2.0 * inverse * lam).unsqueeze(-1) * vp
        # h = r/2 - |p-o|^2/(2r): dh/dr = 1/2 + |p-o|^2/(2 r^2), d(dh/dp)/dr = (p-o)/r^2 = -slope/r
        per_r = 2.0 * inverse
        dh_dr = 0.5 + 0.5 * (point.offset.square().sum(-1)) * per_r.square()
        g_radii = -(a * dh_dr * along - lam * per_r * along).sum(1)
        return torch.cat([torch.zeros_like(g_centers[:, :1]), g_centers], dim=1), g_radii


class _Attach(torch.autograd.Function):
    """Hands x and u on and gives them the implicit gradient."""

    @staticmethod
    def forward(ctx, gradient, x, u, *inputs):
        ctx.gradient = gradient
        ctx.save_for_backward(*inputs)  # torch then refuses a backward pass after they were changed in place
        return x.clone(), u.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gx, gu):
        _ = ctx.saved_tensors
        return None, None, None, *ctx.gradient.pull_back(gx, gu, ctx.needs_input_grad[3:])
