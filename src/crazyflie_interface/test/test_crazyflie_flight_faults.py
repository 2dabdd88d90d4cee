# SPDX-License-Identifier: GPL-3.0-or-later
"""Faults of mocap, odometry, clock, recorder and policy, and virtual spheres, through the flight manager."""

import numpy as np
import pytest
from crazyflie_bench import LEVEL, Bench, changed, hover_plan

from crazyflie_interface import guard
from crazyflie_interface.flight import TICK
from crazyflie_interface.guard import ANSWERS, Answer
from deqmpc import interface
from deqmpc.dynamics import rotation
from deqmpc.interface import PHASES, Diagnostic
from deqmpc.types import Obstacles, RigidBodyState

FLYING = ('taking_off', 'holding', 'following', 'landing')


def in_phase(phase, **settings):
    """A bench whose drone is in `phase`."""
    b = Bench(changed(**settings)).step(1.2)
    steps = {'disarmed': (), 'armed': ('armed',), 'taking_off': ('armed', 'taking_off')}.get(
        phase, ('armed', 'taking_off', 'holding'))
    for step in steps:
        if step == 'armed':
            b.ask('arm', True)
        elif step == 'taking_off':
            b.ask('takeoff')
        b.until(step)
    if phase == 'taking_off':
        b.step(1.0)
    if phase in ('following', 'landing', 'emergency'):
        b.ask({'following': 'engage', 'landing': 'land', 'emergency': 'emergency'}[phase]).step(0.1)
    assert b.manager.phase == phase
    return b


CARRIED_OUT = {  # (phase, answer) -> the phase it leads to and what is sent; all others change nothing
    ('armed', 'cut'): ('disarmed', {'arm'}),
    ('taking_off', 'land'): ('landing', {'land'}), ('holding', 'land'): ('landing', {'land'}),
    ('following', 'hold'): ('holding', {'go_to', 'notify_stop'}),
    ('following', 'land'): ('landing', {'land', 'notify_stop'}),
    **{(phase, 'cut'): ('emergency', {'emergency_stop'}) for phase in FLYING}}


@pytest.mark.parametrize('phase', PHASES)
def test_every_answer_of_the_guard_is_carried_out_in_every_phase_with_its_commands(monkeypatch, phase):
    b, judge = in_phase(phase), guard.decide
    for answer in ANSWERS:  # from mildest to worst
        if b.manager.phase != phase:
            monkeypatch.setattr(guard, 'decide', judge)
            b = in_phase(phase)
        b.log.clear()
        monkeypatch.setattr(guard, 'decide', lambda inputs, settings, answer=answer: Answer(answer, 'because'))
        b.manager.tick(b.now + 0.001)
        reached, commands = CARRIED_OUT.get((phase, answer), (phase, set()))
        assert b.manager.phase == reached, answer
        assert commands <= {name for _, name, _ in b.log}, answer
        assert (b.manager.reason == 'because') == bool(commands), answer


# --- poses that no flying drone has -----------------------------------------------------------------

def turned(angle, axis=(0.0, 0.0, 1.0)):
    return np.append(np.sin(angle / 2) * np.asarray(axis, float), np.cos(angle / 2))


POSE_FAULTS = {
    'jumped': lambda b, k: (b.position + [0.5, 0.0, 0.0] + 1e-5 * k, LEVEL),
    'another body': lambda b, k: (np.array([-1.0, 1.5, 0.3]) + 1e-5 * k, turned(1.0)),
    'flipped heading': lambda b, k: (b.position + 1e-5 * k, turned(np.pi / 2 + 1e-5 * k)),
    'upside down': lambda b, k: (b.position + 1e-5 * k, turned(np.pi - 1e-5 * k, (1.0, 0.0, 0.0))),
    'frozen': lambda b, k: (b.stuck, LEVEL),
    'stamps run backwards': lambda b, k: (b.position + 1e-5 * k, LEVEL),
    'not finite': lambda b, k: (np.array([0.0, np.nan, 1.0]), LEVEL),
}
WORD = {'jumped': 'jumped', 'another body': 'jumped', 'flipped heading': '1.57 rad',
        'upside down': '3.14 rad', 'frozen': 'frozen', 'stamps run backwards': 'not after the last one',
        'not finite': 'not finite'}


def feed(b, fault, seconds):
    """Poses with `fault` at 100 Hz instead of the bench's own; the policy goes on."""
    b.mocap, b.began = False, getattr(b, 'began', b.now)
    for k in range(round(seconds / TICK)):
        for half in (0, 1):
            position, quaternion = POSE_FAULTS[fault](b, 2 * k + half)
            stamp = b.now - 0.005 + half * TICK / 2
            if fault == 'stamps run backwards':
                stamp = 2 * b.began - stamp - 0.02
            b.manager.on_pose(stamp, position, quaternion, b.now + half * TICK / 2)
        b.step()


