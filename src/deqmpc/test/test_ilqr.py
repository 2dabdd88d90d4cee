"""iLQR: linear problems in one step, optima by other solvers and gradients, rollouts without defects, statuses."""

import math
from dataclasses import dataclass

import pytest
import torch

from deqmpc import tasks
from deqmpc.dynamics.cartpole import Cartpole
from deqmpc.dynamics.pendulum import Pendulum
from deqmpc.problem import Problem
from deqmpc.realtime import RealtimeSolver
from deqmpc.solvers import ilqr, interior_point, riccati

TIGHT = ilqr.Settings(feasibility=1e-6, gradient=1e-6, change=1e-10, iterations=40, mu_max=1e6)


@dataclass(frozen=True)
class Mass:
    """A mass of 1 kg on a line; Euler's step is linear."""

    integrator = 'euler'
    n = 2
    m = 1

    def derivative(self, x, u):
        return [x[1], u[0]]


class Given:
    """Dynamics that are a step themselves: the integrator of others."""

    def __init__(self, phi):
        self.phi, self.n, self.m = phi, phi.equations.n, phi.equations.m

    def step(self, x, u):
        return self.phi.step(x, u)

    def linearize(self, x, u):
        following, F = self.phi.linearize(x, u)
        return following, F[..., :self.n], F[..., self.n:]


def instances(problem, x_init, goal=None):
    """Of the states (B, n), to a goal or zero."""
    x_init = torch.as_tensor(x_init, dtype=torch.float64)
    x_ref = torch.zeros(len(x_init), problem.horizon + 1, problem.n, dtype=torch.float64)
    return problem.instances(x_init, x_ref if goal is None else x_ref + goal,
                             x_ref.new_zeros(len(x_init), problem.horizon, problem.m))


def pendulum(**bounds):
    """Swing-ups, 1 s."""
    return Problem(Pendulum(), 0.05, 20, [1.0, 0.1], [0.01], [10.0, 10.0], position=(0,), **bounds)


def by_autograd(problem, data, constraints, s):
    """Largest |d(f + z'g + v'e)/du| of the rollout, with the multipliers of the solution s."""
    u = s.u.clone().requires_grad_()
    x = [data.x_init]
    for t in range(problem.horizon):
        x.append(problem.phi.step(x[-1], u[:, t]))
    x = torch.stack(x, dim=1)
    value = problem.cost(data, x, u).sum() + (s.warm_start.lam * problem.residuals(data, x, u)).sum()
    for c, v in zip(constraints, s.multipliers, strict=True):
        at = slice(problem.horizon, None) if c.terminal else slice(0, problem.horizon)
        value = value + (v * c.value(x[:, at], u[:, :1] * 0 if c.terminal else u, data.x_ref[:, at])).sum()
    return torch.autograd.grad(value, u)[0].abs().amax()


def test_a_linear_problem_is_solved_in_one_step_to_the_regulator_s_solution():
    problem = Problem(Mass(), 0.1, 20, [1.0, 0.1], [0.01], position=(0,))
    data = instances(problem, [[1.0, 0.0], [-2.0, 3.0]])
    s = ilqr.solve(problem, data, settings=ilqr.Settings(gradient=1e-9))
    x, u = data.x_ref, data.u_ref
    _, F = problem.phi.linearize(x[:, :-1], u)
    H = torch.diag_embed(torch.cat([data.Q, data.R], dim=1)).unsqueeze(1).expand(-1, 20, -1, -1)
    factors = riccati.factor(H, torch.diag_embed(data.Qf), F, torch.zeros_like(x))
    c = torch.cat([data.x_init.unsqueeze(1), torch.zeros_like(x[:, 1:])], dim=1)
    best, inputs, _ = riccati.solve(factors, x.new_zeros(2, 20, 3, 1), x.new_zeros(2, 2, 1), c.unsqueeze(3))
    assert s.converged.all() and (s.steps == 1).all()
    assert (s.x - best.squeeze(3)).abs().max() < 1e-12 and (s.u - inputs.squeeze(3)).abs().max() < 1e-12


def test_the_states_are_a_rollout_of_the_inputs():
    problem = pendulum(u_low=[-12.0], u_high=[12.0])
    data = instances(problem, [[1.0, 0.0]])
    s = ilqr.solve(problem, data)
    assert problem.defects(data, s.x, s.u).abs().max() == 0.0 and (s.defect == 0).all()


@pytest.mark.parametrize('ends', [(), (interior_point.at_reference(),)])
def test_at_the_solution_of_a_bounded_swing_up_the_gradient_of_the_lagrangian_vanishes(ends):
    problem = pendulum(u_low=[-12.0], u_high=[12.0])
    data = instances(problem, [[1.0, 0.0], [0.6, -1.0]])
    s = ilqr.solve(problem, data, settings=TIGHT, constraints=ends)
    assert s.converged.all() and s.violation.max() <= 1e-6
    lam, h = s.warm_start.lam, problem.residuals(data, s.x, s.u)
    assert (lam >= 0).all() and lam.max() > 0.01  # some bound is active
    assert (lam * h).abs().max() < 1e-4
    assert by_autograd(problem, data, ends, s) < 1e-4
    if ends:
        assert (s.x[:, -1]).abs().max() <= 1e-6


