# SPDX-License-Identifier: GPL-3.0-or-later
import dataclasses
import itertools

import numpy as np
import pytest

from crazyflie_interface import radio
from crazyflie_interface.guard import ANSWERS, BASELINE, Inputs, decide, outside
from crazyflie_interface.phases import FLYING
from crazyflie_interface.settings import FlightSettings, GuardSettings
from deqmpc.interface import PHASES

S = GuardSettings()
FINE = Inputs('following', pose_age=0.01, plan_age=0.05, position=np.array([0.0, 0.0, 1.0]),
              velocity=np.zeros(3), setpoint=np.array([0.0, 0.0, 1.0]), battery_v=4.0,
              supervisor=radio.ARMED | radio.CAN_FLY, telemetry_age=0.1)


def ask(**values):
    return decide(dataclasses.replace(FINE, **values), S)


@pytest.mark.parametrize('phase', PHASES)
def test_with_nothing_wrong_the_guard_only_repeats_the_phase(phase):
    answer = ask(phase=phase)
    assert answer.answer == BASELINE[phase] and answer.reason == ''


# The table of the facts, in s: age -> answer while following.
POSE = [(0.0, 'follow'), (0.099, 'follow'), (0.15, 'follow'), (0.2, 'hold'), (0.25, 'hold'), (0.499, 'hold'),
        (0.5, 'land'), (1.499, 'land'), (1.5, 'cut'), (np.inf, 'cut')]
PLAN = [(0.0, 'follow'), (0.2, 'follow'), (0.399, 'follow'), (0.4, 'hold'), (0.5, 'hold'), (5.0, 'hold'),
        (np.inf, 'hold')]
# the parts of it that matter in the other phases
APPLIES = {'disarmed': (), 'armed': (), 'taking_off': ('land', 'cut'), 'holding': ('land', 'cut'),
           'following': ('hold', 'land', 'cut'), 'landing': ('cut',), 'emergency': ()}


@pytest.mark.parametrize('phase', PHASES)
def test_the_whole_table_of_ages_and_phases(phase):
    for (pose_age, pose_says), (plan_age, plan_says) in itertools.product(POSE, PLAN):
        answer = ask(phase=phase, pose_age=pose_age, plan_age=plan_age)
        says = max(pose_says, plan_says if phase == 'following' else 'follow', key=ANSWERS.index)
        expected = says if says in APPLIES[phase] else BASELINE[phase]
        assert answer.answer == expected, (pose_age, plan_age)
        assert bool(answer.reason) == (expected != BASELINE[phase])


ONE_FAULT = {  # inputs -> (answer in flight, answer when armed on the ground)
    'fence': (dict(position=np.array([2.6, 0, 1.0])), 'land', 'idle'),
    'far outside': (dict(position=np.array([3.1, 0, 1.0])), 'cut', 'idle'),
    'ceiling': (dict(position=np.array([0, 0, 2.6])), 'land', 'idle'),
    'tilt': (dict(tilted_for=0.11), 'cut', 'cut'),
    'short tilt': (dict(tilted_for=0.09), None, 'idle'),
    'battery': (dict(battery_low_for=3.1, battery_v=3.2), 'land', 'idle'),
    'sag': (dict(battery_low_for=2.9, battery_v=3.2), None, 'idle'),
    'critical': (dict(battery_critical_for=0.6, battery_v=3.1), 'land', 'idle'),
    'tumbled': (dict(supervisor=radio.ARMED | radio.TUMBLED), 'cut', 'cut'),
    'locked': (dict(supervisor=radio.ARMED | radio.LOCKED), 'cut', 'cut'),
    'crashed': (dict(supervisor=radio.ARMED | radio.CRASHED), 'cut', 'cut'),
    'link': (dict(link='lost', link_fault='gone'), 'cut', 'cut'),
    'send': (dict(link_fault='cannot send'), 'land', 'idle'),
    'telemetry': (dict(telemetry_age=1.0), 'land', 'idle'),
    'unknown supervisor': (dict(supervisor=None), None, 'idle'),
    'unknown battery': (dict(battery_low_for=3.1, battery_v=None), 'land', 'idle'),
    'battery not a number': (dict(battery_low_for=3.1, battery_v=np.nan), 'land', 'idle'),
    'estimate': (dict(estimate_off_for=0.6, estimate_error=0.5), 'land', 'idle'),
    'estimate not a number': (dict(estimate_off_for=0.6, estimate_error=np.nan), 'land', 'idle'),
    'short estimate': (dict(estimate_off_for=0.4, estimate_error=0.5), None, 'idle'),
    'recorder': (dict(recorder_fault='the recorder is silent'), 'land', 'idle'),
}