@pytest.mark.parametrize('fault', POSE_FAULTS)
def test_an_impossible_pose_counts_as_none_is_not_forwarded_and_is_named(fault):
    b = in_phase('following')
    b.stuck = b.manager._pose[1].copy()
    b.log.clear()
    feed(b, fault, 0.3)
    assert b.manager.phase == 'holding'
    assert WORD[fault] in b.manager.reason and 'no mocap pose' in b.manager.reason
    assert not any(name == 'extpose' for _, name, _ in b.log)
    feed(b, fault, 0.3)
    assert b.manager.phase == 'landing'
    assert WORD[fault] in b.manager.reason


@pytest.mark.parametrize('fault', ['jumped', 'another body', 'flipped heading', 'frozen'])
def test_on_the_ground_a_drone_may_stand_still_and_be_carried(fault):
    b = Bench().step(0.5)
    b.stuck = b.manager._pose[1].copy()
    b.log.clear()
    feed(b, fault, 0.2)
    assert sum(name == 'extpose' for _, name, _ in b.log) >= 19


def test_a_drone_at_rest_on_the_floor_may_repeat_its_pose_while_it_takes_off():
    b = in_phase('armed')
    b.ask('takeoff')
    b.stuck = b.manager._pose[1].copy()
    assert b.manager.on_pose(b.now + 0.01, b.stuck, LEVEL, b.now + 0.01) == ''


def test_one_false_pose_in_flight_is_left_out_and_the_flight_goes_on():
    b = in_phase('following')
    for _ in range(50):
        assert 'jumped' in b.manager.on_pose(b.now + 0.001, b.position + [0.0, 0.4, 0.0], LEVEL, b.now + 0.001)
        b.step(0.06)
    assert b.manager.phase == 'following' and b.manager.reason == ''


def test_a_drone_that_is_flown_hard_and_seen_rarely_does_not_jump():
    b = in_phase('following')
    p, v, t = b.manager._pose[1].copy(), np.zeros(3), b.now
    rng = np.random.default_rng(0)
    for k in range(200):  # 1 g in changing directions, 1 mm of noise, every third frame seen
        t += 0.03
        a = 9.81 * turned(0.3 * k)[[2, 3, 0]] * [1, 1, 0]
        p, v = p + 0.03 * v + 0.5 * a * 0.03**2, np.clip(v + 0.03 * a, -2, 2)
        q = rotation.from_yaw(0.09 * k)
        assert b.manager.on_pose(t, p + 1e-3 * rng.standard_normal(3), q, t) == '', k
        b.manager.on_odometry(RigidBodyState(t, p, q, v, np.zeros(3)), t)


# --- odometry ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('position,velocity,word', [
    ([np.nan, 0, 0], [0, 0, 0], 'odometry is not finite'), (None, [0, np.inf, 0], 'odometry is not finite'),
    ([5.0, 0, 0], [0, 0, 0], 'm from the pose')])
def test_odometry_that_cannot_be_used_is_named_and_ends_in_a_hold(position, velocity, word):
    b = in_phase('following')
    on_odometry, b.manager.on_odometry = b.manager.on_odometry, lambda state, now: None
    for _ in range(15):
        b.step()
        where = b.position if position is None else np.array(position)
        on_odometry(RigidBodyState(b.now, where, LEVEL, np.array(velocity), np.zeros(3)), b.now)
    assert b.manager.phase == 'holding'
    assert 'no odometry' in b.manager.reason and word in b.manager.reason


# --- the system clock -------------------------------------------------------------------------------

@pytest.mark.parametrize('step', [-3600.0, 1.0])
@pytest.mark.parametrize('phase', [p for p in FLYING if p != 'following'])
def test_setting_the_system_clock_changes_no_age_and_no_phase(phase, step):
    b = in_phase(phase)
    manager, offset = b.manager, 0.0
    on_pose = manager.on_pose
    def stamped(stamp, position, quaternion, now):
        manager.on_ros_time(now + offset, now)
        return on_pose(stamp + offset, position, quaternion, now)
    manager.on_pose = stamped
    b.step(0.1)
    offset = step
    b.step(0.3)
    assert manager.reason == '' and manager.phase in (phase, 'holding', 'disarmed')
    assert manager._pose_age(b.now) < 0.02
    assert f'{step:+.3f} s' in manager.health(b.now)[1]
    if phase == 'landing':
        b.until('disarmed')


@pytest.mark.parametrize('step', [-1.0, 1.0])
def test_a_followed_plan_is_held_when_the_system_clock_is_set_and_engage_resumes(step):
    b = in_phase('following')
    b.manager.on_ros_time(b.now, b.now)
    b.manager.on_ros_time(b.now + step, b.now)
    b.step()
    assert b.manager.phase == 'holding' and 'clock was set' in b.manager.reason
    for k in range(60):  # stamps of the new clock
        b.manager.on_ros_time(b.now + step, b.now)
        b.mocap = b.policy = False
        b.step()
        b.manager.on_pose(b.now + step - 0.005, b.position + 1e-6 * (-1) ** k, LEVEL, b.now)
        b.manager.on_odometry(RigidBodyState(b.now + step, b.position, LEVEL, np.zeros(3), np.zeros(3)), b.now)
        b.manager.on_plan(hover_plan(b.now + step, b.position), b.now)
    assert b.manager.phase == 'holding'
    b.ask('engage').step()
    assert b.manager.phase == 'following'