def test_the_interior_point_method_finds_no_better_cost_near_the_solution():
    problem = pendulum(u_low=[-12.0], u_high=[12.0])
    data = instances(problem, [[1.0, 0.0]])
    s = ilqr.solve(problem, data, settings=TIGHT)
    other = interior_point.solve(problem, data, interior_point.guess(problem, data, s.x, s.u))
    assert other.converged.all() and abs(float(other.cost / s.cost) - 1.0) < 1e-6


def test_a_sample_of_a_batch_has_the_numbers_of_a_solve_alone():
    problem = pendulum(u_low=[-12.0], u_high=[12.0])
    data = instances(problem, [[1.0, 0.0], [0.3, 0.0]])
    together = ilqr.solve(problem, data, constraints=(interior_point.at_reference(),))
    for i in range(2):
        alone = ilqr.solve(problem, data[i:i + 1], constraints=(interior_point.at_reference(),))
        assert (together.x[i] - alone.x[0]).abs().max() < 1e-9 and together.steps[i] == alone.steps[0]


def test_dynamics_that_are_a_step_themselves_are_solved_alike():
    own = Problem(Cartpole(), 0.05, 30, [1.0] * 4, [0.1], [50.0] * 4, position=(0,))
    given = Problem(Given(own.phi), 0.05, 30, [1.0] * 4, [0.1], [50.0] * 4, position=(0,))
    x = [[0.5, 0.4, 0.0, 0.0]]
    a, b = ilqr.solve(own, instances(own, x)), ilqr.solve(given, instances(given, x))
    assert a.converged.all() and torch.equal(a.x, b.x) and torch.equal(a.steps, b.steps)
    with pytest.raises(ValueError, match='Given has no equations'):
        RealtimeSolver(given, 0)


def test_the_slope_is_the_derivative_of_the_merit_along_rollouts():
    problem = pendulum(u_low=[-3.0], u_high=[3.0])
    data = instances(problem, [[2.0, 0.5]])
    start = ilqr.guess(problem, data, data.u_ref + 3.5)
    solver = ilqr._Solver(problem, data, start, ilqr.Settings(), (interior_point.at_reference(),))
    d = solver.direction()
    step = torch.full((1,), 1e-6, dtype=torch.float64)
    ends = [solver.merit(slice(None), solver.shoot(slice(None), a, d)) for a in (-step, step)]
    assert abs(float((ends[1] - ends[0]) / (2e-6 * d.slope)) - 1.0) < 1e-5


def test_the_quadrotor_reaches_its_goal_within_motor_limits():
    task = tasks.make('quadrotor')
    problem = task.problem(12)
    x, _ = task.sample(2, torch.Generator().manual_seed(1))
    data = problem.instances(x, task.goal.expand(2, 13, -1), task.u_ref.expand(2, 12, -1))
    s = ilqr.solve(problem, data, settings=ilqr.Settings(feasibility=1e-3, mu_0=100.0, change=1e-3))
    assert s.converged.all() and s.violation.max() <= 1e-3
    assert (s.cost < problem.cost(data, *(w for w in (ilqr.rollout(problem, x, data.u_ref), data.u_ref)))).all()


def test_a_sample_that_is_not_finite_is_named_and_leaves_the_others_alone():
    problem = pendulum()
    data = instances(problem, [[2.0, 0.0], [math.nan, 0.0]])
    s = ilqr.solve(problem, data)
    alone = ilqr.solve(problem, data[:1])
    assert s.status_of(1) is ilqr.Status.NOT_FINITE and torch.equal(s.x[0], alone.x[0])
    assert s.x[1].isnan().all()


def test_a_terminal_state_out_of_reach_is_infeasible():
    problem = pendulum(u_low=[-1.0], u_high=[1.0])
    data = instances(problem, [[0.0, 0.0]], goal=torch.tensor([9.0, 0.0], dtype=torch.float64))
    s = ilqr.solve(problem, data, settings=ilqr.Settings(iterations=6, gamma=100.0, mu_max=1e4),
                   constraints=(interior_point.at_reference(),))
    assert s.status_of(0) is ilqr.Status.INFEASIBLE and s.violation[0] > 1.0


def test_bad_settings_shapes_and_gradients_are_one_clear_error():
    for wrong in ({'iterations': 0}, {'gradient': 0.0}, {'armijo': 1.0}, {'gamma': 0.5}, {'linear_solver': 'lu'}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ilqr.Settings(**wrong)
    problem = pendulum()
    data = instances(problem, [[2.0, 0.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match='warm_start.x'):
        ilqr.solve(problem, data, ilqr.cold_start(problem, data[:1]))
    data.x_ref.requires_grad_()
    with pytest.raises(ValueError, match='gradient'):
        ilqr.solve(problem, data)
