"""The planner that shoots: plans that can be flown after any number of iterations, and where they lead."""

from dataclasses import replace

import pytest
import torch

from deqmpc import tasks
from deqmpc.problem import Problem
from deqmpc.rollouts import rollout
from deqmpc.shooting import Settings, ShootingPlanner, with_projected_inputs
from deqmpc.tasks import Spheres


@pytest.fixture(scope='module')
def quadrotor():
    """The task, and two states."""
    task = tasks.make('quadrotor')
    return task, task.sample(2, torch.Generator().manual_seed(0))[0]


def test_after_one_iteration_the_plan_is_a_rollout_of_inputs_within_their_limits(quadrotor):
    task, x = quadrotor
    planner = ShootingPlanner(task, Settings(first_iterations=1))
    made = planner.plan(x, Spheres.none(2))
    u = planner.applied(made.memory.solver.u)
    assert made.ok.all() and (made.defect == 0).all() and (made.violation == 0).all()
    assert (u > planner.limited.u_low).all() and (u < planner.limited.u_high).all()
    assert torch.allclose(planner.limited.phi.step(made.x[:, :-1], u), made.x[:, 1:], atol=1e-12)
    asked = made.memory.solver.u
    assert (asked > planner.limited.u_high).any() or (asked < planner.limited.u_low).any()


def test_one_iteration_a_step_flies_within_limits_and_with_them_as_constraints_plans_break_them(quadrotor):
    task, x = quadrotor
    found = {}
    for projected in (True, False):
        planner = ShootingPlanner(task, Settings(iterations=1, first_iterations=4, projected=projected), horizon=8)
        found[projected] = rollout(task, planner, x, steps=10)
    assert found[True].plan_violation.max() == 0.0 and found[False].plan_violation.max() > 0.1
    assert not found[True].failed.any() and (found[True].x[:, -1, :3].norm(dim=1) < x[:, :3].norm(dim=1)).all()


def test_a_plan_goes_on_from_the_last_one_and_costs_no_more(quadrotor):
    task, x = quadrotor
    planner = ShootingPlanner(task, Settings(first_iterations=6, iterations=2))
    first = planner.plan(x, Spheres.none(2))
    following = task.step(x, first.u)
    data = planner.problem.instances(following, task.goal.expand(2, task.horizon + 1, -1),
                                     task.u_ref.expand(2, task.horizon, -1))
    again, cold = planner.plan(following, Spheres.none(2), first.memory), planner.plan(following, Spheres.none(2))
    costs = [planner.problem.cost(data, p.x, p.memory.solver.u) for p in (again, cold)]
    assert (costs[0] < 1.2 * costs[1]).all()


def test_an_episode_without_a_plan_starts_cold_and_the_others_do_not_notice(quadrotor):
    task, x = quadrotor
    planner = ShootingPlanner(task, Settings(first_iterations=3, iterations=1))
    first = planner.plan(x, Spheres.none(2))
    lost = replace(first.memory, known=torch.tensor([True, False]))
    both = planner.plan(x, Spheres.none(2), lost)
    assert torch.allclose(both.x[:1], planner.plan(x[:1], Spheres.none(1), first.memory[:1]).x, atol=1e-9)
    assert torch.allclose(both.x[1:], first.x[1:], atol=1e-9)


def test_the_crazyflie_passes_a_sphere_on_its_way():
    task = tasks.make('crazyflie_obs')
    x = torch.zeros(1, 12, dtype=torch.float64)
    x[0, 0] = -0.7
    sphere = Spheres(torch.tensor([[[-0.35, 0.01, 0.0]]], dtype=torch.float64),
                     torch.zeros(1, 1, 3, dtype=torch.float64), torch.tensor([[0.08]], dtype=torch.float64))
    found = rollout(task, ShootingPlanner(task, horizon=8), x, sphere, steps=16)
    assert not found.failed.any() and found.planned.all()
    assert found.violation.max() < 0.01 and found.x[0, -1, 0] > -0.2


def test_bounds_that_are_not_finite_and_bad_settings_are_one_clear_error(quadrotor):
    task, _ = quadrotor
    own = task.problem()
    with pytest.raises(ValueError, match='high'):
        with_projected_inputs(Problem(own.equations, own.dt, own.horizon, own.Q, own.R, u_low=own.u_low))
    for wrong in ({'iterations': 0}, {'sharpness': 1.0}, {'penalty': 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)
