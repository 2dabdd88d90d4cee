import dataclasses

import numpy as np
import pytest

from deqmpc.policies.base import PolicyStatus
from deqmpc.types import Obstacles, Plan, RigidBodyState
from deqmpc_controller.plan_gate import ACCEPTED, GateSettings, judge

LEVEL = np.array([0.0, 0.0, 0.0, 1.0])
GOOD = PolicyStatus(ok=True, message='ok', iterations=4, residual=1e-5)


def state(position=(1.0, 0.0, 1.0), velocity=(0.0, 0.0, 0.0)):
    return RigidBodyState(5.0, np.array(position), LEVEL, np.array(velocity), np.zeros(3))


def straight(position=(1.0, 0.0, 1.0), velocity=(-0.5, 0.0, 0.0), points=6, dt=0.1):
    t = dt * np.arange(points)
    return Plan(5.0, t, np.array(position) + t[:, None] * np.array(velocity), np.tile(LEVEL, (points, 1)),
                np.tile(velocity, (points, 1)), np.zeros((points, 3)), np.zeros((points, 3)))


def sphere(position, radius=0.1, velocity=(0.0, 0.0, 0.0)):
    return Obstacles(5.0, np.array([position]), np.array([radius]), np.array([velocity]))


def test_a_straight_plan_in_free_space_passes():
    assert judge(straight(), GOOD, state(), Obstacles.none()) == ACCEPTED


@pytest.mark.parametrize('field', ['position', 'quaternion', 'velocity', 'rates', 'acceleration'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_plan_with_a_number_that_is_not_finite_is_refused(field, bad):
    array = np.array(getattr(straight(), field))
    array[3, 1] = bad
    plan = dataclasses.replace(straight(), **{field: array})
    assert 'not finite' in judge(plan, GOOD, state(), Obstacles.none())


@pytest.mark.parametrize(('plan', 'status', 'words'), [
    (straight(), dataclasses.replace(GOOD, residual=0.5), 'residual 0.5 above 0.02'),
    (straight(), dataclasses.replace(GOOD, residual=float('nan')), 'residual nan'),
    (straight(position=(1.5, 0.0, 1.0)), GOOD, 'starts 0.50 m from the drone'),
    (straight(velocity=(0.0, 0.0, -2.5)), GOOD, 'leaves the fence by 0.25 m'),
    (straight(velocity=(2.5, 0.0, 0.0)), GOOD, 'reaches 2.50 m/s, limit 2 m/s'),
])
def test_a_plan_beyond_a_limit_is_refused_with_value_and_limit(plan, status, words):
    assert words in judge(plan, status, state(), Obstacles.none())


def test_a_sphere_that_only_the_path_between_two_knots_crosses_is_seen():
    # 1 m/s at 0.1 s: knots at x = 1.0, 0.9, ...; a 4 cm sphere at x = 0.85 holds no knot.
    plan = straight(velocity=(-1.0, 0.0, 0.0))
    field = sphere((0.85, 0.0, 1.0), radius=0.04)
    assert (np.linalg.norm(plan.position - field.position[0], axis=1) > 0.04).all()
    assert 'passes sphere 0' in judge(plan, GOOD, state(), field)


def test_a_moving_sphere_is_judged_where_it_will_be():
    aside = sphere((0.75, 1.0, 1.0), velocity=(0.0, -2.0, 0.0))  # on the path 0.5 s from now
    assert 'passes sphere 0' in judge(straight(), GOOD, state(), aside)
    assert judge(straight(), GOOD, state(), dataclasses.replace(aside, velocity=-aside.velocity)) == ACCEPTED


def test_a_plan_from_inside_a_sphere_passes_only_when_it_leads_out():
    around = sphere((1.02, 0.0, 1.0))
    assert judge(straight(), GOOD, state(), around) == ACCEPTED
    inwards = straight(velocity=(0.04, 0.0, 0.0))
    assert 'passes sphere 0' in judge(inwards, GOOD, state(), around)


def test_a_plan_from_outside_the_fence_passes_only_when_it_leads_in():
    out = state(position=(2.6, 0.0, 1.0))
    assert judge(straight(position=(2.6, 0.0, 1.0)), GOOD, out, Obstacles.none()) == ACCEPTED
    assert 'leaves the fence' in judge(straight((2.6, 0.0, 1.0), (0.5, 0.0, 0.0)), GOOD, out, Obstacles.none())


def test_the_clearance_limit_moves_the_refusal_by_its_value():
    beside = sphere((0.75, 0.15, 1.0))  # the path passes 0.05 m from its surface
    assert judge(straight(), GOOD, state(), beside) == ACCEPTED
    assert 'limit 0.06 m' in judge(straight(), GOOD, state(), beside, GateSettings(min_clearance=0.06))
