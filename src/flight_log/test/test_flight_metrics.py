"""Metrics against closed forms and independent loops."""

import numpy as np
import pytest

from deqmpc.dynamics import rotation
from deqmpc.statistics import wilson
from deqmpc.types import Obstacles
from flight_log import metrics

RNG = np.random.default_rng(0)
GOAL = np.array([0.0, 0.0, 1.0])


def test_hovering_level_at_the_goal_earns_e_squared_a_step():
    n = 5
    q = np.tile([0.0, 0.0, 0.0, 1.0], (n, 1))
    c = metrics.cost(np.tile(GOAL, (n, 1)), q, np.zeros((n, 3)), np.zeros((n, 3)), GOAL)
    assert np.all(c == 0)
    assert metrics.reward(c) == pytest.approx(np.full(n, np.e**2))


def test_cost_is_the_weighted_sum_of_the_twelve_errors():
    n = 50
    p, v, w = RNG.normal(size=(3, n, 3))
    q = rotation.normalize(RNG.normal(size=(n, 4)))
    weights = np.array([10.0] * 6 + [1.0] * 6)
    x = np.concatenate([p - GOAL, rotation.mrp_from_quaternion(q), v, w], axis=1)
    assert metrics.cost(p, q, v, w, GOAL) == pytest.approx(np.einsum('ni,i,ni->n', x, weights, x) / 200)


def test_cost_does_not_depend_on_the_sign_of_the_quaternion():
    q = rotation.normalize(RNG.normal(size=(20, 4)))
    zero = np.zeros((20, 3))
    assert metrics.cost(zero, q, zero, zero, GOAL) == pytest.approx(metrics.cost(zero, -q, zero, zero, GOAL))


def test_a_cost_above_500_is_charged_instead_of_rewarded():
    assert metrics.reward(np.array([499.0, 501.0]))[1] == -501.0


@pytest.mark.parametrize('count', [1, 7, 40])
def test_clearance_equals_the_loop_over_obstacles_at_each_time(count):
    t = np.linspace(0.0, 3.0, 31)
    start, velocity = RNG.uniform(-1, 1, (count, 3)), RNG.normal(size=(count, 3))
    radius = RNG.uniform(0.05, 0.3, count)
    truth = Obstacles(0.0, start, radius, velocity)
    track = metrics.SphereTrack.of([truth.at(s) for s in t[::5]], list(t[::5]))
    path = RNG.uniform(-1, 1, (len(t), 3))
    d, k = metrics.clearance(t, path, track)
    for i in range(len(t)):  # constant velocity, so linear interpolation is exact
        expected, sphere = truth.at(t[i]).clearance(path[i])
        assert d[i] == pytest.approx(expected) and k[i] == sphere


def test_one_latched_message_holds_for_all_times():
    field = Obstacles(5.0, np.array([[1.0, 0, 0]]), np.array([0.25]), np.zeros((1, 3)))
    track = metrics.SphereTrack.of([field], [5.0])
    d, k = metrics.clearance(np.array([0.0, 5.0, 9.0]), np.zeros((3, 3)), track)
    assert d == pytest.approx([0.75] * 3) and list(k) == [0, 0, 0]


def test_spheres_that_appear_and_vanish_count_while_they_are_there():
    one = Obstacles(0.0, np.array([[1.0, 0, 0]]), np.array([0.1]), np.zeros((1, 3)))
    two = Obstacles(1.0, np.array([[1.0, 0, 0], [0.5, 0, 0]]), np.array([0.1, 0.1]), np.zeros((2, 3)))
    none = Obstacles.none(2.0)
    track = metrics.SphereTrack.of([one, two, none], [0.0, 1.0, 2.0])
    d, k = metrics.clearance(np.array([0.5, 1.5, 2.5]), np.zeros((3, 3)), track)
    assert d[:2] == pytest.approx([0.9, 0.4]) and list(k) == [0, 1, -1] and d[2] == np.inf


def test_without_spheres_the_clearance_is_infinite():
    d, k = metrics.clearance(np.arange(3.0), np.zeros((3, 3)), metrics.SphereTrack.of([], []))
    assert np.all(d == np.inf) and np.all(k == -1)


def test_interpolation_is_exact_on_a_line_and_nan_outside():
    s = np.array([0.0, 1.0, 4.0])
    values = np.outer(s, [1.0, 2.0, 3.0])
    out = metrics.interpolate(np.array([-0.1, 0.5, 2.0, 4.1]), s, values)
    assert out[1:3] == pytest.approx(np.outer([0.5, 2.0], [1.0, 2.0, 3.0]))
    assert np.isnan(out[[0, 3]]).all()


def test_missed_ticks_and_gaps_are_counted():
    t = np.array([0.0, 0.1, 0.2, 0.5, 0.61, 0.7])
    assert metrics.missed_ticks(t, 0.1) == 2
    assert metrics.gaps(t, 0.15) == (1, pytest.approx(0.3))


def test_a_counter_that_restarts_keeps_counting():
    assert metrics.counted(np.array([3.0, 3, 5, 0, 1])) == 3
    assert metrics.counted(np.array([np.nan, 4.0])) == 0


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998 (Statistics in Medicine 17, table I, method 3): 81/263, 15/148, 0/20, 1/29
    for k, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                            (1, 29, 0.0061, 0.1718)):
        assert wilson(k, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
