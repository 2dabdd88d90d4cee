# SPDX-License-Identifier: GPL-3.0-or-later
import itertools

import pytest

from crazyflie_interface.guard import ANSWERS, BASELINE
from crazyflie_interface.phases import FLYING, ON_ANSWER, TRANSITIONS, after, refusal
from deqmpc.interface import PHASES

# The legal pairs, written out apart from the table under test.
LEGAL = {
    ('disarmed', 'arm'): 'armed', ('armed', 'disarm'): 'disarmed', ('emergency', 'disarm'): 'disarmed',
    ('armed', 'takeoff'): 'taking_off', ('taking_off', 'arrived'): 'holding', ('holding', 'go_to'): 'holding',
    ('holding', 'engage'): 'following', ('following', 'disengage'): 'holding',
    ('taking_off', 'land'): 'landing', ('holding', 'land'): 'landing', ('following', 'land'): 'landing',
    ('landing', 'landed'): 'disarmed', **{(phase, 'cut'): 'emergency' for phase in PHASES},
}


@pytest.mark.parametrize('phase,event', itertools.product(PHASES, TRANSITIONS))
def test_exactly_the_legal_events_change_the_phase_and_the_others_say_why(phase, event):
    if (phase, event) in LEGAL:
        assert refusal(phase, event) == '' and after(phase, event) == LEGAL[phase, event]
    else:
        assert phase in refusal(phase, event) and event in refusal(phase, event)
        with pytest.raises(ValueError, match='is refused in phase'):
            after(phase, event)


def test_the_table_knows_only_phases_of_the_interface():
    for allowed, to in TRANSITIONS.values():
        assert set(allowed) <= set(PHASES) and to in PHASES
    assert set(FLYING) < set(PHASES)


def test_the_only_way_into_the_air_is_arm_then_takeoff_and_every_phase_in_the_air_can_land_or_cut():
    into = {e for (p, e), to in LEGAL.items() if p not in FLYING and to in FLYING}
    assert into == {'takeoff'}
    for phase in FLYING:
        assert phase == 'landing' or refusal(phase, 'land') == ''


# What each answer makes of each phase, written out apart from the table under test.
BECOMES = {
    #              idle          follow        hold          land          cut
    'disarmed':   ('disarmed',   'disarmed',   'disarmed',   'disarmed',   'disarmed'),
    'armed':      ('armed',      'armed',      'armed',      'armed',      'disarmed'),
    'taking_off': ('taking_off', 'taking_off', 'taking_off', 'landing',    'emergency'),
    'holding':    ('holding',    'holding',    'holding',    'landing',    'emergency'),
    'following':  ('following',  'following',  'holding',    'landing',    'emergency'),
    'landing':    ('landing',    'landing',    'landing',    'landing',    'emergency'),
    'emergency':  ('emergency',  'emergency',  'emergency',  'emergency',  'emergency'),
}


@pytest.mark.parametrize('phase,answer', itertools.product(PHASES, ANSWERS))
def test_every_answer_of_the_guard_makes_of_every_phase_what_the_table_says(phase, answer):
    event = ON_ANSWER[phase].get(answer)
    assert (after(phase, event) if event else phase) == BECOMES[phase][ANSWERS.index(answer)]


def test_an_answer_never_leads_to_a_phase_that_asks_for_less():
    for phase, answer in itertools.product(FLYING, ANSWERS):
        reached = BECOMES[phase][ANSWERS.index(answer)]
        assert ANSWERS.index(BASELINE[reached]) >= ANSWERS.index(BASELINE[phase])