# --- the other processes ----------------------------------------------------------------------------

def word(b, node, level=interface.OK, message='fine'):
    b.manager.on_diagnostic(node, Diagnostic(b.now, f'cf1/{node}', level, message, {}), b.now)


def test_a_recorder_that_dies_in_flight_lands_and_one_that_was_never_there_does_not():
    b = in_phase('following')
    del b.reports['recorder'], b.manager.heard['recorder']
    b.step(6.0)
    assert b.manager.phase == 'following'
    word(b, 'recorder')
    b.step(4.9)
    assert b.manager.phase == 'following'
    b.step(0.2)
    assert b.manager.phase == 'landing' and 'recorder is silent' in b.manager.reason


def test_a_recorder_that_fails_lands_at_once_unless_the_operator_asks_for_a_warning():
    for answer, phase in (('land', 'landing'), ('warn', 'following')):
        b = in_phase('following', recorder_answer=answer)
        del b.reports['recorder']
        word(b, 'recorder', interface.ERROR, 'recording stopped: disk full')
        b.step()
        assert b.manager.phase == phase and 'disk full' in b.manager.health(b.now)[1]


def test_the_hold_without_a_plan_says_what_the_policy_says_or_that_it_is_silent():
    b = in_phase('following')
    b.policy = False
    del b.reports['policy']
    for _ in range(25):
        word(b, 'policy', interface.WARN, 'residual 0.3 above 0.02')
        b.step()
    assert b.manager.phase == 'holding' and 'the policy says: residual 0.3' in b.manager.reason
    b = in_phase('following')
    word(b, 'policy')
    b.policy = False
    b.step(0.6)
    assert b.manager.phase == 'holding' and 'no plan' in b.manager.reason and 'silent' in b.manager.reason


# --- virtual spheres --------------------------------------------------------------------------------

def sphere(b, position, velocity=(0.0, 0.0, 0.0), radius=0.1):
    b.manager.on_obstacles(Obstacles(b.now, np.array([position], float), np.array([radius]),
                                     np.array([velocity], float)), b.now)


def test_a_plan_through_a_sphere_is_held_before_it_is_there():
    b = in_phase('following')
    b.plan_velocity = np.array([0.5, 0.0, 0.0])
    sphere(b, b.position + [1.0, 0.0, 0.0])
    b.until('holding')
    assert 'the plan meets a sphere' in b.manager.reason
    b.step(1.0)
    assert b.manager._obstacles.clearance(b.position)[0] > 0.0


def test_a_drone_pushed_at_a_sphere_is_held_though_its_plan_is_clear():
    b = in_phase('following')
    sphere(b, b.position + [0.0, 0.3, 0.0])
    b._drone_full_state = lambda setpoint: None  # it does not follow
    while b.manager.phase == 'following':
        assert b.position[1] < 0.3
        b.target, b.policy = None, False
        b.position[1] += 0.6 * TICK / 2
        before = b.now
        b.manager.on_plan(hover_plan(b.now, [0.0, 0.0, 0.5]), b.now)
        b.manager.on_odometry(RigidBodyState(b.now, b.position, LEVEL, np.array([0, 0.6, 0]), np.zeros(3)), b.now)
        b.mocap = False
        b.step()
        b.manager.on_pose(b.now, b.position, LEVEL, b.now)
        assert b.now > before
    assert b.manager.phase == 'holding' and 'the motion meets a sphere' in b.manager.reason


def test_a_hold_of_the_guard_in_the_way_of_a_moving_sphere_becomes_a_landing():
    b = in_phase('following')
    b.policy = False
    b.until('holding')
    sphere(b, b.position + [0.4, 0.0, 0.05], velocity=(-0.5, 0.0, 0.0))
    b.step()
    assert b.manager.phase == 'landing' and 'the hold would be hit' in b.manager.reason


def test_a_plan_that_leads_out_of_a_sphere_that_appeared_on_the_drone_is_followed():
    b = in_phase('following')
    b.plan_velocity = np.array([0.3, 0.0, 0.0])
    b.step(0.2)
    sphere(b, b.position - [0.02, 0.0, 0.0])
    b.step(1.0)
    assert b.manager.phase == 'following'


def test_a_plan_into_another_drone_is_not_followed_and_a_stranger_is_an_error():
    b = in_phase('following', neighbours=['cf2'])
    b.plan_velocity = np.array([0.5, 0.0, 0.0])
    b.manager.on_neighbour('cf2', RigidBodyState(b.now, b.position + [1.2, 0.0, 0.0], LEVEL, np.array([-0.2, 0.0, 0.0]),
                                                 np.zeros(3)), b.now)
    b.until('landing')  # the other flies on towards the place where it would hold
    assert 'the plan meets a sphere' in b.manager.reason and b.position[0] < 0.9
    with pytest.raises(KeyError):
        b.manager.on_neighbour('cf9', RigidBodyState(b.now, b.position, LEVEL, np.zeros(3), np.zeros(3)), b.now)