@pytest.mark.parametrize('fault', ONE_FAULT)
def test_one_fault_has_its_answer_in_every_phase(fault):
    values, flying, armed = ONE_FAULT[fault]
    for phase in PHASES:
        expected = BASELINE[phase]
        if phase in FLYING:
            expected = max(flying or expected, expected, key=ANSWERS.index)
        elif phase == 'armed':
            expected = armed
        assert ask(phase=phase, **values).answer == expected, phase


def test_the_worst_of_two_faults_wins():
    faults = [(v, f) for v, f, _ in ONE_FAULT.values() if f]
    for (a, answer_a), (b, answer_b) in itertools.combinations(faults, 2):
        if not set(a) & set(b):
            expected = max(answer_a, answer_b, key=ANSWERS.index)
            assert ask(**a, **b).answer == expected, (a, b)


@pytest.mark.parametrize('values,word', [
    (dict(setpoint=np.array([0, 0, 2.6])), 'fence'), (dict(setpoint=np.array([0, 0, 0.05])), 'fence'),
    (dict(setpoint_fault='setpoint.position is not finite'), 'finite'),
    (dict(velocity=np.array([9.0, 0, 0])), 'outside the fence in'),
    (dict(odometry_age=0.3, odometry_fault='odometry is not finite'), 'no odometry for 0.30 s (limit 0.2 s) ('),
    (dict(clock_step=-1.0), 'clock was set by -1.000 s')])
def test_what_must_not_be_followed_is_answered_by_a_hold_that_names_it(values, word):
    answer = ask(**values)
    assert answer.answer == 'hold' and word in answer.reason


def test_the_floor_of_the_fence_holds_while_following_and_not_while_landing():
    low = dict(position=np.array([0.0, 0.0, 0.02]))
    assert ask(**low).answer == 'land'
    assert ask(phase='landing', **low).answer == 'land' and ask(phase='landing', **low).reason == ''
    assert ask(phase='taking_off', **low).answer == 'hold'


def test_a_drone_that_disarmed_itself_is_cut_in_flight_but_not_at_the_end_of_a_landing():
    assert ask(supervisor=radio.CAN_ARM).answer == 'cut'
    assert ask(phase='landing', supervisor=radio.CAN_ARM).answer == 'land'


def test_a_hold_that_the_guard_began_ends_in_a_landing_and_an_operators_hold_does_not():
    assert ask(phase='holding', guard_held_for=1.9).answer == 'hold'
    assert ask(phase='holding', guard_held_for=2.0).answer == 'land'
    assert ask(phase='holding', guard_held_for=None).answer == 'hold'


def test_reasons_carry_the_value_the_limit_and_why_the_last_input_was_refused():
    reason = ask(plan_age=0.45, plan_fault='plan.position is not finite').reason
    assert '0.45' in reason and '0.4 s' in reason and 'not finite' in reason
    reason = ask(pose_age=0.3, pose_fault='pose is not finite').reason
    assert '0.30' in reason and '0.2 s' in reason and 'not finite' in reason


@pytest.mark.parametrize('answer', ['warn', 'hold', 'land'])
def test_the_operator_chooses_what_a_dead_recorder_is_answered_by(answer):
    settings = GuardSettings(recorder_answer=answer)
    given = decide(dataclasses.replace(FINE, recorder_fault='the recorder is silent for 6.0 s'), settings)
    assert given.answer == ('follow' if answer == 'warn' else answer)


def test_distance_to_the_fence_is_negative_inside_and_zero_on_it():
    assert outside(np.zeros(3), [-1, -1, -1], [1, 2, 3]) == -1.0
    assert outside(np.array([1.0, 0, 0]), [-1, -1, -1], [1, 2, 3]) == 0.0
    assert outside(np.array([0, 0, 5.0]), [-1, -1, -1], [1, 2, 3]) == 2.0


@pytest.mark.parametrize('values,names', [
    (dict(plan_hold=0.2), 'plan_warn < plan_hold'), (dict(pose_land=0.1), 'pose_hold'),
    (dict(battery_land=3.9), 'battery_land'), (dict(fence_low=[0.0, 0.0]), 'fence_low'),
    (dict(fence_low=[3.0, 0.0, 0.0]), 'fence_low'), (dict(takeoff_height=2.9), 'takeoff_height')])
def test_settings_that_contradict_each_other_are_refused_by_name(values, names):
    with pytest.raises(ValueError, match=names):
        FlightSettings(**values)
