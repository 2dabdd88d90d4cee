"""mpc_only in closed loop with its own model, and at the edges of its input."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from deqmpc import obstacles
from deqmpc.airframe import Airframe
from deqmpc.dynamics import rotation
from deqmpc.dynamics.crazyflie import Crazyflie
from deqmpc.dynamics.integrators import rk4
from deqmpc.policies.base import load_policy
from deqmpc.types import Obstacles, RigidBodyState

torch.set_num_threads(1)
MODEL = Crazyflie()
GOAL = np.array([0.0, 0.0, 1.0])


@pytest.fixture(scope='module')
def policy():
    return load_policy('mpc_only')


def at(position, yaw=0.0, velocity=(0.0, 0.0, 0.0), stamp=0.0):
    return RigidBodyState(stamp, np.array(position, dtype=float), rotation.from_yaw(yaw),
                          np.array(velocity, dtype=float), np.zeros(3))


def spheres(*positions, radius=0.1, velocity=(0.0, 0.0, 0.0)):
    p = np.array(positions, dtype=float).reshape(-1, 3)
    return Obstacles(0.0, p, np.full(len(p), radius), np.tile(np.array(velocity, dtype=float), (len(p), 1)))


def fly(policy, state, field, ticks, rng=None):
    """Apply each plan's first input to the model; returns the visited states and the least clearance."""
    visited, clearance, warm = [state], np.inf, None
    for _ in range(ticks):
        plan, warm, status = policy.plan(state, field.at(state.stamp), warm)
        assert status.ok and plan.is_finite(), status
        x = [*state.position, *rotation.mrp_from_quaternion(state.quaternion), *state.velocity, *state.rates]
        u = warm.solver.u[0].tolist()
        for k in range(10):
            x, _ = rk4(MODEL.derivative, x, u, policy.dt / 10)
            now = state.stamp + policy.dt * (k + 1) / 10
            clearance = min(clearance, field.at(now).clearance(np.array(x[:3]))[0])
        x = np.array(x)
        if rng is not None:
            x += rng.normal(size=12) * np.repeat([0.001, 0.001, 0.005, 0.02], 3)
        state = RigidBodyState(state.stamp + policy.dt, x[:3], rotation.quaternion_from_mrp(x[3:6]), x[6:9],
                               x[9:12])
        visited.append(state)
    return visited, clearance


def seeded_start(rng, field):
    while True:
        direction = rng.normal(size=3) * [1.0, 1.0, 0.3]
        p = GOAL + 1.5 * direction / np.linalg.norm(direction)
        if 0.4 < p[2] < 1.7 and field.at(0.0).clearance(p)[0] > 0.1:
            return at(p, yaw=rng.uniform(-np.pi, np.pi))


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('speed', [0.0, 0.3])
def test_it_reaches_the_goal_among_forty_spheres_without_entering_one(policy, seed, speed):
    rng = np.random.default_rng(seed)
    field = obstacles.draw(seed, obstacles.FieldSettings(speed=speed))
    visited, clearance = fly(policy, seeded_start(rng, field), field, 60, rng)
    assert clearance > 0.0
    assert min(np.linalg.norm(s.position - GOAL) for s in visited) < 0.1
    if speed == 0.0:
        assert np.linalg.norm(visited[-1].position - GOAL) < 0.1


@pytest.mark.parametrize('blocking', [
    [(0.7, 0.0, 1.0)],
    [(0.7, y, 1.0 + z) for y in (-0.2, 0.0, 0.2) for z in (-0.2, 0.0, 0.2)],
], ids=['one sphere on the line', 'a wall without gaps'])
def test_a_sphere_on_the_straight_line_does_not_stop_it(policy, blocking):
    visited, clearance = fly(policy, at((1.5, 0.0, 1.0)), spheres(*blocking), 50)
    assert clearance > 0.02 and np.linalg.norm(visited[-1].position - GOAL) < 0.1


