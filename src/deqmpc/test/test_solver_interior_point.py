"""The interior-point method: its Newton step, its merit function, optimality, isolation of samples, closed forms."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import solver_benchmark
import torch
from torch.autograd.functional import hessian, jacobian

from deqmpc.dynamics.pendulum import Pendulum
from deqmpc.policies.base import load_policy
from deqmpc.problem import Instances, Problem
from deqmpc.realtime import RealtimeSolver
from deqmpc.reproduce import Results, command
from deqmpc.solvers import augmented_lagrangian as al
from deqmpc.solvers import ilqr
from deqmpc.solvers import interior_point as ip
from deqmpc.types import Obstacles, RigidBodyState

torch.set_num_threads(1)
CONSTRAINTS = (ip.Function(lambda x, u, r: torch.stack([x[0] * u[0] - 3.0, x[1].square() - 4.0])),
               ip.Function(lambda x, u, r: (x[1] * u[0] + x[0].sin()).unsqueeze(0), equality=True),
               ip.Function(lambda x, u, r: (x[0] - r[0]).exp().unsqueeze(0) - 1.0, equality=True, terminal=True),
               ip.Function(lambda x, u, r: x[1:] - r[1:] - 0.1, terminal=True))


@dataclass(frozen=True)
class DoubleIntegrator:
    """x'' = u: RK4 is exact."""

    n = 2
    m = 1

    def derivative(self, x, u):
        return [x[1], u[0]]


@dataclass(frozen=True)
class Adder:
    """x+ = x + u."""

    integrator = 'euler'
    n = 1
    m = 1

    def derivative(self, x, u):
        return [u[0]]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pendulum(B=6, T=8):
    """Bounds, some of which become active, and spheres around angles to stay away from."""
    problem = Problem(Pendulum(), 0.05, T, [1.0, 0.1], [0.1], [5.0, 1.0], u_low=[-4.0], u_high=[4.0], x_high=[9.0, 0.1],
                      position=(0,))
    x_init = 0.15 * normal(B, 2)
    x_ref = 0.8 * x_init.unsqueeze(1) + 0.02 * normal(B, T + 1, 2, seed=1)  # within reach
    radii = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)  # the third is absent
    return problem, problem.instances(x_init, x_ref, 0.1 * normal(B, T, 1, seed=2),
                                      1.5 + normal(B, 3, 1, seed=3).abs(), radii)


def at_random(problem, data, constraints, settings=ip.Settings()):
    """A solver in the middle of its way: everything is random, slacks and multipliers positive."""
    start = ip.guess(problem, data, 0.3 * normal(*data.x_ref.shape, seed=4), normal(*data.u_ref.shape, seed=5),
                     settings)
    solver = ip._Solver(problem, data, start, settings, constraints)
    state = solver.state
    for i, name in enumerate(('s', 'z', 'delta_k', 'delta_g', 'delta_e')):
        getattr(state, name).copy_(0.1 + normal(*getattr(state, name).shape, seed=10 + i).abs())
    state.t[:, solver.soft] = 0.1 + normal(len(state.t), len(solver.soft), seed=15).abs()
    state.y.copy_(normal(*state.y.shape, seed=20)), state.v.copy_(normal(*state.v.shape, seed=21))
    return solver


def direction_of(solver):
    """The direction; the solver keeps the shift it needed."""
    solver.linearize()
    return solver.direction()


def flat(*values, b):
    return torch.cat([v[b].flatten() for v in values])


def unknowns(solver, d, b):
    """dd, ds, dt of soft rows, dy, dv, dz of sample b."""
    return flat(d.dx, d.du, d.ds, d.dt[:, solver.soft], d.dy, d.dv, d.dz, b=b)


def dense(solver, b, delta_scale=1.0):
    """The Newton matrix and its right-hand side of sample b by autograd, in the order of `unknowns`."""
    state, p, soft = solver.state, solver.point, solver.soft
    one, size = solver.data[b:b + 1], p.x[b].numel()

    def rows(tau):
        point = solver.rows.at(one, tau[:size].view(1, *p.x.shape[1:]), tau[size:].view(1, *p.u.shape[1:]))
        return torch.cat([v.flatten() for v in (point.k, point.e, point.g)]), point.cost.sum()
    tau, multipliers = flat(p.x, p.u, b=b), flat(state.y, state.v, state.z, b=b)
    J = jacobian(lambda t: rows(t)[0], tau)
    P = hessian(lambda t: rows(t)[1] + multipliers @ rows(t)[0], tau)
    P.diagonal().add_(state.shift[b])
    s, t, z, rest = state.s[b], state.t[b, soft], state.z[b], (solver.rho - state.z[b])[soft]
    slack = torch.cat([torch.zeros(len(J) - len(s), len(s), dtype=J.dtype), torch.eye(len(s), dtype=J.dtype)])
    slack = torch.cat([slack, -slack[:, soft]], dim=1)
    delta = delta_scale * flat(state.delta_k, state.delta_e, state.delta_g, b=b)
    top = torch.cat([P, torch.zeros(len(P), slack.shape[1], dtype=J.dtype), J.T], dim=1)
    middle = torch.cat([torch.zeros(slack.shape[1], len(P), dtype=J.dtype), torch.diag(torch.cat([z / s, rest / t])),
                        slack.T], dim=1)
    bottom = torch.cat([J, slack, -torch.diag(delta)], dim=1)
    gradient = jacobian(lambda t: rows(t)[1], tau) + J.T @ multipliers
    rhs = -torch.cat([gradient, z - state.mu[b] / s, rest - state.mu[b] / t, flat(p.k, p.e, b=b),
                      p.g[b] + s - state.t[b]])
    return torch.cat([top, middle, bottom]), rhs, P, J


@pytest.mark.parametrize('constraints', [(), CONSTRAINTS])
@pytest.mark.parametrize('elastic', [math.inf, 9.0])
def test_the_step_solves_the_newton_system_assembled_densely(constraints, elastic):
    problem, data = pendulum(B=3)
    solver = at_random(problem, data, constraints, ip.Settings(elastic=elastic))
    assert len(solver.soft) == (0 if elastic == math.inf else 8 * (2 + 3))  # two upper bounds and three spheres
    d = direction_of(solver)
    assert d.ok.all()
    for b in range(3):
        matrix, rhs, *_ = dense(solver, b)
        got = unknowns(solver, d, b)
        assert (matrix @ got - rhs).abs().max() < 1e-10 * rhs.abs().max()
        assert (got - torch.linalg.solve(matrix, rhs)).abs().max() < 1e-8 * got.abs().max()


def test_the_step_tends_to_the_unregularised_one_in_proportion_to_delta():
    problem, data = pendulum(B=2)
    constraints, gaps = CONSTRAINTS[2:], []
    for delta in (1e-7, 1e-9, 1e-11):
        solver = at_random(problem, data, constraints)
        for name in ('delta_k', 'delta_g', 'delta_e'):
            getattr(solver.state, name).fill_(delta)
        d = direction_of(solver)
        assert d.ok.all()
        exact = torch.stack([torch.linalg.solve(*dense(solver, b, delta_scale=0.0)[:2]) for b in range(2)])
        got = torch.stack([unknowns(solver, d, b) for b in range(2)])
        gaps.append(float((got - exact).abs().max() / exact.abs().max()))
    assert gaps[2] < 1e-5 and gaps[1] < 0.02 * gaps[0] and gaps[2] < 0.02 * gaps[1]


def merit_along(solver, d, t):
    every = slice(None)
    point = solver.rows.at(solver.data, solver.point.x + t * d.dx, solver.point.u + t * d.du)
    return solver.merit(every, point, solver.state.s + t * d.ds, solver.state.t + t * d.dt)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('elastic', [math.inf, 9.0])
def test_the_merit_function_falls_along_the_step_at_the_rate_of_the_theorem(seed, elastic):
    problem, data = pendulum(B=4)
    solver = at_random(problem, data[torch.randperm(4, generator=torch.Generator().manual_seed(seed))], CONSTRAINTS,
                       ip.Settings(elastic=elastic))
    d = direction_of(solver)
    t = 1e-6
    numeric = (merit_along(solver, d, t) - merit_along(solver, d, -t)) / (2.0 * t)
    assert (d.slope < 0).all() and torch.allclose(d.slope, numeric, rtol=1e-5, atol=1e-6)
    for b in range(4):
        _, _, P, J = dense(solver, b)
        dd, state = flat(d.dx, d.du, b=b), solver.state
        moved = J @ dd
        moved[len(J) - state.s.shape[1]:] += d.ds[b] - d.dt[b]
        delta = flat(state.delta_k, state.delta_e, state.delta_g, b=b)
        give = (d.dt[b].square() * (solver.rho - state.z[b]) / state.t[b])[solver.soft]
        theorem = (dd @ P @ dd + (d.ds[b].square() * state.z[b] / state.s[b]).sum() + give.sum()
                   + (moved.square() / delta).sum())
        assert float(d.slope[b]) == pytest.approx(-float(theorem), rel=1e-8)


@pytest.mark.parametrize('elastic', [math.inf, 1e3])
def test_every_accepted_step_of_a_solve_has_a_negative_slope_and_lowers_the_merit(monkeypatch, elastic):
    problem, data = pendulum()
    seen, step = [], ip._Solver.step

    def watched(self, d):
        state = self.state
        before, failures = self.merit(slice(None), self.point, state.s, state.t), state.failures.clone()
        kept = dataclasses.replace(self.state)
        step(self, d)
        now, self.state = self.state, kept
        after = self.merit(slice(None), self.point, now.s, now.t)
        self.state = now
        took = now.failures <= failures
        seen.append((d.slope[took], (after - before)[took], before[took]))
    monkeypatch.setattr(ip._Solver, 'step', watched)
    settings = ip.Settings(elastic=elastic)
    assert ip.solve(problem, data, settings=settings, constraints=CONSTRAINTS[3:]).converged.all()
    slope, change, size = (torch.cat(v) for v in zip(*seen, strict=True))
    assert len(slope) > 30 and (slope < 1e-12 * (1.0 + size.abs())).all()
    assert (change < 1e-13 * (1.0 + size.abs())).all()


def test_without_the_dual_regularisation_the_step_need_not_lower_the_merit_and_with_it_does():
    """The authors' example: cost 1/2 (x0^2 + u0^2 + x1^2), x1 = x0 + u0, x0 = 0, at (x0, u0, x1) = (0, 0, 1) with the
    multipliers (0, 3). The slope of the merit of penalty eta along the standard Newton step is 2 - eta."""
    problem = Problem(Adder(), 1.0, 1, [1.0], [1.0], position=(0,))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    data = problem.instances(zero, zero.expand(1, 2, 1), zero.view(1, 1, 1))
    start = ip.guess(problem, data, torch.tensor([[[0.0], [1.0]]], dtype=torch.float64), zero.view(1, 1, 1))
    for eta, slope in ((0.5, -5.79), (1.0, -2.43), (2.0, -0.71), (3.0, -0.61), (10.0, -5.86)):
        solver = ip._Solver(problem, data, start, ip.Settings())
        solver.state.y[0, :, 0] = torch.tensor([0.0, 3.0])
        solver.state.delta_k.fill_(1.0 / eta)
        d = direction_of(solver)
        assert float(d.slope) == pytest.approx(slope, abs=5e-3) and d.ok.all()
        standard = torch.linalg.solve(*dense(solver, 0, delta_scale=0.0)[:2])[:3]  # of x0, x1, u0
        gradient = torch.stack([solver.point.x[0, 0, 0], solver.point.x[0, 1, 0], solver.point.u[0, 0, 0]])
        push = solver.state.y[0, :, 0] + eta * solver.point.k[0, :, 0]
        gradient = gradient + push @ torch.tensor([[-1.0, 0.0, 0.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
        assert float(gradient @ standard) == pytest.approx(2.0 - eta, abs=1e-9)


@pytest.mark.parametrize('rho', [0.5, 30.0, 1e4])
def test_the_slacks_of_a_trial_are_those_that_minimise_the_merit_there(rho):
    """Stationarity: mu/s = p and rho - mu/t = p with the augmented multiplier p = z + (g + s - t)/delta."""
    problem, data = pendulum()
    solver = at_random(problem, data, (), ip.Settings(elastic=rho))
    state, soft = solver.state, solver.soft
    state.z[:, soft] = rho * torch.rand(6, len(soft), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state.delta_g.copy_(10.0 ** (2.0 * normal(*state.delta_g.shape, seed=2) - 3.0))
    state.mu.copy_(10.0 ** torch.arange(-9, -3, dtype=torch.float64))
    g = normal(*state.s.shape, seed=3)
    s, t = solver.best_slacks(slice(None), g)
    p, mu = state.z + (g + s - t) / state.delta_g, state.mu.unsqueeze(1)
    noise = 1e-12 * (state.z.abs() + (g.abs() + s + t) / state.delta_g)
    assert (s > 0).all() and (t[:, soft] > 0).all() and ((mu / s - p).abs() <= noise + 1e-12 * mu / s).all()
    assert ((rho - mu / t - p).abs() <= noise + 1e-12 * mu / t)[:, soft].all()


def test_soft_spheres_hold_exactly_where_their_multiplier_suffices_and_give_way_where_nothing_else_can():
    problem, data = pendulum()
    hard = ip.solve(problem, data)
    price = float(hard.warm_start.lam.max())
    soft = ip.solve(problem, data, settings=ip.Settings(elastic=10.0 * price))
    assert hard.converged.all() and soft.converged.all() and torch.allclose(hard.x, soft.x, atol=1e-6)
    data = Instances(*(v.clone() for v in data.tensors()))
    data.centers[2, :, 0], data.radii[2, 0] = data.x_init[2, :1] + 0.1, 2.0  # the first knots cannot leave it
    stuck, given = (ip.solve(problem, data, settings=ip.Settings(elastic=e)) for e in (math.inf, 20.0))
    theirs = al.solve(problem, data, settings=al.Settings(elastic=20.0, feasibility=1e-9, optimality=1e-18,
                                                          gn_steps=60, newton_below=1e-2))
    others = [0, 1, 3, 4, 5]
    assert stuck.status_of(2) is ip.Status.INFEASIBLE is given.status_of(2) and given.converged[others].all()
    assert given.error.max() < 1e-8 and given.violation[2] > 0.5 and given.warm_start.lam.max() <= 20.0
    assert torch.allclose(given.cost, theirs.cost, rtol=1e-5) and torch.allclose(given.x, theirs.x, atol=1e-5)


def test_a_converged_solution_satisfies_the_kkt_conditions():
    problem, data = pendulum()
    constraints = (CONSTRAINTS[0], CONSTRAINTS[2], CONSTRAINTS[3])
    solution = ip.solve(problem, data, constraints=constraints)
    assert solution.converged.all() and solution.error.max() < 1e-8
    x, u = (v.clone().requires_grad_() for v in (solution.x, solution.u))
    z, y = solution.warm_start.lam, solution.warm_start.eta
    h = problem.residuals(data, x, u)
    value = problem.cost(data, x, u).sum() + (y * problem.defects(data, x, u)).sum() + (z * h)[..., :-1].sum()
    at = ((x[:, :-1], u, data.x_ref[:, :-1]), *2 * ((x[:, -1:], u[:, :1] * 0.0, data.x_ref[:, -1:]),))
    for c, arguments, v in zip(constraints, at, solution.multipliers, strict=True):
        rows = c.value(*arguments)
        value = value + (v * rows).sum()
        assert rows.abs().max() < 1e-7 if c.equality else (v * rows).abs().max() < 1e-6 and rows.max() < 1e-7
    gradient = torch.autograd.grad(value, (x, u))
    assert max(float(v.abs().max()) for v in gradient) < 1e-6 and (z * h)[..., :-1].abs().max() < 1e-6
    assert z.min() >= 0 and h.max() < 1e-7 and (z > 1e-3).any(dim=2).any(dim=1).sum() >= 2


def test_a_regulator_that_ends_at_rest_is_the_one_of_least_energy():
    """min |u|^2 with x_T = 0: u = -C' (C C')^-1 A^T x_0 with the controllability matrix C."""
    T, h = 12, 0.1
    problem = Problem(DoubleIntegrator(), h, T, [0.0, 0.0], [1.0], position=(0,))
    x = torch.tensor([[1.0, -0.5], [-0.3, 2.0]], dtype=torch.float64)
    data = problem.instances(x, x.new_zeros(2, T + 1, 2), x.new_zeros(2, T, 1))
    solution = ip.solve(problem, data, constraints=[ip.at_reference()])
    A, b = np.array([[1.0, h], [0.0, 1.0]]), np.array([0.5 * h * h, h])
    C = np.stack([np.linalg.matrix_power(A, T - 1 - t) @ b for t in range(T)], axis=1)
    exact = -C.T @ np.linalg.solve(C @ C.T, np.linalg.matrix_power(A, T) @ x.numpy().T)
    assert solution.converged.all() and solution.x[:, -1].abs().max() < 1e-8
    assert np.abs(solution.u[..., 0].numpy().T - exact).max() < 1e-6


def test_swing_ups_reach_the_costs_of_the_authors_and_cart_pole_ends_exactly_upright():
    experiment = command.load(command.experiments()['riccati_interior_point'])
    for name, build in (('acrobot', experiment.acrobot), ('cart-pole', experiment.cart_pole)):
        problem, data, settings, more = build()
        solution = ip.solve(problem, data, settings=settings, **more)
        assert solution.converged.all() and solution.steps[0] <= experiment.STEPS[name], name
        assert float(solution.cost[0]) == pytest.approx(experiment.AUTHORS[name], abs=1e-3)
        assert solution.defect[0] < 1e-8
    assert solution.x[0, -1].abs().max() < 1e-7 and solution.u.abs().max() <= 5.0 + 1e-7


@pytest.mark.parametrize('what', ['x_init', 'warm start', 'infeasible', 'infinite reference'])
def test_one_bad_sample_leaves_the_others_bit_equal(what):
    problem, data = pendulum()
    start = ip.cold_start(problem, data)
    good = ip.solve(problem, data, start)
    data = Instances(*(v.clone() for v in data.tensors()))
    expected = ip.Status.NOT_FINITE
    if what == 'x_init':
        data.x_init[2, 0] = math.nan
    elif what == 'warm start':
        start.x[2, 1, 0] = math.nan
    elif what == 'infinite reference':
        data.x_ref[2, 1, 0] = math.inf
    else:
        data.centers[2, :, 0], data.radii[2, 0] = data.x_init[2, :1], 2.0  # the first knots cannot leave it
        expected = ip.Status.INFEASIBLE
    bad = ip.solve(problem, data, start)
    others = [0, 1, 3, 4, 5]
    assert good.converged.all() and bad.status_of(2) is expected
    for name in ('x', 'u', 'status', 'steps', 'cost', 'error', 'decrement'):
        assert torch.equal(getattr(good, name)[others], getattr(bad, name)[others]), name
    for a, b in zip(good.warm_start.tensors(), bad.warm_start.tensors(), strict=True):
        assert torch.equal(a[others], b[others])


def test_a_batch_of_nothing_but_bad_samples_has_an_answer_under_constraints():
    problem = Problem(Pendulum(), 0.05, 8, [1.0, 0.1], [0.1], position=(0,))
    data = problem.instances(torch.full((3, 2), math.nan, dtype=torch.float64), normal(3, 9, 2), normal(3, 8, 1))
    for solver in (ip, ilqr):
        found = solver.solve(problem, data, constraints=CONSTRAINTS[:1])
        assert all(found.status_of(i) is solver.Status.NOT_FINITE for i in range(len(data.x_init))), solver
        assert found.x.isnan().all()


def test_batched_equals_looped_and_the_parallel_recursion_the_sequential_one():
    problem, data = pendulum()
    whole = ip.solve(problem, data, constraints=CONSTRAINTS[3:])
    parallel = ip.solve(problem, data, constraints=CONSTRAINTS[3:], settings=ip.Settings(linear_solver='parallel'))
    assert whole.converged.all() and torch.allclose(whole.x, parallel.x, atol=1e-7)
    for b in range(len(data.x_init)):
        one = ip.solve(problem, data[b:b + 1], constraints=CONSTRAINTS[3:])
        assert one.steps[0] == whole.steps[b] and torch.allclose(one.x[0], whole.x[b], atol=1e-9)


def test_the_augmented_lagrangian_solver_agrees_continues_and_has_the_same_gradient():
    problem, data = pendulum()
    tight = al.Settings(feasibility=1e-9, optimality=1e-18, gn_steps=60, newton_below=1e-2)
    data.x_ref.requires_grad_()
    ours, theirs = ip.solve(problem, data), al.solve(problem, data, settings=tight)
    assert ours.converged.all() and theirs.converged.all()
    assert torch.allclose(ours.x, theirs.x, atol=1e-6)
    a, b = (torch.autograd.grad(s.x.square().sum() + s.u.sum(), data.x_ref)[0] for s in (ours, theirs))
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    again = al.solve(problem, data, ours.warm_start)
    assert again.converged.all() and again.steps.max() <= 3


def test_its_settings_make_the_realtime_solver_and_mpc_only_plan_by_it():
    problem, data = pendulum()
    settings = ip.Settings(elastic=1e3)
    solver, direct = RealtimeSolver(problem, 3, settings), ip.solve(problem, data, settings=settings)
    batch = solver.solve_batch(data)
    one = solver.solve(*(getattr(data, name)[1].numpy() for name in ('x_init', 'x_ref', 'u_ref', 'centers', 'radii')))
    assert not solver.compiled and torch.equal(batch.x, direct.x)
    assert np.allclose(one.x, direct.x[1].numpy(), atol=1e-9) and one.optimality == pytest.approx(
        float(direct.error[1]), abs=1e-8) and one.status is al.Status.CONVERGED
    state = RigidBodyState(0.0, np.array([1.0, 0.2, 1.1]), np.array([0.0, 0.0, 0.0, 1.0]), *np.zeros((2, 3)))
    field = Obstacles(0.0, np.array([[0.75, 0.1, 1.0]]), np.array([0.1]), np.zeros((1, 3)))
    plans = [load_policy('mpc_only', {'solver': name}).plan(state, field) for name in ('realtime', 'interior_point')]
    assert np.abs(plans[0][0].position - plans[1][0].position).max() < 1e-3
    assert plans[1][2].ok and plans[1][2].residual < 1e-7
    with pytest.raises(ValueError, match="solver = 'simplex'"):
        load_policy('mpc_only', {'solver': 'simplex'})


def test_bad_settings_shapes_and_a_gradient_through_constraints_are_one_clear_error():
    for wrong in ({'tolerance': 0.0}, {'max_steps': 0}, {'boundary': 1.0}, {'shift_up': 1.0}, {'linear_solver': 'lu'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ip.Settings(**wrong)
    problem, data = pendulum()
    with pytest.raises(ValueError, match='warm_start.x'):
        ip.solve(problem, data, ip.cold_start(problem, data[:2]))
    data.x_ref.requires_grad_()
    with pytest.raises(ValueError, match='gradient'):
        ip.solve(problem, data, constraints=CONSTRAINTS[3:])


def test_residuals_of_the_recursions_do_not_grow_as_delta_falls_and_those_of_the_normal_equations_do():
    experiment = command.load(command.experiments()['riccati_interior_point'])
    made = Results([{'x': '', 'steps': 1, 'solved': 1.0, 'cost': 0.0, **r} for r in experiment.linear_rows(3)])
    assert {r['x'] for r in made.rows} == set(experiment.DELTAS)
    for variant, limit in (('sequential', 1e-10), ('parallel', 1e-8)):
        assert max(r['residual'] for r in made.select(variant=variant)) < limit
    assert max(r['residual'] for r in made.select(variant='normal equations', x=experiment.DELTAS[-1])) > 1e-8


@pytest.mark.parametrize('T', [5, 20])
def test_cold_starts_of_the_benchmark_end_at_the_optimum_of_ipopt(T):
    d = {k: v[:10] for k, v in solver_benchmark.recorded(T).items()}
    problem, data = solver_benchmark.instances(d, T)
    solution = ip.solve(problem, data)
    gap = solution.cost.numpy() / d['cost'] - 1.0
    assert solution.converged.all() and solution.error.max() < 1e-8
    assert (np.abs(gap) < 1e-6).mean() >= 0.7  # the others are other ways around a sphere
