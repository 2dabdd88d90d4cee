"""Path-following interior-point method for small cone programs and complementarity problems, batched, differentiable.

  min_z l(z; theta)   s.t.   c(z; theta) = 0,   z in K        K: free, nonnegative and second-order (SOC) cones

With multipliers lambda of c and nu in K* of the cones, w = (z, lambda, nu) and a central-path parameter mu > 0,

  r(w; theta, mu) = ( dl/dz + (dc/dz)' lambda - nu,   c,   z o nu - mu e ) = 0
  nonnegative:  a o b = a b, e = 1        SOC:  a o b = (a'b, a_0 b_1 + b_0 a_1), e = (1, 0, .., 0)

Contact with friction has the same form and is no minimisation, so what is solved here are `Conditions`: any equations
of w with pairs of entries of w in cones, to which this module adds the rows a o b - mu e. `Program` derives the
conditions of a minimisation from l and c.

Algorithm 1 of Howell, Le Cleac'h, Singh, Florence, Manchester, Sindhwani, Trajectory optimization with
optimization-based dynamics (RA-L 2022):

  w = start(theta)
  for every mu of the path, from 1 downwards by the factor gamma:
    while |r(w; theta, mu)| >= eps_r:
      D = (dr/dw)^-1 r;   alpha = 1, halved until w - alpha D is inside the cones, then until |r| falls
      w = w - alpha D
    keep w_mu = w

  dw_mu/dtheta = -(dr/dw)^-1 dr/dtheta   at the w_mu of a mu that may be larger than the one a value is taken at

The derivative is that of the exact central path at its mu: smooth where the solution itself jumps. Every sample has
its own path, status and step count, and never sees another one. float64 on the CPU runs compiled code, generated from
the conditions (cone_program_code.py); where there is no compiler, and on a GPU, the same steps run in torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deqmpc.dynamics.equations import Scalars
from deqmpc.realtime import build
from deqmpc.solvers import cone_program_code as code
from deqmpc.solvers.augmented_lagrangian import STATUS, Status

log = logging.getLogger(__name__)

_CONVERGED, _LIMIT, _SINGULAR, _NOT_FINITE = (STATUS.index(s) for s in (
    Status.CONVERGED, Status.ITERATION_LIMIT, Status.SINGULAR, Status.NOT_FINITE))


@dataclass(frozen=True)
class Cones:
    """Which entries of w are paired: each pair (a, b) lies in its cone and the cone's dual, and a o b = mu e."""

    nonnegative: tuple[tuple[int, int], ...] = ()
    second_order: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()  # the first index of each is the axis

    def __post_init__(self):
        for a, b in self.second_order:
            if len(a) != len(b) or len(a) < 2:
                raise ValueError(f'second-order cones over {a} and {b}; expected two equally long lists of 2 or more')

    @property
    def rows(self) -> int:
        """Rows of a o b - mu e."""
        return len(self.nonnegative) + sum(len(a) for a, _ in self.second_order)

    def products(self, w: Scalars, mu: Any) -> list:
        """a o b - mu e, one scalar a row."""
        rows = [w[a] * w[b] - mu for a, b in self.nonnegative]
        for a, b in self.second_order:
            rows.append(sum(w[i] * w[j] for i, j in zip(a, b, strict=True)) - mu)
            rows += [w[a[0]] * w[j] + w[b[0]] * w[i] for i, j in zip(a[1:], b[1:], strict=True)]
        return rows

    def margins(self, w: Scalars) -> list:
        """Scalars that are all positive strictly inside the cones: a for a nonnegative a, a_0^2 - |a_1|^2 and a_0
        for a second-order one."""
        inside = [w[i] for pair in self.nonnegative for i in pair]
        for a in (side for pair in self.second_order for side in pair):
            inside += [w[a[0]], w[a[0]] ** 2 - sum(w[i] ** 2 for i in a[1:])]
        return inside


class Conditions(Protocol):
    """What r consists of, written once over sympy scalars. Implementations are frozen dataclasses, hence hashable by
    their constants."""

    size: int  # entries of w
    parameters: int  # entries of theta
    cones: Cones

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """The size - cones.rows scalars that vanish beside the cone products."""

    def start(self, theta: Scalars) -> list:
        """A w strictly inside the cones."""


