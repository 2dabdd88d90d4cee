# SPDX-License-Identifier: GPL-3.0-or-later
import dataclasses
import struct
from unittest.mock import MagicMock

import numpy as np
import pytest
from cflib.crazyflie import Crazyflie
from cflib.crazyflie.commander import Commander
from scipy.interpolate import CubicHermiteSpline, interp1d
from scipy.spatial.transform import Rotation, Slerp

from crazyflie_interface.setpoint import (
    Setpoint,
    int16_milli_to_cflib_si,
    plan_fault,
    setpoint_at,
    setpoint_fault,
    si_to_int16_milli,
    slerp,
)
from deqmpc.types import Plan


def random_plan(seed, points=8, stamp=50.0):
    rng = np.random.default_rng(seed)
    t = np.concatenate([[0.0], np.cumsum(rng.uniform(0.05, 0.2, points - 1))])
    # turns of at most 0.6 rad a point, with random signs: q and -q are one rotation
    q = Rotation.from_rotvec(0.1 * np.arange(points)[:, None] * rng.standard_normal((points, 3)))
    q = q.as_quat() * rng.choice([-1.0, 1.0], (points, 1))
    return Plan(stamp, t, rng.normal(size=(points, 3)), q, rng.normal(size=(points, 3)),
                rng.normal(size=(points, 3)), rng.normal(size=(points, 3)))


@pytest.mark.parametrize('seed', range(5))
def test_interpolation_agrees_with_scipy(seed):
    plan = random_plan(seed)
    spline = CubicHermiteSpline(plan.time_from_start, plan.position, plan.velocity)
    turn = Slerp(plan.time_from_start, Rotation.from_quat(plan.quaternion))
    linear = interp1d(plan.time_from_start, np.hstack([plan.acceleration, plan.rates]), axis=0)
    for s in np.random.default_rng(seed).uniform(0, plan.time_from_start[-1] - 1e-6, 40):
        sp = setpoint_at(plan, plan.stamp + s)
        s = plan.stamp + s - plan.stamp  # as rounded
        np.testing.assert_allclose(sp.position, spline(s), atol=1e-11)
        np.testing.assert_allclose(sp.velocity, spline(s, 1), atol=1e-9)
        np.testing.assert_allclose(np.hstack([sp.acceleration, sp.rates]), linear(s), atol=1e-11)
        assert (Rotation.from_quat(sp.quaternion).inv() * turn(s)).magnitude() < 1e-7
        assert abs(np.linalg.norm(sp.quaternion) - 1) < 1e-12


def test_a_plan_is_met_at_its_points_and_is_continuous_there():
    plan = random_plan(3)
    for i, t in enumerate(plan.time_from_start[:-1]):
        for side in (-1e-9, 1e-9)[i == 0:]:
            sp = setpoint_at(plan, plan.stamp + t + side)
            np.testing.assert_allclose(sp.position, plan.position[i], atol=1e-6)
            np.testing.assert_allclose(sp.velocity, plan.velocity[i], atol=1e-5)


def test_past_its_end_a_plan_holds_its_last_position_level_and_at_rest():
    plan = random_plan(1)
    sp = setpoint_at(plan, plan.stamp + plan.time_from_start[-1] + 3.0)
    np.testing.assert_array_equal(sp.position, plan.position[-1])
    for zero in (sp.velocity, sp.acceleration, sp.rates):
        np.testing.assert_array_equal(zero, 0.0)
    yaw, _, _ = Rotation.from_quat(plan.quaternion[-1]).as_euler('ZYX')
    np.testing.assert_allclose(Rotation.from_quat(sp.quaternion).as_rotvec(), [0, 0, yaw], atol=1e-12)


def test_before_its_start_a_plan_stands_at_point_0():
    plan = random_plan(2)
    np.testing.assert_allclose(setpoint_at(plan, plan.stamp - 1.0).position, plan.position[0])


def test_a_plan_of_one_point_is_a_hold():
    plan = random_plan(0, points=1)
    np.testing.assert_array_equal(setpoint_at(plan, plan.stamp).position, plan.position[0])


