"""Recorded flights as trajectories of the library."""

import numpy as np
from flight_log_synthetic import GOAL, SyntheticTrial, settle, static_field, write_trial

from flight_log.episodes import PERIOD, read


def test_a_trial_becomes_the_states_that_followed_the_policy_in_the_frame_of_the_goal(tmp_path):
    d = read(write_trial(tmp_path / 'bag', SyntheticTrial(seconds=3.0)))
    path = settle()
    flown = np.array([path(PERIOD * k) - GOAL for k in range(len(d.states))])
    assert 29 <= len(d.states) <= 32 and d.lengths.tolist() == [len(d.states)]
    assert np.abs(d.states[:, :3] - flown).max() < 0.03  # the status that begins it comes at 10 Hz
    assert np.isnan(d.controls).all()


def test_spheres_stand_where_they_were_seen_from_the_goal(tmp_path):
    d = read(write_trial(tmp_path / 'bag', SyntheticTrial(seconds=1.0, obstacles=static_field([[1.0, 0.0, 1.0]]))))
    assert d.centers.shape == (len(d.states), 1, 3) and not d.velocity.any()
    assert np.allclose(d.centers, [1.0, 0.0, 0.0]) and np.allclose(d.radii, [[0.1]])
