# SPDX-License-Identifier: GPL-3.0-or-later
import dataclasses

import numpy as np
import pytest
from crazyflie_bench import LEVEL, Bench, changed, hover_plan

from crazyflie_interface import radio
from crazyflie_interface.flight import TICK, FlightManager
from deqmpc import interface
from deqmpc.types import RigidBodyState

HANDOVER = ['go_to', 'notify_stop'] * 3  # sent three times, because one lost packet would be silence
OFF = ['stop', 'arm'] * 3


def test_a_flight_goes_through_every_phase_and_ends_disarmed():
    b = Bench().following()
    assert b.manager.phase == 'following' and b.sent[-1] is not None
    b.ask('disengage').step(1.2)
    b.ask('go_to', [0.5, 0.2, 0.8], 0.3)
    assert b.manager.status(b.now)['go_to'] == 'active'
    b.step(4.0)
    assert b.manager.status(b.now)['go_to'] == 'done'
    assert np.linalg.norm(b.position - [0.5, 0.2, 0.8]) < 1e-3
    b.ask('land').until('disarmed').step(0.1)
    assert b.commands() == ['arm', 'takeoff', 'full_state', *HANDOVER, 'go_to', 'land', *OFF]
    assert [args for _, name, args in b.log if name == 'arm'][-1] == (False,)
    assert b.manager.reason == ''


def test_the_status_has_exactly_the_keys_of_the_interface():
    b = Bench().holding()
    status = b.manager.status(b.now)
    assert tuple(status) == interface.FLIGHT_KEYS
    assert [status[k] for k in ('phase', 'guard', 'reason', 'go_to')] == ['holding', 'hold', '', 'idle']


def test_setpoints_go_out_on_every_tick_along_the_plan_and_begin_where_the_drone_is():
    b = Bench().holding()
    b.plan_velocity = np.array([0.3, 0.0, 0.0])
    b.step(0.2).ask('engage')
    before = b.position.copy()
    b.step(1.0)
    sent = [(t, args[0]) for t, name, args in b.log if name == 'full_state']
    assert len(sent) == round(1.0 / TICK)
    assert np.linalg.norm(sent[0][1].position - before) < 0.05
    steps = np.linalg.norm(np.diff([s.position for _, s in sent], axis=0), axis=1)
    assert steps.max() < 0.05 and b.position[0] > before[0] + 0.1


def test_look_ahead_reads_the_plan_that_much_later():
    b = Bench(changed(look_ahead=0.1)).holding()
    b.policy = False
    b.manager.on_plan(hover_plan(b.now, b.position, [0.5, 0, 0]), b.now)
    b.ask('engage').step()
    assert b.sent[-1].position[0] - b.position[0] == pytest.approx(0.5 * (0.1 + TICK), abs=0.02)


# --- arming ---------------------------------------------------------------------------------------

def test_arming_is_refused_with_every_failed_check_its_value_and_its_limit():
    b = Bench().step(1.2)
    b.volts, b.bits, b.parameter_faults = 3.75, radio.LOCKED, ('parameter a.b reads 1, was set to 2',)
    b._telemetry = lambda: dataclasses.replace(
        Bench._telemetry(b), position=b.position + [0.06, 0, 0], yaw=0.3, variance=np.full(3, 0.1))
    b.radio.telemetry.side_effect = b._telemetry
    message = b.refused('arm', True)
    for part in ('3.75 V', '3.8 V', 'locked', 'a.b reads 1', '0.060 m', '0.05 m', '0.300 rad', '0.175 rad',
                 'estimate_variance: 0.1 m^2', 'canArm'):
        assert part in message, part
    assert 'reset' in message and b.commands() == ['reset_estimator']
    b.refused('arm', True)
    assert len([n for _, n, _ in b.log if n == 'reset_estimator']) == 1  # it must have time to settle


def gap(b):
    b.mocap = False
    b.step(0.3)
    b.mocap = True
    b.step(0.5)


@pytest.mark.parametrize('break_it,word', [
    (lambda b: setattr(b, 'link', 'lost'), 'lost'),
    (lambda b: setattr(b, 'bits', None), 'supervisor: unknown'),
    (lambda b: setattr(b, 'volts', None), 'battery: unknown'),
    (lambda b: setattr(b, 'parameter_faults', None), 'not set yet'),
    (lambda b: setattr(b, 'drone_alive', False) or b.step(1.5), 'telemetry'),
    (lambda b: setattr(b, 'mocap', False) or b.step(0.3), 'mocap_pose: 0.3'),
    (lambda b: gap(b), 'longest gap 0.3'),
    (lambda b: b.position.__setitem__(0, 3.0) or b.step(), 'fence')])
