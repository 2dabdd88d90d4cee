"""The trial conductor against a scripted flight."""

import dataclasses
import math

import numpy as np
import pytest
from flight_log_fake_flight import FIELD, GOAL, FakeFlight

from deqmpc.types import Obstacles
from flight_log.protocol import Call, Done, GoTo, TrialConductor, TrialSettings, draw_start, parse_start


def fly(flight, **settings):
    settings = {'start': '0.8 -0.9 1.2 0.0', 'require_obstacles': False, **settings}
    conductor = TrialConductor(TrialSettings(**settings))
    stages = []
    while flight.t < 300.0:
        action = conductor.step(flight.t, flight.seen())
        if conductor.stage not in stages[-1:]:
            stages.append(conductor.stage)
        if isinstance(action, Done):
            return action, stages, conductor
        if isinstance(action, Call):
            conductor.reply(action.name, *flight.call(action.name, action.value))
        elif isinstance(action, GoTo) and 'go_to' not in flight.ignores and flight.phase == 'holding':
            flight.target, flight.go_to = action.pose.position, 'active'
        flight.advance()
    raise AssertionError(f'no end: {conductor.stage}, {conductor.take_lines()}')


EMPTY = Obstacles.none()


def test_a_trial_goes_through_all_stages_and_calls_each_service_once():
    flight = FakeFlight(spheres=EMPTY)
    done, stages, conductor = fly(flight)
    assert done.success and done.reason == '' and done.steps == 200
    assert stages == ['arming', 'taking_off', 'to_start', 'settling', 'engaging', 'following', 'disengaging',
                      'landing', 'finished']
    assert flight.calls == [('arm', True), 'takeoff', 'engage', 'disengage', 'land']
    assert done.distance < 0.01 and flight.phase == 'disarmed'
    lines = conductor.take_lines()
    assert 'step 100 of 200: 0.00 m to the goal, clearance inf m' in lines and lines[-1] == 'trial succeeded'
    assert conductor.step(flight.t, flight.seen()) is done


def test_services_that_are_refused_at_first_are_asked_again():
    flight = FakeFlight(spheres=EMPTY, refuses={'arm': 4.0, 'engage': 9.0})
    done, _, conductor = fly(flight, max_steps=20)
    assert done.success
    assert flight.calls.count(('arm', True)) == 5
    assert 'arm refused: arm is not allowed' in conductor.take_lines()


@pytest.mark.parametrize('missing', ['status', 'pose', 'plan', 'obstacles'])
def test_nothing_is_armed_while_something_is_missing(missing):
    flight = FakeFlight(mute=[missing])
    done, _, _ = fly(flight, preflight_timeout=5.0, require_obstacles=True)
    assert not done.success and f'no {missing}' in done.reason and flight.calls == []
    assert done.steps == 0 and math.isnan(done.distance)


NEVER = math.inf


@pytest.mark.parametrize('broken, reason, calls', [
    # refused all the time
    ({'refuses': {'arm': NEVER}}, 'arm refused: arm is not allowed', []),
    ({'refuses': {'takeoff': NEVER}}, 'takeoff refused', [('arm', False)]),
    ({'refuses': {'engage': NEVER}}, 'engage refused', ['land']),
    # accepted without effect
    ({'ignores': ['takeoff']}, 'no answer from takeoff, phase armed', [('arm', False)]),
    ({'ignores': ['go_to']}, 'not at the start, but at', ['land']),
    # ended by the guard
    ({'events': [(1.0, 'phase', 'landing'), (1.0, 'reason', 'battery 3.60 V')]}, 'battery 3.60 V', []),
    ({'events': [(8.0, 'phase', 'holding'), (8.0, 'reason', 'no plan for 0.40 s')]},
     'following ended by phase holding at step', ['land']),
    ({'events': [(8.0, 'phase', 'landing'), (8.0, 'reason', 'outside the fence')]}, 'outside the fence', []),
    ({'events': [(8.0, 'phase', 'emergency'), (8.0, 'reason', 'tilt')]}, 'motors cut (tilt)', []),
    ({'events': [(8.0, 'phase', 'disarmed')]}, 'following ended by phase disarmed', []),
    # the policy
    ({'events': [(9.0, 'policy_rate', 0.1)]}, 'the policy restarted', ['disengage', 'land']),
    ({'policy_rate': 1.0}, 'only', ['disengage', 'land']),
])
def test_every_failure_ends_in_what_is_right_in_that_phase(broken, reason, calls):
    flight = FakeFlight(spheres=EMPTY, **broken)
    done, _, conductor = fly(flight, follow_slack=2.0, max_steps=60)
    assert not done.success and reason in done.reason, done.reason
    up = [('arm', True), 'takeoff', 'engage']
    after = [c for c in flight.calls if c not in up]
    assert list(dict.fromkeys(after)) == calls
    assert 'emergency' not in flight.calls
    assert flight.phase in ('disarmed', 'emergency')
    assert conductor.take_lines()[-1] == f'trial failed: {done.reason}'


