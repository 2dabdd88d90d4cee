"""Dual-regularised interior point: exact linear solves however small delta is, optima from cold starts.

Sousa-Pinto and Orban, arXiv 2509.16370 (deqmpc.solvers.riccati, riccati_scan and interior_point). Four parts:

  linear system  residual of the KKT system of random regulators (N = 30, n = 4, m = 2) against delta: by the
                 sequential recursion, the parallel one, and Cholesky on the normal equations H + C'C/delta
  depth          tensor operations, one after the other, of a factorisation and a solve against N = 8 to 1024 stages
  swing-ups      the authors' acrobot, and cart-pole with |u| <= 5 that ends exactly upright; explicit Euler, 0.1 s
  crazyflie_obs  starts and spheres of the task, T = 20, first guess hovering where it starts, against the
                 augmented-Lagrangian solver, which asks for 1e-4 only

Checks: residuals of both recursions are below 1e-10 and 1e-8 at every delta, and the normal equations miss 1e-8 at the
smallest; the recursion's operations grow as N, the scan's by the same number at every doubling; acrobot within 30
steps and cart-pole within 120, with the authors' costs, 44.513 and 66.8026; at least 99 % of the flights are solved;
where both solvers succeed, the interior point's cost is at most 1 % above in 95 % of them. Acrobot is solved with the
authors' penalties and the exact Hessian alone, cart-pole with this solver's defaults.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deqmpc import tasks
from deqmpc.dynamics.cartpole import Cartpole
from deqmpc.dynamics.equations import Scalars, cos, sin
from deqmpc.problem import Instances, Problem
from deqmpc.provenance import commit
from deqmpc.reproduce import Check, Column, Plan, Results
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import interior_point, riccati, riccati_scan

X_LABEL = 'delta or N'
SEEDS = {'smoke': 2, 'small': 100, 'medium': 300, 'full': 1000}
DELTAS = (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
STAGES = tuple(2 ** k for k in range(3, 11))
AUTHORS = {'acrobot': 44.513, 'cart-pole': 66.8026}  # their solver's costs
STEPS = {'acrobot': 30, 'cart-pole': 120}  # theirs: 24 and 107
FLIGHT, OURS, OTHER = 'crazyflie_obs', 'interior point', 'augmented Lagrangian'
COLUMNS = (Column('relative KKT residual, 1e-12', 'residual', 1e12), Column('solved, %', 'solved', 100.0),
           Column('operations in a row', 'operations'), Column('Newton steps', 'steps'), Column('cost', 'cost'))


@dataclass(frozen=True)
class Acrobot:
    """Two links of 1 kg and 1 m with a torque at the elbow. x = (q1, q2, q1', q2') from hanging, q2 relative."""

    gravity: float = 9.8
    integrator = 'euler'
    n = 4
    m = 1

    def derivative(self, x: Scalars, u: Scalars) -> list:
        """M(q) q'' + coriolis + weight = (0, u), inertias of 1 about the centres at half of the links."""
        q1, q2, w1, w2 = x
        c2, s2 = cos(q2), 0.5 * sin(q2)
        m11, m12, m22 = 3.5 + c2, 1.25 + 0.5 * c2, 1.25  # I1 + m1 lc^2 + I2 + m2 (l1^2 + lc^2 + 2 l1 lc cos q2), ..
        far = 0.5 * self.gravity * sin(q1 + q2)
        t1 = s2 * (2.0 * w1 * w2 + w2 * w2) - 1.5 * self.gravity * sin(q1) - far
        t2 = u[0] - s2 * w1 * w1 - far
        inverse = 1.0 / (m11 * m22 - m12 * m12)
        return [w1, w2, inverse * (m22 * t1 - m12 * t2), inverse * (m11 * t2 - m12 * t1)]


@dataclass(frozen=True)
class EulerCartpole(Cartpole):
    """The authors' cart of 10 kg and pole of 1 kg and 0.5 m, a point mass at its end; theta is 0 upright."""

    moment: float = 0.5
    inertia: float = 0.25
    integrator = 'euler'