def test_each_preflight_check_alone_refuses_arming(break_it, word):
    b = Bench().step(1.2)
    break_it(b)
    assert word in b.refused('arm', True)
    assert 'arm' not in b.commands()


def test_a_check_that_fails_between_arming_and_take_off_refuses_the_take_off():
    b = Bench().step(1.2)
    b.ask('arm', True).until('armed')
    del b.reports['recorder']
    b.step(3.0)
    assert 'recorder: the recorder node has been silent' in b.refused('takeoff')
    assert b.manager.phase == 'armed' and 'takeoff' not in b.commands()


def test_a_waived_check_arms_and_takes_off_and_every_other_still_counts():
    b = Bench(changed(preflight_waive='recorder,disk'))
    b.reports = {n: v for n, v in b.reports.items() if n != 'recorder'}
    b.step(1.2).volts = 3.5
    assert b.refused('arm', True).startswith('battery: 3.50 V')
    b.volts = 4.1
    b.holding()


def test_reading_the_preflight_table_changes_nothing_and_a_refused_request_resets_the_estimator():
    b = Bench().step(1.2)
    b.radio.telemetry.side_effect = lambda: dataclasses.replace(
        Bench._telemetry(b), position=b.position + [0.06, 0, 0])
    assert not all(c.passed for c in b.manager.preflight(b.now)) and b.commands() == []
    assert 'resets the estimator' in b.manager.try_preflight(b.now).message and b.commands() == ['reset_estimator']


def test_arming_needs_mocap_poses_at_their_rate():
    b = Bench()
    b._report()
    for _ in range(60):
        b.now += 0.025
        b.manager.on_pose(b.now, b.position, LEVEL, b.now)
        b._telemetry_stamp = b.now
    assert '40.0 Hz' in b.refused('arm', True)


def test_arming_without_a_pose_says_so():
    b = Bench()
    assert 'mocap_pose: no pose yet' in b.refused('arm', True)


def test_the_phase_is_armed_only_once_the_drone_confirms_it():
    b = Bench(loses=lambda name: name == 'arm').step(1.2)
    b.ask('arm', True).step(0.2)
    assert b.manager.phase == 'disarmed' and 'disarmed' in b.refused('takeoff')
    assert 'already arming' in b.refused('arm', True)
    b.step(2.0)
    assert b.manager.phase == 'disarmed' and 'did not confirm' in b.manager.reason
    assert [a for _, n, a in b.log if n == 'arm'] == [(True,)] * 4 + [(False,)]


def test_a_drone_that_disarms_itself_on_the_ground_is_disarmed():
    b = Bench().step(1.2)
    b.ask('arm', True).until('armed')
    b.bits = radio.CAN_ARM
    b.step(0.1)
    assert b.manager.phase == 'disarmed' and 'itself' in b.manager.reason


def test_a_drone_tumbled_on_the_ground_is_disarmed_and_not_locked():
    b = Bench().step(1.2)
    b.ask('arm', True).until('armed')
    b.bits |= radio.TUMBLED
    b.step(0.1)
    assert b.manager.phase == 'disarmed' and 'tumbled' in b.manager.reason
    assert 'emergency_stop' not in b.commands()


# --- lost packets -----------------------------------------------------------------------------------

@pytest.mark.parametrize('command', ['arm', 'takeoff', 'go_to', 'land', 'notify_stop', 'stop'])
def test_any_command_may_be_lost_once(command):
    lost = []
    b = Bench(loses=lambda name: name == command and not lost and not lost.append(name))
    b.following().ask('disengage').step(1.2).ask('go_to', [0.5, 0, 0.8], 0.0).step(6.0)
    assert b.manager.status(b.now)['go_to'] == 'done'
    b.ask('land').until('disarmed').step(0.2)
    assert b.position[2] < 0.05 and not b.bits & radio.ARMED


def test_a_takeoff_that_never_happens_ends_by_landing_with_the_reason():
    b = Bench(loses=lambda name: name == 'takeoff').step(1.2)
    b.ask('arm', True).until('armed')
    b.ask('takeoff').until('landing').until('disarmed')
    assert 'take-off reached' in b.manager.reason


