"""The simulated cameras: what is measured, what is lost, when it arrives."""

import numpy as np
import pytest

from deqmpc.dynamics import rotation
from deqmpc.types import RigidBodyState
from sim_env.mocap_noise import MocapSensor, MocapSettings

Q = rotation.normalize(np.array([0.2, -0.1, 0.3, 0.9]))


def truth(t):
    return RigidBodyState(t, np.array([1.0, 2.0, 3.0]), Q, np.zeros(3), np.zeros(3))


def film(settings, seed=0, duration=20.0, start=0.0, step=1e-3):
    """The frames of `duration` seconds, the truth moving on by `step`."""
    sensor = MocapSensor(settings, seed)
    frames = [sensor.sample(truth(start + k * step)) for k in range(round(duration / step))]
    return [f for f in frames if f is not None]


def test_exposures_are_periodic_and_deliveries_are_late_by_latency_and_jitter_and_in_order():
    frames = film(MocapSettings(latency=0.02, jitter=0.05))
    assert [f.number for f in frames] == list(range(2000))
    assert np.diff([f.exposure for f in frames]) == pytest.approx(np.full(1999, 0.01), abs=1e-9)
    late = np.array([f.delivery - f.exposure for f in frames])
    assert late.min() >= 0.02 and late.max() <= 0.07 + 1e-9
    assert np.all(np.diff([f.delivery for f in frames]) >= 0.0)


def test_noise_has_the_standard_deviations_that_were_asked_for():
    frames = film(MocapSettings(position_noise=0.001, orientation_noise=0.01))
    error = np.array([f.position for f in frames]) - truth(0.0).position
    assert error.std(axis=0) == pytest.approx([0.001] * 3, rel=0.1)
    turned = np.array([rotation.multiply(f.quaternion, rotation.conjugate(Q)) for f in frames])
    assert 2.0 * turned[:, :3].std(axis=0) == pytest.approx([0.01] * 3, rel=0.1)
    assert np.linalg.norm([f.quaternion for f in frames], axis=1) == pytest.approx(np.ones(len(frames)))


def test_without_noise_the_truth_is_measured():
    frame, = film(MocapSettings(position_noise=0.0, orientation_noise=0.0), duration=0.005)
    assert frame.position == pytest.approx(truth(0.0).position) and frame.quaternion == pytest.approx(Q)


def test_a_lost_frame_leaves_a_gap_in_the_numbers():
    numbers = np.array([f.number for f in film(MocapSettings(drop_probability=0.2))])
    assert 1 - len(numbers) / 2000 == pytest.approx(0.2, abs=0.03)
    assert np.all(np.diff(numbers) >= 1) and np.diff(numbers).max() > 1


def test_bursts_and_occlusions_take_the_share_of_time_that_was_asked_for():
    # Renewal process: down for d after up for 1/r in the mean -> share d / (d + 1/r) = 1/3.
    slow = {'rate': 20.0}  # enough frames a spell, few enough for a long film
    bursts = film(MocapSettings(burst_rate=1.0, burst_duration=0.5, **slow), duration=300.0, step=0.05)
    assert 1 - len(bursts) / 6000 == pytest.approx(1 / 3, abs=0.08)
    gaps = np.diff([f.number for f in bursts])
    assert gaps.max() > 10  # bursts, not single frames
    occluded = film(MocapSettings(occlusion_rate=1.0, occlusion_duration=0.5, **slow), duration=300.0,
                    step=0.05)
    assert len(occluded) == 6000
    assert np.mean([f.position is None for f in occluded]) == pytest.approx(1 / 3, abs=0.08)


def test_false_poses_lie_at_their_distance():
    frames = film(MocapSettings(position_noise=0.0, false_pose_probability=0.1, false_pose_distance=0.4))
    distance = np.array([np.linalg.norm(f.position - truth(0.0).position) for f in frames])
    assert np.mean(distance > 1e-6) == pytest.approx(0.1, abs=0.03)
    assert distance[distance > 1e-6] == pytest.approx(np.full(np.sum(distance > 1e-6), 0.4))


def test_equal_seeds_give_equal_films_and_a_loss_does_not_change_the_noise():
    def positions(settings, seed):
        return {f.number: f.position for f in film(settings, seed, 2.0) if f.position is not None}
    clean, again, other = (positions(MocapSettings(), seed) for seed in (1, 1, 2))
    assert all(np.array_equal(clean[k], again[k]) for k in clean)
    assert not np.array_equal(clean[0], other[0])
    lossy = positions(MocapSettings(drop_probability=0.3, occlusion_rate=2.0), 1)
    assert lossy and all(np.array_equal(clean[k], lossy[k]) for k in lossy)


def test_time_may_start_anywhere():
    frames = film(MocapSettings(burst_rate=1.0), duration=1.0, start=1.7e9)
    assert frames[0].number == 0 and frames[0].exposure == 1.7e9


@pytest.mark.parametrize('settings', [
    {'rate': 0.0}, {'drop_probability': 1.1}, {'latency': -0.1}, {'position_noise': np.nan},
    {'jitter': np.inf}])
def test_settings_that_make_no_sense_are_named(settings):
    with pytest.raises(ValueError, match=f'MocapSettings.{next(iter(settings))}'):
        MocapSettings(**settings)