def acrobot() -> tuple[Problem, Instances, interior_point.Settings, dict]:
    """From hanging, all zeros as a guess; costs 0.05 |x - goal|^2 + 0.005 u^2, at the end 500 |x - goal|^2."""
    problem = Problem(Acrobot(), 0.1, 50, [0.1] * 4, [0.01], [1000.0] * 4, position=(0,))
    data = _to(problem, [0.0] * 4, [np.pi, 0.0, 0.0, 0.0])
    return problem, data, interior_point.Settings(delta_0=1e-3, delta_min=1e-9, gauss_newton=False), {}


def cart_pole() -> tuple[Problem, Instances, interior_point.Settings, dict]:
    """Exactly upright at the end, from a straight line; costs 0.1 |x - goal|^2 + 0.01 u^2, at the end 1000 |.|^2."""
    problem = Problem(EulerCartpole(), 0.1, 50, [0.2] * 4, [0.02], [2000.0] * 4, u_low=[-5.0], u_high=[5.0],
                      position=(0,))
    data = _to(problem, [0.0, 0.2 - np.pi, 0.0, -0.1], [0.0] * 4)
    line = torch.linspace(0.0, 1.0, 51, dtype=torch.float64).view(1, 51, 1)
    settings = interior_point.Settings()
    guess = interior_point.guess(problem, data, data.x_init.unsqueeze(1) * (1.0 - line), data.u_ref, settings)
    return problem, data, settings, {'warm_start': guess, 'constraints': [interior_point.at_reference()]}


def _to(problem, start, goal) -> Instances:
    start, goal = (torch.tensor([v], dtype=torch.float64) for v in (start, goal))
    return problem.instances(start, goal.unsqueeze(1).repeat(1, problem.horizon + 1, 1),
                             start.new_zeros(1, problem.horizon, problem.m))


def rows(plan: Plan, out) -> list[dict]:
    """Residuals, depths, swing-ups and flights."""
    made = [*linear_rows(min(plan.seeds, 20)), *depth_rows(), *swing_up_rows(), *flight_rows(plan.seeds)]
    empty = {'x': '', 'seed': 0} | {c.metric: np.nan for c in COLUMNS}
    return [{**empty, **row, 'commit': commit()} for row in made]


def linear_rows(seeds: int) -> list[dict]:
    """A row for every delta, way and random regulator."""
    made = []
    for delta in DELTAS:
        system = regulators(seeds, delta)
        for variant, solve in (('sequential', recursion(riccati)), ('parallel', recursion(riccati_scan)),
                               ('normal equations', normal_equations)):
            for seed, residual in enumerate(relative_residual(system, *solve(system))):
                made.append({'task': 'linear system', 'variant': variant, 'x': delta, 'seed': seed,
                             'residual': float(residual)})
    return made