def test_a_go_to_that_never_happens_says_how_far_it_is():
    b = Bench().holding()
    b.loses = lambda name: name == 'go_to'
    b.ask('go_to', [1.0, 0, 0.5], 0.0).step(12.0)
    assert b.manager.status(b.now)['go_to'] == 'idle' and '1.00 m from its target' in b.manager.reason


def test_an_emergency_stop_is_repeated():
    b = Bench().following()
    b.ask('emergency').step(1.0)
    assert sum(name == 'emergency_stop' for _, name, _ in b.log) > 10


# --- refusals ---------------------------------------------------------------------------------------

def test_engage_is_refused_without_fresh_plan_or_pose_and_where_the_plan_would_jump():
    b = Bench().holding()
    b.policy = False
    b.step(0.3)
    assert 'no fresh plan' in b.refused('engage')
    b.manager.on_plan(hover_plan(b.now, b.position + [0.3, 0, 0]), b.now)
    assert '0.30 m from the drone' in b.refused('engage')
    b.manager.on_plan(hover_plan(b.now + 0.001, [3.0, 0, 0.5]), b.now)
    assert 'outside the fence' in b.refused('engage')
    b.policy, b.mocap = True, False
    b.step(0.14)
    assert 'no fresh mocap pose' in b.refused('engage')


def test_engage_is_refused_while_a_go_to_is_active_and_a_second_go_to_too():
    b = Bench().holding().ask('go_to', [1.0, 0, 0.5], 0.0)
    assert 'go_to is active' in b.refused('engage')
    assert 'another go_to' in b.refused('go_to', [0.5, 0, 0.5], 0.0)


@pytest.mark.parametrize('target,yaw,word', [
    ([9.0, 0, 1], 0.0, 'fence'), ([0, 0, 0.0], 0.0, 'fence'), ([np.nan, 0, 1], 0.0, 'finite'),
    ([0, 0, 1], np.inf, 'finite'), ([0, 0], 0.0, 'finite')])
def test_a_go_to_that_is_not_a_place_in_the_fence_is_refused(target, yaw, word):
    b = Bench().holding()
    assert word in b.refused('go_to', target, yaw)
    assert 'go_to' not in b.commands()


def test_requests_in_the_wrong_phase_are_refused_and_send_nothing():
    b = Bench().step(1.2)
    for request, args in (('takeoff', ()), ('land', ()), ('engage', ()), ('disengage', ()), ('arm', (False,)),
                          ('go_to', ([0, 0, 1.0], 0.0))):
        assert 'refused in phase disarmed' in b.refused(request, *args)
    assert b.commands() == []


# --- aborts -----------------------------------------------------------------------------------------

def test_a_silent_policy_is_followed_then_held_then_landed():
    b = Bench().following()
    silent, b.policy = b.now, False
    b.until('holding')
    assert 0.3 < b.now - silent < 0.45 and 'no plan' in b.manager.reason
    b.until('landing')
    assert 'without a new engage' in b.manager.reason
    b.until('disarmed').step(0.1)
    assert b.commands() == ['arm', 'takeoff', 'full_state', *HANDOVER, 'land', *OFF]


def test_after_a_regain_the_flight_does_not_resume_by_itself_and_engage_resumes_it():
    b = Bench().following()
    b.policy = False
    b.until('holding')
    b.policy = True
    b.step(1.0)
    assert b.manager.phase == 'holding' and b.sent[-1] is None and 'no plan' in b.manager.reason
    b.ask('engage').step(3.0)
    assert b.manager.phase == 'following' and b.manager.reason == ''


def test_an_operators_go_to_ends_the_guards_hold():
    b = Bench().following()
    b.policy = False
    b.until('holding').step(1.0)
    b.ask('go_to', [0.3, 0, 0.5], 0.0).step(5.0)
    assert b.manager.phase == 'holding' and b.manager.reason == ''


def test_a_lost_mocap_is_held_then_landed_then_cut():
    b = Bench().following()
    lost, b.mocap = b.now, False
    times = {phase: b.until(phase).now - lost for phase in ('holding', 'landing', 'emergency')}
    assert times == pytest.approx({'holding': 0.2, 'landing': 0.5, 'emergency': 1.5}, abs=0.03)
    assert 'emergency_stop' in b.commands() and 'no mocap pose' in b.manager.reason