def test_a_setpoint_survives_the_way_through_its_message_shape():
    sp = setpoint_at(random_plan(4), 50.1)
    back = sp.as_plan(7.0)
    assert back.stamp == 7.0 and len(back.time_from_start) == 1
    np.testing.assert_array_equal(back.velocity[0], sp.velocity)


@pytest.mark.parametrize('angle', [0.0, 1e-9, 1e-7, 1e-3, 3.0, np.pi - 1e-9])
def test_slerp_stays_on_the_unit_sphere_at_small_and_large_angles(angle):
    a, b = Rotation.identity(), Rotation.from_rotvec([angle, 0, 0])
    q = slerp(a.as_quat(), b.as_quat(), 0.25)
    assert abs(Rotation.from_quat(q).magnitude() - 0.25 * angle) < 1e-9


@pytest.mark.parametrize('name', ['position', 'velocity', 'acceleration', 'quaternion', 'rates'])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_plan_or_setpoint_with_a_number_that_is_not_finite_is_refused_by_name(name, value):
    plan = random_plan(0)
    bad = getattr(plan, name).copy()
    bad[3, 1] = value
    assert f'plan.{name} is not finite' in plan_fault(dataclasses.replace(plan, **{name: bad}))
    sp = setpoint_at(plan, plan.stamp)
    assert f'setpoint.{name}' in setpoint_fault(dataclasses.replace(sp, **{name: bad[3]}))
    assert plan_fault(plan) == '' and setpoint_fault(sp) == ''


def test_plans_that_run_backwards_or_start_late_or_are_not_rotations_are_refused():
    plan = random_plan(0)
    t = plan.time_from_start.copy()
    t[2] = t[1]
    assert 'increase' in plan_fault(dataclasses.replace(plan, time_from_start=t))
    assert 'start at 0' in plan_fault(dataclasses.replace(plan, time_from_start=plan.time_from_start + 0.1))
    assert 'norm' in plan_fault(dataclasses.replace(plan, quaternion=2 * plan.quaternion))
    assert 'no points' in plan_fault(Plan(0.0, np.zeros(0), *(np.zeros((0, n)) for n in (3, 4, 3, 3, 3))))
    assert 'stamp' in plan_fault(dataclasses.replace(plan, stamp=np.nan))


def packet(setpoint):
    """The bytes that cflib's own Commander sends, as 13 numbers."""
    cf = MagicMock(spec=Crazyflie)
    p, v, a, w = (int16_milli_to_cflib_si(si_to_int16_milli(x)) for x in (
        setpoint.position, setpoint.velocity, setpoint.acceleration, setpoint.rates))
    Commander(cf).send_full_state_setpoint(p, v, a, setpoint.quaternion, *w)
    return struct.unpack('<B9hI3h', bytes(cf.send_packet.call_args.args[0].data))


def test_every_int16_that_a_setpoint_can_ask_for_comes_out_of_cflib_as_asked():
    for n in range(-32767, 32768, 37):
        three = np.array([n, -n, n // 2])
        sp = Setpoint(three / 1000, three[::-1] / 1000, -three / 1000, np.array([0, 0, 0, 1.0]), three / 1000)
        numbers = packet(sp)
        np.testing.assert_array_equal(numbers[1:10], np.concatenate([three, three[::-1], -three]))
        np.testing.assert_array_equal(numbers[11:], three)


def test_numbers_beyond_int16_saturate_and_never_raise():
    np.testing.assert_array_equal(si_to_int16_milli([1e9, -40.0, 32.7674]), [32767, -32767, 32767])
    np.testing.assert_array_equal(si_to_int16_milli([0.0014, 0.0016, -0.0016]), [1, 2, -2])
    level = np.array([0, 0, 0, 1.0])
    wild = Setpoint(np.zeros(3), np.full(3, 99.0), np.full(3, -1e6), level, np.full(3, 50.0))
    assert setpoint_fault(wild) == ''
    assert packet(wild)[4:10] == (32767,) * 3 + (-32767,) * 3


def test_a_position_beyond_int16_is_a_fault_because_saturating_it_means_another_place():
    sp = Setpoint(np.array([33.0, 0, 0]), *np.zeros((2, 3)), np.array([0, 0, 0, 1.0]), np.zeros(3))
    assert '32.767 m' in setpoint_fault(sp)