class Program:
    """Conditions of  min_z l(z; theta)  s.t.  c(z; theta) = 0,  z in K,  with w = (z, lambda, nu). A subclass, a frozen
    dataclass, gives `variables`, `parameters`, `nonnegative` and `second_order` (indices of z), l and c."""

    variables: int  # entries of z
    parameters: int
    nonnegative: tuple[int, ...] = ()  # each entry >= 0
    second_order: tuple[tuple[int, ...], ...] = ()  # |rest| <= first

    def objective(self, z: Scalars, theta: Scalars) -> Any:
        """l, a scalar."""
        raise NotImplementedError

    def constraints(self, z: Scalars, theta: Scalars) -> list:
        """c."""
        return []

    @property
    def dual_of(self) -> dict[int, int]:
        """Index in w of the multiplier nu of each entry of z that is in a cone."""
        in_cones = [*self.nonnegative, *(i for cone in self.second_order for i in cone)]
        if len(set(in_cones)) != len(in_cones):
            raise ValueError(f'entries {in_cones} of z are in cones; expected each at most once')
        return {i: self.variables + self._equalities + k for k, i in enumerate(in_cones)}

    @property
    def _equalities(self) -> int:
        import sympy
        return len(self.constraints(sympy.symbols(f'z:{self.variables}'), sympy.symbols(f't:{self.parameters}')))

    @property
    def size(self) -> int:
        """Entries of w."""
        return self.variables + self._equalities + len(self.dual_of)

    @property
    def cones(self) -> Cones:
        """Pairs of z and nu."""
        dual = self.dual_of
        return Cones(tuple((i, dual[i]) for i in self.nonnegative),
                     tuple((cone, tuple(dual[i] for i in cone)) for cone in self.second_order))

    def equations(self, w: Scalars, theta: Scalars) -> list:
        """dl/dz + (dc/dz)' lambda - nu, then c."""
        import sympy
        z = list(w[:self.variables])
        dual, c = self.dual_of, self.constraints(z, theta)
        lagrangian = self.objective(z, theta) + sum(a * b for a, b in zip(w[self.variables:], c, strict=False))
        return [sympy.diff(lagrangian, e) - (w[dual[i]] if i in dual else 0) for i, e in enumerate(z)] + list(c)

    def start(self, theta: Scalars) -> list:
        """1 on the axes of the cones, 0.1 beside them, 0 elsewhere."""
        w = [0.0] * self.size
        for pair in self.cones.nonnegative:
            for i in pair:
                w[i] = 1.0
        for side in (side for pair in self.cones.second_order for side in pair):
            for k, i in enumerate(side):
                w[i] = 0.1 if k else 1.0
        return w


@dataclass(frozen=True)
class Settings:
    """Numbers of Algorithm 1; the defaults are the paper's."""

    mu_0: float = 1.0  # first parameter of the path
    gamma: float = 0.1  # factor from one parameter to the next
    tolerance: float = 1e-8  # eps_r, on the Euclidean norm of r
    max_steps: int = 200  # Newton steps at most, of a whole path
    halvings: int = 40  # of the step length at most

    def __post_init__(self):
        for name in ('mu_0', 'gamma', 'tolerance'):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f'{name} = {getattr(self, name)!r}; expected a finite number > 0')
        if self.gamma >= 1.0:
            raise ValueError(f'gamma = {self.gamma!r}; expected a number < 1')
        for name in ('max_steps', 'halvings'):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} = {value!r}; expected an integer >= 1')

    def path(self, *targets: float) -> list[float]:
        """The parameters from mu_0 down to the least of `targets`, with each of the targets among them."""
        for mu in targets:
            if not 0.0 < mu <= self.mu_0:
                raise ValueError(f'mu = {mu!r}; expected a number > 0, at most mu_0 = {self.mu_0}')
        levels, mu = set(targets), self.mu_0
        while mu > min(targets) * (1.0 + 1e-9):
            if not any(math.isclose(mu, t, rel_tol=1e-9) for t in targets):
                levels.add(mu)
            mu *= self.gamma
        return sorted(levels, reverse=True)


@dataclass(frozen=True)
class Path:
    """Points of the central path of a batch."""

    mu: tuple[float, ...]  # (L,) falling
    w: Tensor  # (..., L, size); NaN from the first mu on that was not reached
    status: Tensor  # (...) index into STATUS: CONVERGED, ITERATION_LIMIT, SINGULAR (no step lowers r) or NOT_FINITE
    steps: Tensor  # (...) Newton steps
    residual: Tensor  # (...) |r| at the last mu that was tried

    @property
    def converged(self) -> Tensor:
        """(...) bool."""
        return self.status == _CONVERGED

    def at(self, mu: float) -> Tensor:
        """w at one of the parameters, (..., size)."""
        for k, level in enumerate(self.mu):
            if math.isclose(level, mu, rel_tol=1e-9):
                return self.w[..., k, :]
        raise ValueError(f'mu = {mu!r}; expected one of the path, {self.mu}')