def test_a_short_mocap_gap_is_flown_through():
    b = Bench().following()
    b.mocap = False
    b.step(0.12)
    b.mocap = True
    b.step(1.0)
    assert b.manager.phase == 'following'


def test_an_emergency_ends_by_disarming_and_a_locked_drone_is_not_armed_again():
    b = Bench().following()
    b.ask('emergency').step(0.1)
    assert b.manager.phase == 'emergency' and b.manager.health(b.now)[0] == interface.ERROR
    assert 'refused in phase emergency' in b.refused('land')
    b.ask('arm', False)
    assert b.manager.phase == 'disarmed' and 'restart the drone' in b.refused('arm', True)


def test_a_battery_that_stays_low_lands_and_one_that_dips_does_not():
    b = Bench().following()
    b.volts = 3.25  # + 0.4 V of sag
    b.step(2.0)
    b.volts = 3.5
    b.step(2.0)
    assert b.manager.phase == 'following'
    b.volts = 3.25
    b.step(3.1)
    assert b.manager.phase == 'landing' and '3.25 V' in b.manager.reason


def test_leaving_the_fence_lands_and_heading_out_of_it_holds():
    b = Bench().following()
    b.manager.on_odometry(RigidBodyState(b.now, b.position, LEVEL, np.array([9.0, 0, 0]), np.zeros(3)), b.now)
    b.manager.tick(b.now + 0.001)
    assert b.manager.phase == 'holding' and 'outside the fence in' in b.manager.reason
    while b.position[0] < 2.6:  # pushed at 2 m/s
        b.position[0] += 0.04
        b.target = None
        b.step()
    assert b.manager.phase == 'landing' and 'outside the fence' in b.manager.reason


def test_a_plan_out_of_the_fence_is_held_before_its_setpoint_is_sent():
    b = Bench().following()
    b.policy = False
    b.manager.on_plan(hover_plan(b.now, b.position, [0, 0, 20.0]), b.now)
    b.until('holding')
    assert 'setpoint' in b.manager.reason
    assert max(a[0].position[2] for _, n, a in b.log if n == 'full_state') <= 2.5


def test_plans_that_cannot_be_used_count_as_no_plan():
    b = Bench().following()
    b.policy = False
    plan = hover_plan(b.now)
    bad = np.full_like(plan.position, np.nan)
    for _ in range(25):
        b.step()
        assert 'not finite' in b.manager.on_plan(dataclasses.replace(plan, position=bad), b.now)
    assert b.manager.phase == 'holding' and 'not finite' in b.manager.reason
    assert 'old on arrival' in b.manager.on_plan(hover_plan(b.now - 1.0), b.now)
    assert b.manager.on_plan(hover_plan(b.now), b.now) == ''
    assert 'not after' in b.manager.on_plan(hover_plan(b.now), b.now)


@pytest.mark.parametrize('position,quaternion,word', [
    ([np.nan, 0, 1], LEVEL, 'finite'), ([0, 0, 1], [0, 0, 0, np.inf], 'finite'),
    ([0, 0, 1], np.zeros(4), 'norm')])
def test_poses_that_cannot_be_used_are_neither_forwarded_nor_counted(position, quaternion, word):
    b = Bench().following()
    b.mocap = False
    b.log.clear()
    for _ in range(12):
        b.step()
        assert word in b.manager.on_pose(b.now, np.array(position), np.array(quaternion), b.now)
    assert b.manager.phase == 'holding' and word in b.manager.reason
    assert not any(name == 'extpose' for _, name, _ in b.log)


def test_a_frozen_stamp_is_not_a_fresh_pose():
    b = Bench().following()
    b.mocap = False
    stamp = b.now
    for _ in range(14):
        b.step()
        b.manager.on_pose(stamp, b.position, LEVEL, b.now)
    assert b.manager.phase == 'holding'


def test_a_late_pose_is_as_old_as_its_stamp():
    b = Bench().following()
    b.mocap = False
    for _ in range(20):
        b.step()
        b.manager.on_pose(b.now - 0.3, b.position, LEVEL, b.now)
    assert b.manager.phase != 'following'


def test_a_lost_link_is_an_emergency():
    b = Bench().following()
    b.link, b.fault = 'lost', 'radio hears no drone'
    b.step()
    assert b.manager.phase == 'emergency' and 'hears no drone' in b.manager.reason


