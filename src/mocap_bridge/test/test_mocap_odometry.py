"""The odometry filter on motions that are known, on damage, and on recorded flights."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import butter, filtfilt
from scipy.spatial.transform import Rotation

from mocap_bridge.odometry import OdometryFilter, OdometrySettings

LEVEL = np.array([0.0, 0.0, 0.0, 1.0])
DT = 0.01


def noisy(rng, p, R=None):
    q = (R or Rotation.identity()) * Rotation.from_rotvec(rng.normal(0.0, 1e-3, 3))
    return p + rng.normal(0.0, 1e-4, 3), q.as_quat()


def hover(filter_, n, start=0.0, position=(0.0, 0.0, 1.0), seed=0):
    rng = np.random.default_rng(seed)
    for k in range(n):
        result = filter_.update(start + k * DT, *noisy(rng, np.array(position)))
    return result


def test_constant_velocity_and_constant_rates_are_found_without_a_lag():
    f, v, w = OdometryFilter(), np.array([1.0, -0.5, 0.2]), np.array([0.3, -0.4, 1.0])
    for k in range(300):
        t = k * DT
        result = f.update(t, v * t, Rotation.from_rotvec(w * t).as_quat())
    np.testing.assert_allclose(result.state.velocity, v, atol=1e-6)
    np.testing.assert_allclose(result.state.rates, w, atol=1e-6)
    np.testing.assert_allclose(result.state.position, v * t, atol=1e-8)


def test_constant_acceleration_is_followed_without_a_lag():
    f, a = OdometryFilter(), np.array([2.0, 0.0, -1.0])
    for k in range(150):
        result = f.update(k * DT, 0.5 * a * (k * DT) ** 2, LEVEL)
    np.testing.assert_allclose(result.state.velocity, a * 149 * DT, atol=1e-4)


def test_rates_are_in_the_body_frame():
    f, tilted = OdometryFilter(), Rotation.from_euler('x', 1.0)
    for k in range(200):  # turning about the body's own z axis
        result = f.update(k * DT, np.zeros(3), (tilted * Rotation.from_rotvec([0, 0, k * DT])).as_quat())
    np.testing.assert_allclose(result.state.rates, [0.0, 0.0, 1.0], atol=1e-5)


def test_position_noise_becomes_velocity_noise_by_less_than_a_hundred_per_second():
    rng, sigma, f = np.random.default_rng(1), 3e-4, OdometryFilter()
    v = [f.update(k * DT, rng.normal(0.0, sigma, 3), LEVEL) for k in range(2000)]
    v = np.array([r.state.velocity for r in v[200:]])
    assert v.std() / sigma < 100.0


@pytest.mark.parametrize('hz, delay', [(1.0, 1e-3), (2.0, 2e-3), (5.0, 6e-3)])
def test_the_velocity_of_an_oscillation_comes_with_little_delay(hz, delay):
    f, w = OdometryFilter(), 2.0 * math.pi * hz
    t = np.arange(1000) * DT
    results = [f.update(s, np.array([0.3 / w * math.sin(w * s), 0.0, 0.0]), LEVEL) for s in t]
    v = np.array([r.state.velocity[0] if r.state else 0.0 for r in results])[500:]
    response = 2.0 * np.mean(v * np.exp(-1j * w * t[500:])) / 0.3
    assert abs(-np.angle(response) / w) < delay
    assert 0.98 < abs(response) < 1.25


@pytest.mark.parametrize('position, quaternion, reason', [
    ((math.nan, 0.0, 1.0), LEVEL, 'not_finite'),
    ((0.0, math.inf, 1.0), LEVEL, 'not_finite'),
    ((0.0, 0.0, 1.0), (0.0, 0.0, math.nan, 1.0), 'not_finite'),
    ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), 'bad_quaternion'),
    ((0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 2.0), 'bad_quaternion'),
    ((0.0, 0.5, 1.0), LEVEL, 'jump'),
    ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0), 'jump'),
])
def test_an_impossible_sample_is_refused_with_its_reason_and_leaves_no_trace(position, quaternion, reason):
    f, same = OdometryFilter(), OdometryFilter()
    hover(f, 50)
    hover(same, 50)
    result = f.update(0.5, np.array(position), np.array(quaternion))
    assert (result.state, result.reason, result.accepted) == (None, reason, False)
    assert f.statistics.rejected == {reason: 1}
    after = [g.update(0.51, np.array([0.0, 0.0, 1.0]), LEVEL) for g in (f, same)]
    np.testing.assert_array_equal(after[0].state.velocity, after[1].state.velocity)


def test_a_stamp_that_is_not_finite_is_refused():
    assert OdometryFilter().update(math.nan, np.zeros(3), LEVEL).reason == 'not_finite'


def test_a_stamp_that_does_not_advance_is_refused():
    f = OdometryFilter()
    hover(f, 10)
    assert f.update(9 * DT, np.array([0.0, 0.0, 1.0]), LEVEL).reason == 'duplicate'
    assert f.update(5 * DT, np.array([0.0, 0.0, 1.0]), LEVEL).reason == 'out_of_order'


def test_every_second_sample_arriving_twice_costs_no_other_sample():
    f, rng, accepted = OdometryFilter(), np.random.default_rng(2), 0
    for k in range(500):
        sample = noisy(rng, np.array([0.0, 0.0, 1.0]))
        accepted += f.update(k * DT, *sample).accepted
        if k % 2:
            f.update((k - k % 3) * DT, *sample)  # the same stamp again, or an older one
    assert accepted == 500 and set(f.statistics.rejected) == {'duplicate', 'out_of_order'}


def test_a_clock_that_was_set_back_silences_the_filter_for_ten_samples_only():
    f = OdometryFilter()
    hover(f, 100, start=1000.0)
    rng = np.random.default_rng(3)
    taken = [f.update(5.0 + k * DT, *noisy(rng, np.array([0.0, 0.0, 1.0]))).accepted for k in range(20)]
    assert taken.index(True) == OdometrySettings().reaccept - 1 and all(taken[9:])


def test_a_frozen_pose_is_refused_after_ten_repetitions_and_believed_when_it_moves():
    f = OdometryFilter()
    hover(f, 20)
    frozen = noisy(np.random.default_rng(9), np.array([0.0, 0.0, 1.0]))
    reasons = [f.update(0.2 + k * DT, *frozen).reason for k in range(30)]
    assert reasons[:10] == [''] * 10 and set(reasons[10:]) == {'frozen'}
    assert f.update(0.55, frozen[0] + 1e-4, frozen[1]).accepted


@pytest.mark.parametrize('distance', [0.05, 0.2, 1.0])
def test_a_jump_that_stays_is_taken_after_ten_samples_and_never_becomes_a_velocity(distance):
    f = OdometryFilter()
    hover(f, 100)
    rng, speeds, accepted = np.random.default_rng(5), [], []
    for k in range(40):
        result = f.update(1.0 + k * DT, *noisy(rng, np.array([distance, 0.0, 1.0])))
        accepted.append(result.accepted)
        if result.state is not None:
            speeds.append(np.linalg.norm(result.state.velocity))
    assert accepted.index(True) == OdometrySettings().reaccept - 1
    assert all(accepted[9:]) and max(speeds) < 0.2


def test_every_tenth_sample_swapped_with_another_body_leaves_the_motion_untouched():
    f, rng, other = OdometryFilter(), np.random.default_rng(6), np.array([0.4, -0.3, 0.2])
    for k in range(400):
        t = k * DT
        p = np.array([math.sin(t), math.cos(t), 1.0])
        swapped = k % 10 == 9
        result = f.update(t, *noisy(rng, other if swapped else p))
        assert result.accepted != swapped
        if result.state is not None and k > 50:
            np.testing.assert_allclose(result.state.velocity, [math.cos(t), -math.sin(t), 0.0], atol=0.1)


def test_gaps_are_counted_with_their_lengths():
    f, rng = OdometryFilter(), np.random.default_rng(7)
    stamps = [0.0, 0.01, 0.02, 0.17, 0.18, 0.25, 0.26]
    gaps = [f.update(t, *noisy(rng, np.zeros(3))).gap for t in stamps]
    assert [round(g, 3) for g in gaps if g] == [0.15, 0.07]
    s = f.statistics
    assert (s.gaps, round(s.longest_gap, 3), round(s.last_gap, 3)) == (2, 0.15, 0.07)


def test_after_a_long_silence_the_filter_starts_from_nothing_and_settles_first():
    f = OdometryFilter()
    hover(f, 100)
    rng = np.random.default_rng(8)
    results = [f.update(5.0 + k * DT, *noisy(rng, np.array([3.0, 0.0, 1.0]))) for k in range(5)]
    assert [r.reason for r in results] == ['settling', 'settling', '', '', '']
    assert all(r.accepted for r in results)
    assert np.linalg.norm(results[-1].state.velocity) < 0.1


def test_the_sign_of_a_quaternion_does_not_matter_and_is_counted():
    f, g = OdometryFilter(), OdometryFilter()
    for k in range(100):
        q = Rotation.from_rotvec([0.0, 0.0, 0.5 * k * DT]).as_quat()
        a, b = f.update(k * DT, np.zeros(3), q), g.update(k * DT, np.zeros(3), q if k % 2 else -q)
    np.testing.assert_allclose(a.state.rates, b.state.rates, atol=1e-9)
    assert (f.statistics.sign_flips, g.statistics.sign_flips) == (0, 99)
    assert g.update(1.0, np.zeros(3), q).flipped is False


def test_a_gap_while_turning_fast_does_not_make_the_rates_run_away():
    rng, f = np.random.default_rng(9), OdometryFilter(OdometrySettings(angular_jerk=1000.0))
    t = 0.0
    for _ in range(3000):
        t += rng.choice([2e-4, 0.02, 0.04, 0.15], p=[0.3, 0.5, 0.15, 0.05])
        q = Rotation.from_rotvec([0.5 * math.sin(6 * t), 0, 0]) * Rotation.from_rotvec(rng.normal(0, 3e-3, 3))
        result = f.update(t, np.zeros(3), q.as_quat())
        if result.state is not None:
            assert np.linalg.norm(result.state.rates) < 2.0 * OdometrySettings().max_rate


# --- recorded data ------------------------------------------------------------------------------------

def load(folder, name, columns):
    root = Path(os.environ.get('DEQMPC_DATA', Path(__file__).parents[4] / 'shared' / 'data'))
    if not (root / folder).is_dir():
        pytest.skip(f'recorded data not found at {root / folder} (set DEQMPC_DATA)')
    data = np.genfromtxt(root / folder / name, delimiter=',', names=True)
    return data['t'], *(np.stack([data[c] for c in group.split()], 1) for group in columns)


def replay(t, position, quaternion):
    f = OdometryFilter()
    results = [f.update(*sample) for sample in zip(t, position, quaternion, strict=True)]
    return f, results


@pytest.mark.parametrize('name', ['helix_fast_mell.csv', 'mell_trefoil_fast_rep3.csv',
                                  'mell_trefoil_medium_rep1.csv', 'mell_trefoil_slow_rep1.csv'])
def test_velocity_on_a_recorded_flight_is_within_one_centimetre_per_second_rms(name):
    t, p, q = load('flights', name, ('px py pz', 'qx qy qz qw'))
    f, results = replay(t, p, q)
    # zero-phase reference: the whole recording, filtered forwards and backwards at 12 Hz
    reference = np.gradient(filtfilt(*butter(4, 12.0 / 50.0), p, axis=0), t, axis=0)
    velocity = np.array([r.state.velocity if r.state else np.full(3, np.nan) for r in results])
    error = (velocity - reference)[50:-50]
    assert math.sqrt(np.mean(error ** 2)) < 0.010
    assert not f.statistics.rejected and f.statistics.restarts == 0


@pytest.mark.parametrize('name, gaps', [('optitrack_20240816_00_11_25.csv', 5),
                                        ('optitrack_20240824_00_08_07.csv', 3)])
def test_a_jittered_50_hz_recording_is_taken_whole_and_its_gaps_are_reported(name, gaps):
    t, p, q = load('mocap', name, ('x y z', 'qx qy qz qw'))
    f, results = replay(t, p, q)
    assert not f.statistics.rejected and f.statistics.accepted == len(t)
    assert f.statistics.gaps == gaps == int((np.diff(t) > OdometrySettings().gap).sum())
    assert f.statistics.longest_gap == pytest.approx(np.diff(t).max())
    speed = [np.linalg.norm(r.state.velocity) for r in results if r.state]
    assert max(speed) < 2.0  # differences of neighbouring samples reach 33 m/s