@pytest.mark.parametrize('yaw', [-3.1, -1.0, 0.5, 3.1])
def test_any_goal_yaw_is_reached(yaw):
    policy = load_policy('mpc_only', {'goal': [0.0, 0.0, 1.0, yaw]})
    visited, _ = fly(policy, at((0.5, 0.2, 1.0), yaw=0.4), spheres((0.25, 0.1, 1.0)), 45)
    error = (rotation.yaw(visited[-1].quaternion) - yaw + np.pi) % (2 * np.pi) - np.pi
    assert abs(error) < 0.02 and np.linalg.norm(visited[-1].position - GOAL) < 0.05


@pytest.mark.parametrize('dt, horizon', [(0.05, 10), (0.02, 12)])
def test_other_rates_and_horizons_fly(dt, horizon):
    policy = load_policy('mpc_only', {'dt': dt, 'horizon': horizon})
    visited, clearance = fly(policy, at((0.8, 0.0, 1.0)), spheres((0.4, 0.02, 1.0)), round(3.5 / dt))
    assert clearance > 0.02 and np.linalg.norm(visited[-1].position - GOAL) < 0.1


def test_a_start_inside_a_margin_has_a_plan_that_leaves_it(policy):
    field = spheres((1.5, 0.12, 1.0))
    plan, _, status = policy.plan(at((1.5, 0.0, 1.0)), field)
    clearance = [field.clearance(p)[0] for p in plan.position]
    assert status.ok and clearance[0] == pytest.approx(0.02) and clearance[-1] > 0.049


def test_a_plan_keeps_its_promises(policy):
    state, field = at((1.0, 0.2, 1.1), yaw=1.0, velocity=(-0.3, 0.0, 0.0)), spheres((0.7, 0.15, 1.05))
    plan, warm, status = policy.plan(dataclasses.replace(state, stamp=12.5), field)
    assert plan.stamp == 12.5 and np.allclose(plan.time_from_start, 0.1 * np.arange(6))
    assert np.allclose(plan.position[0], state.position, atol=1e-12)
    assert np.allclose(np.abs(plan.quaternion[0] @ state.quaternion), 1.0, atol=1e-4)
    assert np.allclose(np.linalg.norm(plan.quaternion, axis=1), 1.0)
    x = [*plan.position[1], *rotation.mrp_from_quaternion(plan.quaternion[1]), *plan.velocity[1], *plan.rates[1]]
    u = warm.solver.u[1]
    assert np.allclose(plan.acceleration[1], MODEL.derivative(x, u)[6:9], atol=1e-9)
    following, _ = rk4(MODEL.derivative, x, u, 0.1)
    assert np.allclose(following[:3], plan.position[2], atol=3e-3)
    assert min(field.clearance(p)[0] for p in plan.position[1:]) > 0.049
    frame = Airframe()
    thrust = warm.solver.u * frame.hover_thrust
    assert thrust.min() > frame.thrust_min - 1e-3 and thrust.max() < frame.thrust_max + 1e-3
    assert status.ok and status.residual < 1e-2 and status.iterations > 0 and 'converged' in status.message


def test_moving_spheres_are_taken_to_where_they_will_be(policy):
    """A sphere that will cross the way in 0.3 s is avoided there, and one that leaves it is not."""
    state = at((0.5, 0.0, 1.0), velocity=(-0.6, 0.0, 0.0))
    coming = spheres((0.32, 0.3, 1.0), velocity=(0.0, -1.0, 0.0))
    plan, _, _ = policy.plan(state, coming)
    clearance = [coming.at(t).clearance(p)[0] for t, p in zip(plan.time_from_start, plan.position, strict=True)]
    assert min(clearance) > 0.045
    later = dataclasses.replace(coming, stamp=-0.1)  # the same field measured 0.1 s ago
    moved, _, _ = policy.plan(state, later)
    assert not np.allclose(moved.position, plan.position, atol=1e-3)