def test_losing_telemetry_lands():
    b = Bench().following()
    b.drone_alive = False
    b.step(1.1)
    assert b.manager.phase == 'landing' and 'telemetry' in b.manager.reason


@pytest.mark.parametrize('phase', interface.PHASES)
def test_shutting_down_leaves_the_drone_on_the_ground_from_every_phase(phase):
    b = Bench().step(1.2)
    if phase != 'disarmed':
        b.ask('arm', True).until('armed')
    if phase not in ('disarmed', 'armed'):
        b.ask('takeoff').step(1.0)
    if phase in ('holding', 'following', 'landing', 'emergency'):
        b.until('holding')
    if phase in ('following', 'landing', 'emergency'):
        b.ask({'following': 'engage', 'landing': 'land', 'emergency': 'emergency'}[phase]).step(0.1)
    assert b.manager.phase == phase
    b.manager.shutdown(b.now)
    b.manager.shutdown(b.now)
    assert 'shutting down' in b.refused('takeoff')
    b.until('emergency' if phase == 'emergency' else 'disarmed').step(0.1)
    assert b.manager.grounded and not b.bits & radio.ARMED
    if phase not in ('disarmed', 'emergency'):
        assert b.position[2] < 0.05


def test_the_firmware_watchdog_is_fed_from_arming_on_when_asked_for():
    b = Bench(changed(firmware_watchdog=True)).step(1.2)
    assert not any(n == 'emergency_watchdog' for _, n, _ in b.log)
    b.holding()
    times = np.array([t for t, n, _ in b.log if n == 'emergency_watchdog'])
    assert np.diff(times).max() < 0.25


# --- the invariant ----------------------------------------------------------------------------------

def silence_without_a_notice(log, end):
    """Longest time (s) after a setpoint with neither a setpoint nor a stop notice."""
    worst, open_since = 0.0, None
    for t, name, _ in [*log, (end, 'end', ())]:
        if open_since is not None:
            worst = max(worst, t - open_since)
        if name == 'full_state':
            open_since = t
        elif name in ('notify_stop', 'emergency_stop'):
            open_since = None
    return worst


@pytest.mark.parametrize('seed', range(8))
def test_silence_never_reaches_the_drone_without_a_stop_notice(seed):
    rng = np.random.default_rng(seed)
    b = Bench(loses=lambda name: rng.random() < 0.05 and name != 'full_state').step(1.2)
    requests = [('arm', True), ('takeoff',), ('engage',), ('disengage',), ('land',),
                ('go_to', [0.3, -0.2, 0.9], 0.0)]
    onward = {'disarmed': 0, 'armed': 1, 'holding': 2}  # or no scenario would get far
    for _ in range(60):
        choice = rng.integers(len(requests))
        if rng.random() < 0.6:
            choice = onward.get(b.manager.phase, choice)
        request, *args = requests[choice]
        getattr(b.manager, request)(*args, b.now)
        event = rng.random()
        if event < 0.08:
            b.policy = not b.policy
        elif event < 0.12:
            b.mocap = not b.mocap
        elif event < 0.14:
            b.manager.on_plan(hover_plan(b.now, [np.nan] * 3), b.now)
        elif event < 0.15:
            b.volts = 2.9
        elif event < 0.6:
            b.policy = b.mocap = True
            b.plan_velocity = rng.uniform(-0.5, 0.5, 3)
            b.volts = 4.0
        b.step(rng.uniform(0.1, 1.5))
        if b.manager.phase == 'emergency':  # a new drone
            b.bits = radio.CAN_ARM
            b.position[:] = [0, 0, 0.02]
            b.mocap = b.policy = True
            b.manager.arm(False, b.now)
            b.step(1.2)
    b.manager.shutdown(b.now)
    b.step(12.0)
    assert b.manager.grounded
    assert any(name == 'full_state' for _, name, _ in b.log), 'the scenario never followed a plan'
    assert silence_without_a_notice(b.log, b.now) < 0.1


def test_ten_seconds_of_ticks_use_no_clock_of_their_own(monkeypatch):
    def no_clock(*_):
        raise AssertionError('a clock was read')
    b = Bench()
    for name in ('time', 'monotonic', 'perf_counter', 'sleep'):
        monkeypatch.setattr(f'time.{name}', no_clock)
    b.following()
    monkeypatch.undo()
    assert isinstance(b.manager, FlightManager) and b.manager.phase == 'following'