class ConeSolver:
    """Solves `conditions` for batches of theta. `compiled` is None to take compiled code where it can be had, else
    whether to; NoCompiler is raised where it is asked for and cannot be had."""

    def __init__(self, conditions: Conditions, settings: Settings = Settings(), compiled: bool | None = None):
        self.conditions, self.settings = conditions, settings
        self._native = None
        if compiled is not False:
            try:
                self._native = code.native(conditions)
            except build.NoCompiler as error:
                if compiled:
                    raise
                log.warning('cone program: %s; running in torch, about 100 times slower', error)

    @property
    def compiled(self) -> bool:
        """Whether float64 on the CPU runs compiled code."""
        return self._native is not None

    def solve(self, theta: Tensor, mu: Sequence[float], start: Tensor | None = None) -> Path:
        """The path at theta (..., parameters) down to the least of `mu`, with each of `mu` on it; from `start`
        (..., size), inside the cones, instead of that of the conditions. Never raises for numbers; ValueError for
        shapes."""
        levels = self.settings.path(*mu)
        flat = self._flat('theta', theta, self.conditions.parameters)
        if start is not None:
            start = self._flat('start', start.expand(*theta.shape[:-1], -1), self.conditions.size)
        run = self._native.solve if self._runs_compiled(flat) else self._solve_in_torch
        w, status, steps, residual = run(flat, start, levels, self.settings)
        shape = theta.shape[:-1]
        return Path(tuple(levels), w.reshape(*shape, len(levels), self.conditions.size),
                    *(v.reshape(shape) for v in (status, steps, residual)))

    def single(self, mu: float) -> code.Single:
        """A compiled solver of one sample at a time at mu, on floats; NoCompiler where there is none."""
        return code.native(self.conditions).single(mu, self.settings)

    def sensitivity(self, w: Tensor, theta: Tensor) -> Tensor:
        """dw/dtheta (..., size, parameters) of the central path through w (..., size); NaN where dr/dw is singular."""
        p, q = self._flat('w', w, self.conditions.size), self._flat('theta', theta, self.conditions.parameters)
        if w.shape[:-1] != theta.shape[:-1]:
            raise ValueError(f'w {tuple(w.shape)} and theta {tuple(theta.shape)}; expected the same leading sizes')
        run = self._native.sensitivity if self._runs_compiled(q) else self._sensitivity_in_torch
        return run(p, q).reshape(*w.shape, self.conditions.parameters)

    def residual(self, w: Tensor, theta: Tensor, mu: float) -> Tensor:
        """r (..., size) at w (..., size) and theta (..., parameters)."""
        f = code.functions(self.conditions)
        flat = [self._flat('w', w, self.conditions.size), self._flat('theta', theta, self.conditions.parameters)]
        return f.residual(*flat, flat[0].new_full((len(flat[0]), 1), mu)).reshape(w.shape)

    def _flat(self, name, value, length):
        if value.dim() < 1 or value.shape[-1] != length:
            raise ValueError(f'{name} has shape {tuple(value.shape)}, expected (..., {length})')
        return value.detach().reshape(-1, length).contiguous()

    def _runs_compiled(self, theta):
        return self._native is not None and theta.dtype == torch.float64 and theta.device.type == 'cpu'

    def _sensitivity_in_torch(self, w, theta):
        f = code.functions(self.conditions)
        by_theta = f.jacobian_theta(w, theta)
        s, failed = torch.linalg.solve_ex(f.jacobian_w(w, theta), -by_theta)
        return s.masked_fill((failed != 0)[:, None, None], math.nan)

    def _solve_in_torch(self, theta, start, levels, settings):
        f = code.functions(self.conditions)
        B = len(theta)
        w = f.start(theta) if start is None else start.clone()
        finite = torch.isfinite(theta).all(dim=1) & torch.isfinite(w).all(dim=1)
        status = torch.where(finite, _CONVERGED, _NOT_FINITE)
        steps = torch.zeros(B, dtype=torch.long, device=theta.device)
        norm = torch.where(finite, theta.new_zeros(B), math.nan)
        points = []
        for mu in levels:
            self._newton(f, w, theta, mu, status, steps, norm, settings)
            points.append(torch.where((status == _CONVERGED)[:, None], w, math.nan))
        return torch.stack(points, dim=1), status, steps, norm

    def _newton(self, f, w, theta, mu, status, steps, norm, settings):
        """Newton steps at one mu, in place, for the samples whose status is still CONVERGED."""
        left = (status == _CONVERGED).nonzero()[:, 0]
        while len(left):
            here, t = w[left], theta[left]
            m = here.new_full((len(left), 1), mu)
            r = f.residual(here, t, m)
            norm[left] = length = r.norm(dim=1)
            go = ~(length < settings.tolerance)
            over = go & (steps[left] >= settings.max_steps)
            status[left[over]] = _LIMIT
            go &= ~over
            left, here, t, m, r, length = left[go], here[go], t[go], m[go], r[go], length[go]
            if not len(left):
                return
            D, failed = torch.linalg.solve_ex(f.jacobian_w(here, t), r)
            trial, ok = self._search(f, here, D, t, m, length, settings)
            ok &= failed == 0
            w[left] = torch.where(ok[:, None], trial, here)
            steps[left] += ok
            status[left[~ok]] = _SINGULAR
            left = left[ok]

    def _search(self, f, w, D, theta, mu, length, settings):
        """w - alpha D with the first alpha = 1, 1/2, .. that is inside the cones and lowers |r|, and whether any is."""
        alpha = torch.ones_like(length)
        for _ in range(settings.halvings):
            trial = w - alpha[:, None] * D
            ok = (f.margins(trial) > 0).all(dim=1) & (f.residual(trial, theta, mu).norm(dim=1) < length)
            if ok.all():
                break
            alpha = torch.where(ok, alpha, 0.5 * alpha)
        return trial, ok
