"""Reading many messages at once, against the decoder that reads them one by one."""

import numpy as np
import pytest

from deqmpc import interface
from deqmpc.types import Plan, RigidBodyState
from flight_log import cdr
from flight_log.bag import TYPES, deserialize, serialize

RNG = np.random.default_rng(3)


def unit():
    q = RNG.standard_normal(4)
    return q / np.linalg.norm(q)


def pose(stamp=1.25, frame='world'):
    return serialize(interface.pose_message(TYPES, stamp, RNG.standard_normal(3), unit(), frame), cdr.POSE)


def odometry(stamp=1.25, robot='cf1'):
    state = RigidBodyState(stamp, RNG.standard_normal(3), unit(), RNG.standard_normal(3), RNG.standard_normal(3))
    return serialize(interface.odometry_message(TYPES, state, robot), cdr.ODOM)


def plan(points=6, stamp=1.25, robot='cf1'):
    q = np.array([unit() for _ in range(points)])
    made = Plan(stamp, 0.1 * np.arange(points), RNG.standard_normal((points, 3)), q,
                *(RNG.standard_normal((points, 3)) for _ in range(3)))
    return serialize(interface.plan_message(TYPES, made, robot), cdr.PLAN)


@pytest.mark.parametrize('kind, make, names', [
    (cdr.POSE, pose, ('world', 'w', 'a_frame_of_another_length', '')), (cdr.ODOM, odometry, ('cf1', 'cf231', 'x')),
    (cdr.PLAN, plan, ('cf1', 'cf231', 'x'))])
def test_every_number_is_the_one_that_the_single_decoder_reads(kind, make, names):
    messages = [make(stamp=12.5 + 0.01 * i, **{'frame' if make is pose else 'robot': names[i % len(names)]})
                for i in range(40)]
    rows, faults = cdr.read(kind, messages)
    assert not faults
    for row, data in zip(rows, messages, strict=True):
        np.testing.assert_allclose(row, cdr._decoded(kind, data), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize('points', (1, 2, 5, 6, 21))
def test_plans_of_any_number_of_points_are_read(points):
    for robot in ('cf1', 'cf12', 'cf123', 'cf1234'):  # the points start 0 or 4 bytes off a multiple of 8
        data = plan(points, robot=robot)
        [row], faults = cdr.read(cdr.PLAN, [data])
        p = interface.read_plan(deserialize(data, cdr.PLAN))
        assert not faults and row.shape == (points, 17)
        np.testing.assert_array_equal(row[:, 1:4], p.position)
        np.testing.assert_array_equal(row[:, 14:17], p.acceleration)


def test_a_message_with_the_length_of_others_but_other_fields_is_not_read_by_their_layout():
    # frame and child frame change places: same length, same offsets of nothing
    a, b = odometry(robot='cf1'), odometry(robot='cf1')
    header = interface.header(TYPES, 3.0, 'cf1')
    swapped = serialize(TYPES.make(cdr.ODOM, header=header, child_frame_id='world'), cdr.ODOM)
    assert len(swapped) == len(a)
    rows, faults = cdr.read(cdr.ODOM, [a, swapped, b])
    assert not faults and rows[1][0] == 3.0 and rows[1][1:4].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(rows[2], cdr._decoded(cdr.ODOM, b))


def test_bytes_that_are_no_such_message_are_named_and_the_others_read():
    good = [pose() for _ in range(5)]
    rows, faults = cdr.read(cdr.POSE, [good[0], good[1][:20], b'', *good[2:]])
    assert sorted(faults) == [1, 2] and rows[1] is None and rows[2] is None
    assert sum(row is not None for row in rows) == 4
    with_two = TYPES.make(cdr.PLAN, points=[TYPES.make('trajectory_msgs/msg/MultiDOFJointTrajectoryPoint')])
    _, faults = cdr.read(cdr.PLAN, [serialize(with_two, cdr.PLAN)])
    assert 'expected one of each' in faults[0]


def test_random_bytes_never_raise():
    for kind, make in ((cdr.POSE, pose), (cdr.ODOM, odometry), (cdr.PLAN, plan)):
        whole = make()
        for _ in range(300):
            data = bytearray(whole)
            for at in RNG.integers(0, len(data), 3):
                data[at] = RNG.integers(256)
            cdr.read(kind, [bytes(data), bytes(data[:RNG.integers(len(data))]), whole])
