"""Regularised primal-dual interior-point method for constrained optimal control, batched.

Sousa-Pinto and Orban, arXiv 2509.16370. With the trajectory d = (x_0..x_T, u_0..u_{T-1}) of `deqmpc.problem`,

  min f(d)   s.t.   k(d) = 0  (y)      e(d) = 0  (v)      g(d) + s = 0  (z),  s > 0

k are the defects, g the bounds and spheres and every `Constraint` that is an inequality, e those that are equalities
(at each of the stages, or of the last state). With the barrier's mu and a dual regularisation delta > 0 of every row,

  A(d, s) = f - mu sum log s + y'k + v'e + z'(g + s) + 1/2 |k|^2/delta_k + 1/2 |e|^2/delta_e + 1/2 |g + s|^2/delta_g

is the augmented barrier-Lagrangian, and an iteration solves for (dd, ds, dy, dv, dz), with J = (k', e', g'),

  [P   0     J' ]        [grad_d L     ]    P = Hessian of L = f + y'k + v'e + z'g, shifted by `shift` I
  [0   z/s   I_g]  .  = -[z - mu/s     ]
  [J   I_g  -delta]      [k, e, g + s  ]

Elimination of ds, dv and dz leaves a dual-regularised LQR (deqmpc.solvers.riccati) with D = delta_k:
  H = P + e'^T e'/delta_e + g'^T w g',   w = 1 / (s/z + delta_g)
  gradient = grad f + e'^T (v + e/delta_e) + g'^T (z + w q),   q = g + mu/z,   offset of the dynamics k + delta_k y
  dz = w (g' dd + q),   ds = delta_g dz - g' dd - g - s,   dv = (e' dd + e)/delta_e,   y + dy = the LQR's co-state

Descent. Where the matrix has the inertia of a minimum, which the recursion's pivots certify (`Factors.ok`), the slope
of A along (dd, ds) with fixed multipliers is
  -( dd' P dd + ds' (z/s) ds + |k' dd|^2/delta_k + |e' dd|^2/delta_e + |g' dd + ds|^2/delta_g )  < 0.
So where the inertia is wrong the curvature of the rows is left out (Gauss-Newton, `gauss_newton`), then `shift` grows,
until the pivots are positive, and a line search on A always finds a step. At every trajectory it tries, it takes the
slacks that minimise A there, the root s > 0 of s^2 + (g + delta z) s = delta mu, which only lowers A further: slacks
that move on a straight line make the rows of spheres that the step bends, and their boundary s > 0, cut it short.
The multipliers y and v follow by the same step length, z by its own to the boundary; mu falls when the KKT error is
below a multiple of it, the delta of a row when its residual does not. A finite delta only limits the step: at a
solution all of k, e, g + s are zero.

Soft rows. A finite `elastic` rho makes bounds on the state and spheres soft, as in the augmented-Lagrangian solver:
they give way by t > 0 at the price rho t, an exact l1 penalty, and hold wherever a multiplier below rho suffices:
  g + s - t = 0,   A gains rho t - mu log t,   and the Newton system (rho - z)/t dt - dz = -(rho - z - mu/t)
dt is eliminated as ds is, w = 1 / (s/z + t/(rho - z) + delta_g), q = g + mu/z - mu/(rho - z), and the slope of A gains
-dt' (rho - z)/t dt. The s and t that minimise A at a trajectory are mu/p and mu/(rho - p), where p, which is
z + (g + s - t)/delta, is the root in (0, rho) of delta (p - z) - g - mu/p + mu/(rho - p), a growing function.

Every sample has its own mu, delta, shift, step length and status, and never sees another one. Settings, problem,
warm start (x, u, lam = z, eta = y, mu = 1/delta) and solution are those of deqmpc.solvers.augmented_lagrangian, so
that one solver continues where the other stopped. It is made for accuracy: exact Hessians, 1e-8 in all KKT residuals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from deqmpc.problem import Instances, Problem
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import riccati
from deqmpc.solvers.augmented_lagrangian import STATUS, Status, WarmStart, select
from deqmpc.solvers.settings import check_numbers

_CONVERGED, _LIMIT, _INFEASIBLE, _SINGULAR, _NOT_FINITE, _RUNNING = range(6)
_HALF_TO_ROUNDING = 7  # steps of Newton's method from half of a root to all its digits


@dataclass(frozen=True)
class Settings:
    """Numbers of the method. Defaults are for float64 and metres, seconds, hover thrusts."""

    tolerance: float = 1e-8  # on |k|, |e|, |g + s|, and on dual residual and complementarity, relative to multipliers
    max_steps: int = 300  # Newton steps at most
    barrier_0: float = 0.1  # first mu
    barrier_ratio: float = 0.2  # mu <- min(ratio mu, mu^1.5) ...
    barrier_when: float = 10.0  # ... when the KKT error is below this multiple of mu
    delta_0: float = 1e-4  # first dual regularisation, 1/penalty, of a cold start
    delta_ratio: float = 0.5  # delta of a row <- ratio delta ...
    delta_when: float = 0.9  # ... when its residual is above this share of the last one
    delta_min: float = 1e-6  # smallest delta
    gauss_newton: bool = True  # where the inertia is wrong, leave the curvature of the rows out before shifting
    shift_0: float = 1e-4  # first primal regularisation where the inertia is wrong
    shift_up: float = 8.0  # its factor from one attempt to the next
    shift_down: float = 0.2  # its factor after a step
    shift_max: float = 1e8  # largest
    elastic: float = float('inf')  # largest multiplier of a bound on the state or a sphere; finite = soft constraints
    feasibility: float = 1e-4  # violation from which on a soft constraint counts as given up (INFEASIBLE)
    boundary: float = 0.995  # least share of the way to s = 0, z = 0 that a step may go
    armijo: float = 1e-4  # share of the slope that a step must gain
    halvings: int = 20  # of the step length at most
    linear_solver: str = 'sequential'  # Riccati recursion: sequential, parallel or auto, as in the AL solver

    def __post_init__(self):
        check_numbers(self)
        for name in ('barrier_ratio', 'delta_ratio', 'shift_down', 'boundary', 'armijo'):
            if getattr(self, name) >= 1:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a number < 1')
        if self.shift_up <= 1 or self.delta_min > self.delta_0:
            raise ValueError(f'shift_up = {self.shift_up}, delta_min = {self.delta_min}; expected shift_up > 1 and '
                             f'delta_min <= delta_0 = {self.delta_0}')
        al.check_linear_solver(self.linear_solver)


# --- constraints beyond bounds and spheres ----------------------------------------------------------

class Constraint(Protocol):
    """Rows of e or g. x (..., P, n), u (..., P, m) and the reference states r (..., P, n) of P knots."""

    equality: bool  # rows = 0, else rows <= 0
    terminal: bool  # of x_T alone (u is 0 there), else of (x_t, u_t) for t = 0..T-1

    def value(self, x: Tensor, u: Tensor, r: Tensor) -> Tensor:
        """Rows (..., P, c)."""

    def jacobian(self, x: Tensor, u: Tensor, r: Tensor) -> Tensor:
        """d rows / d(x, u), (B, P, c, n+m)."""

    def curvature(self, x: Tensor, u: Tensor, r: Tensor, v: Tensor) -> Tensor:
        """Hessian of v' rows, (B, P, n+m, n+m), for v (B, P, c)."""


