"""Detours: point-mass paths past spheres, as guesses."""

import numpy as np
import pytest

from deqmpc.detours import Settings, detours
from deqmpc.solvers import langevin

SHORT = Settings(flow=langevin.Settings(steps=60, sigma=2.0))
START = np.array([1.0, 0.0, 0.0, 0.1, 0.0, 0.0])
RADII = np.array([0.2, 0.0])  # the second is absent


def paths(seed=0, horizon=40, count=3, settings=SHORT):
    centers = np.broadcast_to([[0.5, 0.0, 0.0], [9.0, 9.0, 9.0]], (horizon + 1, 2, 3))
    return detours(START, np.zeros(3), centers, RADII, np.full(3, 0.75), -0.3, 0.1, horizon, count, seed, settings)


def test_paths_begin_at_the_start_stay_above_the_floor_and_within_the_speed():
    position, velocity = paths()
    assert position.shape == velocity.shape == (3, 41, 3)
    assert (position[:, 0] == START[:3]).all() and (velocity[:, 0] == START[3:]).all()
    assert position[..., 2].min() >= -0.3 and np.abs(velocity).max() <= 0.75
    assert np.isfinite(position).all() and np.abs(position[0] - position[1]).max() > 0.1


def test_a_long_quiet_flow_ends_near_the_goal_with_the_dynamics_kept_and_the_sphere_avoided():
    settings = Settings(flow=langevin.Settings(steps=3000, sigma=0.5, quiet=0.7))
    position, velocity = (v[:, ::settings.stride] for v in paths(settings=settings, count=2))
    missed = position[:, 1:] - position[:, :-1] - 0.2 * (velocity[:, 1:] + velocity[:, :-1])
    assert np.abs(missed).max() < 0.02 and np.abs(position[:, -1]).max() < 0.2  # the hill pushes from the goal too
    assert np.linalg.norm(position - [0.5, 0.0, 0.0], axis=2).min() > 0.2


def test_a_seed_gives_the_same_paths_again_and_another_one_others():
    assert np.array_equal(paths(3)[0], paths(3)[0]) and not np.array_equal(paths(3)[0], paths(4)[0])


def test_a_horizon_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match='horizon = 42; expected a multiple of stride = 4'):
        paths(horizon=42)
