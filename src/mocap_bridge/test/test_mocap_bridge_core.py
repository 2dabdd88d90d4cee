"""From frames to samples, and the health report."""

import mocap_wire as wire
import numpy as np
import pytest

from deqmpc.interface import ERROR, OK, WARN
from mocap_bridge.bridge import Bridge, HealthSettings
from mocap_bridge.odometry import OdometrySettings
from mocap_bridge.session import BodyPose, ClientSettings, MocapError, MocapFrame, Session

RNG = np.random.default_rng(0)


def session(up_axis='z'):
    s = Session(ClientSettings())
    s.datagram(wire.server_info(), 0.0, 0.0)
    s.datagram(wire.models({'cf1': 1}), 0.0, 0.0)
    s.up_axis = up_axis
    return s


def bridge(up_axis='auto'):
    return Bridge('cf1', up_axis, OdometrySettings(), HealthSettings(), 0.0)


def frame(t, valid=True, bodies=None, up_axis='z', delay=0.004, position=(0.0, 0.0, 1.0)):
    pose = BodyPose(np.array(position) + RNG.normal(0, 1e-4, 3), np.array([0.0, 0.0, 0.0, 1.0]), valid, 1e-4)
    return MocapFrame(round(100 * t), t, t + delay, t, {'cf1': pose} if bodies is None else bodies, up_axis)


def run(b, start, stop, step=0.01, publish=0.005, **kwargs):
    samples = []
    for t in np.arange(start, stop - 1e-9, step):
        sample = b.frame(frame(float(t), **kwargs))
        if sample is not None:
            samples.append(sample)
            b.published(sample, sample.stamp + publish)
    return samples


def test_a_body_that_is_not_tracked_is_never_published():
    b = bridge()
    assert len(run(b, 0.0, 0.1)) == 10
    assert run(b, 0.1, 0.2, valid=False) == [] and b.invalid == 10 and not b.tracked
    assert run(b, 0.2, 0.3, bodies={}) == [] and b.absent == 10


def test_a_pose_that_is_refused_is_never_published():
    b = bridge()
    run(b, 0.0, 0.5)
    assert b.frame(frame(0.5, position=(1.0, 0.0, 1.0))) is None
    assert b.frame(frame(0.51)) is not None


def test_nothing_is_published_before_the_up_axis_is_known():
    b = bridge()
    assert run(b, 0.0, 0.1, up_axis=None) == []
    assert len(run(b, 0.1, 0.2, up_axis='y')) == 10


def test_a_y_up_stream_is_published_z_up():
    sample = run(bridge(), 0.0, 0.1, up_axis='y', position=(1.0, 2.0, -3.0))[-1]
    np.testing.assert_allclose(sample.position, [1.0, 3.0, 2.0], atol=1e-3)
    np.testing.assert_allclose(sample.state.position, [1.0, 3.0, 2.0], atol=1e-3)


def test_a_set_up_axis_wins_over_what_the_server_says_and_a_contradiction_is_a_warning():
    b, s = bridge('z'), session('y')
    sample = run(b, 0.0, 1.0, up_axis='y', position=(1.0, 2.0, 3.0))[-1]
    assert sample.position[2] == pytest.approx(3.0, abs=1e-3)
    level, message, _ = b.report(s, 1.0)
    assert level == WARN and 'streams y up' in message
    b.check_axes(s)


@pytest.mark.parametrize('up_axis, untold, message', [
    ('x', False, 'streams x up'), (None, True, 'set up_axis')])
def test_axes_that_cannot_be_used_are_refused(up_axis, untold, message):
    s = session(up_axis)
    s._axis_requests = 10 if untold else 0
    with pytest.raises(MocapError, match=message):
        bridge().check_axes(s)


def test_an_unknown_up_axis_is_refused():
    with pytest.raises(MocapError, match='expected one of auto, z, y'):
        bridge('w')


def test_a_good_stream_is_reported_as_good():
    b = bridge()
    run(b, 0.0, 1.0)
    level, message, values = b.report(session(), 1.0)
    assert (level, message) == (OK, 'tracking')
    assert values['rate_hz'] == pytest.approx(100.0) and values['latency_ms'] == pytest.approx(5.0)


@pytest.mark.parametrize('kwargs, message', [
    ({'step': 0.02}, 'rate 50.0 Hz'), ({'step': 0.005}, 'rate 200.0 Hz'),
    ({'publish': 0.02}, 'latency 20.0 ms')])
def test_a_stream_outside_its_limits_is_a_warning(kwargs, message):
    b = bridge()
    run(b, 0.0, 1.0, **kwargs)
    level, text, _ = b.report(session(), 1.0)
    assert level == WARN and message in text


def test_gaps_and_refusals_of_the_interval_are_warnings_and_then_forgotten():
    b, s = bridge(), session()
    run(b, 0.0, 0.5)
    b.frame(frame(0.5, position=(2.0, 0.0, 1.0)))
    run(b, 0.6, 1.05)
    level, message, values = b.report(s, 1.05)
    assert level == WARN and '1 gaps' in message and '1 poses refused: 1 jump' in message
    assert values['rejected_jump'] == 1 and values['longest_gap_s'] == pytest.approx(0.11)
    run(b, 1.05, 2.05)
    assert b.report(s, 2.05)[0] == OK


def scattered(b):
    """Poses that are nowhere near each other, for less than the filter's patience."""
    for k in range(45):
        b.frame(frame(1.0 + 0.01 * k, position=(3.0 * (k + 1), 0.0, 1.0)))


def frozen(b):
    """One pose, again and again, until the filter has believed it for the last time, and then further."""
    pose = BodyPose(np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.0, 0.0, 1.0]), True, 1e-4)
    for k in range(46):
        b.frame(frame(1.0 + 0.01 * k, bodies={'cf1': pose}))


@pytest.mark.parametrize('make, message', [
    (lambda b, s: setattr(s, 'connected', False), 'no answer'),
    (lambda b, s: None, 'no frames'),
    (lambda b, s: run(b, 1.0, 2.0, valid=False), 'not tracked'),
    (lambda b, s: (run(b, 1.0, 2.0, bodies={}), s.models.pop('cf1')), 'gone'),
    (lambda b, s: frozen(b), 'refused: 36 frozen'), (lambda b, s: scattered(b), 'refused: 45 jump')])
def test_a_stream_that_stopped_is_an_error_that_says_why(make, message):
    b, s = bridge(), session()
    run(b, 0.0, 1.0)
    b.report(s, 1.0)
    make(b, s)
    level, text, _ = b.report(s, 1.5 if 'refused' in message else 2.0)
    assert level == ERROR and message in text