def regulators(count: int, delta: float, N: int = 30, n: int = 4, m: int = 2) -> tuple[torch.Tensor, ...]:
    """H, QN, F, D, s, qN, c of deqmpc.solvers.riccati, uniform data with positive definite costs."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(count, *shape, generator=random, dtype=torch.float64)

    def positive(*shape):
        a = uniform(*shape)
        return a @ a.transpose(-1, -2) + 0.1 * torch.eye(shape[-1], dtype=torch.float64)
    F = torch.cat([uniform(N, n, n) / 2, uniform(N, n, m)], dim=-1)  # / 2: bounded over the horizon
    return (positive(N, n + m, n + m), positive(n, n), F, torch.full((count, N + 1, n), delta, dtype=torch.float64),
            uniform(N, n + m, 1), uniform(n, 1), uniform(N + 1, n, 1))


def recursion(module):
    """Its factor and solve in one call."""
    return lambda system: module.solve(module.factor(*system[:4]), *system[4:])


def normal_equations(system):
    """(H + C'C / delta) z = -(s + C'c / delta), y = (C z + c) / delta, by a dense Cholesky factorisation."""
    H, QN, F, D, s, qN, c = system
    (B, N, n, nm), delta = F.shape, D[0, 0, 0]
    P, C = torch.zeros(B, N * nm + n, N * nm + n, dtype=H.dtype), torch.zeros(B, (N + 1) * n, N * nm + n, dtype=H.dtype)
    for i in range(N + 1):
        z, y = slice(i * nm, min((i + 1) * nm, N * nm + n)), slice(i * n, (i + 1) * n)
        P[:, z, z] = H[:, i] if i < N else QN
        C[:, y, i * nm:i * nm + n] = -torch.eye(n, dtype=H.dtype)
        if i < N:
            C[:, (i + 1) * n:(i + 2) * n, z] = F[:, i]
    g, c = torch.cat([s.flatten(1, 2), qN], dim=1), c.flatten(1, 2)
    root, info = torch.linalg.cholesky_ex(P + C.transpose(1, 2) @ C / delta)
    z = torch.cholesky_solve(-(g + C.transpose(1, 2) @ c / delta), root)
    z = torch.where((info == 0).view(-1, 1, 1), z, float('nan'))
    y = ((C @ z + c) / delta).unflatten(1, (N + 1, n))
    stages = z[:, :N * nm].unflatten(1, (N, nm))
    return torch.cat([stages[:, :, :n], z[:, None, N * nm:]], dim=1), stages[:, :, n:], y


def relative_residual(system, x, u, y) -> torch.Tensor:
    """(B,) largest residual of the KKT system relative to the largest unknown; inf where there is none."""
    H, QN, F, D, s, qN, c = system
    n, z = x.shape[2], torch.cat([x[:, :-1], u], dim=2)
    stage = H @ z + s + F.transpose(2, 3) @ y[:, 1:]
    stage[:, :, :n] -= y[:, :-1]
    ahead = torch.cat([c[:, :1], F @ z + c[:, 1:]], dim=1) - x - D.unsqueeze(3) * y
    error = torch.cat([v.flatten(1) for v in (stage, QN @ x[:, -1] + qN - y[:, -1], ahead)], dim=1).abs().amax(dim=1)
    size = torch.cat([v.flatten(1) for v in (x, u, y)], dim=1).abs().amax(dim=1)
    return torch.nan_to_num(error / size, nan=float('inf'))


class Operations(TorchDispatchMode):
    """Counts tensor operations: on an accelerator, launches one after the other."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def depth_rows() -> list[dict]:
    """A row for every number of stages and recursion."""
    made = []
    for N in STAGES:
        system = regulators(1, 1e-4, N)
        for variant, module in (('sequential', riccati), ('parallel', riccati_scan)):
            with Operations() as counter:
                recursion(module)(system)
            made.append({'task': 'depth', 'variant': variant, 'x': N, 'operations': counter.count})
    return made


def swing_up_rows() -> list[dict]:
    """A row for each."""
    made = []
    for name, build in (('acrobot', acrobot), ('cart-pole', cart_pole)):
        problem, data, settings, more = build()
        s = interior_point.solve(problem, data, settings=settings, **more)
        made.append({'task': name, 'variant': OURS, 'solved': float(s.converged[0]), 'steps': int(s.steps[0]),
                     'cost': float(s.cost[0])})
    return made


def flight_rows(count: int) -> list[dict]:
    """A row for every start and solver."""
    task, made = tasks.make(FLIGHT), []
    problem = task.problem(20)
    x, spheres = task.sample(count, torch.Generator().manual_seed(0))
    data = problem.instances(x, task.goal.expand(count, 21, -1), task.u_ref.expand(count, 20, -1), spheres.centers,
                             spheres.inflated(task.margin))
    for name, solver, settings in ((OURS, interior_point, interior_point.Settings()), (OTHER, al, al.Settings())):
        s = solver.solve(problem, data, settings=settings)
        made += [{'task': FLIGHT, 'variant': name, 'seed': i, 'solved': float(s.converged[i]),
                  'steps': int(s.steps[i]), 'cost': float(s.cost[i])} for i in range(count)]
    return made