def test_a_warm_start_saves_steps_and_a_stale_or_foreign_one_is_dropped(policy):
    state, field = at((1.0, 0.3, 1.0)), spheres((0.7, 0.2, 1.0), (0.3, 0.0, 1.0))
    plan, warm, cold = policy.plan(state, field)
    following = RigidBodyState(0.1, plan.position[1], plan.quaternion[1], plan.velocity[1], plan.rates[1])
    assert policy.plan(following, field, warm)[2].iterations < cold.iterations
    fresh = policy.plan(dataclasses.replace(following, stamp=9.0), field)[0]
    assert np.array_equal(policy.plan(dataclasses.replace(following, stamp=9.0), field, warm)[0].position,
                          fresh.position)
    more = spheres((0.7, 0.2, 1.0), (0.3, 0.0, 1.0), (2.0, 2.0, 1.0))
    assert policy.plan(following, more, warm)[2].ok
    elsewhere = dataclasses.replace(following, position=np.array([-1.0, 0.0, 1.0]))
    assert np.array_equal(policy.plan(elsewhere, field, warm)[0].position,
                          policy.plan(elsewhere, field)[0].position)


def test_the_same_call_gives_the_same_plan(policy):
    state, field = at((1.5, 0.0, 1.0)), spheres((0.9, 0.0, 1.0))
    assert np.array_equal(policy.plan(state, field)[0].position, policy.plan(state, field)[0].position)


@pytest.mark.parametrize('bad', ['position', 'quaternion', 'velocity', 'rates', 'stamp', 'sphere', 'radius'])
def test_input_that_is_not_finite_gives_no_plan_and_says_so(policy, bad):
    state, field = at((1.0, 0.0, 1.0)), spheres((0.5, 0.0, 1.0))
    if bad == 'stamp':
        state = dataclasses.replace(state, stamp=float('nan'))
    elif bad == 'sphere':
        field.position[0, 1] = np.inf
    elif bad == 'radius':
        field.radius[0] = np.nan
    else:
        getattr(state, bad)[1] = np.nan
    plan, warm, status = policy.plan(state, field)
    assert plan is None and warm is None and not status.ok and 'finite' in status.message


def test_extreme_finite_states_never_raise(policy):
    rng = np.random.default_rng(0)
    for scale in (1.0, 10.0, 1e3, 1e6):
        q = rotation.normalize(rng.normal(size=4))
        state = RigidBodyState(0.0, scale * rng.normal(size=3), q, scale * rng.normal(size=3),
                               scale * rng.normal(size=3))
        plan, _, status = policy.plan(state, spheres(*rng.normal(size=(5, 3))))
        assert (plan is None) <= (not status.ok)


def test_wrong_shapes_raise(policy):
    with pytest.raises(ValueError, match=r'obstacles.position has shape \(2, 2\), expected \(2, 3\)'):
        policy.plan(at((1.0, 0.0, 1.0)), Obstacles(0.0, np.zeros((2, 2)), np.ones(2), np.zeros((2, 3))))
    with pytest.raises(ValueError, match=r'state.velocity has shape \(2,\), expected \(3,\)'):
        policy.plan(at((1.0, 0.0, 1.0), velocity=(0.0, 0.0)), spheres())


@pytest.mark.parametrize('name, settings, message', [
    ('mpc', {}, "unknown policy 'mpc'; expected one of: .*mpc_only"),
    ('mpc_only', {'cruise_sped': 1.0}, "unknown setting 'cruise_sped', did you mean 'cruise_speed'"),
    ('mpc_only', {'horizon': 5.5}, 'horizon = 5.5; expected a value of type int'),
    ('mpc_only', {'goal': [0.0, 0.0, 1.0]}, r'goal = \[0.0, 0.0, 1.0\]; expected 4 numbers'),
    ('mpc_only', {'dt': '0.1'}, "dt = '0.1'; expected a number"),
    ('mpc_only', {'dt': 0.02}, r'dt \* horizon = 0.1 s; expected at least 0.2 s'),
    ('mpc_only', {'margin': -0.1}, 'margin = -0.1; expected a number >= 0'),
])
def test_wrong_names_and_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_policy(name, settings)


def test_a_missing_airframe_file_is_a_file_not_found_error():
    with pytest.raises(FileNotFoundError, match='no_such_airframe.yaml'):
        load_policy('mpc_only', {'airframe': 'no_such_airframe.yaml'})


def test_the_interface_imports_without_torch_or_sympy():
    code = ('import sys, deqmpc, deqmpc.interface, deqmpc.obstacles, deqmpc.policies.base; '
            'sys.exit(bool({"torch", "sympy"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