@dataclass(frozen=True)
class Function:
    """A constraint given by `function` of one knot, (n,), (m,), (n,) -> (c,), in torch; derivatives by torch.func."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, u, reference state) -> rows
    equality: bool = False
    terminal: bool = False

    def value(self, x: Tensor, u: Tensor, r: Tensor) -> Tensor:
        """See Constraint."""
        flat = _each(self.function, *(v.expand(*x.shape[:-1], -1).flatten(0, -2) for v in (x, u, r)))
        return flat.view(*x.shape[:-1], flat.shape[-1])

    def jacobian(self, x: Tensor, u: Tensor, r: Tensor) -> Tensor:
        """See Constraint."""
        n = x.shape[-1]
        rows = torch.func.jacrev(lambda z, r: self.function(z[:n], z[n:], r))
        return _each(torch.vmap(rows), torch.cat([x, u], dim=-1), r)

    def curvature(self, x: Tensor, u: Tensor, r: Tensor, v: Tensor) -> Tensor:
        """See Constraint."""
        n = x.shape[-1]
        hessian = torch.func.jacrev(torch.func.grad(lambda z, r, v: (v * self.function(z[:n], z[n:], r)).sum()))
        return _each(torch.vmap(hessian), torch.cat([x, u], dim=-1), r, v)


def _each(function: Callable[..., Tensor], *samples: Tensor) -> Tensor:
    """`function` of every sample; of none too, which torch.vmap refuses: all samples of a batch may have ended."""
    if len(samples[0]):
        return torch.vmap(function)(*samples)
    return torch.vmap(function)(*(v.new_zeros(1, *v.shape[1:]) for v in samples))[:0]


def at_reference() -> Function:
    """The terminal equality x_T = reference state of knot T."""
    return Function(lambda x, u, r: x - r, equality=True, terminal=True)


# --- solving --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Solution(al.Solution):
    """As of the augmented-Lagrangian solver, and:"""

    error: Tensor  # (B,) KKT error at mu = 0: the largest of dual and primal residuals and complementarity, scaled
    multipliers: tuple[Tensor, ...]  # of the constraints in their order, (B, P, c) each


def cold_start(problem: Problem, data: Instances, settings: Settings = Settings()) -> WarmStart:
    """x_init at every knot, the reference inputs, no multipliers."""
    return al.cold_start(problem, data, al.Settings(mu_0=1.0 / settings.delta_0, mu_max=1.0 / settings.delta_min))


def guess(problem: Problem, data: Instances, x: Tensor, u: Tensor, settings: Settings = Settings()) -> WarmStart:
    """A warm start from trajectories alone."""
    return replace(cold_start(problem, data, settings), x=x.detach(), u=u.detach())


def solve(problem: Problem, data: Instances, warm_start: WarmStart | None = None, settings: Settings = Settings(),
          constraints: Sequence[Constraint] = ()) -> Solution:
    """Solve a batch. Never raises for numbers, only for shapes, and for a gradient through `constraints`, which is not
    there (ValueError both); see `Solution.status`."""
    start = cold_start(problem, data, settings) if warm_start is None else warm_start
    al.check_warm_start(problem, data, start)
    wanted = torch.is_grad_enabled() and any(v.requires_grad for v in data.tensors())
    if wanted and constraints:
        raise ValueError('an instance requires a gradient, which solutions under `constraints` do not have; '
                         'expected torch.no_grad() or detached instances')
    with torch.no_grad():
        plain = Instances(*(v.detach() for v in data.tensors()))
        solution = _Solver(problem, plain, start, settings, constraints).run()
        if wanted:
            own = al.Settings(linear_solver=settings.linear_solver, elastic=settings.elastic)
            gradient = al.ImplicitGradient(problem, plain, _with_active_set(problem, plain, solution, own), own)
    return al.attach_gradient(data, solution, gradient) if wanted else solution


def _with_active_set(problem, data, solution, settings: al.Settings) -> Solution:
    """The solution with the multiplier 0 where it is below the slack, of a row that is not active, and rho where what
    is left to it is below the violation, of a row that gave way."""
    h, lam = torch.nan_to_num(problem.residuals(data, solution.x, solution.u)), solution.warm_start.lam
    rho = al.row_limits(problem, h.shape[-1] - len(problem.limit), settings.elastic, h)
    lam = torch.where(rho - lam < h, rho, torch.where(lam > -h, lam, 0.0))
    return replace(solution, warm_start=replace(solution.warm_start, lam=lam))


@dataclass
class Point(al.Point):
    """A trajectory, with all rows side by side."""

    g: Tensor  # (B, G) bounds, spheres, then inequality constraints
    e: Tensor  # (B, E)


class Rows:
    """Bounds, spheres and constraints as the flat rows g and e."""

    def __init__(self, problem: Problem, data: Instances, constraints: Sequence[Constraint]):
        self.problem, self.constraints = problem, constraints
        T = problem.horizon
        self.own = T * (len(problem.limit) + data.radii.shape[1])  # rows of g that are the problem's
        self.knots = [slice(T, T + 1) if c.terminal else slice(0, T) for c in constraints]
        zero = data.x_init.new_zeros
        self.widths = [c.value(zero(1, 1, problem.n), zero(1, 1, problem.m), zero(1, 1, problem.n)).shape[-1]
                       for c in constraints]

    def blank(self, like: Tensor) -> list[Tensor]:
        """Empty multipliers of the constraints, (B, P, c) each, for `like` (B, ...)."""
        return [like.new_empty(len(like), 1 if c.terminal else self.problem.horizon, width)
                for c, width in zip(self.constraints, self.widths, strict=True)]

    def limits(self, spheres: int, elastic: float, like: Tensor) -> Tensor:
        """rho (G,): `elastic` for bounds on the state and spheres, inf for bounds on inputs and for constraints."""
        own = al.row_limits(self.problem, spheres, elastic, like).repeat(self.problem.horizon)
        more = sum(width * (at.stop - at.start) for c, width, at in zip(self.constraints, self.widths, self.knots,
                                                                         strict=True) if not c.equality)
        return torch.cat([own, own.new_full((more,), float('inf'))])

    def at(self, data: Instances, x: Tensor, u: Tensor, k: Tensor | None = None) -> Point:
        """The point of a trajectory; k are its defects where they are known."""
        problem, count = self.problem, len(self.problem.limit)
        h, offset = problem.residuals_and_offsets(data, x, u)
        h[..., count:] = torch.where(data.radii.unsqueeze(1) > 0, h[..., count:], -1.0)  # an absent sphere is far
        rows = {True: [x.new_zeros(len(x), 0)], False: [h.flatten(1)]}
        for c, arguments in zip(self.constraints, self._arguments(data, x, u), strict=True):
            rows[c.equality].append(c.value(*arguments).flatten(1))
        return Point(x, u, problem.cost(data, x, u), problem.defects(data, x, u) if k is None else k, h, offset,
                      torch.cat(rows[False], dim=1), torch.cat(rows[True], dim=1))

    def _arguments(self, data, x, u):
        last = u.new_zeros(*u.shape[:-2], 1, u.shape[-1])
        for c, at in zip(self.constraints, self.knots, strict=True):
            yield x[:, at], last if c.terminal else u, data.x_ref[:, at]

    def split(self, g: Tensor, e: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Values of rows as of the problem (B, T, C), and of the constraints in their order (B, P, c) each."""
        T, parts, at = self.problem.horizon, [], {True: 0, False: self.own}
        for c, width in zip(self.constraints, self.widths, strict=True):
            P, first = 1 if c.terminal else T, at[c.equality]
            at[c.equality] += P * width
            parts.append((e if c.equality else g)[:, first:first + P * width].unflatten(1, (P, width)))
        return g[:, :self.own].unflatten(1, (T, self.own // T)), parts

    def jacobians(self, data: Instances, point: Point) -> list[Tensor]:
        """Of the constraints, (B, P, c, n+m) each."""
        return [c.jacobian(*a) for c, a in zip(self.constraints, self._arguments(data, point.x, point.u), strict=True)]

    def terms(self, data, point, jacobians, v, a) -> tuple[Tensor, Tensor]:
        """Gradient of the cost plus rows' v and its Hessian plus rows' outer products times a, in knots; v and a are
        pairs of values of (g, e)."""
        (vh, vs), (ah, weights) = self.split(*v), self.split(*a)
        s, H = al.stage_terms(self.problem, data, point, vh, ah)
        for J, at, v, a in zip(jacobians, self.knots, vs, weights, strict=True):
            s[:, at] += (v.unsqueeze(2) @ J).squeeze(2)
            H[:, at] += (J * a.unsqueeze(3)).transpose(2, 3) @ J
        return s, H

    def curvature(self, data, point, y, v) -> Tensor:
        """Hessian of y'k + rows' v, in knots."""
        vh, vs = self.split(*v)
        C = al.curvature(self.problem, data, point, vh, y)
        for c, at, v, a in zip(self.constraints, self.knots, vs, self._arguments(data, point.x, point.u), strict=True):
            C[:, at] += c.curvature(*a, v)
        return C

    def along(self, data, point, jacobians, dx, du) -> tuple[Tensor, Tensor]:
        """g' dd (B, G) and e' dd (B, E)."""
        sign, _ = self.problem.constants(dx)
        _, inverse = al.radius_and_inverse(data.radii)
        spheres = -2.0 * inverse * (point.offset * dx[:, 1:, self.problem.position].unsqueeze(2)).sum(3)
        own = torch.cat([torch.cat([dx[:, 1:], du], dim=2) @ sign.T, spheres], dim=2)
        rows = {True: [dx.new_zeros(len(dx), 0)], False: [own.flatten(1)]}
        d = torch.cat([dx, torch.cat([du, torch.zeros_like(du[:, :1])], dim=1)], dim=2)
        for c, J, at in zip(self.constraints, jacobians, self.knots, strict=True):
            rows[c.equality].append((J @ d[:, at].unsqueeze(3)).flatten(1))
        return torch.cat(rows[False], dim=1), torch.cat(rows[True], dim=1)


@dataclass
class _Direction:
    """A Newton step of every sample, and the slope of the merit along it."""

    dx: Tensor
    du: Tensor
    ds: Tensor
    dt: Tensor
    dy: Tensor
    dz: Tensor
    dv: Tensor
    slope: Tensor  # (B,)
    ok: Tensor  # (B,) the inertia is right and all numbers are finite


@dataclass
class _State:
    """All that a sample carries from one iteration to the next."""

    s: Tensor  # (B, G)
    t: Tensor  # (B, G) by how much rows give way; 0 of hard ones
    z: Tensor  # (B, G)
    y: Tensor  # (B, T+1, n)
    v: Tensor  # (B, E)
    mu: Tensor  # (B,) of the barrier
    delta_k: Tensor  # (B, T+1, n)
    delta_g: Tensor  # (B, G)
    delta_e: Tensor  # (B, E)
    shift: Tensor  # (B,)
    steps: Tensor  # (B,)
    failures: Tensor  # (B,) in a row
    decrement: Tensor  # (B,)

    def __getitem__(self, samples) -> _State:
        return _State(*(getattr(self, f.name)[samples] for f in fields(self)))


def _largest(*values: Tensor) -> Tensor:
    """(B,) largest magnitude over all of the values."""
    found = [v.flatten(1).abs().amax(dim=1) for v in values if v.numel()]
    return torch.stack(found).amax(dim=0)


class _Solver:
    """One batch on its way. Finished samples leave it; `out` collects them."""

    def __init__(self, problem, data, start, settings, constraints=()):
        self.problem, self.settings = problem, settings
        self.lqr = al.linear_solver(settings, data, problem.horizon)
        B = data.x_init.shape[0]
        finite = data.is_finite() & torch.stack(
            [torch.isfinite(v).reshape(B, -1).all(dim=1) for v in start.tensors()]).all(dim=0)
        self.index = finite.nonzero()[:, 0]
        self.rows = Rows(problem, data, constraints)
        self.out = al.Results(start, finite, numbers=('error',), multipliers=self.rows.blank(start.mu))
        self.rho = self.rows.limits(data.radii.shape[1], settings.elastic, data.x_init)
        self.soft = torch.isfinite(self.rho).nonzero()[:, 0]
        self.eps = torch.finfo(data.x_init.dtype).eps
        self.data, start = data[self.index], start[self.index]
        self.point = self.rows.at(self.data, start.x, start.u)
        self.state = self._first(start)

    def _first(self, start) -> _State:
        """Slacks and multipliers on the central path of the first mu, those above it kept."""
        p, mu = self.point, self.settings.barrier_0
        B = len(p.x)
        s = (-p.g).clamp_min(mu ** 0.5)
        z = mu / s
        z[:, :self.rows.own] = torch.maximum(z[:, :self.rows.own], start.lam.flatten(1))
        z = torch.minimum(z, 0.5 * self.rho)
        delta, zero = (1.0 / start.mu).clamp(self.settings.delta_min, 1.0 / self.eps), torch.zeros_like(start.mu)
        count = torch.zeros(B, dtype=torch.long, device=zero.device)
        return _State(s, mu / (self.rho - z), z, start.eta.clone(), torch.zeros_like(p.e), torch.full_like(zero, mu),
                      delta.view(-1, 1, 1).expand_as(p.k).clone(), delta.view(-1, 1).expand_as(p.g).clone(),
                      delta.view(-1, 1).expand_as(p.e).clone(), zero, count, count.clone(), zero + float('inf'))

    def run(self) -> Solution:
        while len(self.index):
            finished = self.judge()
            if finished.any():
                self.retire(finished)
            if not finished.all():
                self.step(self.direction())
        return self.out.solution(Solution, multipliers=self.out.multipliers)

    def retire(self, finished):
        """Write the finished samples to `out` and drop them."""
        p, state = self.point, self.state
        lam, multipliers = self.rows.split(state.z, state.v)
        rows = torch.cat([p.g, p.e.abs()], dim=1)
        violation = rows.amax(dim=1).clamp_min(0.0) if rows.shape[1] else torch.zeros_like(p.cost)
        start = WarmStart(p.x, p.u, lam, state.y, 1.0 / state.delta_k.flatten(1).amin(dim=1))
        self.out.write(self.index[finished], finished, self.status, start, multipliers, cost=p.cost,
                       defect=_largest(p.k), violation=violation, decrement=state.decrement, error=self.error,
                       steps=state.steps)
        keep = ~finished
        self.index = self.index[keep]
        self.data, self.state, self.point = self.data[keep], self.state[keep], p.map(lambda v: v[keep])
        self.F, self.jacobians = self.F[keep], [J[keep] for J in self.jacobians]

    def linearize(self):
        """Jacobians of the dynamics and of the constraints at the point."""
        self.jacobians = self.rows.jacobians(self.data, self.point)
        _, self.F = self.problem.phi.linearize(self.point.x[:, :-1], self.point.u)

    def errors(self) -> tuple[Tensor, Tensor]:
        """KKT error at mu = 0 and at the sample's mu, (B,). Dual residual and complementarity are relative to the
        mean multiplier where that is above 100 (as in Ipopt)."""
        p, state, n = self.point, self.state, self.problem.n
        zero = torch.zeros_like(state.z), torch.zeros_like(state.v)
        gradient, _ = self.rows.terms(self.data, p, self.jacobians, (state.z, state.v), zero)
        gradient[..., :n] -= state.y
        gradient[:, :-1] += (state.y[:, 1:].unsqueeze(2) @ self.F).squeeze(2)
        all_rows = torch.cat([state.z, state.v, state.y.flatten(1)], dim=1)
        scale = 1.0 / (0.01 * all_rows.abs().mean(dim=1)).clamp_min(1.0)
        fixed = torch.maximum(scale * _largest(gradient), _largest(p.k, p.e, p.g + state.s - state.t))
        if not state.s.shape[1]:
            return fixed, fixed
        gap = torch.cat([state.s * state.z, (state.t * (self.rho - state.z))[:, self.soft]], dim=1)
        return (torch.maximum(fixed, scale * _largest(gap)),
                torch.maximum(fixed, scale * _largest(gap - state.mu.unsqueeze(1))))

    def next_barrier(self, error) -> Tensor:
        """mu, smaller where the barrier problem is solved well enough."""
        mu, s = self.state.mu, self.settings
        return torch.where(error <= s.barrier_when * mu, torch.minimum(
            s.barrier_ratio * mu, mu ** 1.5).clamp_min(0.1 * s.tolerance), mu)

    def judge(self) -> Tensor:
        """Linearise, adapt mu, and tell which samples are finished; sets `status`."""
        state, settings, p = self.state, self.settings, self.point
        self.linearize()
        self.error, barrier_error = self.errors()
        state.mu = self.next_barrier(barrier_error)
        done = self.error <= settings.tolerance
        stuck = (state.failures >= 6) | ~torch.isfinite(self.error)
        limit = state.steps >= settings.max_steps
        rows = torch.cat([p.k.flatten(1), p.e, p.g + state.s - state.t], dim=1).abs()
        deltas = torch.cat([state.delta_k.flatten(1), state.delta_e, state.delta_g], dim=1)
        hopeless = ((rows > settings.tolerance ** 0.5) & (deltas <= settings.delta_min)).any(dim=1)
        broken = (p.g[:, self.soft] > settings.feasibility).any(dim=1)
        self.status = torch.where(done & ~broken, _CONVERGED, torch.where(done | hopeless, _INFEASIBLE, torch.where(
            stuck, _SINGULAR, _LIMIT)))
        return done | stuck | limit

    def factor(self, H, C, D):
        """Factors of the first Hessian with the right inertia, exact, Gauss-Newton or shifted; and its shift."""
        T, n, settings = self.problem.horizon, self.problem.n, self.settings

        def attempt(at, shift):
            K = H[at] + curved[at].view(-1, 1, 1, 1) * C[at]
            K.diagonal(dim1=2, dim2=3).add_(shift.view(-1, 1, 1))
            return self.lqr.factor(K[:, :T], K[:, T, :n, :n], self.F[at], D[at])
        shift = self.state.shift.clone()
        curved = torch.ones_like(shift, dtype=torch.bool)
        factors = attempt(slice(None), shift)
        while len(bad := (~factors.ok & (shift < settings.shift_max)).nonzero()[:, 0]):
            straighten = curved[bad] & settings.gauss_newton
            curved[bad] = curved[bad] & ~straighten
            more = (settings.shift_up * shift[bad]).clamp(settings.shift_0, settings.shift_max)
            shift[bad] = torch.where(straighten, shift[bad], more)
            again = attempt(bad, shift[bad])
            for f in fields(factors):
                if f.name not in ('F', 'D'):
                    getattr(factors, f.name)[bad] = getattr(again, f.name)
        return factors, shift

    def direction(self) -> _Direction:
        """The step of the Newton system above."""
        p, state, T = self.point, self.state, self.problem.horizon
        mu, rest = state.mu.unsqueeze(1), self.rho - state.z
        w, toward = 1.0 / (state.s / state.z + state.t / rest + state.delta_g), p.g + mu / state.z - mu / rest
        pushes = state.z + w * toward, state.v + p.e / state.delta_e
        s, H = self.rows.terms(self.data, p, self.jacobians, pushes, (w, 1.0 / state.delta_e))
        C = self.rows.curvature(self.data, p, state.y, (state.z, state.v))
        factors, state.shift = self.factor(H, C, state.delta_k)
        c = p.k + state.delta_k * state.y
        n = self.problem.n
        dx, du, y = (v.squeeze(3) for v in riccati.solve(
            factors, s[:, :T].unsqueeze(3), s[:, T, :n].unsqueeze(2), c.unsqueeze(3)))
        gd, ed = self.rows.along(self.data, p, self.jacobians, dx, du)
        dz, dv = w * (gd + toward), (ed + p.e) / state.delta_e
        rows = p.g + state.s - state.t
        dt = mu / rest - state.t + state.t / rest * dz
        ds = state.delta_g * dz - gd - rows + dt
        # of the merit: the cost's slope is that of s without the rows' pushes
        kd = state.delta_k * (y - state.y) - p.k
        slope = ((s[..., :n] * dx).sum((1, 2)) + (s[:, :T, n:] * du).sum((1, 2)) - (pushes[0] * gd).sum(1)
                 + ((state.z + rows / state.delta_g) * (gd + ds - dt) - mu / state.s * ds).sum(1)
                 + ((self.rho - mu / state.t) * dt)[:, self.soft].sum(1)
                 + ((state.y + p.k / state.delta_k) * kd).sum((1, 2)))
        ok = factors.ok & torch.isfinite(slope) & (slope <= 1e2 * self.eps * (1.0 + p.cost.abs()))
        return _Direction(dx, du, ds, dt, y - state.y, dz, dv, slope, ok)

    def merit(self, at, point: Point, s: Tensor, t: Tensor) -> Tensor:
        """A of the samples `at`, (count,)."""
        state, rows, give = self.state[at], point.g + s - t, t[:, self.soft]
        return (point.cost - state.mu * (s.log().sum(1) + give.log().sum(1)) + give @ self.rho[self.soft]
                + ((state.z + 0.5 * rows / state.delta_g) * rows).sum(1)
                + ((state.y + 0.5 * point.k / state.delta_k) * point.k).sum((1, 2))
                + ((state.v + 0.5 * point.e / state.delta_e) * point.e).sum(1))

    def best_slacks(self, at, g: Tensor) -> tuple[Tensor, Tensor]:
        """The s and t that minimise A for rows g (count, G) of the samples `at`: see the top of the file.

        Below rho/2 the function of p is concave, so that Newton's method from below its root never passes it; there,
        mu/(rho - p) <= 2 mu/rho leaves a quadratic whose root is below and at least half of it. A root above rho/2 is
        that of the mirrored row: rho - p for p, -g for g, and t for s."""
        state = self.state[at]
        mu, delta, rho = state.mu.unsqueeze(1), state.delta_g, self.rho
        mirrored = delta * (0.5 * rho - state.z) < g
        b = torch.where(mirrored, delta * (rho - state.z) - g, delta * state.z + g)
        low = b - 2.0 * mu / rho
        root = (low.square() + 4.0 * delta * mu).sqrt()
        p = torch.where(low > 0, 0.5 * (low + root) / delta, 2.0 * mu / (root - low))
        for _ in range(_HALF_TO_ROUNDING if len(self.soft) else 0):
            slope = delta + mu / p.square() + mu / (rho - p).square()
            p = torch.minimum(p - (delta * p - b - mu / p + mu / (rho - p)) / slope, 0.5 * rho)
        near, far = mu / p, mu / (rho - p)
        return torch.where(mirrored, far, near), torch.where(mirrored, near, far)

    def step(self, d: _Direction):
        """Line search and update."""
        p, state, settings = self.point, self.state, self.settings
        before = self.merit(slice(None), p, state.s, state.t)
        tau = torch.maximum(1.0 - state.mu, torch.full_like(state.mu, settings.boundary))
        alpha = torch.ones_like(state.mu)
        alpha_z = torch.minimum(_to_boundary(state.z, d.dz, tau), _to_boundary(self.rho - state.z, -d.dz, tau))
        slack = 10.0 * self.eps * (before.abs() + p.cost.abs() + 1.0)  # rounding must not stop it
        took = torch.zeros_like(d.ok)
        left = d.ok.nonzero()[:, 0]
        new, new_s, new_t = p.map(torch.clone), state.s.clone(), state.t.clone()
        for _ in range(settings.halvings):
            if not len(left):
                break
            a = alpha[left]
            trial = self.rows.at(self.data[left], p.x[left] + a.view(-1, 1, 1) * d.dx[left],
                                 p.u[left] + a.view(-1, 1, 1) * d.du[left])
            s, t = self.best_slacks(left, trial.g)
            good = self.merit(left, trial, s, t) <= (before + slack)[left] + settings.armijo * a * d.slope[left]
            at = left[good]
            took[at], new_s[at], new_t[at] = True, s[good], t[good]
            for f in fields(new):
                getattr(new, f.name)[at] = getattr(trial, f.name)[good]
            left = left[~good]
            alpha[left] *= 0.5
        self.update(d, took, alpha, alpha_z, new, new_s, new_t)

    def update(self, d, took, alpha, alpha_z, new, new_s, new_t):
        """Move the samples that `took` a step of length alpha; adapt delta and shift."""
        p, state, settings = self.point, self.state, self.settings
        step = torch.where(took, alpha, 0.0)
        state.z = torch.where(took.unsqueeze(1), state.z + alpha_z.unsqueeze(1) * d.dz, state.z)
        state.y = select(took, state.y + step.view(-1, 1, 1) * d.dy, state.y)
        state.v = select(took, state.v + step.unsqueeze(1) * d.dv, state.v)
        for name, old, now in (('delta_k', p.k, new.k), ('delta_e', p.e, new.e),
                               ('delta_g', p.g + state.s - state.t, new.g + new_s - new_t)):
            delta = getattr(state, name)
            slow = (now.abs() >= settings.delta_when * old.abs()) & (now.abs() > settings.tolerance)
            smaller = torch.where(slow, (settings.delta_ratio * delta).clamp_min(settings.delta_min), delta)
            setattr(state, name, select(took, smaller, delta))
        self.point, state.s, state.t = new, new_s, new_t
        state.decrement = torch.where(d.ok, (-d.slope).clamp_min(0.0) / (1e-2 + new.cost.abs()), state.decrement)
        less = settings.shift_down * state.shift
        state.shift = torch.where(took, torch.where(less < 0.01 * settings.shift_0, 0.0, less),
                                  (settings.shift_up * state.shift).clamp(settings.shift_0, settings.shift_max))
        state.failures = torch.where(took, 0, state.failures + 1)
        state.steps = state.steps + 1


def _to_boundary(s: Tensor, ds: Tensor, tau: Tensor) -> Tensor:
    """(B,) the largest step length <= 1 with s + alpha ds >= (1 - tau) s."""
    if not s.shape[1]:
        return torch.ones_like(tau)
    return (tau / (-ds / s).amax(dim=1).clamp_min(1e-300)).clamp_max(1.0)


__all__ = ['STATUS', 'Constraint', 'Function', 'Settings', 'Solution', 'Status', 'WarmStart', 'at_reference',
           'cold_start', 'guess', 'solve']
