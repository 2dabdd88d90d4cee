"""The real-time path: one instance of `deqmpc.problem`, solved by compiled code without allocation.

  solver = RealtimeSolver(problem, spheres_max=40)                             to a tolerance (interior point)
  solver = RealtimeSolver(problem, 40, al.Settings(iterations=2, gn_steps=2, optimality=0.0))       fixed steps
  solution = solver.solve(x_init, x_ref, u_ref, centers, radii, warm_start)
  solution = solver.solve_batch(instances, warm_start)                         torch tensors, see batch.py
  solution = solver.solve_cold(x_init, x_ref, u_ref, centers, radii)           where no plan is known

The type of the settings chooses the method. `al.Settings` runs the iterations of deqmpc.solvers.augmented_lagrangian,
step by step; `Settings` the primal-dual interior-point method of solver.c. Where there is no compiler both are served
by the torch solver, 100 times slower and to the same tolerances; the log says so once. `interior_point.Settings` asks
for deqmpc.solvers.interior_point, which is never compiled: the same calls, with regularisation that finds a step from
any start, to 1e-8.

Arrays are NumPy float64. A solver owns its buffers: one thread at a time, a solver a thread.
"""

from __future__ import annotations

import ctypes
import inspect
import logging
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch

from deqmpc.dynamics import equations as dynamics
from deqmpc.problem import Instances, Problem
from deqmpc.realtime import build, codegen
from deqmpc.realtime.batch import BatchSolver
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import interior_point
from deqmpc.solvers.settings import check_numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Numbers of the interior-point method. Lengths in the units of the problem's residuals (m, hover thrusts)."""

    tolerance: float = 1e-6  # on defects, rows and complementarity; stationarity to 100 times that, relatively
    max_steps: int = 100  # Newton steps at most, for a bounded solve time
    exact_after: int = 8  # step from which on the curvature of the dynamics is used: where Gauss-Newton is slow
    elastic: float = float('inf')  # largest multiplier of a constraint on the state; finite = soft constraints
    feasibility: float = 1e-4  # violation from which on a soft constraint counts as given up (INFEASIBLE)
    mu_start: float = 0.1  # first barrier parameter, in units of the cost
    slack_min: float = 0.01  # least first slack of a row

    def __post_init__(self):
        check_numbers(self)


class WarmStart(NamedTuple):  # made in every call: a frozen dataclass takes five times as long
    """Where a solve starts. Multipliers and penalty are used by the augmented Lagrangian only."""

    x: np.ndarray  # (T+1, n)
    u: np.ndarray  # (T, m)
    lam: np.ndarray | None = None  # (T, bounds + K) multipliers of the residuals, bounds first; None: zeros
    eta: np.ndarray | None = None  # (T+1, n) multipliers of the defects; None: zeros
    mu: float | None = None  # penalty; None: mu_0 of the settings

    def shifted(self, steps: int = 1) -> WarmStart:
        """Advanced by `steps` knots, the last knot repeated."""
        def shift(v):
            return None if v is None else np.concatenate([v[steps:], np.repeat(v[-1:], min(steps, len(v)), axis=0)])
        return WarmStart(shift(self.x), shift(self.u), shift(self.lam), shift(self.eta), self.mu)


class Solution(NamedTuple):
    """Result of a solve. Its arrays are its own."""

    x: np.ndarray  # (T+1, n); NaN where the status is NOT_FINITE
    u: np.ndarray  # (T, m)
    warm_start: WarmStart  # pass it back to continue from here
    status: al.Status
    steps: int  # Newton or Gauss-Newton steps
    iterations: int  # AL iterations; 0 for the interior-point method
    defect: float  # largest |k|
    violation: float  # largest h, 0 where all hold
    optimality: float  # AL: Newton decrement relative to 1e-2 + cost; else largest entry of dL/dtau, or KKT error
    cost: float

    @property
    def residual(self) -> float:
        """The larger one of defect and violation."""
        return max(self.defect, self.violation)


