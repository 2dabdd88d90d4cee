import dataclasses
import math

import numpy as np
import pytest

from deqmpc.neighbours import ColumnSettings, Neighbours
from deqmpc.types import Obstacles, RigidBodyState


def state(stamp=10.0, position=(1.0, 2.0, 1.0), velocity=(0.5, 0.0, 0.0)):
    return RigidBodyState(stamp, np.array(position), np.array([0.0, 0.0, 0.0, 1.0]), np.array(velocity), np.zeros(3))


def test_a_neighbour_is_a_column_that_moves_with_it_to_now():
    others = Neighbours(['cf2'], ColumnSettings(0.25, 0.35))
    others.on_odometry('cf2', state())
    joined = others.join(Obstacles.none(), 10.2)
    assert joined.stamp == 10.2
    assert joined.position == pytest.approx(np.array([[1.1, 2.0, z] for z in (0.65, 1.0, 1.35)]))
    assert joined.velocity == pytest.approx(np.tile([0.5, 0.0, 0.0], (3, 1)))
    assert joined.radius == pytest.approx(np.full(3, 0.25))


def test_a_column_keeps_a_point_farther_off_above_than_beside():
    others = Neighbours(['cf2'])
    others.on_odometry('cf2', state())
    column = others.join(Obstacles.none(), 10.0)
    beside, _ = column.clearance(np.array([1.0, 2.24, 1.0]))
    above, _ = column.clearance(np.array([1.0, 2.0, 1.59]))
    assert beside < 0.0 and above < 0.0  # Hoenig et al.: 0.24 m and 0.60 m
    assert column.clearance(np.array([1.0, 2.0, 1.61]))[0] > 0.0


def test_the_virtual_field_comes_along_and_moves_to_the_same_instant():
    others = Neighbours(['cf2'])
    others.on_odometry('cf2', state())
    field = Obstacles(9.0, np.array([[0.0, 0.0, 1.0]]), np.array([0.1]), np.array([[0.1, 0.0, 0.0]]))
    joined = others.join(field, 10.0)
    assert joined.position[0] == pytest.approx([0.1, 0.0, 1.0]) and len(joined.radius) == 4


@pytest.mark.parametrize('bearing', [0.0, 1.0, 2.5, -1.5])
def test_two_drones_that_meet_both_find_the_way_on_their_right_shorter(bearing):
    here, there = np.array([0.0, 0.0, 1.0]), np.array([math.cos(bearing), math.sin(bearing), 1.0])
    for own, other in ((here, there), (there, here)):
        others = Neighbours(['cf2'])
        others.on_odometry('cf2', state(position=other, velocity=own - other))
        shown = others.join(Obstacles.none(), 10.0, seen_from=own)
        right = np.array([other[1] - own[1], own[0] - other[0], 0.0])
        assert shown.clearance(other + 0.4 * right)[0] > shown.clearance(other - 0.4 * right)[0] + 0.1
        assert len(shown.radius) == 6


def test_a_drone_straight_above_is_shown_once_more_where_it_is():
    others = Neighbours(['cf2'])
    others.on_odometry('cf2', state(position=(0.0, 0.0, 2.0)))
    shown = others.join(Obstacles.none(), 10.0, seen_from=np.array([0.0, 0.0, 1.0]))
    assert np.isfinite(shown.position).all() and shown.position[:3] == pytest.approx(shown.position[3:])


def test_a_neighbour_that_is_silent_or_unheard_is_a_fault_that_names_it():
    others = Neighbours(['cf2', 'cf3'])
    assert others.fault(10.0, 0.5) == 'no odometry of cf2 yet'
    others.on_odometry('cf2', state())
    others.on_odometry('cf3', state())
    assert others.fault(10.4, 0.5) == ''
    assert others.fault(10.7, 0.5) == 'odometry of cf2 is 0.70 s old, limit 0.5 s'


def test_older_odometry_and_numbers_that_are_not_finite_do_not_replace_the_newest():
    others = Neighbours(['cf2'])
    others.on_odometry('cf2', state())
    others.on_odometry('cf2', state(stamp=9.0, position=(5.0, 5.0, 5.0)))
    others.on_odometry('cf2', dataclasses.replace(state(stamp=11.0), velocity=np.full(3, np.nan)))
    assert others.join(Obstacles.none(), 10.0).position[1] == pytest.approx([1.0, 2.0, 1.0])


def test_without_neighbours_the_field_is_the_field():
    field = Obstacles.none(3.0)
    assert Neighbours([]).join(field, 10.0) is field and Neighbours([]).fault(10.0, 0.1) == ''


@pytest.mark.parametrize(('radius', 'spacing'), [(0.0, 0.0), (-1.0, 0.1), (0.2, 0.5), (math.nan, 0.1), (0.2, -0.1)])
def test_a_column_with_holes_is_refused(radius, spacing):
    with pytest.raises(ValueError, match='expected a radius > 0'):
        ColumnSettings(radius, spacing)