def draw(figure, results: Results):
    """Residual over delta; operations over N; share of flights solved within so many steps."""
    figure.set_size_inches(14.4, 4.0)
    left, middle, right = figure.subplots(1, 3)
    for variant in ('sequential', 'parallel', 'normal equations'):
        worst = [max(r['residual'] for r in results.select(task='linear system', variant=variant, x=d)) for d in DELTAS]
        left.loglog(DELTAS, worst, marker='o', label=variant)
    left.set(title='linear system', xlabel='delta', ylabel='largest relative KKT residual')
    for variant in ('sequential', 'parallel'):
        middle.loglog(STAGES, depth(results, variant), marker='o', label=variant)
    middle.set(title='depth', xlabel='N', ylabel='operations in a row')
    for variant in (OURS, OTHER):
        found = results.select(task=FLIGHT, variant=variant)
        steps = np.sort([r['steps'] for r in found if r['solved']])
        right.step(steps, np.arange(1, len(steps) + 1) / len(found), where='post', label=variant)
    right.set(title=f'{FLIGHT}, cold starts', xlabel='Newton steps', ylabel='share solved', ylim=(0, 1.02))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)


def depth(results: Results, variant: str) -> list[int]:
    """Operations at every number of stages."""
    return [results.select(task='depth', variant=variant, x=N)[0]['operations'] for N in STAGES]


def checks(results: Results) -> list[Check]:
    """See the top of the file."""
    def worst(variant, **where):
        return max(r['residual'] for r in results.select(task='linear system', variant=variant, **where))
    made = [Check(f'residual of the {v} recursion: {worst(v):.1e}, < {limit:.0e} at every delta', worst(v) < limit)
            for v, limit in (('sequential', 1e-10), ('parallel', 1e-8))]
    dense = worst('normal equations', x=DELTAS[-1])
    made.append(Check(f'of the normal equations at delta = {DELTAS[-1]:g}: {dense:.1e}, > 1e-8', dense > 1e-8))
    loop, scan = depth(results, 'sequential'), depth(results, 'parallel')
    more = {b - a for a, b in zip(scan, scan[1:], strict=False)}
    each = {(b - a) / N for a, b, N in zip(loop, loop[1:], STAGES, strict=False)}  # operations of a stage
    made.append(Check(f'from {STAGES[0]} to {STAGES[-1]} stages the recursion goes from {loop[0]} to {loop[-1]} '
                      f'operations in a row, the scan from {scan[0]} to {scan[-1]}, by {max(more)} at a doubling',
                      len(more) == 1 and len(each) == 1))
    for name, cost in AUTHORS.items():
        row, = results.select(task=name)
        made.append(Check(f'{name}: {row["steps"]} steps, cost {row["cost"]:.4f}; at most {STEPS[name]}, {cost}',
                          bool(row['solved']) and row['steps'] <= STEPS[name] and abs(row['cost'] - cost) < 1e-3))
    solved = results.mean('solved', task=FLIGHT, variant=OURS)
    made.append(Check(f'{100 * solved:.1f} % of the flights are solved, >= 99 %', solved >= 0.99))
    pairs = list(zip(results.select(task=FLIGHT, variant=OURS), results.select(task=FLIGHT, variant=OTHER),
                     strict=True))
    near = [a['cost'] <= 1.01 * b['cost'] for a, b in pairs if a['solved'] and b['solved']]
    share = float(np.mean(near)) if near else np.nan
    made.append(Check(f'in {100 * share:.1f} % of {len(near)} flights the cost is at most 1 % above the augmented '
                      f"Lagrangian's, >= 95 %", share >= 0.95))
    return made