class RealtimeSolver:
    """Solves instances of `problem` with at most `spheres_max` spheres, one by one.

    Builds the compiled code on the first use on a machine (a few seconds). `compiled` is False where that was not
    possible, and with `interior_point.Settings`. Raises ValueError on settings that cannot be used.
    """

    def __init__(self, problem: Problem, spheres_max: int,
                 settings: Settings | al.Settings | interior_point.Settings = Settings()):
        if isinstance(spheres_max, bool) or not isinstance(spheres_max, int) or spheres_max < 0:
            raise ValueError(f'spheres_max = {spheres_max!r}; expected an integer >= 0')
        if not isinstance(settings, (Settings, al.Settings, interior_point.Settings)):
            raise ValueError(f'settings is a {type(settings).__name__}; expected realtime.Settings, '
                             f'augmented_lagrangian.Settings or interior_point.Settings')
        if isinstance(settings, al.Settings) and settings.newton_below > 0:
            raise ValueError(f'newton_below = {settings.newton_below}; the compiled solver takes Gauss-Newton steps '
                             f'only, expected 0')
        self.problem, self.spheres_max, self.settings = problem, spheres_max, settings
        if isinstance(settings, interior_point.Settings):
            self._backend = _Torch(problem, settings)
            return
        try:
            self._backend = _compiled(problem, spheres_max, settings)
        except build.NoCompiler as error:
            _say_once(error)
            self._backend = _Torch(problem, settings)

    @property
    def compiled(self) -> bool:
        """Whether the compiled code runs."""
        return isinstance(self._backend, _Compiled)

    def solve(self, x_init: np.ndarray, x_ref: np.ndarray, u_ref: np.ndarray, spheres: np.ndarray | None = None,
              radii: np.ndarray | None = None, warm_start: WarmStart | None = None) -> Solution:
        """Solve one instance.

        x_init (n,), x_ref (T+1, n), u_ref (T, m); spheres (K, d) standing still or (T+1, K, d) at every knot, radii
        (K,), 0 for an absent one. Without a warm start the trajectory stands at x_init with inputs u_ref.
        Numbers that are not finite give the status NOT_FINITE. Raises ValueError on shapes that do not fit.
        """
        return self._backend.solve(x_init, x_ref, u_ref, spheres, radii, warm_start)

    def solve_cold(self, x_init: np.ndarray, x_ref: np.ndarray, u_ref: np.ndarray, spheres: np.ndarray | None = None,
                   radii: np.ndarray | None = None) -> Solution:
        """Solve one instance of which no plan is known: arguments, shapes and errors of `solve`.

        Spheres leave a local minimum for each side that they can be passed on, and one start finds one of them. So the
        instance is solved from two that see it differently: standing at x_init, where the way is found from its near
        end, and the plan without spheres, whose knots leave every sphere on the side they are on. That plan is moved
        1 cm aside, as one through the middle of a sphere is on none. The cheaper solution that converged is returned,
        with the Newton steps of all three solves. Where none did, the one with the least residual is, first of those
        whose soft constraints gave way.
        """
        standing = self.solve(x_init, x_ref, u_ref, spheres, radii)
        if radii is None or len(radii) == 0 or standing.status is al.Status.NOT_FINITE:
            return standing
        free = self.solve(x_init, x_ref, u_ref)
        if free.status is al.Status.NOT_FINITE:
            return standing
        deflected = self.solve(x_init, x_ref, u_ref, spheres, radii, WarmStart(self._aside(free.x), free.u))
        soft = np.isfinite(self.settings.elastic)
        best = min(standing, deflected, key=lambda s: _rank(s, soft))
        return best._replace(steps=standing.steps + free.steps + deflected.steps)

    def _aside(self, x):
        """x with the positions after x_0 moved along the axis on which they travel least."""
        x, p = x.copy(), self.problem.position
        axis = np.argmin(np.abs(x[-1, p] - x[0, p]))
        x[1:, p.start + axis] += _ASIDE
        return x

    def linearize(self, x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """phi(x_t, u_t) (T, n) and dphi/d(x, u) (T, n, n+m) along x (T+1, n), u (T, m): what the solver sees."""
        return self._backend.linearize(x, u)

    def solve_batch(self, data: Instances, warm_start: al.WarmStart | None = None) -> al.Solution:
        """Solve a batch, torch float64 on the CPU, as `al.solve` does: weights of each sample, and the implicit
        gradient where an input requires one.

        Each sample has the numbers of `solve`; samples that are not finite leave the others alone. Runs on
        torch.get_num_threads() threads. Raises ValueError on shapes, types and devices that do not fit.
        """
        if warm_start is None:
            settings = al.Settings() if isinstance(self.settings, Settings) else self.settings
            method = interior_point if isinstance(settings, interior_point.Settings) else al
            warm_start = method.cold_start(self.problem, data, settings)
        al.check_warm_start(self.problem, data, warm_start)
        return self._backend.solve_batch(data, warm_start)


_ASIDE = 0.01  # m, far less than a sphere


def _rank(solution: Solution, soft: bool) -> tuple[int, float]:
    """Smaller is better: converged ones by cost, then soft constraints that gave way, then the rest, by residual."""
    if solution.status is al.Status.CONVERGED:
        return 0, solution.cost
    if soft and solution.status is al.Status.INFEASIBLE:  # the minimiser of the exact penalty
        return 1, solution.residual
    return (2, solution.residual) if np.isfinite(solution.residual) else (3, 0.0)


_said: set[str] = set()  # what this process has logged


def _say_once(error):
    if not _said:
        _said.add(str(error))
        log.warning('real-time solver: %s; falling back to the torch solver, about 100 times slower. Install a C '
                    'compiler (apt install gcc) for the compiled one', error)


class _Exchange(ctypes.Structure):
    """`Exchange` of solver.c."""

    _fields_ = [(name, ctypes.c_long) for name in ('T', 'K_max', 'bounds')] + [('dt', ctypes.c_double)] + [
        (name, ctypes.c_void_p) for name in ('Q', 'R', 'Qf', 'bound_lane', 'bound_sign', 'bound_limit')] + [
        ('K', ctypes.c_long)] + [
        (name, ctypes.c_void_p) for name in ('x_init', 'x_ref', 'u_ref', 'centers', 'radii',
                                             'x', 'u', 'lam', 'eta', 'mu')] + [
        (name, ctypes.c_long) for name in ('iterations', 'gn_steps', 'max_steps', 'halvings', 'exact_after')] + [
        (name, ctypes.c_double) for name in ('gamma', 'mu_max', 'progress', 'feasibility', 'optimality', 'elastic',
                                             'armijo', 'tolerance', 'mu_start', 'slack_min')] + [
        (name, ctypes.c_long) for name in ('status', 'steps', 'outer')] + [
        (name, ctypes.c_double) for name in ('defect', 'violation', 'decrement', 'cost')]


def _library(equations, position, renew=False) -> ctypes.CDLL:
    """The library of these dynamics. Deriving them takes seconds, so the text is kept under what it is made from."""
    try:
        sources = [inspect.getsource(inspect.getmodule(part)) for part in (type(equations), dynamics, codegen)]
    except (OSError, TypeError):  # equations typed into an interpreter: nothing to tell an old text by
        text = codegen.c_source(equations, position)
    else:
        parts = [repr(equations), repr(position), *sources]
        text = build.cached_text(parts, lambda: codegen.c_source(equations, position), renew)
    folder = resources.files('deqmpc.realtime')
    return build.load('\n'.join([text, *(folder.joinpath(name).read_text() for name in ('solver.c', 'batch.c'))]))


def _compiled(problem, spheres_max, settings) -> _Compiled:
    """The compiled solver, its dynamics checked against their definition: a kept text may be of an older one, where
    the equations use another module that has changed."""
    for renew in (False, True):
        made = _Compiled(problem, spheres_max, settings, renew)
        if made.agrees_with(problem):
            return made
    raise RuntimeError(f'the code generated from {problem.equations} does not agree with its definition')


class _Compiled:
    def __init__(self, problem: Problem, spheres_max: int, settings: Settings | al.Settings, renew: bool = False):
        position = range(problem.n)[problem.position]
        T, n, m, d, K = problem.horizon, problem.n, problem.m, len(position), spheres_max
        self._library = _library(problem.equations, position, renew)
        bounds = len(problem.limit)
        lane = problem.sign.abs().argmax(dim=1).numpy()
        own = {
            'Q': problem.Q.numpy(), 'R': problem.R.numpy(), 'Qf': problem.Qf.numpy(),
            'bound_lane': lane.astype(np.dtype(ctypes.c_long)),
            'bound_sign': problem.sign.sum(dim=1).numpy(), 'bound_limit': problem.limit.numpy(),
            'x_init': np.zeros(n), 'x_ref': np.zeros((T + 1, n)), 'u_ref': np.zeros((T, m)),
            'centers': np.zeros((T + 1) * K * d), 'radii': np.zeros(K), 'x': np.zeros((T + 1, n)),
            'u': np.zeros((T, m)), 'lam': np.zeros(T * (bounds + K)), 'eta': np.zeros((T + 1, n)), 'mu': np.zeros(1)}
        self._own = own = {name: np.ascontiguousarray(v) for name, v in own.items()}
        e = self._exchange = _Exchange(T=T, K_max=K, bounds=bounds, dt=problem.dt,
                                       **{name: v.ctypes.data for name, v in own.items()})
        for name in ('mu_max', 'gamma', 'progress', 'feasibility', 'optimality', 'elastic', 'armijo', 'iterations',
                     'gn_steps', 'max_steps', 'halvings', 'exact_after', 'tolerance', 'mu_start', 'slack_min'):
            setattr(e, name, getattr(settings, name, 0))
        self._is_al = isinstance(settings, al.Settings)
        self._mu_0 = settings.mu_0 if self._is_al else 1.0
        self._shapes = T, n, m, d, bounds, K
        self._views: dict[int, tuple] = {}
        create, self._destroy = self._library.create, self._library.destroy
        create.restype, create.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self._destroy.restype, self._destroy.argtypes = None, [ctypes.c_void_p]
        self._address = ctypes.addressof(e)
        self._work = create(self._address)
        if not self._work:
            raise MemoryError(f'no memory for a horizon of {T} with {K} spheres')
        self._run = self._library.solve_al if self._is_al else self._library.solve_ip
        self._run.restype, self._run.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
        self._batch = BatchSolver(self._library, e, own, settings)

    def agrees_with(self, problem: Problem) -> bool:
        """Whether one step at a random point is that of the dynamics' definition, run on floats."""
        rng = np.random.default_rng(0)
        T, n, m, *_ = self._shapes
        x, u = np.tile(0.3 * rng.normal(size=n), (T + 1, 1)), np.tile(1.0 + 0.3 * rng.normal(size=m), (T, 1))
        exact = problem.phi.step(torch.from_numpy(x[:1]), torch.from_numpy(u[:1]))[0].numpy()
        return bool(np.abs(self.linearize(x, u)[0] - exact).max() <= 1e-9 * (1.0 + np.abs(exact).max()))

    def __del__(self):
        if getattr(self, '_work', None):
            self._destroy(self._work)

    def solve(self, x_init, x_ref, u_ref, spheres, radii, start) -> Solution:
        T, n, m, d, bounds, K_max = self._shapes
        own, e = self._own, self._exchange
        K = 0 if radii is None else len(radii)
        centers, radius, lam = self._views.get(K) or self._view(K)
        _copy('x_init', own['x_init'], x_init)
        _copy('x_ref', own['x_ref'], x_ref)
        _copy('u_ref', own['u_ref'], u_ref)
        if (spheres is None) != (radii is None):
            raise ValueError('spheres and radii must be given together')
        if K:
            _copy('radii', radius, radii)
            if np.ndim(spheres) == 2:
                _copy('spheres', centers[0], spheres)
                centers[1:] = centers[0]
            else:
                _copy('spheres', centers, spheres)
        if start is None:
            own['x'][:] = own['x_init']
            own['u'][:] = own['u_ref']
            start = _NO_START
        else:
            _copy('warm_start.x', own['x'], start.x)
            _copy('warm_start.u', own['u'], start.u)
        if start.lam is None:
            lam[:] = 0.0
        else:
            _copy('warm_start.lam', lam, start.lam)
        if start.eta is None:
            own['eta'][:] = 0.0
        else:
            _copy('warm_start.eta', own['eta'], start.eta)
        own['mu'][0] = self._mu_0 if start.mu is None else start.mu
        e.K = K
        self._run(self._work, self._address)
        status = al.STATUS[e.status]
        if status is al.Status.NOT_FINITE:
            return _not_finite(self._shapes, K)
        x, u = own['x'].copy(), own['u'].copy()
        return Solution(x, u, WarmStart(x, u, lam.copy(), own['eta'].copy(), float(own['mu'][0])), status, e.steps,
                        e.outer, e.defect, e.violation, e.decrement, e.cost)

    def solve_batch(self, data, start) -> al.Solution:
        return self._batch.solve(data, start)

    def linearize(self, x, u):
        T, n, m, *_ = self._shapes
        _copy('x', self._own['x'], x)
        _copy('u', self._own['u'], u)
        self._exchange.K = 0
        defects, F = np.zeros((T + 1, n)), np.zeros((T, n, n + m))
        self._library.linearize(*map(ctypes.c_void_p, (self._work, self._address, defects.ctypes.data, F.ctypes.data)))
        return defects[1:] + self._own['x'][1:], F

    def _view(self, K):
        T, n, m, d, bounds, K_max = self._shapes
        if K > K_max:
            raise ValueError(f'{K} spheres, expected at most spheres_max = {K_max}')
        own = self._own
        self._views[K] = (own['centers'][:(T + 1) * K * d].reshape(T + 1, K, d), own['radii'][:K],
                          own['lam'][:T * (bounds + K)].reshape(T, bounds + K))
        return self._views[K]


_NO_START = WarmStart(None, None)


def _copy(name, to, value):
    if (value.shape if type(value) is np.ndarray else np.shape(value)) != to.shape:  # 10 times faster on arrays
        raise ValueError(f'{name} has shape {np.shape(value)}, expected {to.shape}')
    to[...] = value


def _not_finite(shapes, K):
    T, n, m, d, bounds, _ = shapes
    nan = float('nan')
    x, u = np.full((T + 1, n), nan), np.full((T, m), nan)
    start = WarmStart(x, u, np.full((T, bounds + K), nan), np.full((T + 1, n), nan), nan)
    return Solution(x, u, start, al.Status.NOT_FINITE, 0, 0, nan, nan, nan, nan)


class _Torch:
    """The same calls on the torch solvers."""

    def solve_batch(self, data, start) -> al.Solution:
        return self.method.solve(self.problem, data, start, self.settings)

    def linearize(self, x, u):
        with torch.no_grad():
            following, F = self.problem.phi.linearize(torch.as_tensor(x)[:-1], torch.as_tensor(u))
        return following.numpy(), F.numpy()

    def __init__(self, problem: Problem, settings: Settings | al.Settings | interior_point.Settings):
        self.problem = problem
        self.method = interior_point if isinstance(settings, interior_point.Settings) else al
        if isinstance(settings, Settings):  # the exact Hessian reaches small tolerances that Gauss-Newton does not
            settings = al.Settings(feasibility=settings.tolerance, optimality=settings.tolerance ** 2 * 1e2,
                                   elastic=settings.elastic, gn_steps=40, max_steps=10 * settings.max_steps,
                                   newton_below=1e-2)
        self.settings = settings

    def solve(self, x_init, x_ref, u_ref, spheres, radii, start) -> Solution:
        p = self.problem
        T, n, m, d, bounds = p.horizon, p.n, p.m, len(range(p.n)[p.position]), len(p.limit)
        K = 0 if radii is None else len(radii)
        if (spheres is None) != (radii is None):
            raise ValueError('spheres and radii must be given together')
        shapes = [('x_init', x_init, (n,)), ('x_ref', x_ref, (T + 1, n)), ('u_ref', u_ref, (T, m))]
        if K:
            shapes += [('radii', radii, (K,)),
                       ('spheres', spheres, (K, d) if np.ndim(spheres) == 2 else (T + 1, K, d))]
        if start is not None:
            shapes += [('warm_start.x', start.x, (T + 1, n)), ('warm_start.u', start.u, (T, m))]
            shapes += [(f'warm_start.{name}', v, s) for name, v, s in (
                ('lam', start.lam, (T, bounds + K)), ('eta', start.eta, (T + 1, n))) if v is not None]
        for name, value, shape in shapes:
            if np.shape(value) != shape:
                raise ValueError(f'{name} has shape {np.shape(value)}, expected {shape}')
        if not all(np.isfinite(value).all() for _, value, _ in shapes):
            return _not_finite((T, n, m, d, bounds, K), K)

        def tensor(a):
            return torch.as_tensor(np.array(a, dtype=float))[None]
        with torch.no_grad():
            data = p.instances(tensor(x_init), tensor(x_ref), tensor(u_ref), tensor(spheres) if K else None,
                               tensor(radii) if K else None)
            guess = self.method.cold_start(p, data, self.settings)
            if start is not None:
                guess = al.WarmStart(
                    tensor(start.x), tensor(start.u), guess.lam if start.lam is None else tensor(start.lam),
                    guess.eta if start.eta is None else tensor(start.eta),
                    guess.mu if start.mu is None else guess.mu.new_full((1,), start.mu))
            s = self.method.solve(p, data, guess, self.settings)
        w = s.warm_start
        x, u, lam, eta = (v[0].numpy().copy() for v in (s.x, s.u, w.lam, w.eta))
        optimality = s.error if self.method is interior_point else s.decrement
        return Solution(x, u, WarmStart(x, u, lam, eta, float(w.mu)), s.status_of(0), int(s.steps), 0, float(s.defect),
                        float(s.violation), float(optimality), float(s.cost))
