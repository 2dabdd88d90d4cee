"""What every task promises, and the fields and moving spheres of the quadrotor with a pole."""

import math

import numpy as np
import pytest
import torch

from deqmpc import datasets, tasks
from deqmpc.airframe import Airframe
from deqmpc.baselines import GoalPlanner
from deqmpc.tasks import Spheres
from deqmpc.tasks.quadrotor_pole import PAPER


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('name', tasks.TASKS)
def test_starts_are_sound_reproducible_and_among_the_spheres_the_task_says(name):
    task = tasks.make(name)
    x, spheres = task.sample(30, generator())
    again, _ = task.sample(30, generator())
    assert torch.equal(x, again) and x.dtype == torch.float64 and x.shape == (30, task.equations.n)
    assert not task.failed(x, spheres).any()
    assert spheres.centers.shape == spheres.velocity.shape == (30, task.spheres, task.spatial)
    assert spheres.radii.shape == (30, task.spheres) and (spheres.radii == task.radius).all()


@pytest.mark.parametrize('name', tasks.TASKS)
def test_resting_at_the_goal_stays_there_and_earns_the_best_reward(name):
    task = tasks.make(name)
    x, u = task.goal.expand(2, -1), task.u_ref.expand(2, -1)
    assert (task.step(x, u) - x).abs().max() < 2e-5  # the quadrotor's hover command has six digits
    assert task.reward(x, u).tolist() == pytest.approx([task.best_reward] * 2, abs=1e-5)  # inputs cost 1e-6
    start, _ = task.sample(50, generator())
    assert (task.reward(start, u[:1].expand(50, -1)) <= task.best_reward).all()


@pytest.mark.parametrize('name', tasks.TASKS)
def test_a_step_clips_inputs_to_the_bounds_of_the_problem(name):
    task = tasks.make(name)
    problem, (x, _) = task.problem(3), task.sample(4, generator())
    high = problem.u_high.expand(4, -1)
    assert torch.equal(task.step(x, high), task.step(x, high + 1.0)) and problem.horizon == 3
    assert (problem.u_low <= task.u_ref).all() and (task.u_ref <= problem.u_high).all()


@pytest.mark.parametrize('name', [n for n in tasks.TASKS if tasks.TASKS[n].period])
def test_a_start_without_its_turns_is_next_to_the_goal_and_the_same_start(name):
    task = tasks.make(name)
    x, _ = task.sample(50, generator())
    period = torch.tensor(task.period, dtype=torch.float64)
    u = task.u_ref.expand(50, -1)
    turned = x + 3.0 * period
    assert torch.allclose(task.wrapped(turned), task.wrapped(x), atol=1e-12)
    assert ((task.wrapped(turned) - task.goal).abs()[:, period > 0] <= math.pi + 1e-12).all()
    assert torch.allclose(task.reward(turned, u), task.reward(x, u), atol=1e-12)
    difference = task.step(turned, u) - task.step(x, u)
    assert torch.allclose(difference, 3.0 * period.expand(50, -1), atol=1e-9)


@pytest.mark.parametrize('name', [n for n in tasks.TASKS if tasks.make(n).spheres])
def test_a_position_inside_a_sphere_has_failed_and_one_outside_has_not(name):
    task = tasks.make(name)
    x = task.goal.expand(2, -1).clone()
    centers = x[:, None, :3] + torch.tensor([task.radius, 0.0, 0.0], dtype=torch.float64) * torch.tensor(
        [[[0.999]], [[1.001]]], dtype=torch.float64)
    spheres = Spheres(centers, torch.zeros_like(centers), centers.new_full((2, 1), task.radius))
    assert task.failed(x, spheres).tolist() == [True, False]
    x[1, 3] = math.nan
    assert task.failed(x, spheres).tolist() == [True, True]


def test_a_name_or_number_that_no_task_has_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="unknown task 'qpol'; expected one of pendulum"):
        tasks.make('qpol')
    with pytest.raises(ValueError, match='task qpole: .*speed'):
        tasks.make('qpole', speed=1.0)
    with pytest.raises(ValueError, match="fields = 'many'; expected one or fresh"):
        tasks.make('qpole_obs', fields='many')


# --- the quadrotor with a pole --------------------------------------------------------------------

def test_the_pole_is_rewarded_by_its_angle_from_upright():
    task = tasks.make('qpole')
    x = task.goal.repeat(4, 1)
    x[:, 6] = torch.tensor([math.pi + 0.3, math.pi - 0.3, -math.pi + 0.3, 0.0])
    tipped, other, turned, hanging = task.reward(x, torch.zeros(4, 4)).tolist()
    assert tipped == pytest.approx(math.exp(2.0 - 0.5 * 80.0 * 0.09 / 200.0)) == other == pytest.approx(turned)
    assert hanging == pytest.approx(math.exp(2.0 - 0.5 * 80.0 * math.pi ** 2 / 200.0))


def test_windows_of_a_pole_recorded_between_zero_and_a_turn_are_continuous_around_upright():
    task = tasks.make('qpole')
    angle = np.array([0.3, 0.1, -0.1, -0.3, -0.6, -0.9])  # falling through the hanging end
    states = np.zeros((6, 14))
    states[:, 6] = angle % (2.0 * np.pi)
    d = datasets.Demonstrations(states, np.zeros((6, 4)), np.array([6]), *[np.zeros((1, 0, 3))] * 2, np.zeros((1, 0)))
    w = datasets.windows(d, task, np.array([0, 0]), np.array([0, 3]), 3)
    assert np.allclose(w.x[0, :, 6], angle[:3]) and np.allclose(w.x[1, :, 6], angle[3:] + 2.0 * np.pi)