def test_entering_a_sphere_aborts_the_trial_at_that_step_and_lands():
    wall = Obstacles(0.0, np.array([[0.0, 0.0, 1.0]]), np.array([0.3]), np.zeros((1, 3)))
    flight = FakeFlight(spheres=wall)
    done, stages, _ = fly(flight)
    assert 'collision with sphere 0 at step' in done.reason and 0 < done.steps < 20
    assert stages[-3:] == ['disengaging', 'landing', 'finished']


def test_a_moving_sphere_is_met_where_it_is_at_that_time():
    # read at t = 0, it will be at the goal 14 s later
    moving = Obstacles(0.0, np.array([[7.0, 0.0, 1.0]]), np.array([0.1]), np.array([[-0.5, 0.0, 0.0]]))
    flight = FakeFlight(spheres=moving)
    done, _, _ = fly(flight)
    assert 'collision with sphere 0' in done.reason and flight.t > 13.0


def test_losing_the_status_ends_in_a_call_to_land_and_a_cry_for_help():
    flight = FakeFlight(spheres=EMPTY, events=[(8.0, 'status_lost_at', 8.0), (8.0, 'ignores', {
        'land', 'disengage', 'emergency'})])
    done, _, _ = fly(flight, land_timeout=5.0)
    assert 'no status for' in done.reason and 'TAKE OVER BY HAND' in done.reason
    assert 'land' in flight.calls and 'emergency' not in flight.calls  # high up nothing is cut


def test_a_landing_that_hangs_on_the_ground_is_ended_by_cutting_the_motors():
    flight = FakeFlight(spheres=EMPTY, ignores=['landed'])
    done, _, _ = fly(flight, max_steps=10, land_timeout=5.0)
    assert flight.calls[-1] == 'emergency' and not done.success and 'not landed after 5 s' in done.reason


def test_an_operator_can_end_the_trial_and_it_lands():
    flight = FakeFlight(spheres=EMPTY)
    conductor = TrialConductor(TrialSettings(start='0.8 -0.9 1.2 0.0'))
    while flight.t < 100.0:
        if flight.t > 9.0 and not conductor.failure:
            assert flight.phase == 'following'
            conductor.abort('ended by the operator', flight.t, flight.seen())
        action = conductor.step(flight.t, flight.seen())
        if isinstance(action, Done):
            break
        if isinstance(action, Call):
            conductor.reply(action.name, *flight.call(action.name, action.value))
        elif isinstance(action, GoTo):
            flight.target, flight.go_to = action.pose.position, 'active'
        flight.advance()
    assert action.reason == 'ended by the operator' and flight.calls[-2:] == ['disengage', 'land']


@pytest.mark.parametrize('seed', range(10))
def test_random_starts_are_clear_of_the_spheres_far_from_the_goal_inside_the_volume_and_repeatable(seed):
    s = TrialSettings(seed=seed)
    start = draw_start(seed, FIELD, s)
    assert FIELD.clearance(start.position)[0] >= 0.3
    assert np.linalg.norm(start.position - GOAL) >= 1.0
    assert np.all((start.position >= s.volume_low) & (start.position <= s.volume_high))
    assert np.array_equal(start.position, draw_start(seed, FIELD, s).position)
    assert not np.array_equal(start.position, draw_start(seed + 1, FIELD, s).position)


def test_a_random_start_is_drawn_from_the_obstacles_that_were_received():
    flight = FakeFlight()
    done, _, _ = fly(flight, start='random', seed=5, max_steps=1)
    assert np.array_equal(done.start.position, draw_start(5, FIELD, TrialSettings()).position)


def test_a_volume_without_room_fails_before_arming():
    flight = FakeFlight()
    done, _, _ = fly(flight, start='random', start_clearance=5.0)
    assert 'no start within' in done.reason and flight.calls == []


def test_a_given_start_inside_a_sphere_fails_before_arming():
    wall = Obstacles(0.0, np.array([[0.8, -0.9, 1.2]]), np.array([0.3]), np.zeros((1, 3)))
    flight = FakeFlight(spheres=wall)
    done, _, _ = fly(flight)
    assert 'from sphere 0' in done.reason and flight.calls == []


def test_bad_settings_are_named():
    for wrong, words in (({'start': 'left'}, "start = 'left'"), ({'start': '1 2 nan 0'}, 'finite'),
                         ({'goal': [0.0, 1.0]}, 'goal'), ({'volume_low': [2.0, 0, 0]}, 'volume_low')):
        with pytest.raises(ValueError, match=words):
            TrialSettings(**wrong)
    assert parse_start('1, 2, 3, 0.5').yaw == 0.5 and parse_start('random') is None
    assert all(f.metadata['description'] for f in dataclasses.fields(TrialSettings))


@pytest.mark.parametrize('wobble, ends', [(0.0, True), (0.06, False)])
def test_a_drone_at_rest_settles_though_its_speed_is_noisy_and_one_that_wobbles_does_not(wobble, ends):
    flight = FakeFlight()
    clean = flight.seen

    def noisy():
        seen = clean()
        moved = None if seen.position is None else seen.position + [wobble * math.sin(6.0 * flight.t), 0.0, 0.0]
        return dataclasses.replace(seen, speed=0.2, position=moved)
    flight.seen = noisy
    done, stages, _ = fly(flight)
    assert ('following' in stages) == ends and (ends or 'settling not done after 30 s: not settled' in done.reason)