def test_the_papers_bounds_are_the_thrusts_of_the_other_quadrotor():
    own, theirs = tasks.make('qpole').equations.quadrotor, tasks.make('quadrotor').equations
    for name, command in (('u_low', 11.5), ('u_high', 18.3)):
        thrust = own.thrust_slope * PAPER[name] + own.thrust_offset
        assert thrust == pytest.approx(theirs.thrust_slope * command + theirs.thrust_offset, abs=1e-12)
    assert float(tasks.make('qpole', **PAPER).problem().u_high[0]) == PAPER['u_high']


@pytest.mark.parametrize('name', ['crazyflie_obs', 'crazyflie_dynobs', 'crazyflie_wall'])
def test_a_crazyflies_thrust_limit_bounds_its_plans_and_must_lift_it(name):
    hover = Airframe().hover_thrust
    assert (tasks.make(name).problem().u_high == 0.12 / hover).all()
    assert (tasks.make(name, thrust_max=0.09).problem().u_high == 0.09 / hover).all()
    with pytest.raises(ValueError, match='thrust_max = 0.08; expected more than the 0.0804 N of hovering'):
        tasks.make(name, thrust_max=0.08)


def test_fields_fill_the_cube_and_keep_clear_of_the_origin_and_of_each_other():
    _, spheres = tasks.make('qpole_obs', fields='fresh').sample(50, generator())
    c = spheres.centers
    apart = torch.cdist(c, c) + 10.0 * torch.eye(40)
    assert c.norm(dim=-1).min() >= 1.31 and apart.min() >= 0.72
    assert c.abs().max() <= 5.0 and c.mean().abs() < 0.15 and abs(float(c.std()) - 5.0 / math.sqrt(3.0)) < 0.15
    assert (spheres.gap(torch.zeros(50, 3, dtype=torch.float64)) >= 0.81).all()


def test_one_field_is_the_same_in_every_episode_and_fresh_ones_are_not():
    task = tasks.make('qpole_obs')
    (x, one), (_, other) = task.sample(5, generator(1)), task.sample(5, generator(2))
    assert (one.centers == one.centers[0]).all() and torch.equal(one.centers, other.centers)
    assert not torch.equal(one.centers[0], tasks.make('qpole_obs', field_seed=1).sample(1, generator())[1].centers[0])
    _, fresh = tasks.make('qpole_obs', fields='fresh').sample(2, generator())
    assert not torch.equal(fresh.centers[0], fresh.centers[1])
    assert not one.velocity.any() and x[:, :3].abs().max() <= 5.0


def test_moving_spheres_meet_a_quadrotor_that_keeps_its_velocity_where_it_is_five_steps_later():
    task = tasks.make('qpole_dynobs')
    x, spheres = task.sample(20, generator())
    assert torch.allclose(spheres.velocity.norm(dim=-1), torch.full((20, 40), 0.25, dtype=torch.float64))
    moved = task.move(spheres, x)
    assert torch.allclose(moved.centers, spheres.centers + 0.05 * spheres.velocity)
    upright = task.goal.repeat(20, 1)  # level: body axes are the world's
    upright[:, 7:10] = torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    turned = task.move(spheres, upright)
    target = upright[:, None, :3] + 5 * 0.05 * upright[:, None, 7:10]
    way = target - turned.centers
    assert torch.allclose(turned.velocity, 0.25 * way / way.norm(dim=-1, keepdim=True))


def test_a_tumbling_quadrotor_is_led_by_its_velocity_in_the_world():
    task = tasks.make('qpole_dynobs', speed=1.0, lead=20)
    x = task.goal.unsqueeze(0).clone()
    x[0, 3], x[0, 8] = math.tan(math.pi / 8.0), 2.0  # rolled by 90 degrees: body y is world z
    far = torch.tensor([[[0.0, 4.0, 0.0]]], dtype=torch.float64)
    spheres = task.move(Spheres(far, 0.0 * far, far.new_ones(1, 1)), x)
    way = torch.tensor([0.0, -4.0, 2.0], dtype=torch.float64)  # to 20 steps of 2 m/s above the origin
    assert torch.allclose(spheres.velocity[0, 0], way / way.norm(), atol=1e-12)


@pytest.mark.parametrize('name', ['qpole_obs', 'crazyflie_obs'])
def test_a_plan_from_a_state_that_cannot_keep_clear_of_a_sphere_still_obeys_the_dynamics(name):
    task = tasks.make(name, spheres=1)
    x = task.goal.expand(8, -1).clone()
    x[:, 0] = torch.linspace(-1.2, -0.8, 8)
    x[:, task.positions if name == 'qpole_obs' else 6] = 6.0  # m/s towards a sphere that is nearer than five knots
    spheres = Spheres(torch.zeros(8, 1, 3).double(), torch.zeros(8, 1, 3).double(), torch.full((8, 1), 0.5).double())
    made = GoalPlanner(task).plan(x, spheres)
    assert made.violation.max() > 1e-2 and made.defect.max() < 1e-3
